//! The disk tier: records in append-only segment files, found through an index, under a byte limit.
//!
//! Writing: [`DiskTier::offer`] queues, one flusher thread appends a batch to the current segment, syncs it, tells the
//! index, and only then calls it stored. Until then the payload is served from the queue. Reading: one positioned read,
//! verified byte for byte. Space comes back by dropping the oldest segment whole.
//!
//! A disk that fails does not stop the owner: queued payloads stay where they are, [`DiskTier::offer`] answers
//! [`Offer::Degraded`] once the queue is full, and the flusher tries again every second.

mod config;
mod faults;
mod flusher;
mod format;
mod index;
mod lock;
mod outcome;
mod recovery;
mod segment;
mod stats;
mod table;

use std::{
    fs, io,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvasir_block::{BlockKey, Checksum, LayerBlockKey};
use kvasir_device::Buffer;
use parking_lot::{Condvar, Mutex};

pub use self::{
    config::{AbsentDisk, DiskConfig, DiskPath, OpenError},
    format::SEGMENT_FORMAT,
    outcome::{DiskRead, DiskWatch, Fate, FlushError, Offer},
    recovery::Recovery,
    stats::{DiskStats, OneDiskStats},
};
use self::{
    faults::Faults,
    flusher::Flusher,
    index::Index,
    lock::FolderLock,
    segment::{SegmentWriter, read_record},
    table::{Place, Table},
};

/// Layer blocks on disk. Thread-safe; reads do not wait for writes.
pub struct DiskTier {
    shared: Arc<Shared>,
    recovery: Recovery,
    flusher: Mutex<FlusherHandle>,
    _lock: FolderLock,
}

enum FlusherHandle {
    Ready(Option<SegmentWriter>, u64),
    Running(JoinHandle<()>),
    Stopped,
}

struct Shared {
    config: DiskConfig,
    index: Index,
    state: Mutex<State>,
    /// Wakes the flusher: there is work, or it should stop.
    work: Condvar,
    /// Wakes those who wait for a flush.
    progress: Condvar,
    faults: Faults,
}

#[derive(Default)]
struct State {
    table: Table,
    degraded: Option<String>,
    /// Someone waits: try now, not in a second.
    hurry: bool,
    stop: bool,
    /// No flusher thread runs: not yet, or not any more.
    stopped: bool,
    refused: u64,
    corrupt: u64,
    reclaimed_segments: u64,
    reclaimed_layer_blocks: u64,
    syncs: u64,
    failures: u64,
}

impl DiskTier {
    /// Opens the folder, recovers what it holds. Nothing is written until [`Self::start`].
    ///
    /// # Errors
    /// [`OpenError`] says what stands in the way and what to do.
    pub fn open(config: DiskConfig) -> Result<Self, OpenError> {
        config.validate()?;
        fs::create_dir_all(config.dir()).map_err(|source| OpenError::io("make the folder", config.dir(), source))?;
        let lock = FolderLock::take(config.dir())?;
        let recovered = recovery::recover(&config)?;
        let state = State {
            table: recovered.table,
            stopped: true,
            ..State::default()
        };
        let shared = Shared {
            config,
            index: recovered.index,
            state: Mutex::new(state),
            work: Condvar::new(),
            progress: Condvar::new(),
            faults: Faults::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            recovery: recovered.report,
            flusher: Mutex::new(FlusherHandle::Ready(recovered.writer, recovered.next_segment)),
            _lock: lock,
        })
    }

    /// Starts the flusher thread; once.
    ///
    /// # Errors
    /// What the system said when it could not make a thread.
    pub fn start(&self, watch: Arc<dyn DiskWatch>) -> io::Result<()> {
        let mut handle = self.flusher.lock();
        let FlusherHandle::Ready(writer, next_segment) = std::mem::replace(&mut *handle, FlusherHandle::Stopped) else {
            return Err(io::Error::other("the flusher was started before"));
        };
        let flusher = Flusher::new(Arc::clone(&self.shared), watch, writer, next_segment);
        // Before the thread is there: it may end, and say so, at once.
        self.shared.state.lock().stopped = false;
        let thread = std::thread::Builder::new()
            .name("kv-flusher".to_owned())
            .spawn(move || flusher.run())
            .inspect_err(|_| self.shared.state.lock().stopped = true)?;
        *handle = FlusherHandle::Running(thread);
        Ok(())
    }

    /// What was found when the folder was opened.
    pub fn recovery(&self) -> Recovery {
        self.recovery
    }

    /// Takes a layer block to be written. The queue is bounded in payload bytes; an empty queue takes any one payload.
    pub fn offer(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> Offer {
        let mut state = self.shared.state.lock();
        if state.table.place(key).is_some() {
            return Offer::Present;
        }
        let queue_bytes = state.table.queue_bytes + payload.len() as u64;
        let full = state.table.queue_bytes > 0 && queue_bytes > self.shared.config.queue_bytes_max;
        if full || state.stop {
            state.refused += 1;
            return if state.stop || state.degraded.is_some() {
                Offer::Degraded
            } else {
                Offer::Full
            };
        }
        state.table.enqueue(key, payload, checksum);
        drop(state);
        self.shared.work.notify_one();
        Offer::Queued
    }

    /// Reads and verifies. Promises nothing about the past: what was here may have been reclaimed.
    pub fn get(&self, key: LayerBlockKey) -> DiskRead {
        let (location, file) = {
            let state = self.shared.state.lock();
            match state.table.place(key) {
                None => return DiskRead::Miss,
                Some(Place::Queued(queued)) => {
                    let (payload, checksum) = (**queued).clone();
                    drop(state);
                    if checksum.verifies(&payload) {
                        return DiskRead::Hit { payload, checksum };
                    }
                    self.forget_corrupt(key, |place| matches!(place, Place::Queued(_)));
                    return DiskRead::Corrupt;
                }
                Some(&Place::Stored(location)) => match state.table.segments.get(&location.segment) {
                    Some(segment) => (location, Arc::clone(&segment.file)),
                    None => return DiskRead::Miss,
                },
            }
        };
        match read_record(&file, key, location) {
            Ok(Some((payload, checksum))) => return DiskRead::Hit { payload, checksum },
            Ok(None) => tracing::warn!(?key, ?location, "record is corrupt, dropping it"),
            Err(error) => tracing::warn!(?key, ?location, %error, "record cannot be read, dropping it"),
        }
        self.forget_corrupt(key, |place| matches!(place, Place::Stored(at) if *at == location));
        DiskRead::Corrupt
    }

    /// [`Self::get`] of many, several at a time; outcomes in the order of `keys`. Bytes are read into what `room` gives for the
    /// bytes that a read needs (a little more than the payload), or into the heap where it gives nothing. The deadline is looked
    /// at before each read is begun.
    pub fn get_many(
        &self,
        keys: &[LayerBlockKey],
        room: &mut dyn FnMut(usize) -> Option<Buffer>,
        deadline: Option<Instant>,
    ) -> Vec<DiskRead> {
        let _ = room;
        let late = || deadline.is_some_and(|deadline| Instant::now() >= deadline);
        keys.iter()
            .map(|&key| if late() { DiskRead::TooLate } else { self.get(key) })
            .collect()
    }

    /// How long a read of `bytes` would take, by what reads took of late.
    pub fn read_estimate(&self, bytes: u64) -> Duration {
        let _ = bytes;
        Duration::ZERO
    }

    /// Whether `key` is here, queued or on disk.
    pub fn contains(&self, key: LayerBlockKey) -> bool {
        self.shared.state.lock().table.place(key).is_some()
    }

    /// Calls `visit` with every layer of `block` that is here, rising.
    pub fn visit_layers(&self, block: &BlockKey, visit: impl FnMut(u16)) {
        self.shared.state.lock().table.layers(block).for_each(visit);
    }

    /// Calls `visit` with every block that has a layer here, and how many it has.
    pub fn visit_blocks(&self, mut visit: impl FnMut(&BlockKey, usize)) {
        self.shared
            .state
            .lock()
            .table
            .blocks()
            .for_each(|(block, layers)| visit(block, layers.count()));
    }

    /// Waits until everything taken so far is durable.
    ///
    /// # Errors
    /// [`FlushError`] when the disk did not take it, or the tier was not started; it stays queued.
    pub fn flush(&self) -> Result<(), FlushError> {
        let mut state = self.shared.state.lock();
        let (target, failures) = (state.table.accepted, state.failures);
        state.hurry = true;
        self.shared.work.notify_one();
        while state.table.settled < target {
            if state.failures > failures || state.stopped {
                let reason = state.degraded.clone().unwrap_or_else(|| "no flusher runs".to_owned());
                return Err(FlushError {
                    queued: target - state.table.settled,
                    reason,
                });
            }
            self.shared.progress.wait(&mut state);
        }
        Ok(())
    }

    /// Writes what is queued and ends the flusher thread. Reads still work; offers are refused.
    ///
    /// # Errors
    /// [`FlushError`] when the disk did not take everything; what it did not take is lost with this process.
    pub fn stop(&self) -> Result<(), FlushError> {
        self.shared.state.lock().stop = true;
        self.shared.work.notify_one();
        let handle = std::mem::replace(&mut *self.flusher.lock(), FlusherHandle::Stopped);
        if let FlusherHandle::Running(thread) = handle
            && thread.join().is_err()
        {
            tracing::error!("the flusher thread panicked");
        }
        let state = self.shared.state.lock();
        let queued = state.table.accepted - state.table.settled;
        if queued == 0 {
            return Ok(());
        }
        let reason = state.degraded.clone().unwrap_or_else(|| "no flusher ran".to_owned());
        Err(FlushError { queued, reason })
    }

    /// Counts and sizes.
    pub fn stats(&self) -> DiskStats {
        let state = self.shared.state.lock();
        DiskStats {
            bytes: state.table.disk_bytes(),
            bytes_max: self.shared.config.disks[0].bytes_max,
            segments: state.table.segments.len() as u64,
            layer_blocks: state.table.stored,
            queued_layer_blocks: state.table.queued,
            queue_bytes: state.table.queue_bytes,
            queue_bytes_max: self.shared.config.queue_bytes_max,
            refused: state.refused,
            corrupt: state.corrupt,
            reclaimed_segments: state.reclaimed_segments,
            reclaimed_layer_blocks: state.reclaimed_layer_blocks,
            syncs: state.syncs,
            failures: state.failures,
            degraded: state.degraded.clone(),
            ..DiskStats::default()
        }
    }

    /// Forgets `key` if it is still where the wrong bytes came from.
    fn forget_corrupt(&self, key: LayerBlockKey, same: impl Fn(&Place) -> bool) {
        let mut state = self.shared.state.lock();
        state.corrupt += 1;
        if !state.table.place(key).is_some_and(same) {
            return;
        }
        state.table.remove(key);
        drop(state);
        if let Err(error) = self.shared.index.forget(None, [key].into_iter()) {
            tracing::warn!(?key, %error, "corrupt record stays in the index until it is read again");
        }
    }
}

impl Drop for DiskTier {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "closed the disk tier with unwritten layer blocks");
        }
    }
}

impl std::fmt::Debug for DiskTier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskTier")
            .field("dir", &self.shared.config.dir())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
