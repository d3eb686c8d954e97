//! Plain numbers about the cache; the service turns them into metrics.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use kvasir_tier::{DiskStats, ObjectStats, Recovery};

/// Counts since the start, and sizes at one moment. Counts are of layer blocks unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Changes when the cache starts anew.
    pub epoch: u64,
    /// Since it started.
    pub uptime: Duration,
    /// Namespaces open.
    pub namespaces: u64,
    /// Of those, with a sketch basis.
    pub namespaces_with_basis: u64,
    /// Bytes of the files of different bases.
    pub basis_bytes: u64,
    /// Their limit.
    pub basis_bytes_max: u64,
    /// Blocks available: all layers held.
    pub blocks: u64,
    /// Bytes of the host tier, bookkeeping included.
    pub host_bytes: u64,
    /// Their limit.
    pub host_bytes_max: u64,
    /// Of those bytes: in buffers that are being filled, or held by readers after eviction.
    pub host_bytes_elsewhere: u64,
    /// Layer blocks in the host tier.
    pub host_layer_blocks: u64,
    /// Layer blocks moved inside the host tier, to join free memory.
    pub host_moved_layer_blocks: u64,
    /// Blocks evicted from the host tier.
    pub host_evicted_blocks: u64,
    /// The disk tier: bytes, queue, failures.
    pub disk: DiskStats,
    /// What the disk held at the start.
    pub recovery: Recovery,
    /// Accepted puts.
    pub put_blocks: u64,
    /// Their bytes.
    pub put_bytes: u64,
    /// Puts of what was there.
    pub put_present: u64,
    /// Puts shed because a queue was full.
    pub put_busy: u64,
    /// Puts whose checksum did not match their bytes.
    pub put_checksum_mismatch: u64,
    /// Accepted puts that the disk did not take: held in memory only.
    pub put_host_only: u64,
    /// Accepted puts that were not meant for the disk, since nobody asked for their blocks before.
    pub admission_skipped: u64,
    /// Of what was in memory only, written to disk after a hit.
    pub saved: u64,
    /// Gets served from the host tier.
    pub get_hits_host: u64,
    /// Gets served from the disk tier.
    pub get_hits_disk: u64,
    /// Gets served from the object tier.
    pub get_hits_object: u64,
    /// Bytes served.
    pub get_bytes: u64,
    /// Gets of what is not held.
    pub misses_absent: u64,
    /// Gets of what was held but wrong.
    pub misses_corrupt: u64,
    /// Gets shed because too many disk reads were waiting.
    pub misses_busy: u64,
    /// Gets of what is held, too late for their deadline or slower than computing.
    pub misses_late: u64,
    /// Of those, answered at once since they would have been too late.
    pub misses_late_estimated: u64,
    /// Layer blocks read from disk, prefetch included.
    pub disk_reads: u64,
    /// Reads from disk that run.
    pub disk_reads_running: u64,
    /// Reads from disk that wait for their turn.
    pub disk_reads_waiting: u64,
    /// Gets that were answered by another's read of the same layer block.
    pub reads_shared: u64,
    /// Layer blocks kept in memory after a read from below, prefetch included.
    pub promoted: u64,
    /// Layer blocks handed to the object tier when the disk forgot them.
    pub demoted: u64,
    /// The object tier, if there is one.
    pub object: Option<ObjectStats>,
    /// Layers of leases that are being brought into memory ahead: one or none.
    pub prefetch_running: u64,
    /// Layers of leases that wait to be brought into memory ahead.
    pub prefetch_waiting: u64,
    /// Bytes brought ahead and not read yet.
    pub prefetch_bytes: u64,
    /// Layer blocks read ahead.
    pub prefetch_issued: u64,
    /// Of those, read by their reader before its lease ended.
    pub prefetch_useful: u64,
    /// Of those, not.
    pub prefetch_wasted: u64,
    /// Layer blocks, or layers, that were not brought: no room, no place in the queue, or the lease ended.
    pub prefetch_dropped: u64,
    /// Wrong copies found in the host tier (also where the disk's copy then served).
    pub host_corrupt: u64,
    /// Leases held, open contexts included.
    pub leases: u64,
    /// Their limit.
    pub leases_max: u64,
    /// Matches that came without the lease they asked for.
    pub leases_refused: u64,
    /// Blocks pinned by leases.
    pub pinned_blocks: u64,
    /// Contexts open for retrieval.
    pub contexts: u64,
    /// Their limit.
    pub contexts_max: u64,
    /// Payload bytes that open contexts hold verified.
    pub context_bytes: u64,
    /// Their limit.
    pub context_bytes_max: u64,
    /// Retrievals answered.
    pub retrieve_queries: u64,
    /// Of those, answered by a scan that several queries shared.
    pub retrieve_joined: u64,
    /// Of the retrievals, with less than was asked because the deadline passed.
    pub retrieve_late: u64,
    /// Keys they scored, summed over KV heads.
    pub retrieve_keys_scanned: u64,
    /// Bytes of keys and values they read.
    pub retrieve_bytes: u64,
    /// Layer blocks that they wanted and did not get: vanished, corrupt, or too many disk reads were running.
    pub retrieve_missing: u64,
    /// Layer blocks that were sketched, each for all its KV heads.
    pub sketched_blocks: u64,
    /// Of those, ahead of the first query that wants them.
    pub sketched_ahead: u64,
    /// Processor time of that, in microseconds.
    pub sketch_cpu_micros: u64,
    /// Layer blocks that are being sketched ahead: one or none.
    pub sketches_running: u64,
    /// Layer blocks that wait to be sketched ahead.
    pub sketches_waiting: u64,
    /// Layer blocks that were not sketched ahead: the queue was full, or they had left memory.
    pub sketches_dropped: u64,
    /// Layer blocks whose sketches were read from disk.
    pub sketches_loaded: u64,
    /// Sketches on disk that were not whole: made again.
    pub sketches_unusable: u64,
    /// Bytes of sketches in memory, without those that contexts hold.
    pub sketch_bytes: u64,
    /// Their limit.
    pub sketch_bytes_max: u64,
    /// Layers of open contexts whose sketches were clustered.
    pub clustered_layers: u64,
    /// Processor time of the thread that does it, in microseconds.
    pub cluster_cpu_micros: u64,
    /// Layers that are being clustered: one or none.
    pub clusters_running: u64,
    /// Layers that wait to be clustered.
    pub clusters_waiting: u64,
    /// Layers that were not: the queue was full, their context was closed, or a block was not to be had.
    pub clusters_dropped: u64,
    /// Times that a layer was not since contexts hold as many bytes as they may.
    pub clusters_without_room: u64,
    /// Query samples taken.
    pub query_samples: u64,
    /// Bytes of those that are held.
    pub query_bytes: u64,
    /// Their limit.
    pub query_bytes_max: u64,
    /// Indexes built.
    pub indexes_built: u64,
    /// Indexes that could not be built.
    pub index_builds_failed: u64,
    /// Indexes that are being built: one or none.
    pub index_builds_running: u64,
    /// Indexes that wait to be built.
    pub index_builds_waiting: u64,
    /// Bytes of indexes handed to the disk.
    pub index_bytes_written: u64,
    /// Layers of built indexes that were read into memory.
    pub indexes_loaded: u64,
    /// Layers of built indexes whose files were gone or damaged.
    pub indexes_unusable: u64,
    /// Times that a built index was not used since there was no room for it in memory.
    pub indexes_without_room: u64,
    /// Bytes of built indexes in memory.
    pub index_bytes: u64,
    /// Their limit.
    pub index_bytes_max: u64,
    /// Times that work in the background stepped aside for callers.
    pub background_aside: u64,
    /// Event subscribers.
    pub subscribers: u64,
    /// Subscribers that fell behind and were let go.
    pub subscribers_lagged: u64,
}

/// A count that many threads raise.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) put_blocks: Counter,
    pub(crate) put_bytes: Counter,
    pub(crate) put_present: Counter,
    pub(crate) put_busy: Counter,
    pub(crate) put_checksum_mismatch: Counter,
    pub(crate) put_host_only: Counter,
    pub(crate) admission_skipped: Counter,
    pub(crate) saved: Counter,
    pub(crate) get_hits_host: Counter,
    pub(crate) get_hits_disk: Counter,
    pub(crate) get_hits_object: Counter,
    pub(crate) get_bytes: Counter,
    pub(crate) misses_absent: Counter,
    pub(crate) misses_corrupt: Counter,
    pub(crate) misses_busy: Counter,
    pub(crate) misses_late: Counter,
    pub(crate) misses_late_estimated: Counter,
    pub(crate) disk_reads: Counter,
    pub(crate) reads_shared: Counter,
    pub(crate) promoted: Counter,
    pub(crate) demoted: Counter,
    pub(crate) prefetch_issued: Counter,
    pub(crate) prefetch_dropped: Counter,
    pub(crate) host_corrupt: Counter,
    pub(crate) retrieve_queries: Counter,
    pub(crate) retrieve_joined: Counter,
    pub(crate) retrieve_late: Counter,
    pub(crate) retrieve_keys_scanned: Counter,
    pub(crate) retrieve_bytes: Counter,
    pub(crate) retrieve_missing: Counter,
    pub(crate) sketched_blocks: Counter,
    pub(crate) sketched_ahead: Counter,
    pub(crate) sketch_cpu_micros: Counter,
    pub(crate) sketches_dropped: Counter,
    pub(crate) sketches_loaded: Counter,
    pub(crate) sketches_unusable: Counter,
    pub(crate) clustered_layers: Counter,
    pub(crate) cluster_cpu_micros: Counter,
    pub(crate) clusters_dropped: Counter,
    pub(crate) clusters_without_room: Counter,
    pub(crate) query_samples: Counter,
    pub(crate) indexes_built: Counter,
    pub(crate) index_builds_failed: Counter,
    pub(crate) index_bytes_written: Counter,
    pub(crate) indexes_loaded: Counter,
    pub(crate) indexes_unusable: Counter,
    pub(crate) indexes_without_room: Counter,
}
