//! Limits and places of the disk tier, and what stands in the way of opening it.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kvasir_device::FileIo;

use super::format::{PAGE, SEGMENT_FORMAT};

/// Most disks of one tier.
const DISKS_MAX: usize = 64;

/// One disk: a folder, and how much of it.
#[derive(Clone, Debug)]
pub struct DiskPath {
    /// Folder that this tier has for itself: `LOCK`, `segments/`, `index/`. Made where missing; with several disks its parent
    /// must be there, so that a disk that is not mounted is noticed.
    pub dir: PathBuf,
    /// Most bytes of its segment files; the index comes on top, about 100 bytes per layer block.
    pub bytes_max: u64,
    /// How its files are read and written; `None` takes what the kernel does best. Tests put a
    /// [`Faulty`](kvasir_device::faulty::Faulty) here.
    pub io: Option<Arc<dyn FileIo>>,
}

/// What to do about a disk that cannot be opened at the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AbsentDisk {
    /// Do not start.
    #[default]
    Refuse,
    /// Start without it, say so in the log and in [`DiskStats`](super::DiskStats); its blocks are misses. At least one disk
    /// must be there.
    LeaveOut,
}

/// Where and how much.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// At least one. Blocks are spread over them as they can take them.
    pub disks: Vec<DiskPath>,
    /// What to do about one that is not there.
    pub absent: AbsentDisk,
    /// Bytes of a segment file, a multiple of 4096; also the unit of reclaim.
    pub segment_bytes: u64,
    /// Most payload bytes accepted but not yet synced, for all disks together.
    pub queue_bytes_max: u64,
    /// Free bytes that are left to others on each file system: no segment is begun that would go below.
    pub free_bytes_min: u64,
    /// Most bytes per second that each disk's scrub reads; 0 turns it off.
    pub scrub_bytes_per_second: u64,
    /// How long a disk on which three segments failed takes nothing before it is tried again.
    pub rest_after_failures: Duration,
}

impl DiskConfig {
    /// One disk in `dir` with the other limits at their defaults.
    pub fn in_dir(dir: impl Into<PathBuf>, bytes_max: u64) -> Self {
        Self {
            disks: vec![DiskPath {
                dir: dir.into(),
                bytes_max,
                io: None,
            }],
            absent: AbsentDisk::Refuse,
            segment_bytes: 256 << 20,
            queue_bytes_max: 256 << 20,
            free_bytes_min: 0,
            scrub_bytes_per_second: 8 << 20,
            rest_after_failures: Duration::from_secs(30),
        }
    }

    pub(crate) fn validate(&self) -> Result<(), OpenError> {
        /// Offsets are kept in 32 bits, and a segment may be as long as one record.
        const SEGMENT_BYTES_MAX: u64 = 1 << 30;
        const SEGMENT_BYTES_MIN: u64 = 4 * PAGE;
        let wrong = |field, found, expected| Err(OpenError::Config { field, found, expected });
        if self.disks.is_empty() || self.disks.len() > DISKS_MAX {
            return wrong(
                "disks",
                self.disks.len() as u64,
                format!("must be from 1 to {DISKS_MAX}"),
            );
        }
        let sizes = SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX;
        if !sizes.contains(&self.segment_bytes) || !self.segment_bytes.is_multiple_of(PAGE) {
            let expected =
                format!("must be from {SEGMENT_BYTES_MIN} to {SEGMENT_BYTES_MAX} bytes, a multiple of {PAGE}");
            return wrong("segment_bytes", self.segment_bytes, expected);
        }
        if let Some(disk) = self.disks.iter().find(|disk| disk.bytes_max < 2 * self.segment_bytes) {
            let expected = format!(
                "must be at least two segments of {} bytes, or nothing could be kept",
                self.segment_bytes
            );
            return wrong("disk_bytes_max", disk.bytes_max, expected);
        }
        Ok(())
    }
}

/// Why a tier could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Sizes that cannot work.
    #[error("{field} is {found}: {expected}")]
    Config {
        /// Name of the setting: `segment_bytes`, `disks`, or `disk_bytes_max` for [`DiskPath::bytes_max`].
        field: &'static str,
        /// Its value.
        found: u64,
        /// What it must be.
        expected: String,
    },
    /// Another process has the folder open.
    #[error("{} is in use by {owner}: stop it, or give this one a folder of its own", dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
        /// What its owner wrote into the lock file.
        owner: String,
    },
    /// A segment was written by a newer version.
    #[error(
        "{} has segment format {found}, this version reads up to {SEGMENT_FORMAT}: use the newer version or another folder",
        path.display()
    )]
    NewerFormat {
        /// The segment.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The file system said no.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// RocksDB said no.
    #[error("cannot {what} in {}", path.display())]
    Index {
        /// What was attempted.
        what: &'static str,
        /// The index's folder.
        path: PathBuf,
        /// What RocksDB said.
        source: rocksdb::Error,
    },
}

impl OpenError {
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn index(what: &'static str, dir: &Path, source: rocksdb::Error) -> Self {
        Self::Index {
            what,
            path: dir.join("index"),
            source,
        }
    }
}
