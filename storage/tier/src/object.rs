//! The object tier: packs of layer blocks in an S3-compatible bucket, or a folder, shared by all stores of a namespace.
//!
//! Writing: [`ObjectTier::offer`] queues; blocks of one namespace gather in a pack of tens of MiB, which is written as one
//! object, whole or not at all. Until then the payload is served from the queue. Finding: each pack ends in a manifest;
//! stores list a namespace when they open it and every minute after, and read the manifests they have not seen, so each
//! finds what the others wrote. Reading: neighbours in a pack come in one ranged GET; each record is checked against the
//! manifest (key, place, length) and its CRC before anyone sees a byte.
//!
//! The API is synchronous and may be called from any thread, also one of an async runtime that may block; inside is a
//! small runtime of two threads. A bucket that is slow, broken or gone costs misses, never a wait beyond the deadline: a
//! breaker stops asking it, and uploads wait in the bounded queue. `FORMAT-OBJECT.md` has the bytes.

mod breaker;
mod bucket;
mod catalog;
mod config;
mod failure;
mod format;
mod http;
mod queue;
mod read;
mod scan;
mod stats;
mod upload;

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvasir_block::{BlockKey, Checksum, LayerBlockKey, NamespaceId};
use parking_lot::{Condvar, Mutex};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::{Notify, Semaphore, watch},
};

pub use self::{
    breaker::{BreakerConfig, BreakerState},
    config::{Credentials, ObjectConfig, ObjectError, StoreId},
    failure::{FailureCounts, ObjectFailure},
    format::PACK_FORMAT,
    stats::ObjectStats,
};
use self::{bucket::Bucket, catalog::Catalog, format::RECORD_PAYLOAD_BYTES_MAX, queue::Queue, stats::Counts};
use crate::disk::Offer;

/// Threads of the tier's own runtime: enough for TLS and copies of one network card's worth, little enough to leave the
/// processor to the cache.
const RUNTIME_THREADS: usize = 2;
/// How long a stop waits for a request that is stuck in the file system.
const STUCK_MAX: Duration = Duration::from_secs(1);

/// What became of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectRead {
    /// The bytes as they were put, verified.
    Hit {
        /// Keys and values.
        payload: Bytes,
        /// The checksum they came with.
        checksum: Checksum,
    },
    /// Not here, as far as this store knows; or removed by the store that wrote it.
    Miss,
    /// Was here, but what came was not it; forgotten.
    Corrupt,
    /// The deadline came first.
    TooLate,
    /// The bucket does not serve us at the moment; [`ObjectStats::degraded`] says why.
    Unavailable,
}

/// Not everything accepted is in the bucket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{queued} layer blocks are not in the bucket yet ({reason}): they stay queued and are tried again")]
pub struct ObjectFlushError {
    /// Layer blocks accepted and not in the bucket.
    pub queued: u64,
    /// What stands in the way.
    pub reason: String,
}

/// Layer blocks in a bucket. Thread-safe.
pub struct ObjectTier {
    shared: Arc<Shared>,
    runtime: Handle,
    /// The thread that owns the runtime.
    thread: Mutex<Option<JoinHandle<()>>>,
    stopping: watch::Sender<bool>,
}

struct Shared {
    config: ObjectConfig,
    bucket: Bucket,
    /// One permit for each ranged GET in flight.
    gets: Semaphore,
    state: Mutex<State>,
    /// Wakes those who wait for a flush or a scan.
    progress: Condvar,
    /// Wakes the uploads: a pack is closed.
    work: Notify,
    /// Wakes the scans: a namespace is to be listed.
    look: Notify,
}

struct State {
    queue: Queue,
    catalog: Catalog,
    counts: Counts,
    /// Bytes of packs being written now.
    writing_bytes: u64,
    last_sequence: u64,
    /// Why the last upload or removal failed, until one succeeds.
    degraded: Option<String>,
    stop: bool,
}

impl ObjectTier {
    /// Sets up the tier. It asks nothing of the bucket yet, so a bucket that is away does not keep a store from starting.
    ///
    /// # Errors
    /// [`ObjectError`] names the setting that cannot work.
    pub fn open(config: ObjectConfig) -> Result<Self, ObjectError> {
        let bucket = Bucket::open(&config)?;
        let state = State {
            queue: Queue::new(config.object_bytes, config.open_age_max),
            catalog: Catalog::new(config.store, config.namespaces_max, config.entries_max),
            counts: Counts::default(),
            writing_bytes: 0,
            last_sequence: 0,
            degraded: None,
            stop: false,
        };
        let runtime = Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            // Only folders and name look-ups block.
            .max_blocking_threads(config.gets_max.min(64) + config.puts_max.min(64) + 1)
            .thread_name("kv-object")
            .enable_all()
            .build()
            .map_err(ObjectError::Threads)?;
        let shared = Arc::new(Shared {
            gets: Semaphore::new(config.gets_max),
            config,
            bucket,
            state: Mutex::new(state),
            progress: Condvar::new(),
            work: Notify::new(),
            look: Notify::new(),
        });
        let (stopping, stop) = watch::channel(false);
        let handle = runtime.handle().clone();
        let background = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("kv-object-tier".to_owned())
            .spawn(move || serve(runtime, background, stop))
            .map_err(ObjectError::Threads)?;
        Ok(Self {
            shared,
            runtime: handle,
            thread: Mutex::new(Some(thread)),
            stopping,
        })
    }

    /// Makes a namespace known, so that its packs are found from now on; a first listing begins in the background. False
    /// where [`ObjectConfig::namespaces_max`] are known: reads then miss, and offers are refused.
    pub fn open_namespace(&self, namespace: NamespaceId) -> bool {
        let opened = self.shared.state.lock().catalog.open(namespace);
        self.shared.look.notify_one();
        opened
    }

    /// Lists a namespace now and reads its new manifests. True if everything in the bucket is known when this returns,
    /// false if the bucket failed or the deadline came first.
    pub fn refresh(&self, namespace: NamespaceId, deadline: Instant) -> bool {
        let mut state = self.shared.state.lock();
        if !state.catalog.open(namespace) {
            return false;
        }
        let Some(scans) = state.catalog.scans(namespace) else {
            return false;
        };
        scans.requested += 1;
        let target = scans.requested;
        self.shared.look.notify_one();
        loop {
            match state.catalog.scans(namespace) {
                Some(scans) if scans.done >= target => return scans.complete,
                Some(_) => {}
                None => return false,
            }
            if state.stop || self.shared.progress.wait_until(&mut state, deadline).timed_out() {
                return false;
            }
        }
    }

    /// Takes a layer block to be written. The queue is bounded in payload bytes; an empty queue takes any one payload.
    ///
    /// Blocks that will be read together should be offered one after another: that is the order in which they lie.
    /// [`Offer::Degraded`] also stands for a tier that is read-only, and for a namespace or payload beyond its limits.
    pub fn offer(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> Offer {
        let config = &self.shared.config;
        let mut state = self.shared.state.lock();
        if state.queue.payload(key).is_some() || state.catalog.place(key).is_some() {
            return Offer::Present;
        }
        let payload_bytes = payload.len() as u64;
        let fits = payload_bytes <= RECORD_PAYLOAD_BYTES_MAX;
        if config.read_only || state.stop || !fits || !state.catalog.open(key.namespace) {
            state.counts.refused += 1;
            return Offer::Degraded;
        }
        if state.queue.bytes() > 0 && state.queue.bytes() + payload_bytes > config.queue_bytes_max {
            state.counts.refused += 1;
            // Many namespaces with a little each: none is full, and together they are.
            let closed = state.queue.nothing_closed() && state.queue.close_largest();
            let degraded = state.degraded.is_some() || self.shared.bucket.breaker_state() != BreakerState::Closed;
            drop(state);
            if closed {
                self.shared.work.notify_one();
            }
            return if degraded { Offer::Degraded } else { Offer::Full };
        }
        let first = state.queue.len() == 0;
        let ready = state.queue.push((key, payload, checksum), Instant::now());
        drop(state);
        // The first wakes the uploads too: they do not know yet when it will be old.
        if ready || first {
            self.shared.work.notify_one();
        }
        Offer::Queued
    }

    /// Reads and verifies, one answer for each key in the order of `keys`; returns by `deadline`, with what came.
    ///
    /// Keys that lie beside each other in a pack are read together, whatever their order here. The answers to one call
    /// share no memory with each other.
    pub fn get_many(&self, keys: &[LayerBlockKey], deadline: Instant) -> Vec<ObjectRead> {
        let reads = read::get_many(&self.shared, &self.runtime, keys, deadline);
        self.shared.state.lock().counts.count(&reads);
        reads
    }

    /// Whether `key` is here as far as this store knows, queued or in the bucket.
    pub fn contains(&self, key: LayerBlockKey) -> bool {
        let state = self.shared.state.lock();
        state.queue.payload(key).is_some() || state.catalog.place(key).is_some()
    }

    /// Calls `visit` with every layer of `block` that is here, rising.
    pub fn visit_layers(&self, block: &BlockKey, visit: impl FnMut(u16)) {
        let state = self.shared.state.lock();
        let mut layers: Vec<u16> = state.catalog.layers(block).chain(state.queue.layers(block)).collect();
        drop(state);
        layers.sort_unstable();
        layers.dedup();
        layers.into_iter().for_each(visit);
    }

    /// Calls `visit` with every block of `namespace` that has a layer here, and how many it has. The tier is locked
    /// meanwhile: do not call it from `visit`.
    pub fn visit_blocks(&self, namespace: NamespaceId, mut visit: impl FnMut(&BlockKey, usize)) {
        let state = self.shared.state.lock();
        for (block, layers) in state.catalog.blocks(namespace) {
            let also_queued = state
                .queue
                .layers(&block)
                .filter(|layer| state.catalog.place(block.layer(*layer)).is_none());
            visit(&block, layers + also_queued.count());
        }
        let mut last = None;
        for block in state.queue.blocks(namespace) {
            if last != Some(block) && state.catalog.layers(&block).next().is_none() {
                visit(&block, state.queue.layers(&block).count());
            }
            last = Some(block);
        }
    }

    /// Waits until everything taken so far is in the bucket, packs that are not full included.
    ///
    /// # Errors
    /// [`ObjectFlushError`] when it is not by `deadline`; it stays queued.
    pub fn flush(&self, deadline: Instant) -> Result<(), ObjectFlushError> {
        let mut state = self.shared.state.lock();
        let target = state.queue.close_all();
        self.shared.work.notify_one();
        while !state.queue.is_settled(target) {
            let stopped = state.stop;
            if stopped || self.shared.progress.wait_until(&mut state, deadline).timed_out() {
                let queued = state.queue.unsettled(target);
                let reason = self.shared.degraded(&state).unwrap_or_else(|| {
                    let reason = if stopped {
                        "the tier is stopped"
                    } else {
                        "the deadline came first"
                    };
                    reason.to_owned()
                });
                // It may have been settled at the last moment.
                return if queued == 0 {
                    Ok(())
                } else {
                    Err(ObjectFlushError { queued, reason })
                };
            }
        }
        Ok(())
    }

    /// Signs requests with other credentials from now on.
    pub fn renew(&self, credentials: &Credentials) {
        self.shared.bucket.renew(credentials);
        self.shared.look.notify_one();
        self.shared.work.notify_one();
    }

    /// Writes what is queued until `deadline`, then ends the tier's threads. Reads of what is queued still work, others
    /// are unavailable; offers are refused.
    ///
    /// # Errors
    /// [`ObjectFlushError`] when the bucket did not take everything; what it did not take is lost with this process.
    pub fn stop(&self, deadline: Instant) -> Result<(), ObjectFlushError> {
        let flushed = if self.thread.lock().is_some() {
            self.flush(deadline)
        } else {
            Ok(())
        };
        self.shared.state.lock().stop = true;
        self.shared.progress.notify_all();
        self.stopping.send_replace(true);
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the object tier's thread panicked");
        }
        flushed
    }

    /// Counts and sizes.
    pub fn stats(&self) -> ObjectStats {
        self.shared.stats()
    }
}

impl Drop for ObjectTier {
    fn drop(&mut self) {
        // What is not in the bucket by now was not flushed by choice.
        let _ = self.stop(Instant::now());
    }
}

/// Body of the tier's thread: uploads and scans until the stop, then the end of the runtime.
fn serve(runtime: Runtime, shared: Arc<Shared>, stop: watch::Receiver<bool>) {
    runtime.block_on(async {
        tokio::join!(upload::run(&shared, stop.clone()), scan::run(&shared, stop));
    });
    runtime.shutdown_timeout(STUCK_MAX);
}

#[cfg(test)]
mod tests;
