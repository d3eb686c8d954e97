//! One open disk: its folder, its files' way in and out, its index, and how fast it reads.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use kvasir_device::{FileIo, takes_direct_io};

use super::{DiskPath, OpenError, format::SegmentId, index::Index, lock::FolderLock};

/// An open disk.
pub(crate) struct Volume {
    pub(crate) number: u8,
    pub(crate) dir: PathBuf,
    pub(crate) bytes_max: u64,
    pub(crate) io: Arc<dyn FileIo>,
    pub(crate) direct: bool,
    pub(crate) index: Index,
    pub(crate) pace: Pace,
    /// Up to which segment the scrub of an earlier life had come; 0 for none.
    pub(crate) scrubbed_to: SegmentId,
    pub(crate) _lock: FolderLock,
}

/// A disk's folder, locked; its index not yet read.
pub(crate) struct Folder {
    pub(crate) number: u8,
    pub(crate) path: DiskPath,
    pub(crate) io: Arc<dyn FileIo>,
    pub(crate) direct: bool,
    pub(crate) lock: FolderLock,
}

impl Folder {
    /// Makes the folder where it is missing, and takes it.
    pub(crate) fn take(number: u8, path: &DiskPath, alone: bool, io: &Arc<dyn FileIo>) -> Result<Self, OpenError> {
        let made = match alone {
            true => fs::create_dir_all(&path.dir),
            // With several disks a parent that is missing is a disk that is not mounted.
            false => fs::create_dir(&path.dir).or_else(|error| if path.dir.is_dir() { Ok(()) } else { Err(error) }),
        };
        made.map_err(|source| OpenError::io("make the folder", &path.dir, source))?;
        let lock = FolderLock::take(&path.dir)?;
        let direct = takes_direct_io(&path.dir).map_err(|source| OpenError::io("write to", &path.dir, source))?;
        let io = Arc::clone(path.io.as_ref().unwrap_or(io));
        tracing::info!(dir = %path.dir.display(), io = io.name(), direct, "disk is open");
        Ok(Self {
            number,
            path: path.clone(),
            io,
            direct,
            lock,
        })
    }
}

impl Volume {
    pub(crate) fn segments_dir(&self) -> PathBuf {
        self.dir.join("segments")
    }
}

/// How long reads take, of late: exponentially weighted means of a read's time and bytes.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    nanos: AtomicU64,
    bytes: AtomicU64,
}

impl Pace {
    pub(crate) fn note(&self, took: Duration, bytes: usize) {
        mix(&self.nanos, took.as_nanos().min(u128::from(u64::MAX)) as u64);
        mix(&self.bytes, bytes as u64);
    }

    /// How long a read of `bytes` would take: as long as the usual read, or longer in proportion where it is larger.
    pub(crate) fn estimate(&self, bytes: u64) -> Duration {
        let (nanos, usual) = (self.nanos.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        let times = (bytes as f64 / usual.max(1) as f64).max(1.0);
        Duration::from_nanos(if nanos == 0 { 0 } else { (nanos as f64 * times) as u64 })
    }

    pub(crate) fn micros(&self) -> u64 {
        self.nanos.load(Ordering::Relaxed) / 1000
    }

    pub(crate) fn bytes_per_second(&self) -> u64 {
        let (nanos, bytes) = (self.nanos.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        (bytes as u128 * 1_000_000_000 / u128::from(nanos.max(1))) as u64
    }
}

/// A sixteenth of the news; two that do it at once may lose one, which a mean can bear.
fn mix(mean: &AtomicU64, news: u64) {
    let old = mean.load(Ordering::Relaxed);
    let mixed = if old == 0 { news } else { old - old / 16 + news / 16 };
    mean.store(mixed, Ordering::Relaxed);
}
