//! Counts and sizes of the object tier.

use super::{BreakerState, FailureCounts, ObjectRead, Shared, State};

/// Counts and sizes at one moment. Counts are since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObjectStats {
    /// Objects known in the open namespaces, of all stores.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Layer blocks known in them.
    pub layer_blocks: u64,
    /// Open namespaces.
    pub namespaces: u64,
    /// Objects that this store wrote and that are still there.
    pub own_objects: u64,
    /// Their bytes.
    pub own_bytes: u64,
    /// Limit of these bytes.
    pub own_bytes_max: u64,
    /// Layer blocks accepted, not yet in the bucket.
    pub queued_layer_blocks: u64,
    /// Their payload bytes.
    pub queue_bytes: u64,
    /// Limit of the payload bytes.
    pub queue_bytes_max: u64,
    /// Reads that were hits.
    pub hits: u64,
    /// Reads that were misses.
    pub misses: u64,
    /// Reads that got something else than what was put.
    pub corrupt: u64,
    /// Reads that ran into their deadline.
    pub late: u64,
    /// Reads not made or not answered because the bucket does not serve us.
    pub unavailable: u64,
    /// Offers not taken.
    pub refused: u64,
    /// Layer blocks accepted and then given up: their payload no longer had its checksum, or the bucket refused the object.
    pub lost: u64,
    /// Payload bytes of the hits that came out of the bucket's answers.
    pub hit_bytes: u64,
    /// Body bytes read from the bucket, manifests and gaps included.
    pub read_bytes: u64,
    /// Bytes of objects written.
    pub written_bytes: u64,
    /// Objects written.
    pub written_objects: u64,
    /// Objects of this store removed, for age or to stay inside the limit.
    pub removed_objects: u64,
    /// Objects that were listed once and are gone.
    pub vanished_objects: u64,
    /// Manifests read and understood.
    pub manifests: u64,
    /// Manifests that could not be used: torn, changed, of another namespace, or newer than this version.
    pub refused_manifests: u64,
    /// Manifests left out because [`super::ObjectConfig::entries_max`] newer blocks are known, at the last scan of each namespace.
    pub unread_manifests: u64,
    /// Objects listed that no version of this tier has named.
    pub foreign_objects: u64,
    /// Listings that reached the end.
    pub scans: u64,
    /// GET requests.
    pub gets: u64,
    /// PUT requests.
    pub puts: u64,
    /// Listings begun.
    pub lists: u64,
    /// DELETE requests.
    pub deletes: u64,
    /// Requests that failed, by kind; retries count each.
    pub failures: FailureCounts,
    /// Whether requests go out.
    pub breaker: BreakerState,
    /// How often the breaker opened.
    pub breaker_opened: u64,
    /// What does not work at the moment, and what to do.
    pub degraded: Option<String>,
}

/// What the tier counts itself; requests are counted by the bucket.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    hits: u64,
    misses: u64,
    corrupt: u64,
    late: u64,
    unavailable: u64,
    hit_bytes: u64,
    pub(super) refused: u64,
    pub(super) lost: u64,
    pub(super) written_bytes: u64,
    pub(super) written_objects: u64,
    pub(super) removed_objects: u64,
    pub(super) vanished_objects: u64,
    pub(super) manifests: u64,
    pub(super) refused_manifests: u64,
    pub(super) unread_manifests: u64,
    pub(super) foreign_objects: u64,
    pub(super) scans: u64,
}

impl Counts {
    pub(super) fn count(&mut self, reads: &[ObjectRead]) {
        for read in reads {
            match read {
                ObjectRead::Hit { payload, .. } => {
                    self.hits += 1;
                    self.hit_bytes += payload.len() as u64;
                }
                ObjectRead::Miss => self.misses += 1,
                ObjectRead::Corrupt => self.corrupt += 1,
                ObjectRead::TooLate => self.late += 1,
                ObjectRead::Unavailable => self.unavailable += 1,
            }
        }
    }
}

impl Shared {
    pub(super) fn stats(&self) -> ObjectStats {
        let (requests, breaker) = (self.bucket.counts(), self.bucket.breaker_state());
        let state = self.state.lock();
        let (sizes, counts) = (state.catalog.sizes(), state.counts);
        ObjectStats {
            objects: sizes.packs,
            bytes: sizes.bytes,
            layer_blocks: sizes.layer_blocks,
            namespaces: sizes.namespaces,
            own_objects: sizes.own_packs,
            own_bytes: sizes.own_bytes,
            own_bytes_max: self.config.written_bytes_max,
            queued_layer_blocks: state.queue.len() as u64,
            queue_bytes: state.queue.bytes(),
            queue_bytes_max: self.config.queue_bytes_max,
            hits: counts.hits,
            misses: counts.misses,
            corrupt: counts.corrupt,
            late: counts.late,
            unavailable: counts.unavailable,
            refused: counts.refused,
            lost: counts.lost,
            hit_bytes: counts.hit_bytes,
            read_bytes: requests.read_bytes,
            written_bytes: counts.written_bytes,
            written_objects: counts.written_objects,
            removed_objects: counts.removed_objects,
            vanished_objects: counts.vanished_objects,
            manifests: counts.manifests,
            refused_manifests: counts.refused_manifests,
            unread_manifests: counts.unread_manifests,
            foreign_objects: counts.foreign_objects,
            scans: counts.scans,
            gets: requests.gets,
            puts: requests.puts,
            lists: requests.lists,
            deletes: requests.deletes,
            failures: requests.failures,
            breaker,
            breaker_opened: self.bucket.breaker_opened(),
            degraded: self.degraded(&state),
        }
    }

    /// What does not work at the moment.
    pub(super) fn degraded(&self, state: &State) -> Option<String> {
        if self.bucket.breaker_state() != BreakerState::Closed
            && let Some(failure) = self.bucket.counts().last_failure
        {
            return Some(format!(
                "the bucket does not serve us ({}): {}",
                failure.name(),
                failure.advice()
            ));
        }
        state.degraded.clone()
    }
}
