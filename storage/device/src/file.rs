//! Files as a storage tier wants them: many reads at once with a deadline, aligned writes, syncs that tell the truth.
//!
//! A [`BlockFile`] is an open file and how it was opened; a [`FileIo`] does things with it. There are two real ones,
//! [`Uring`] and [`Psync`], which [`best_io`] chooses between, and one that lies on purpose, [`faulty::Faulty`]. Nothing here
//! maps a file: one that is cut short while it is read gives short reads, not a dead process.

pub mod faulty;
mod psync;
mod uring;

use std::{
    fmt, fs,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::fs::OFlags;

pub use self::{psync::Psync, uring::Uring};
use crate::{Buffer, PAGE_BYTES};

/// Bytes of one write of [`FileIo::write_filled`].
pub const PIECE_BYTES: usize = 1 << 20;

/// An open file, and whether it goes past the page cache.
///
/// With direct I/O offsets, lengths and memory must be multiples of [`PAGE_BYTES`]; keep them so for every file, then it does
/// not matter which kind it is.
#[derive(Debug)]
pub struct BlockFile {
    file: File,
    path: PathBuf,
    direct: bool,
}

impl BlockFile {
    /// Makes a new file for reading and writing.
    ///
    /// # Errors
    /// What the system said; `AlreadyExists` when there is one of that name.
    pub fn create(path: &Path, direct: bool) -> io::Result<Self> {
        Self::open_with(OpenOptions::new().create_new(true), path, direct)
    }

    /// Opens a file for reading and writing.
    ///
    /// # Errors
    /// What the system said.
    pub fn open(path: &Path, direct: bool) -> io::Result<Self> {
        Self::open_with(&mut OpenOptions::new(), path, direct)
    }

    fn open_with(options: &mut OpenOptions, path: &Path, direct: bool) -> io::Result<Self> {
        let flags = if direct { OFlags::DIRECT } else { OFlags::empty() };
        let file = options
            .read(true)
            .write(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)?;
        let path = path.to_owned();
        Ok(Self { file, path, direct })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it goes past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Bytes of the file at this moment.
    ///
    /// # Errors
    /// What the system said.
    pub fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Whether there is not a byte in it.
    ///
    /// # Errors
    /// What the system said.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// One read of many.
#[derive(Debug)]
pub struct ReadAt<'a> {
    /// From which file.
    pub file: &'a BlockFile,
    /// From which byte on.
    pub offset: u64,
    /// To where: all of it, unless the file ends before.
    pub buffer: &'a mut [u8],
    /// What became of it.
    pub outcome: ReadOutcome,
    /// How long it took from its submission; zero where it was not submitted.
    pub took: Duration,
}

impl<'a> ReadAt<'a> {
    /// A read that was not tried yet.
    pub fn new(file: &'a BlockFile, offset: u64, buffer: &'a mut [u8]) -> Self {
        Self {
            file,
            offset,
            buffer,
            outcome: ReadOutcome::TooLate,
            took: Duration::ZERO,
        }
    }
}

/// What became of one read.
#[derive(Debug)]
pub enum ReadOutcome {
    /// Not submitted: the deadline had passed.
    TooLate,
    /// This many bytes; fewer than asked for only where the file ends.
    Read(usize),
    /// What the system said.
    Failed(io::Error),
}

/// One write of many.
#[derive(Clone, Copy, Debug)]
pub struct WriteAt<'a> {
    /// From which byte of the file on.
    pub offset: u64,
    /// What to write, all of it.
    pub bytes: &'a [u8],
}

/// Something that reads and writes files. All calls block until they are done; several threads may call at once.
pub trait FileIo: Send + Sync + fmt::Debug {
    /// A word for logs and statistics: `io_uring`, `psync`, …
    fn name(&self) -> &'static str;

    /// Does all the reads, several at a time where it can. The deadline is looked at before each is submitted; what was
    /// submitted is waited for.
    fn read_many(&self, reads: &mut [ReadAt<'_>], deadline: Option<Instant>);

    /// [`Self::read_many`] that tells of each read by its place in `reads` when it is done, where possible while the disk is
    /// busy with others.
    fn read_each(&self, reads: &mut [ReadAt<'_>], deadline: Option<Instant>, done: &mut dyn FnMut(usize, &ReadAt<'_>)) {
        self.read_many(reads, deadline);
        reads.iter().enumerate().for_each(|(i, read)| done(i, read));
    }

    /// Writes everything, in any order.
    ///
    /// # Errors
    /// The first thing that went wrong; then nothing is known about any of the bytes.
    fn write_many(&self, file: &BlockFile, writes: &[WriteAt<'_>]) -> io::Result<()>;

    /// Fills `memory` piece by piece and writes it from `offset` on, in pieces of [`PIECE_BYTES`]; the last one is what is left.
    /// `fill` is called for them in order, and works at the next one while the disk takes those before it, where that is
    /// possible.
    ///
    /// # Errors
    /// As [`Self::write_many`].
    fn write_filled(
        &self,
        file: &BlockFile,
        offset: u64,
        memory: &mut [u8],
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> io::Result<()> {
        memory.chunks_mut(PIECE_BYTES).for_each(fill);
        let pieces = memory.chunks(PIECE_BYTES).zip((offset..).step_by(PIECE_BYTES));
        let writes: Vec<_> = pieces.map(|(bytes, offset)| WriteAt { offset, bytes }).collect();
        self.write_many(file, &writes)
    }

    /// Makes what was written, and the file's length, survive a loss of power.
    ///
    /// # Errors
    /// What the system said. Do not call it again for this file: the kernel may have dropped the bytes and would then
    /// report success.
    fn sync_data(&self, file: &BlockFile) -> io::Result<()> {
        file.file.sync_data()
    }

    /// Gives the file a length of `bytes` and the space for them, which reads as zeros. Where the file system cannot do
    /// that, only the length.
    ///
    /// # Errors
    /// `StorageFull` or `QuotaExceeded` when there is no space, or what else the system said.
    fn preallocate(&self, file: &BlockFile, bytes: u64) -> io::Result<()> {
        let made = rustix::fs::fallocate(&file.file, rustix::fs::FallocateFlags::empty(), 0, bytes);
        match made.map_err(io::Error::from) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => file.file.set_len(bytes),
            made => made,
        }
    }

    /// The first place from `from` on that may hold something else than zeros that were never written; `None` where only such
    /// follow. A file system that cannot tell answers `from`.
    ///
    /// # Errors
    /// What the system said.
    fn next_written(&self, file: &BlockFile, from: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(&file.file, rustix::fs::SeekFrom::Data(from)) {
            Ok(at) => Ok(Some(at.max(from))),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(from)),
            Err(error) => Err(error.into()),
        }
    }

    /// Cuts the file to `bytes`, or lengthens it with zeros.
    ///
    /// # Errors
    /// What the system said.
    fn truncate(&self, file: &BlockFile, bytes: u64) -> io::Result<()> {
        file.file.set_len(bytes)
    }

    /// Bytes that an ordinary user may still write to the file system of `dir`.
    ///
    /// # Errors
    /// What the system said.
    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        let disk = rustix::fs::statvfs(dir)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
}

/// The fastest that this kernel lets us use: io_uring with up to `depth` operations in flight in each of `rings` rings, or
/// else psync. What was chosen, and why, is logged.
pub fn best_io(rings: usize, depth: u32) -> Arc<dyn FileIo> {
    match Uring::new(rings, depth) {
        Ok(uring) => Arc::new(uring),
        Err(error) => {
            tracing::info!(%error, "the kernel refuses io_uring, reading and writing with psync");
            Arc::new(Psync)
        }
    }
}

/// Whether the file system of `dir` takes direct I/O with blocks of [`PAGE_BYTES`]: found out by writing and reading one.
///
/// # Errors
/// What the system said when not even a buffered file could be made there.
pub fn takes_direct_io(dir: &Path) -> io::Result<bool> {
    let path = dir.join(format!("probe-{}.tmp", std::process::id()));
    // One that a killed process left.
    let _ = fs::remove_file(&path);
    let direct = match BlockFile::create(&path, true) {
        Ok(file) => probe(&file).unwrap_or(false),
        // Some file systems refuse at open, after they have made the file.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => false,
        Err(error) => return Err(error),
    };
    let _ = fs::remove_file(&path);
    Ok(direct)
}

fn probe(file: &BlockFile) -> io::Result<bool> {
    let mut written = Buffer::heap(PAGE_BYTES);
    written.as_mut_slice().fill(0xA5);
    file.file.write_all_at(written.as_slice(), 0)?;
    let mut read = Buffer::heap(PAGE_BYTES);
    file.file.read_exact_at(read.as_mut_slice(), 0)?;
    Ok(read.as_slice() == written.as_slice())
}

#[cfg(test)]
mod tests;
