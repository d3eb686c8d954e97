//! Files that fail on purpose: errors, full disks, short and slow reads, flipped bits, and the state that a loss of power
//! leaves behind. Wraps any [`FileIo`]; who does not make one pays nothing for it.
//!
//! A [`Rule`] says which operations it means, how often, and what becomes of them. Chance comes from a seed, so that a run
//! can be had again.
//!
//! ```
//! use std::sync::Arc;
//! use kvasir_device::{Psync, faulty::{Fault, Faulty, Operation, Rule}};
//! let io = Faulty::new(Arc::new(Psync), 7);
//! io.add(Rule::new(Operation::Sync, Fault::Error(std::io::ErrorKind::Other)).times(1));
//! io.add(Rule::new(Operation::Read, Fault::Flip).one_in(100));
//! ```

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{BlockFile, FileIo, Psync, ReadAt, ReadOutcome, WriteAt};

/// What a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// One read of [`FileIo::read_many`].
    Read,
    /// One write of [`FileIo::write_many`].
    Write,
    /// [`FileIo::sync_data`].
    Sync,
    /// [`FileIo::preallocate`].
    Preallocate,
    /// [`FileIo::truncate`].
    Truncate,
}

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails and does nothing.
    Error(io::ErrorKind),
    /// It fails and does nothing, with an error number of the system: 5 is `EIO`.
    Os(i32),
    /// Only this many bytes of it are done: a read comes back short, a write fails after them.
    Short(usize),
    /// It is done, later.
    Delay(Duration),
    /// One bit of it is another one: of the bytes read, or of those that reach the disk.
    Flip,
}

/// `EIO`: what a disk says when it cannot.
pub const EIO: Fault = Fault::Os(5);

/// Which operations fail, how often and how.
#[derive(Clone, Debug)]
pub struct Rule {
    operation: Operation,
    fault: Fault,
    path: Option<String>,
    bytes: Option<Range<u64>>,
    after: u64,
    times: Option<u64>,
    one_in: u64,
}

impl Rule {
    /// Every such operation, from now on.
    pub fn new(operation: Operation, fault: Fault) -> Self {
        Self {
            operation,
            fault,
            path: None,
            bytes: None,
            after: 0,
            times: None,
            one_in: 1,
        }
    }

    /// Only on files whose path contains `part`.
    #[must_use]
    pub fn on(mut self, part: impl Into<String>) -> Self {
        self.path = Some(part.into());
        self
    }

    /// Only reads and writes that touch these bytes of the file.
    #[must_use]
    pub fn within(mut self, bytes: Range<u64>) -> Self {
        self.bytes = Some(bytes);
        self
    }

    /// Lets the first `count` of them pass.
    #[must_use]
    pub fn after(mut self, count: u64) -> Self {
        self.after = count;
        self
    }

    /// Happens at most `count` times.
    #[must_use]
    pub fn times(mut self, count: u64) -> Self {
        self.times = Some(count);
        self
    }

    /// Happens to one in `count` of them, by the seed.
    #[must_use]
    pub fn one_in(mut self, count: u64) -> Self {
        self.one_in = count.max(1);
        self
    }

    fn is_about(&self, operation: Operation, path: &Path, bytes: &Range<u64>) -> bool {
        let path_fits = || match &self.path {
            Some(part) => path.to_string_lossy().contains(part.as_str()),
            None => true,
        };
        let bytes_fit = || match &self.bytes {
            Some(mine) => mine.start < bytes.end && bytes.start < mine.end,
            None => true,
        };
        self.operation == operation && path_fits() && bytes_fit()
    }
}

/// A [`FileIo`] with faults.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn FileIo>,
    plan: Mutex<Plan>,
}

#[derive(Debug)]
struct Plan {
    rules: Vec<Rule>,
    chance: Chance,
    /// Bytes that may still be written or allocated.
    space: Option<u64>,
    /// What was there before each write that no sync has covered yet; kept only when asked for.
    unsynced: Option<Vec<Unsynced>>,
    faults: u64,
}

#[derive(Debug)]
struct Unsynced {
    path: PathBuf,
    offset: u64,
    before: Vec<u8>,
}

impl Faulty {
    /// No faults yet; chance starts from `seed`.
    pub fn new(inner: Arc<dyn FileIo>, seed: u64) -> Self {
        let plan = Plan {
            rules: Vec::new(),
            chance: Chance(seed),
            space: None,
            unsynced: None,
            faults: 0,
        };
        Self {
            inner,
            plan: Mutex::new(plan),
        }
    }

    /// Adds a rule. Of those that are about an operation, the first that happens is what happens.
    pub fn add(&self, rule: Rule) {
        self.plan.lock().rules.push(rule);
    }

    /// Takes all rules away, and gives all space back.
    pub fn heal(&self) {
        let mut plan = self.plan.lock();
        plan.rules.clear();
        plan.space = None;
    }

    /// From now on `bytes` may be allocated, or written behind the end of files, before the disk is full.
    pub fn set_space(&self, bytes: u64) {
        self.plan.lock().space = Some(bytes);
    }

    /// Faults that happened.
    pub fn faults(&self) -> u64 {
        self.plan.lock().faults
    }

    /// Remembers from now on what lies under each write until a sync covers it, for [`Self::lose_power`].
    pub fn remember_unsynced(&self) {
        self.plan.lock().unsynced.get_or_insert_default();
    }

    /// What a loss of power may leave: of every write since the last sync of its file, each 512 bytes are there or not, by
    /// the seed. Gives how many sectors were lost. Nothing may use the files meanwhile.
    ///
    /// # Errors
    /// What the system said; a file that is gone meanwhile is no error.
    pub fn lose_power(&self) -> io::Result<u64> {
        const SECTOR: usize = 512;
        let mut plan = self.plan.lock();
        let Plan { unsynced, chance, .. } = &mut *plan;
        let mut lost = 0;
        // Latest first: what lies under a write is what the one before it wrote.
        for write in unsynced.iter_mut().flat_map(|writes| writes.drain(..).rev()) {
            let file = match BlockFile::open(&write.path, false) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file?,
            };
            for (i, sector) in write.before.chunks(SECTOR).enumerate() {
                if chance.next() & 1 == 0 {
                    let offset = write.offset + (i * SECTOR) as u64;
                    Psync.write_many(&file, &[WriteAt { offset, bytes: sector }])?;
                    lost += 1;
                }
            }
        }
        Ok(lost)
    }

    /// The fault that happens to this operation, if one does.
    fn draw(&self, operation: Operation, path: &Path, bytes: &Range<u64>) -> Option<Fault> {
        let mut plan = self.plan.lock();
        let Plan { rules, chance, .. } = &mut *plan;
        let mut fault = None;
        for rule in rules.iter_mut().filter(|rule| rule.is_about(operation, path, bytes)) {
            if rule.after > 0 {
                rule.after -= 1;
            } else if rule.times != Some(0) && chance.next().is_multiple_of(rule.one_in) {
                rule.times = rule.times.map(|times| times - 1);
                fault = Some(rule.fault);
                break;
            }
        }
        plan.faults += u64::from(fault.is_some());
        fault
    }

    fn flip(&self, bytes: &mut [u8]) {
        if !bytes.is_empty() {
            let bit = self.plan.lock().chance.next() as usize % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    fn take_space(&self, bytes: u64) -> io::Result<()> {
        let mut plan = self.plan.lock();
        match &mut plan.space {
            Some(left) if *left < bytes => {
                plan.faults += 1;
                Err(io::ErrorKind::StorageFull.into())
            }
            Some(left) => {
                *left -= bytes;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn remember(&self, file: &BlockFile, write: &WriteAt<'_>) -> io::Result<()> {
        if self.plan.lock().unsynced.is_none() {
            return Ok(());
        }
        let mut before = vec![0; write.bytes.len()];
        // Buffered: there is no telling how this memory is aligned.
        let buffered = BlockFile::open(file.path(), false)?;
        let mut reads = [ReadAt::new(&buffered, write.offset, &mut before)];
        Psync.read_many(&mut reads, None);
        if let ReadOutcome::Failed(error) = std::mem::replace(&mut reads[0].outcome, ReadOutcome::TooLate) {
            return Err(error);
        }
        let path = file.path().to_owned();
        let offset = write.offset;
        if let Some(unsynced) = &mut self.plan.lock().unsynced {
            unsynced.push(Unsynced { path, offset, before });
        }
        Ok(())
    }

    fn write(&self, file: &BlockFile, write: &WriteAt<'_>) -> io::Result<()> {
        let end = write.offset + write.bytes.len() as u64;
        self.take_space(end.saturating_sub(file.len()?.max(write.offset)))?;
        let fault = self.draw(Operation::Write, file.path(), &(write.offset..end));
        let mut copy;
        let (bytes, failed) = match fault {
            None => (write.bytes, None),
            Some(Fault::Error(kind)) => return Err(kind.into()),
            Some(Fault::Os(code)) => return Err(io::Error::from_raw_os_error(code)),
            Some(Fault::Delay(time)) => {
                std::thread::sleep(time);
                (write.bytes, None)
            }
            Some(Fault::Short(bytes)) => (
                &write.bytes[..bytes.min(write.bytes.len())],
                Some(io::Error::from(io::ErrorKind::WriteZero)),
            ),
            Some(Fault::Flip) => {
                copy = crate::Buffer::heap(write.bytes.len());
                copy.as_mut_slice().copy_from_slice(write.bytes);
                self.flip(copy.as_mut_slice());
                (copy.as_slice(), None)
            }
        };
        let write = WriteAt {
            offset: write.offset,
            bytes,
        };
        self.remember(file, &write)?;
        self.inner.write_many(file, &[write])?;
        failed.map_or(Ok(()), Err)
    }

    /// Fails or delays an operation that moves no bytes.
    fn control(&self, operation: Operation, file: &BlockFile) -> io::Result<()> {
        match self.draw(operation, file.path(), &(0..u64::MAX)) {
            Some(Fault::Error(kind)) => Err(kind.into()),
            Some(Fault::Os(code)) => Err(io::Error::from_raw_os_error(code)),
            Some(Fault::Delay(time)) => {
                std::thread::sleep(time);
                Ok(())
            }
            Some(Fault::Short(_) | Fault::Flip) | None => Ok(()),
        }
    }
}

impl FileIo for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn read_many(&self, reads: &mut [ReadAt<'_>], deadline: Option<Instant>) {
        for read in reads {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                read.outcome = ReadOutcome::TooLate;
                continue;
            }
            let started = Instant::now();
            let bytes = read.offset..read.offset + read.buffer.len() as u64;
            let fault = self.draw(Operation::Read, read.file.path(), &bytes);
            match fault {
                Some(Fault::Error(kind)) => read.outcome = ReadOutcome::Failed(kind.into()),
                Some(Fault::Os(code)) => read.outcome = ReadOutcome::Failed(io::Error::from_raw_os_error(code)),
                Some(Fault::Delay(time)) => {
                    std::thread::sleep(time);
                    self.inner.read_many(std::slice::from_mut(read), None);
                }
                Some(Fault::Short(_) | Fault::Flip) | None => self.inner.read_many(std::slice::from_mut(read), None),
            }
            match (&mut read.outcome, fault) {
                (ReadOutcome::Read(done), Some(Fault::Short(bytes))) => *done = bytes.min(*done),
                (ReadOutcome::Read(done), Some(Fault::Flip)) => self.flip(&mut read.buffer[..*done]),
                _ => {}
            }
            read.took = started.elapsed();
        }
    }

    fn write_many(&self, file: &BlockFile, writes: &[WriteAt<'_>]) -> io::Result<()> {
        writes.iter().try_for_each(|write| self.write(file, write))
    }

    fn sync_data(&self, file: &BlockFile) -> io::Result<()> {
        self.control(Operation::Sync, file)?;
        self.inner.sync_data(file)?;
        if let Some(unsynced) = &mut self.plan.lock().unsynced {
            unsynced.retain(|write| write.path != file.path());
        }
        Ok(())
    }

    fn preallocate(&self, file: &BlockFile, bytes: u64) -> io::Result<()> {
        self.control(Operation::Preallocate, file)?;
        self.take_space(bytes.saturating_sub(file.len()?))?;
        self.inner.preallocate(file, bytes)
    }

    fn truncate(&self, file: &BlockFile, bytes: u64) -> io::Result<()> {
        self.control(Operation::Truncate, file)?;
        self.inner.truncate(file, bytes)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        let free = self.inner.free_bytes(dir)?;
        Ok(self.plan.lock().space.map_or(free, |space| space.min(free)))
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, and good enough to decide which write fails.
#[derive(Debug)]
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
