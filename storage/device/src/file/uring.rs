//! io_uring: many reads or writes in flight with one system call.
//!
//! A bounded set of rings, each used by one caller at a time. A caller that finds none free, or has one thing to do only, does
//! it with psync: one call is then as good, and nobody waits for anybody's disk. Every call waits for all that it
//! submitted before it returns, so the kernel never holds memory that we gave away.

use std::{
    fmt, io,
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use parking_lot::Mutex;

use super::{
    BlockFile, FileIo, PIECE_BYTES, Psync, ReadAt, ReadOutcome, WriteAt,
    psync::{read_rest, write_rest},
};

/// Longest single operation: the kernel counts bytes in 31 bits; what is longer comes back short and is finished in parts.
const OPERATION_BYTES_MAX: usize = 1 << 30;
/// Writes of a batch that are in flight at a time: enough to keep a disk busy, and few enough that a read beside them does not
/// wait for a batch. Of 1 MiB each, beside reads of 48 KiB on a virtual disk: with 16 the median read took 1.8 ms, with 4 0.14.
const WRITES_IN_FLIGHT: u32 = 4;
/// Between looks at a ring that the kernel refuses to be asked about.
const PATIENCE: Duration = Duration::from_micros(200);

/// A bounded set of rings.
pub struct Uring {
    pub(super) free: Mutex<Vec<IoUring>>,
    depth: u32,
}

impl Uring {
    /// `rings` rings (at least one) with up to `depth` operations in flight each (1 to 4096).
    ///
    /// # Errors
    /// What the kernel said: `ENOSYS` where it has no io_uring, `EPERM` where a sandbox or `io_uring_disabled` refuses it,
    /// `ENOMEM` where locked memory is short; `Unsupported` where reads and writes are missing.
    pub fn new(rings: usize, depth: u32) -> io::Result<Self> {
        let depth = depth.clamp(1, 4096);
        let free: Vec<IoUring> = (0..rings.max(1))
            .map(|_| IoUring::new(depth))
            .collect::<io::Result<_>>()?;
        let mut probe = Probe::new();
        free[0].submitter().register_probe(&mut probe)?;
        if !(probe.is_supported(opcode::Read::CODE) && probe.is_supported(opcode::Write::CODE)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            free: Mutex::new(free),
            depth,
        })
    }

    fn take(&self) -> Option<IoUring> {
        self.free.lock().pop()
    }
}

impl FileIo for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn read_many(&self, reads: &mut [ReadAt<'_>], deadline: Option<Instant>) {
        self.read_each(reads, deadline, &mut |_, _| {});
    }

    fn read_each(&self, reads: &mut [ReadAt<'_>], deadline: Option<Instant>, done: &mut dyn FnMut(usize, &ReadAt<'_>)) {
        let ring = if reads.len() > 1 { self.take() } else { None };
        let Some(mut ring) = ring else {
            return Psync.read_each(reads, deadline, done);
        };
        let mut flight = Flight::new(&mut ring);
        let mut started = vec![None; reads.len()];
        // Done, not yet told of: first the disk gets more to do.
        let mut finished = Vec::new();
        let mut next = 0;
        loop {
            while next < reads.len() && flight.in_flight < self.depth {
                let now = Instant::now();
                if deadline.is_some_and(|deadline| now >= deadline) {
                    for read in &mut reads[next..] {
                        read.outcome = ReadOutcome::TooLate;
                    }
                    finished.extend(next..reads.len());
                    next = reads.len();
                    break;
                }
                let read = &mut reads[next];
                let bytes = read.buffer.len().min(OPERATION_BYTES_MAX) as u32;
                let entry = opcode::Read::new(types::Fd(read.file.file.as_raw_fd()), read.buffer.as_mut_ptr(), bytes);
                let entry = entry.offset(read.offset).build().user_data(next as u64);
                // SAFETY: `reads` holds the buffer and the file exclusively for the whole call and touches neither until the
                // operation has completed; `flight` waits for all of them before it is dropped, also in a panic.
                if !unsafe { flight.push(&entry) } {
                    break;
                }
                started[next] = Some(now);
                next += 1;
            }
            if !finished.is_empty() {
                flight.submit();
                finished.drain(..).for_each(|index| done(index, &reads[index]));
            }
            if flight.in_flight == 0 {
                break;
            }
            flight.wait(|index, result| {
                finished.push(index);
                let read = &mut reads[index];
                match completed(result) {
                    Completed::Bytes(0) => read.outcome = ReadOutcome::Read(0),
                    Completed::Bytes(done) => read_rest(read, done),
                    Completed::Again => read_rest(read, 0),
                    Completed::Failed(error) => read.outcome = ReadOutcome::Failed(error),
                }
                read.took = started[index].map_or(Duration::ZERO, |at: Instant| at.elapsed());
            });
        }
        drop(flight);
        self.free.lock().push(ring);
        // A ring that would take nothing more: the rest another way.
        Psync.read_each(&mut reads[next..], deadline, &mut |index, read| {
            done(next + index, read)
        });
    }

    fn write_many(&self, file: &BlockFile, writes: &[WriteAt<'_>]) -> io::Result<()> {
        let ring = if writes.len() > 1 { self.take() } else { None };
        let Some(mut ring) = ring else {
            return Psync.write_many(file, writes);
        };
        let mut flight = Flight::new(&mut ring);
        let mut outcome = Ok(());
        let mut next = 0;
        loop {
            while next < writes.len() && flight.in_flight < self.depth && outcome.is_ok() {
                let write = &writes[next];
                let bytes = write.bytes.len().min(OPERATION_BYTES_MAX) as u32;
                let entry = opcode::Write::new(types::Fd(file.file.as_raw_fd()), write.bytes.as_ptr(), bytes);
                let entry = entry.offset(write.offset).build().user_data(next as u64);
                // SAFETY: `writes` and `file` are borrowed for the whole call; `flight` waits for all operations before it
                // is dropped, also in a panic.
                if !unsafe { flight.push(&entry) } {
                    break;
                }
                next += 1;
            }
            if flight.in_flight == 0 {
                break;
            }
            flight.wait(|index, result| {
                let finished = match completed(result) {
                    Completed::Bytes(done) => write_rest(file, &writes[index], done),
                    Completed::Again => write_rest(file, &writes[index], 0),
                    Completed::Failed(error) => Err(error),
                };
                if outcome.is_ok() {
                    outcome = finished;
                }
            });
        }
        drop(flight);
        self.free.lock().push(ring);
        outcome?;
        Psync.write_many(file, &writes[next..])
    }

    fn write_filled(
        &self,
        file: &BlockFile,
        offset: u64,
        memory: &mut [u8],
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> io::Result<()> {
        let mut pieces: Vec<&mut [u8]> = memory.chunks_mut(PIECE_BYTES).collect();
        let ring = if pieces.len() > 1 { self.take() } else { None };
        let Some(mut ring) = ring else {
            pieces.iter_mut().for_each(|piece| fill(piece));
            return (pieces.iter().zip((offset..).step_by(PIECE_BYTES)))
                .try_for_each(|(bytes, offset)| write_rest(file, &WriteAt { offset, bytes }, 0));
        };
        let place = |index: usize| offset + (index * PIECE_BYTES) as u64;
        let mut flight = Flight::new(&mut ring);
        let mut outcome = Ok(());
        let mut next = 0;
        while next < pieces.len() && outcome.is_ok() {
            fill(pieces[next]);
            let bytes = pieces[next].len() as u32;
            let entry = opcode::Write::new(types::Fd(file.file.as_raw_fd()), pieces[next].as_ptr(), bytes);
            let entry = entry.offset(place(next)).build().user_data(next as u64);
            // SAFETY: `memory` and `file` are borrowed for the whole call, and a piece is not touched again once it was filled;
            // `flight` waits for all operations before it is dropped, also in a panic.
            if unsafe { flight.push(&entry) } {
                flight.submit();
            } else {
                outcome = write_rest(
                    file,
                    &WriteAt {
                        offset: place(next),
                        bytes: pieces[next],
                    },
                    0,
                );
            }
            next += 1;
            while flight.in_flight == self.depth.min(WRITES_IN_FLIGHT) || (next == pieces.len() && flight.in_flight > 0)
            {
                flight.wait(|index, result| {
                    let write = WriteAt {
                        offset: place(index),
                        bytes: pieces[index],
                    };
                    let finished = match completed(result) {
                        Completed::Bytes(done) => write_rest(file, &write, done),
                        Completed::Again => write_rest(file, &write, 0),
                        Completed::Failed(error) => Err(error),
                    };
                    if outcome.is_ok() {
                        outcome = finished;
                    }
                });
            }
        }
        drop(flight);
        self.free.lock().push(ring);
        outcome
    }
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring")
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}

enum Completed {
    Bytes(usize),
    Again,
    Failed(io::Error),
}

/// A completion's result: bytes, or a negative error number.
fn completed(result: i32) -> Completed {
    match usize::try_from(result) {
        Ok(bytes) => Completed::Bytes(bytes),
        Err(_) => {
            let error = io::Error::from_raw_os_error(-result);
            match error.kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Completed::Again,
                _ => Completed::Failed(error),
            }
        }
    }
}

/// Operations of one call that the kernel has. Waits for them when dropped.
struct Flight<'r> {
    ring: &'r mut IoUring,
    in_flight: u32,
}

impl<'r> Flight<'r> {
    fn new(ring: &'r mut IoUring) -> Self {
        Self { ring, in_flight: 0 }
    }

    /// Queues an operation; false if there is no place for it.
    ///
    /// # Safety
    /// Its memory and its file must stay valid, and writable memory untouched, until `self` was dropped or has
    /// told of its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the caller's promise.
        let pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        self.in_flight += u32::from(pushed);
        pushed
    }

    /// Tells the kernel of what was pushed. What it does not take now, it is told of again by [`Self::wait`].
    fn submit(&mut self) {
        if let Err(error) = self.ring.submit() {
            tracing::debug!(%error, "the ring is busy");
        }
    }

    /// Waits for at least one operation and tells of all that are done.
    fn wait(&mut self, mut done: impl FnMut(usize, i32)) {
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                // Interrupted, or the kernel is short of memory or has more completions than it can keep: what was
                // submitted still completes, so look, and ask again.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => std::thread::sleep(PATIENCE),
            }
            let before = self.in_flight;
            for completion in self.ring.completion() {
                self.in_flight -= 1;
                done(completion.user_data() as usize, completion.result());
            }
            if self.in_flight < before {
                return;
            }
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            self.wait(|_, _| {});
        }
    }
}
