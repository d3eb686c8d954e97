//! `kvasir_store_*`: the cache's numbers, the doors and the streams, once a second; latencies where calls are served.
//!
//! First looks: `kvasir_store_get_hits_total` against `kvasir_store_get_misses_total`, `kvasir_store_flush_queue_bytes` against its
//! maximum, `kvasir_store_door_waiting`, and `kvasir_store_disk_degraded`.

use std::{sync::Arc, time::Duration};

use kvasir_cache::CacheStats;
use metrics::{counter, gauge, histogram};

use crate::{door::Door, served::Served};

/// How often the cache's numbers are copied.
const PERIOD: Duration = Duration::from_secs(1);

/// Copies numbers until the store stops.
pub(crate) async fn publish(served: Arc<Served>) {
    let mut tick = tokio::time::interval(PERIOD);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = served.stopping.cancelled() => return,
        }
        // Takes the cache's lock for a moment, so not on this thread.
        match served.with_cache(kvasir_cache::BlockCache::stats).await {
            Ok(stats) => cache(&stats),
            Err(_) => return,
        }
        doors(&[&served.io, &served.searches.door]);
        gauge!("kvasir_store_parked_bytes").set(served.searches.rooms.bytes() as f64);
        gauge!("kvasir_store_parked_bytes_max").set(served.config.parked_bytes_max.as_u64() as f64);
        let (streams, put_bytes) = served.load();
        gauge!("kvasir_store_streams").set(streams as f64);
        gauge!("kvasir_store_streams_max").set(served.config.streams_max as f64);
        gauge!("kvasir_store_put_buffer_bytes").set(put_bytes as f64);
        gauge!("kvasir_store_put_buffer_bytes_max").set(served.config.put_bytes_max.as_u64() as f64);
    }
}

fn doors(doors: &[&Door]) {
    for door in doors {
        let (name, threads, running, waiting) = door.load();
        gauge!("kvasir_store_door_threads", "door" => name).set(threads as f64);
        gauge!("kvasir_store_door_running", "door" => name).set(running as f64);
        gauge!("kvasir_store_door_waiting", "door" => name).set(waiting as f64);
    }
}

fn cache(stats: &CacheStats) {
    let disk = &stats.disk;
    let gauges = [
        ("kvasir_store_namespaces", stats.namespaces),
        ("kvasir_store_namespaces_with_basis", stats.namespaces_with_basis),
        ("kvasir_store_basis_bytes", stats.basis_bytes),
        ("kvasir_store_basis_bytes_max", stats.basis_bytes_max),
        ("kvasir_store_blocks", stats.blocks),
        ("kvasir_store_flush_queue_bytes", disk.queue_bytes),
        ("kvasir_store_flush_queue_bytes_max", disk.queue_bytes_max),
        ("kvasir_store_flush_queue_layer_blocks", disk.queued_layer_blocks),
        ("kvasir_store_host_bytes_elsewhere", stats.host_bytes_elsewhere),
        ("kvasir_store_segments", disk.segments),
        ("kvasir_store_leases", stats.leases),
        ("kvasir_store_leases_max", stats.leases_max),
        ("kvasir_store_pinned_blocks", stats.pinned_blocks),
        ("kvasir_store_contexts", stats.contexts),
        ("kvasir_store_contexts_max", stats.contexts_max),
        ("kvasir_store_context_bytes", stats.context_bytes),
        ("kvasir_store_context_bytes_max", stats.context_bytes_max),
        ("kvasir_store_sketches_waiting", stats.sketches_waiting),
        ("kvasir_store_sketch_bytes", stats.sketch_bytes),
        ("kvasir_store_sketch_bytes_max", stats.sketch_bytes_max),
        ("kvasir_store_clusters_running", stats.clusters_running),
        ("kvasir_store_clusters_waiting", stats.clusters_waiting),
        ("kvasir_store_query_sample_bytes", stats.query_bytes),
        ("kvasir_store_query_sample_bytes_max", stats.query_bytes_max),
        ("kvasir_store_index_bytes", stats.index_bytes),
        ("kvasir_store_index_bytes_max", stats.index_bytes_max),
        ("kvasir_store_index_builds_running", stats.index_builds_running),
        ("kvasir_store_index_builds_waiting", stats.index_builds_waiting),
        ("kvasir_store_subscribers", stats.subscribers),
        ("kvasir_store_disk_degraded", u64::from(disk.degraded.is_some())),
    ];
    for (name, value) in gauges {
        gauge!(name).set(value as f64);
    }
    let tiers = [
        ("host", stats.host_bytes, stats.host_bytes_max, stats.host_layer_blocks),
        ("disk", disk.bytes, disk.bytes_max, disk.layer_blocks),
    ];
    for (tier, bytes, bytes_max, layer_blocks) in tiers {
        gauge!("kvasir_store_tier_bytes", "tier" => tier).set(bytes as f64);
        gauge!("kvasir_store_tier_bytes_max", "tier" => tier).set(bytes_max as f64);
        gauge!("kvasir_store_tier_layer_blocks", "tier" => tier).set(layer_blocks as f64);
    }
    counter!("kvasir_store_get_hits_total", "tier" => "host").absolute(stats.get_hits_host);
    counter!("kvasir_store_get_hits_total", "tier" => "disk").absolute(stats.get_hits_disk);
    counter!("kvasir_store_get_hits_total", "tier" => "object").absolute(stats.get_hits_object);
    flow(stats);
    let misses = [
        ("absent", stats.misses_absent),
        ("corrupt", stats.misses_corrupt),
        ("busy", stats.misses_busy),
        ("late", stats.misses_late),
    ];
    for (reason, count) in misses {
        counter!("kvasir_store_get_misses_total", "reason" => reason).absolute(count);
    }
    let puts = [
        ("stored", stats.put_blocks),
        ("present", stats.put_present),
        ("busy", stats.put_busy),
        ("checksum_mismatch", stats.put_checksum_mismatch),
    ];
    for (outcome, count) in puts {
        counter!("kvasir_store_put_blocks_total", "outcome" => outcome).absolute(count);
    }
    let counters = [
        ("kvasir_store_get_bytes_total", stats.get_bytes),
        ("kvasir_store_put_bytes_total", stats.put_bytes),
        ("kvasir_store_put_host_only_total", stats.put_host_only),
        ("kvasir_store_host_evicted_blocks_total", stats.host_evicted_blocks),
        (
            "kvasir_store_host_moved_layer_blocks_total",
            stats.host_moved_layer_blocks,
        ),
        ("kvasir_store_host_corrupt_total", stats.host_corrupt),
        ("kvasir_store_disk_refused_total", disk.refused),
        ("kvasir_store_disk_corrupt_total", disk.corrupt),
        ("kvasir_store_disk_failures_total", disk.failures),
        ("kvasir_store_disk_syncs_total", disk.syncs),
        ("kvasir_store_reclaimed_segments_total", disk.reclaimed_segments),
        ("kvasir_store_sketched_ahead_total", stats.sketched_ahead),
        ("kvasir_store_sketch_cpu_microseconds_total", stats.sketch_cpu_micros),
        ("kvasir_store_sketches_dropped_total", stats.sketches_dropped),
        ("kvasir_store_sketches_loaded_total", stats.sketches_loaded),
        ("kvasir_store_sketches_unusable_total", stats.sketches_unusable),
        ("kvasir_store_clustered_layers_total", stats.clustered_layers),
        ("kvasir_store_cluster_cpu_microseconds_total", stats.cluster_cpu_micros),
        ("kvasir_store_clusters_dropped_total", stats.clusters_dropped),
        ("kvasir_store_clusters_without_room_total", stats.clusters_without_room),
        ("kvasir_store_query_samples_total", stats.query_samples),
        ("kvasir_store_indexes_built_total", stats.indexes_built),
        ("kvasir_store_index_builds_failed_total", stats.index_builds_failed),
        ("kvasir_store_index_written_bytes_total", stats.index_bytes_written),
        ("kvasir_store_indexes_loaded_total", stats.indexes_loaded),
        ("kvasir_store_indexes_unusable_total", stats.indexes_unusable),
        ("kvasir_store_indexes_without_room_total", stats.indexes_without_room),
        ("kvasir_store_background_aside_total", stats.background_aside),
        ("kvasir_store_leases_refused_total", stats.leases_refused),
        ("kvasir_store_subscribers_lagged_total", stats.subscribers_lagged),
        ("kvasir_store_keys_scanned_total", stats.retrieve_keys_scanned),
        ("kvasir_store_retrieval_bytes_total", stats.retrieve_bytes),
        ("kvasir_store_sketched_layer_blocks_total", stats.sketched_blocks),
        ("kvasir_store_queries_joined_total", stats.retrieve_joined),
        ("kvasir_store_queries_late_total", stats.retrieve_late),
        ("kvasir_store_context_blocks_missing_total", stats.retrieve_missing),
    ];
    for (name, value) in counters {
        counter!(name).absolute(value);
    }
}

/// What moves between the tiers, and what waits to.
fn flow(stats: &CacheStats) {
    let gauges = [
        ("kvasir_store_disk_reads_running", stats.disk_reads_running),
        ("kvasir_store_disk_reads_waiting", stats.disk_reads_waiting),
        ("kvasir_store_prefetch_running", stats.prefetch_running),
        ("kvasir_store_prefetch_waiting", stats.prefetch_waiting),
        ("kvasir_store_prefetch_bytes", stats.prefetch_bytes),
    ];
    for (name, value) in gauges {
        gauge!(name).set(value as f64);
    }
    let counters = [
        ("kvasir_store_disk_reads_total", stats.disk_reads),
        ("kvasir_store_reads_shared_total", stats.reads_shared),
        ("kvasir_store_misses_late_estimated_total", stats.misses_late_estimated),
        ("kvasir_store_promoted_total", stats.promoted),
        ("kvasir_store_demoted_total", stats.demoted),
        ("kvasir_store_admission_skipped_total", stats.admission_skipped),
        ("kvasir_store_saved_total", stats.saved),
        ("kvasir_store_prefetch_issued_total", stats.prefetch_issued),
        ("kvasir_store_prefetch_useful_total", stats.prefetch_useful),
        ("kvasir_store_prefetch_wasted_total", stats.prefetch_wasted),
        ("kvasir_store_prefetch_dropped_total", stats.prefetch_dropped),
        (
            "kvasir_store_readmitted_layer_blocks_total",
            stats.disk.readmitted_layer_blocks,
        ),
        (
            "kvasir_store_forgotten_warm_layer_blocks_total",
            stats.disk.forgotten_warm_layer_blocks,
        ),
        (
            "kvasir_store_disk_payload_bytes_total",
            stats.disk.payload_bytes_written,
        ),
        ("kvasir_store_disk_written_bytes_total", stats.disk.bytes_written),
        ("kvasir_store_scrubbed_bytes_total", stats.disk.scrubbed_bytes),
        ("kvasir_store_scrub_corrupt_total", stats.disk.scrub_corrupt),
    ];
    for (name, value) in counters {
        counter!(name).absolute(value);
    }
    if let Some(object) = &stats.object {
        gauge!("kvasir_store_tier_bytes", "tier" => "object").set(object.bytes as f64);
        gauge!("kvasir_store_tier_layer_blocks", "tier" => "object").set(object.layer_blocks as f64);
        gauge!("kvasir_store_object_queue_bytes").set(object.queue_bytes as f64);
        gauge!("kvasir_store_object_queue_bytes_max").set(object.queue_bytes_max as f64);
        gauge!("kvasir_store_object_degraded").set(f64::from(u8::from(object.degraded.is_some())));
        counter!("kvasir_store_object_corrupt_total").absolute(object.corrupt);
        counter!("kvasir_store_object_refused_total").absolute(object.refused);
        counter!("kvasir_store_object_failures_total").absolute(object.failures.total());
    }
}

/// A call (of a stream: one message of it) was served in `elapsed`.
pub(crate) fn served(call: &'static str, elapsed: Duration) {
    histogram!("kvasir_store_call_seconds", "call" => call).record(elapsed.as_secs_f64());
}

/// A call ended with a status that is not OK.
pub(crate) fn refused(call: &'static str, code: &'static str) {
    counter!("kvasir_store_errors_total", "call" => call, "code" => code).increment(1);
}

/// Layer blocks answered without being looked at.
pub(crate) fn shed(outcome: &'static str, layer_blocks: usize) {
    counter!("kvasir_store_shed_total", "outcome" => outcome).increment(layer_blocks as u64);
}

/// Bulk connections now, and how many there may be.
pub(crate) fn bulk_connections(open: usize, max: usize) {
    gauge!("kvasir_store_bulk_connections").set(open as f64);
    gauge!("kvasir_store_bulk_connections_max").set(max as f64);
}

/// Places in the store's memory that readers on this machine hold, and their bytes.
pub(crate) fn local_held(places: u64, bytes: u64) {
    gauge!("kvasir_store_local_places").set(places as f64);
    gauge!("kvasir_store_local_bytes").set(bytes as f64);
}

/// A bulk connection panicked.
pub(crate) fn bulk_panic() {
    counter!("kvasir_store_bulk_panics_total").increment(1);
}

/// A reader said that so many layer blocks came wrong.
pub(crate) fn suspected(layer_blocks: usize) {
    counter!("kvasir_store_suspected_total").increment(layer_blocks as u64);
}

/// A retrieval was answered.
pub(crate) fn retrieved(form: &'static str, fell_short: bool) {
    counter!("kvasir_store_queries_total", "form" => form).increment(1);
    counter!("kvasir_store_shortfalls_total").increment(u64::from(fell_short));
}

/// A query waited for a thread and was then searched for.
pub(crate) fn searched(waited: Duration, search: Duration) {
    histogram!("kvasir_store_search_wait_seconds").record(waited.as_secs_f64());
    histogram!("kvasir_store_search_seconds").record(search.as_secs_f64());
}

/// A hint came: its search was begun (`searched`) or its blocks read (`read`) or in memory already (`warm`); no thread was idle
/// (`busy`); of those begun, no memory was left for what it would find (`no_room`).
pub(crate) fn hint(outcome: &'static str) {
    counter!("kvasir_store_hints_total", "outcome" => outcome).increment(1);
}

/// A query came that was searched ahead for: with what it asks (`taken`) or something else (`other`).
pub(crate) fn parked(outcome: &'static str) {
    counter!("kvasir_store_parked_total", "outcome" => outcome).increment(1);
}

/// A query was answered with what was searched ahead, `hidden` of the time before it came. KV heads whose forecast was of use,
/// and of those where it was too far off.
pub(crate) fn searched_ahead(hidden: Duration, used: u32, too_far: u32) {
    histogram!("kvasir_store_search_hidden_seconds").record(hidden.as_secs_f64());
    counter!("kvasir_store_parked_heads_total", "outcome" => "used").increment(used.into());
    counter!("kvasir_store_parked_heads_total", "outcome" => "too_far").increment(too_far.into());
}
