//! Put: verify, keep in memory, queue for the disk.

use std::time::Instant;

use bytes::Bytes;
use kvasir_block::{BlockKey, Checksum, LayerBlockKey};
use kvasir_tier::Offer;

use super::{BlockCache, Shared, State, Tier};
use crate::{CacheError, ErrorKind};

/// What became of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// Accepted; durable after the next flush (unless the disk is failing, see `put_host_only` in the stats).
    Stored,
    /// Was there already; nothing changed.
    Present,
    /// Shed because the flush queue is full or everything in memory is leased. Try later, or go without.
    Busy,
    /// The bytes do not have the checksum they came with; not stored.
    ChecksumMismatch,
}

impl BlockCache {
    /// Takes a layer block. The payload is copied: it is usually a part of a larger message, and keeping the part would
    /// keep the whole message in memory, outside every budget.
    ///
    /// # Errors
    /// `UnknownNamespace`; `InvalidArgument` for a layer that the schema lacks or a payload of another size.
    pub fn put(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> Result<PutOutcome, CacheError> {
        let schema = self.shared.schema_of_layer(key)?;
        let expected = schema.layer_block_bytes();
        if payload.len() != expected {
            let found = payload.len();
            let message =
                format!("payload has {found} bytes, the schema says {expected}: check dtype, heads and block size");
            return Err(CacheError::new(ErrorKind::InvalidArgument, message));
        }
        let counters = &self.shared.counters;
        if self.shared.is_present(key) {
            counters.put_present.add(1);
            return Ok(PutOutcome::Present);
        }
        if !checksum.verifies(&payload) {
            counters.put_checksum_mismatch.add(1);
            return Ok(PutOutcome::ChecksumMismatch);
        }
        let outcome = self.shared.keep(key, Bytes::copy_from_slice(&payload), checksum);
        match outcome {
            PutOutcome::Stored => {
                counters.put_blocks.add(1);
                counters.put_bytes.add(expected as u64);
            }
            PutOutcome::Present => counters.put_present.add(1),
            PutOutcome::Busy => counters.put_busy.add(1),
            PutOutcome::ChecksumMismatch => {}
        }
        Ok(outcome)
    }
}

impl Shared {
    fn is_present(&self, key: LayerBlockKey) -> bool {
        let in_host = self.state.lock().host.get(key);
        match in_host {
            Some((payload, checksum)) => {
                // Only in memory since the disk did not take it: it may by now.
                if !self.disk.contains(key) {
                    let _ = self.disk.offer(key, payload, checksum);
                }
                true
            }
            None => self.disk.contains(key),
        }
    }

    fn keep(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> PutOutcome {
        let mut state = self.state.lock();
        state.leases.expire(Instant::now());
        let offer = self.disk.offer(key, payload.clone(), checksum);
        match offer {
            Offer::Present => return PutOutcome::Present,
            // Stored must come to mean durable while the disk works, so what it cannot take now is shed.
            Offer::Full => return PutOutcome::Busy,
            Offer::Queued | Offer::Degraded | Offer::TooLarge => {}
        }
        let in_host = self.insert_host(&mut state, key, payload, checksum);
        if matches!(offer, Offer::Degraded | Offer::TooLarge) {
            if !in_host {
                return PutOutcome::Busy;
            }
            self.counters.put_host_only.add(1);
        }
        self.refresh(&mut state, key.block(), if in_host { Tier::Host } else { Tier::Disk });
        PutOutcome::Stored
    }

    /// Puts into the host tier what is not leased out of it; false if there is no room.
    pub(super) fn insert_host(
        &self,
        state: &mut State,
        key: LayerBlockKey,
        payload: Bytes,
        checksum: Checksum,
    ) -> bool {
        let State { host, leases, .. } = state;
        let Ok(evicted) = host.insert(key, payload, checksum, |block: &BlockKey| leases.is_pinned(block)) else {
            return false;
        };
        for block in evicted {
            self.refresh(state, block, Tier::Host);
        }
        true
    }
}
