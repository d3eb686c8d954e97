//! The disk tier: records in append-only segment files, found through an index, under a byte limit.
//!
//! Writing: [`DiskTier::offer`] queues, one flusher thread appends a batch to the current segment, syncs it, tells the
//! index, and only then calls it stored. Until then the payload is served from the queue. Reading: one positioned read,
//! verified byte for byte. Space comes back by dropping the oldest segment whole.
//!
//! A disk that fails does not stop the owner: queued payloads stay where they are, [`DiskTier::offer`] answers
//! [`Offer::Degraded`] once the queue is full, and the flusher tries again every second.

mod faults;
mod flusher;
mod format;
mod index;
mod lock;
mod recovery;
mod segment;
mod table;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
};

use bytes::Bytes;
use kvasir_block::{BlockKey, Checksum, LayerBlockKey};
use parking_lot::{Condvar, Mutex};

use self::{
    faults::Faults,
    flusher::Flusher,
    index::Index,
    lock::FolderLock,
    segment::{SegmentWriter, read_record},
    table::{Place, Table},
};
pub use self::{format::SEGMENT_FORMAT, recovery::Recovery};

/// Where and how much.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Folder that this tier has for itself: `LOCK`, `segments/`, `index/`. Made where missing.
    pub dir: PathBuf,
    /// Most bytes of all segment files together; the index comes on top, about 100 bytes per layer block.
    pub bytes_max: u64,
    /// Bytes at which a segment is full; also the unit of reclaim.
    pub segment_bytes: u64,
    /// Most payload bytes accepted but not yet synced.
    pub queue_bytes_max: u64,
}

/// Why a tier could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Sizes that cannot work.
    #[error("{field} is {found}: {expected}")]
    Config {
        /// Name of the setting: `segment_bytes`, or `disk_bytes_max` for [`DiskConfig::bytes_max`].
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
    fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }

    fn index(what: &'static str, config: &DiskConfig, source: rocksdb::Error) -> Self {
        Self::Index {
            what,
            path: config.dir.join("index"),
            source,
        }
    }
}

/// Not everything accepted is durable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{queued} layer blocks are not on disk yet ({reason}): they stay queued and are tried again")]
pub struct FlushError {
    /// Layer blocks accepted and not durable.
    pub queued: u64,
    /// What stands in the way.
    pub reason: String,
}

/// What became of an offered layer block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Taken; durable after the next flush.
    Queued,
    /// Was here already.
    Present,
    /// The queue is full because the disk is slower than the writers: not taken, try later.
    Full,
    /// Not taken: the tier is closed, or the queue is full and the disk takes nothing. [`DiskStats::degraded`] says why: it
    /// fails, or every segment holds a leased block.
    Degraded,
}

/// What became of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskRead {
    /// The bytes as they were put, verified.
    Hit {
        /// Keys and values.
        payload: Bytes,
        /// The checksum they came with.
        checksum: Checksum,
    },
    /// Not here.
    Miss,
    /// Was here, but a byte was wrong or unreadable; forgotten.
    Corrupt,
}

/// Has a say in what the tier forgets to make room.
pub trait DiskWatch: Send + Sync {
    /// The tier wants to forget what one segment holds of `blocks`. Answer false if one of them must stay; else call
    /// `forget` once, under the lock that guards the decision, and answer true.
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut()) -> bool;
}

/// Counts and sizes at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Bytes of all segment files.
    pub bytes: u64,
    /// Their limit.
    pub bytes_max: u64,
    /// Segment files.
    pub segments: u64,
    /// Layer blocks on disk.
    pub layer_blocks: u64,
    /// Layer blocks accepted, not yet durable.
    pub queued_layer_blocks: u64,
    /// Their payload bytes.
    pub queue_bytes: u64,
    /// Limit of the payload bytes.
    pub queue_bytes_max: u64,
    /// Offers not taken, since the start.
    pub refused: u64,
    /// Records found corrupt by reads, since the start.
    pub corrupt: u64,
    /// Segments dropped to make room, since the start.
    pub reclaimed_segments: u64,
    /// Layer blocks in them.
    pub reclaimed_layer_blocks: u64,
    /// Batches synced, since the start.
    pub syncs: u64,
    /// Failed attempts to write, since the start.
    pub failures: u64,
    /// Why the disk takes nothing at the moment.
    pub degraded: Option<String>,
}

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
        validate(&config)?;
        fs::create_dir_all(&config.dir).map_err(|source| OpenError::io("make the folder", &config.dir, source))?;
        let lock = FolderLock::take(&config.dir)?;
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
            bytes_max: self.shared.config.bytes_max,
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
            .field("dir", &self.shared.config.dir)
            .finish_non_exhaustive()
    }
}

fn validate(config: &DiskConfig) -> Result<(), OpenError> {
    /// Offsets are kept in 32 bits, and a segment may end one record behind its size.
    const SEGMENT_BYTES_MAX: u64 = 1 << 30;
    if !(4096..=SEGMENT_BYTES_MAX).contains(&config.segment_bytes) {
        let expected = format!("must be from 4096 to {SEGMENT_BYTES_MAX} bytes");
        return Err(OpenError::Config {
            field: "segment_bytes",
            found: config.segment_bytes,
            expected,
        });
    }
    if config.bytes_max < 2 * config.segment_bytes {
        let expected = format!(
            "must be at least two segments of {} bytes, or nothing could be kept",
            config.segment_bytes
        );
        return Err(OpenError::Config {
            field: "disk_bytes_max",
            found: config.bytes_max,
            expected,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
