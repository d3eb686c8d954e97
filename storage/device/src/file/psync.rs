//! One blocking system call after the other: works everywhere, and is what [`Uring`](super::Uring) falls back to.

use std::{io, os::unix::fs::FileExt as _, time::Instant};

use super::{BlockFile, FileIo, ReadAt, ReadOutcome, WriteAt};
use crate::PAGE_BYTES;

/// `pread` and `pwrite`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Psync;

impl FileIo for Psync {
    fn name(&self) -> &'static str {
        "psync"
    }

    fn read_many(&self, reads: &mut [ReadAt<'_>], deadline: Option<Instant>) {
        for read in reads {
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                read.outcome = ReadOutcome::TooLate;
                continue;
            }
            read_rest(read, 0);
            read.took = now.elapsed();
        }
    }

    fn write_many(&self, file: &BlockFile, writes: &[WriteAt<'_>]) -> io::Result<()> {
        writes.iter().try_for_each(|write| write_rest(file, write, 0))
    }
}

/// Reads what comes behind the first `done` bytes.
pub(super) fn read_rest(read: &mut ReadAt<'_>, mut done: usize) {
    while done < read.buffer.len() {
        // A direct read that ends inside a page ended at the end of the file; the next one could not even be asked for.
        if read.file.direct && !done.is_multiple_of(PAGE_BYTES) {
            break;
        }
        match read
            .file
            .file
            .read_at(&mut read.buffer[done..], read.offset + done as u64)
        {
            Ok(0) => break,
            Ok(bytes) => done += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                read.outcome = ReadOutcome::Failed(error);
                return;
            }
        }
    }
    read.outcome = ReadOutcome::Read(done);
}

/// Writes what comes behind the first `done` bytes.
pub(super) fn write_rest(file: &BlockFile, write: &WriteAt<'_>, done: usize) -> io::Result<()> {
    file.file.write_all_at(&write.bytes[done..], write.offset + done as u64)
}
