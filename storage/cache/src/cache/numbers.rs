//! [`BlockCache::stats`]: one look at everything that is counted.

use std::time::Instant;

use super::{BlockCache, State};
use crate::CacheStats;

impl BlockCache {
    /// Counts and sizes.
    pub fn stats(&self) -> CacheStats {
        let shared = &self.shared;
        let counters = &shared.counters;
        let disk = shared.disk.stats();
        let (with_basis, basis_bytes) = shared.namespaces.bases();
        let (running, waiting) = shared.disk_gate.load();
        let (bringing, to_bring) = shared.prefetch.load();
        let indexes = &shared.indexes;
        let (sketches, clusters, builds) = (
            indexes.sketcher.load(),
            indexes.clusterer.load(),
            indexes.builder.load(),
        );
        let mut state = shared.state.lock();
        state.leases.expire(Instant::now());
        let State { leases, ahead, .. } = &mut *state;
        ahead.sweep(|lease| leases.is_live(lease));
        let host = state.host.stats();
        CacheStats {
            epoch: shared.epoch,
            uptime: shared.started.elapsed(),
            namespaces: shared.namespaces.len() as u64,
            namespaces_with_basis: with_basis as u64,
            basis_bytes,
            basis_bytes_max: shared.config.basis_bytes_max,
            blocks: state.available.len() as u64,
            host_bytes: host.bytes,
            host_bytes_max: host.bytes_max,
            host_bytes_elsewhere: host.bytes_elsewhere,
            host_layer_blocks: host.layer_blocks,
            host_moved_layer_blocks: host.moved_layer_blocks,
            host_evicted_blocks: host.evicted_blocks,
            disk,
            recovery: shared.disk.recovery(),
            put_blocks: counters.put_blocks.get(),
            put_bytes: counters.put_bytes.get(),
            put_present: counters.put_present.get(),
            put_busy: counters.put_busy.get(),
            put_checksum_mismatch: counters.put_checksum_mismatch.get(),
            put_host_only: counters.put_host_only.get(),
            admission_skipped: counters.admission_skipped.get(),
            saved: counters.saved.get(),
            get_hits_host: counters.get_hits_host.get(),
            get_hits_disk: counters.get_hits_disk.get(),
            get_hits_object: counters.get_hits_object.get(),
            get_bytes: counters.get_bytes.get(),
            misses_absent: counters.misses_absent.get(),
            misses_corrupt: counters.misses_corrupt.get(),
            misses_busy: counters.misses_busy.get(),
            misses_late: counters.misses_late.get(),
            misses_late_estimated: counters.misses_late_estimated.get(),
            disk_reads: counters.disk_reads.get(),
            disk_reads_running: running as u64,
            disk_reads_waiting: waiting as u64,
            reads_shared: counters.reads_shared.get(),
            promoted: counters.promoted.get(),
            demoted: counters.demoted.get(),
            object: shared.object.as_ref().map(kvasir_tier::ObjectTier::stats),
            prefetch_running: bringing as u64,
            prefetch_waiting: to_bring as u64,
            prefetch_bytes: state.ahead.bytes(),
            prefetch_issued: counters.prefetch_issued.get(),
            prefetch_useful: state.ahead.useful,
            prefetch_wasted: state.ahead.wasted,
            prefetch_dropped: counters.prefetch_dropped.get(),
            host_corrupt: counters.host_corrupt.get(),
            leases: state.leases.len() as u64,
            leases_max: shared.config.leases_max as u64,
            leases_refused: state.leases.refused,
            pinned_blocks: state.leases.pinned_blocks() as u64,
            contexts: shared.contexts.open(),
            contexts_max: shared.config.contexts_max as u64,
            context_bytes: shared.contexts.bytes(),
            context_bytes_max: shared.config.context_bytes_max,
            retrieve_queries: counters.retrieve_queries.get(),
            retrieve_joined: counters.retrieve_joined.get(),
            retrieve_late: counters.retrieve_late.get(),
            retrieve_keys_scanned: counters.retrieve_keys_scanned.get(),
            retrieve_bytes: counters.retrieve_bytes.get(),
            retrieve_missing: counters.retrieve_missing.get(),
            sketched_blocks: counters.sketched_blocks.get(),
            sketched_ahead: counters.sketched_ahead.get(),
            sketch_cpu_micros: counters.sketch_cpu_micros.get(),
            sketches_running: sketches.running,
            sketches_waiting: sketches.waiting,
            sketches_dropped: counters.sketches_dropped.get(),
            sketches_loaded: counters.sketches_loaded.get(),
            sketches_unusable: counters.sketches_unusable.get(),
            sketch_bytes: indexes.sketcher.bytes(),
            sketch_bytes_max: shared.config.sketch_bytes_max,
            clustered_layers: counters.clustered_layers.get(),
            cluster_cpu_micros: counters.cluster_cpu_micros.get(),
            clusters_running: clusters.running,
            clusters_waiting: clusters.waiting,
            clusters_dropped: counters.clusters_dropped.get(),
            clusters_without_room: counters.clusters_without_room.get(),
            query_samples: counters.query_samples.get(),
            query_bytes: indexes.samples.bytes(),
            query_bytes_max: shared.config.query_bytes_max,
            indexes_built: counters.indexes_built.get(),
            index_builds_failed: counters.index_builds_failed.get(),
            index_builds_running: builds.running,
            index_builds_waiting: builds.waiting,
            index_bytes_written: counters.index_bytes_written.get(),
            indexes_loaded: counters.indexes_loaded.get(),
            indexes_unusable: counters.indexes_unusable.get(),
            indexes_without_room: counters.indexes_without_room.get(),
            index_bytes: indexes.loaded.bytes(),
            index_bytes_max: shared.config.index_bytes_max,
            background_aside: sketches.aside + clusters.aside + builds.aside,
            subscribers: state.events.subscribers() as u64,
            subscribers_lagged: state.events.lagged,
        }
    }
}
