//! A disk that is watched: it remembers what no sync has covered yet, can be stopped at any operation to look at what a loss of
//! power would leave, and notes when someone syncs a file again after its sync had failed.

use std::{
    collections::HashSet,
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use kvasir_device::{BlockFile, FileIo, ReadAt, WriteAt};
use parking_lot::{Condvar, Mutex};
use rand::{Rng, rngs::StdRng};

const SECTOR: usize = 512;
/// Longest that the writer is held at an operation.
const PATIENCE: Duration = Duration::from_secs(20);

/// A [`FileIo`] over another one.
#[derive(Debug)]
pub(crate) struct Witness {
    inner: Arc<dyn FileIo>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    unsynced: Vec<Unsynced>,
    failed_syncs: HashSet<PathBuf>,
    synced_again: u64,
    /// Operations until the writer is held; `None`: never.
    hold_in: Option<u64>,
    /// At which operation it is held.
    held_at: Option<&'static str>,
    released: bool,
}

/// What was in a file before a write.
#[derive(Clone, Debug)]
struct Unsynced {
    path: PathBuf,
    offset: u64,
    before: Vec<u8>,
}

impl Witness {
    pub(crate) fn new(inner: Arc<dyn FileIo>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Syncs of files whose sync had failed before: none may be believed.
    pub(crate) fn synced_again(&self) -> u64 {
        self.state.lock().synced_again
    }

    /// The writer is to be held before its operation number `count` from now, counted from 0.
    pub(crate) fn hold_after(&self, count: u64) {
        let mut state = self.state.lock();
        state.hold_in = Some(count);
        state.held_at = None;
        state.released = false;
    }

    /// Waits until the writer is held; says before what. `None` if it has not come to that within `patience`.
    pub(crate) fn held(&self, patience: Duration) -> Option<&'static str> {
        let until = Instant::now() + patience;
        let mut state = self.state.lock();
        while state.held_at.is_none() {
            if self.changed.wait_until(&mut state, until).timed_out() {
                return None;
            }
        }
        state.held_at
    }

    /// Lets the writer go on, and holds it no more.
    pub(crate) fn release(&self) {
        let mut state = self.state.lock();
        state.hold_in = None;
        state.released = true;
        self.changed.notify_all();
    }

    /// Makes of `image`, a copy of `origin`, what a loss of power may leave of it: of the sectors that no sync has covered each is
    /// there or not. Says how many were lost.
    pub(crate) fn lose_power(&self, rng: &mut StdRng, origin: &Path, image: &Path) -> Result<u64> {
        let share = [0.1, 0.5, 1.0][rng.random_range(0..3)];
        let mut lost = 0;
        let unsynced = self.state.lock().unsynced.clone();
        // The latest first: what lies under a write is what the one before it wrote.
        for write in unsynced.iter().rev() {
            let path = image.join(write.path.strip_prefix(origin)?);
            let Ok(file) = OpenOptions::new().write(true).open(&path) else {
                continue;
            };
            for (i, sector) in write.before.chunks(SECTOR).enumerate() {
                if rng.random_bool(share) {
                    file.write_all_at(sector, write.offset + (i * SECTOR) as u64)?;
                    lost += 1;
                }
            }
        }
        Ok(lost)
    }

    /// Counts an operation of the writer and holds it there when its time has come.
    fn pass(&self, operation: &'static str) {
        let mut state = self.state.lock();
        match &mut state.hold_in {
            Some(0) => {}
            Some(left) => {
                *left -= 1;
                return;
            }
            None => return,
        }
        state.hold_in = None;
        state.held_at = Some(operation);
        self.changed.notify_all();
        let until = Instant::now() + PATIENCE;
        while !state.released && !self.changed.wait_until(&mut state, until).timed_out() {}
    }

    fn remember(&self, file: &BlockFile, write: &WriteAt<'_>) {
        let mut before = vec![0; write.bytes.len()];
        // What lies behind the end of a file reads as zeros.
        if let Ok(buffered) = OpenOptions::new().read(true).open(file.path()) {
            let mut done = 0;
            while let Ok(count @ 1..) = buffered.read_at(&mut before[done..], write.offset + done as u64) {
                done += count;
            }
        }
        self.state.lock().unsynced.push(Unsynced {
            path: file.path().to_owned(),
            offset: write.offset,
            before,
        });
    }

    /// What the kernel does when a sync fails: it drops the pages, and calls the next sync a success.
    fn drop_pages(&self, file: &BlockFile) {
        let mut state = self.state.lock();
        state.failed_syncs.insert(file.path().to_owned());
        let Ok(buffered) = OpenOptions::new().write(true).open(file.path()) else {
            return;
        };
        for write in state.unsynced.iter().rev().filter(|write| write.path == file.path()) {
            let _ = buffered.write_all_at(&write.before, write.offset);
        }
        state.unsynced.retain(|write| write.path != file.path());
    }
}

impl FileIo for Witness {
    fn name(&self) -> &'static str {
        "witness"
    }

    fn read_many(&self, reads: &mut [ReadAt<'_>], deadline: Option<Instant>) {
        self.inner.read_many(reads, deadline);
    }

    fn write_many(&self, file: &BlockFile, writes: &[WriteAt<'_>]) -> std::io::Result<()> {
        self.pass("write");
        for write in writes {
            self.remember(file, write);
            self.inner.write_many(file, std::slice::from_ref(write))?;
        }
        Ok(())
    }

    fn sync_data(&self, file: &BlockFile) -> std::io::Result<()> {
        self.pass("sync");
        if self.state.lock().failed_syncs.contains(file.path()) {
            self.state.lock().synced_again += 1;
        }
        match self.inner.sync_data(file) {
            Ok(()) => {
                self.state.lock().unsynced.retain(|write| write.path != file.path());
                self.pass("index");
                Ok(())
            }
            Err(error) => {
                self.drop_pages(file);
                Err(error)
            }
        }
    }

    fn preallocate(&self, file: &BlockFile, bytes: u64) -> std::io::Result<()> {
        self.pass("preallocate");
        self.inner.preallocate(file, bytes)
    }

    fn truncate(&self, file: &BlockFile, bytes: u64) -> std::io::Result<()> {
        self.pass("truncate");
        self.inner.truncate(file, bytes)
    }

    fn free_bytes(&self, dir: &Path) -> std::io::Result<u64> {
        self.inner.free_bytes(dir)
    }
}

/// Fails if anything was synced after its sync had failed.
pub(crate) fn ensure_never_synced_again(witness: &Witness) -> Result<()> {
    let again = witness.synced_again();
    ensure!(
        again == 0,
        "{again} files were synced again after their sync had failed"
    );
    Ok(())
}
