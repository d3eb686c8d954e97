//! The disk tier: records in append-only segment files on one or several disks, found through an index, under a byte limit.
//!
//! Writing: [`DiskTier::offer`] queues. Each disk has a thread that takes a batch off the common queue, appends it to its
//! current segment, syncs it, tells its index, and only then calls it stored. Until then payloads are served from the queue.
//! A faster disk takes more batches; one that fails puts its batch back for the others. Reading: positioned reads of whole
//! pages, many at a time, verified byte for byte. Space comes back by whole segments (`disk/reclaim.rs`).
//!
//! Disks that fail do not stop the owner: queued payloads stay where they are, [`DiskTier::offer`] answers
//! [`Offer::Degraded`] once the queue is full, and each disk is tried again every second (after three failed segments within
//! a minute: after a rest).

mod config;
mod flusher;
mod format;
mod health;
mod index;
mod lock;
mod outcome;
mod read;
mod reclaim;
mod recovery;
mod removal;
mod scrub;
mod segment;
mod stats;
mod table;
mod volume;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvasir_block::{BlockKey, Checksum, LayerBlockKey};
use kvasir_device::{Buffer, FileIo, best_io};
use parking_lot::{Condvar, Mutex};

pub use self::{
    config::{AbsentDisk, DiskConfig, DiskPath, OpenError},
    format::SEGMENT_FORMAT,
    outcome::{DiskRead, DiskWatch, Fate, FlushError, Heat, Offer},
    recovery::Recovery,
    stats::{DiskStats, OneDiskStats},
};
use self::{
    flusher::Flusher,
    format::{PAGE, PAYLOAD_BYTES_MAX, record_bytes},
    health::Health,
    recovery::Recovered,
    table::{Place, Table},
    volume::{Folder, Volume},
};

/// Most operations that one call has in flight on io_uring.
const DEPTH: u32 = 32;

/// Layer blocks on disk. Thread-safe; reads do not wait for writes.
pub struct DiskTier {
    shared: Arc<Shared>,
    recovery: Recovery,
    threads: Mutex<Threads>,
}

enum Threads {
    Ready(Vec<recovery::Start>),
    Running(Vec<JoinHandle<()>>),
    Stopped,
}

struct Shared {
    config: DiskConfig,
    /// Those that are there; [`Volume::number`] is the place in this list.
    volumes: Vec<Volume>,
    /// Folders and reasons of those that are not.
    absent: Vec<(std::path::PathBuf, String)>,
    state: Mutex<State>,
    /// Wakes the writers: there is work, or they should stop.
    work: Condvar,
    /// Wakes those who wait for a flush.
    progress: Condvar,
    /// Space of a dropped segment is to be given back, or was.
    removal: Condvar,
    /// Wakes the scrub when it should stop.
    scrub: Condvar,
    /// Reads that callers wait for: the scrub lets them pass.
    reading: AtomicUsize,
}

#[derive(Default)]
struct State {
    table: Table,
    /// One for each volume.
    health: Vec<Health>,
    stop: bool,
    counts: Counts,
}

/// Since the start.
#[derive(Default)]
struct Counts {
    refused: u64,
    corrupt: u64,
    read_errors: u64,
    too_late: u64,
    reclaimed_segments: u64,
    reclaimed_layer_blocks: u64,
    readmitted_layer_blocks: u64,
    demoted_layer_blocks: u64,
    forgotten_warm_layer_blocks: u64,
    retired_segments: u64,
    syncs: u64,
    failures: u64,
    payload_bytes_written: u64,
    bytes_written: u64,
    scrubbed_bytes: u64,
    scrub_corrupt: u64,
}

impl DiskTier {
    /// Opens the folders, recovers what they hold. Nothing is written until [`Self::start`].
    ///
    /// # Errors
    /// [`OpenError`] says what stands in the way and what to do.
    pub fn open(config: DiskConfig) -> Result<Self, OpenError> {
        config.validate()?;
        let alone = config.disks.len() == 1;
        // For each disk one that reads and one that writes, at a time.
        let io: Arc<dyn FileIo> = best_io(2 * config.disks.len() + 2, DEPTH);
        let (mut table, mut report) = (Table::default(), Recovery::default());
        let (mut volumes, mut starts, mut absent) = (Vec::new(), Vec::new(), Vec::new());
        let mut last_error = None;
        for path in &config.disks {
            let number = volumes.len() as u8;
            let opened = Folder::take(number, path, alone, &io)
                .and_then(|folder| recovery::recover(&config, folder, &mut table, &mut report));
            match opened {
                Ok(Recovered { volume, start }) => {
                    volumes.push(volume);
                    starts.push(start);
                }
                Err(error @ (OpenError::Io { .. } | OpenError::Index { .. }))
                    if config.absent == AbsentDisk::LeaveOut && !alone =>
                {
                    tracing::error!(dir = %path.dir.display(), %error, "starting without this disk");
                    table.forget_disk(number);
                    absent.push((path.dir.clone(), error.to_string()));
                    last_error = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        if volumes.is_empty()
            && let Some(error) = last_error
        {
            return Err(error);
        }
        report.segments = table.segments.len() as u64;
        report.layer_blocks = table.stored;
        let state = State {
            table,
            health: volumes.iter().map(|_| Health::default()).collect(),
            ..State::default()
        };
        let shared = Shared {
            config,
            volumes,
            absent,
            state: Mutex::new(state),
            work: Condvar::new(),
            progress: Condvar::new(),
            removal: Condvar::new(),
            scrub: Condvar::new(),
            reading: AtomicUsize::new(0),
        };
        Ok(Self {
            shared: Arc::new(shared),
            recovery: report,
            threads: Mutex::new(Threads::Ready(starts)),
        })
    }

    /// Starts the threads that write, one for each disk, and the scrub; once.
    ///
    /// # Errors
    /// What the system said when it could not make a thread.
    pub fn start(&self, watch: Arc<dyn DiskWatch>) -> io::Result<()> {
        let mut threads = self.threads.lock();
        // Those that run stay known: who stops waits for them.
        let Threads::Ready(starts) = &mut *threads else {
            return Err(io::Error::other("the disk tier was started before"));
        };
        let (starts, mut running) = (std::mem::take(starts), Vec::new());
        let started = self.start_threads(starts, &watch, &mut running);
        *threads = Threads::Running(running);
        started
    }

    fn start_threads(
        &self,
        starts: Vec<recovery::Start>,
        watch: &Arc<dyn DiskWatch>,
        running: &mut Vec<JoinHandle<()>>,
    ) -> io::Result<()> {
        for (number, start) in (0..).zip(starts) {
            let flusher = Flusher::new(Arc::clone(&self.shared), number, Arc::clone(watch), start);
            // Before the thread is there: it may end, and say so, at once.
            self.shared.state.lock().health[number].running = true;
            let thread = std::thread::Builder::new().name(format!("kv-flusher-{number}"));
            let spawned = thread.spawn(move || flusher.run());
            running.push(spawned.inspect_err(|_| self.shared.state.lock().health[number].running = false)?);
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name(format!("kv-removal-{number}"));
            running.push(thread.spawn(move || removal::run(&shared, number as u8))?);
        }
        if self.shared.config.scrub_bytes_per_second > 0 {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("kv-scrub".to_owned());
            running.push(thread.spawn(move || scrub::run(&shared))?);
        }
        Ok(())
    }

    /// What was found when the folders were opened.
    pub fn recovery(&self) -> Recovery {
        self.recovery
    }

    /// Takes a layer block to be written. The queue is bounded in payload bytes; an empty queue takes any one payload.
    pub fn offer(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> Offer {
        let segment_bytes = PAGE + record_bytes(payload.len()).next_multiple_of(PAGE);
        let fits = |volume: &Volume| segment_bytes <= volume.bytes_max;
        if payload.len() > PAYLOAD_BYTES_MAX || !self.shared.volumes.iter().all(fits) {
            self.shared.state.lock().counts.refused += 1;
            return Offer::TooLarge;
        }
        let mut state = self.shared.state.lock();
        if state.table.place(key).is_some() {
            return Offer::Present;
        }
        let queue_bytes = state.table.queue_bytes + payload.len() as u64;
        let full = state.table.queue_bytes > 0 && queue_bytes > self.shared.config.queue_bytes_max;
        if full || state.stop {
            state.counts.refused += 1;
            return if state.stop || state.degraded().is_some() {
                Offer::Degraded
            } else {
                Offer::Full
            };
        }
        state.table.enqueue(key, payload, checksum);
        drop(state);
        self.shared.work.notify_all();
        Offer::Queued
    }

    /// Reads and verifies. Promises nothing about the past: what was here may have been reclaimed.
    pub fn get(&self, key: LayerBlockKey) -> DiskRead {
        let mut read = self.get_many(&[key], &mut |_| None, None);
        read.pop().unwrap_or(DiskRead::Miss)
    }

    /// [`Self::get`] of many, several at a time; outcomes in the order of `keys`. Bytes are read into what `room` gives for the
    /// bytes that a read needs (whole pages: up to 8 KiB more than the payload), or into the heap where it gives nothing. The
    /// deadline is looked at before each read is begun; a read that was begun is waited for.
    pub fn get_many(
        &self,
        keys: &[LayerBlockKey],
        room: &mut dyn FnMut(usize) -> Option<Buffer>,
        deadline: Option<Instant>,
    ) -> Vec<DiskRead> {
        self.shared.reading.fetch_add(1, Ordering::Relaxed);
        let reads = self.shared.read_many(keys, room, deadline);
        self.shared.reading.fetch_sub(1, Ordering::Relaxed);
        reads
    }

    /// How long a read of `bytes` would take, by what reads took of late, on the slowest disk; zero while nothing was read.
    pub fn read_estimate(&self, bytes: u64) -> Duration {
        let estimates = self.shared.volumes.iter().map(|volume| volume.pace.estimate(bytes));
        estimates.max().unwrap_or_default()
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
    /// [`FlushError`] when no disk took it, or the tier was not started; it stays queued.
    pub fn flush(&self) -> Result<(), FlushError> {
        let mut state = self.shared.state.lock();
        let accepted = state.table.accepted;
        let failures: Vec<u64> = state.health.iter().map(|health| health.failures).collect();
        state.health.iter_mut().for_each(|health| health.hurry = true);
        self.shared.work.notify_all();
        loop {
            let queued = state.table.unsettled(accepted);
            if queued == 0 {
                return Ok(());
            }
            let now = Instant::now();
            let mut disks = state.health.iter().zip(&failures);
            if disks.all(|(health, &before)| !health.running || health.failures > before || health.rests(now)) {
                let reason = state.degraded().unwrap_or_else(|| "no flusher runs".to_owned());
                return Err(FlushError { queued, reason });
            }
            self.shared.progress.wait(&mut state);
        }
    }

    /// Writes what is queued and ends the threads. Reads still work; offers are refused.
    ///
    /// # Errors
    /// [`FlushError`] when the disks did not take everything; what they did not take is lost with this process.
    pub fn stop(&self) -> Result<(), FlushError> {
        self.shared.state.lock().stop = true;
        self.shared.work.notify_all();
        self.shared.scrub.notify_all();
        self.shared.removal.notify_all();
        let threads = std::mem::replace(&mut *self.threads.lock(), Threads::Stopped);
        if let Threads::Running(threads) = threads {
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("a thread of the disk tier panicked");
                }
            }
        }
        let state = self.shared.state.lock();
        let queued = state.table.unsettled(u64::MAX);
        if queued == 0 {
            return Ok(());
        }
        let reason = state.degraded().unwrap_or_else(|| "no flusher ran".to_owned());
        Err(FlushError { queued, reason })
    }

    /// Counts and sizes.
    pub fn stats(&self) -> DiskStats {
        let state = self.shared.state.lock();
        stats::of(&self.shared, &state)
    }
}

impl State {
    /// Why nothing is taken: a reason of some disk, if all have one.
    fn degraded(&self) -> Option<String> {
        let all = self.health.iter().all(|health| health.degraded.is_some());
        let reason = self.health.first().and_then(|health| health.degraded.clone());
        reason.filter(|_| all)
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
        let dirs: Vec<_> = self.shared.volumes.iter().map(|volume| &volume.dir).collect();
        f.debug_struct("DiskTier").field("dirs", &dirs).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
