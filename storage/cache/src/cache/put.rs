//! Put: verify, keep in memory, queue for the disk.

use std::time::Instant;

use bytes::Bytes;
use kvasir_block::{
    BlockKey, Checksum, LayerBlockKey, NamespaceId,
    planted::{Bug, planted},
};
use kvasir_device::Buffer;
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
    /// Takes a layer block. The payload is copied once, into the memory where it rests: it is usually a part of a larger message, and
    /// keeping the part would keep the whole message in memory, outside every budget. [`Self::put_reserved`] copies nothing.
    ///
    /// # Errors
    /// `UnknownNamespace`; `InvalidArgument` for a layer that the schema lacks or a payload of another size.
    pub fn put(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> Result<PutOutcome, CacheError> {
        let right = || checksum.verifies(&payload);
        self.put_as(key, payload.len(), checksum, right, |shared| {
            shared.copy_in(key.namespace, &payload)
        })
    }

    /// Keeps a payload of `found` bytes, which `rest` puts where it will rest, unless it is none of the namespace, there already or
    /// not `right`.
    pub(super) fn put_as(
        &self,
        key: LayerBlockKey,
        found: usize,
        checksum: Checksum,
        right: impl FnOnce() -> bool,
        rest: impl FnOnce(&Shared) -> Bytes,
    ) -> Result<PutOutcome, CacheError> {
        let schema = self.shared.schema_of_layer(key)?;
        let expected = schema.layer_block_bytes();
        if found != expected {
            let message =
                format!("payload has {found} bytes, the schema says {expected}: check dtype, heads and block size");
            return Err(CacheError::new(ErrorKind::InvalidArgument, message));
        }
        let counters = &self.shared.counters;
        if self.shared.is_present(key) {
            counters.put_present.add(1);
            return Ok(PutOutcome::Present);
        }
        if !right() && !planted(Bug::PutChecksumSkipped) {
            counters.put_checksum_mismatch.add(1);
            return Ok(PutOutcome::ChecksumMismatch);
        }
        let outcome = self.shared.keep(key, rest(&self.shared), checksum);
        match outcome {
            PutOutcome::Stored => {
                counters.put_blocks.add(1);
                counters.put_bytes.add(expected as u64);
                self.shared.sketch_later(key);
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

    /// A copy in the arena, or outside it where that has no room: then it is the disk's queue that bounds it.
    fn copy_in(&self, namespace: NamespaceId, payload: &Bytes) -> Bytes {
        match self.reserve(namespace, payload.len()) {
            Some(mut buffer) => {
                buffer.as_mut_slice().copy_from_slice(payload);
                buffer.freeze(0..payload.len())
            }
            None => Bytes::copy_from_slice(payload),
        }
    }

    /// Memory of the host tier, for which others make room.
    pub(super) fn reserve(&self, namespace: NamespaceId, bytes: usize) -> Option<Buffer> {
        let owner = self.namespaces.owner(namespace);
        let mut state = self.state.lock();
        state.leases.expire(Instant::now());
        let State { host, leases, .. } = &mut *state;
        let (buffer, evicted) = match host.reserve(bytes, owner, |block: &BlockKey| leases.must_stay(block)) {
            Ok((buffer, evicted)) => (Some(buffer), evicted),
            Err(no_room) => (None, no_room.evicted),
        };
        for block in evicted {
            self.refresh(&mut state, block, Tier::Host);
        }
        buffer
    }

    fn keep(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> PutOutcome {
        let mut state = self.state.lock();
        state.leases.expire(Instant::now());
        let admitted = self.admits(&state, &key.block());
        let offer = if admitted {
            self.disk.offer(key, payload.clone(), checksum)
        } else {
            // As if the disk took nothing: it rests in memory or not at all.
            Offer::Degraded
        };
        match offer {
            Offer::Present => return PutOutcome::Present,
            // Stored must come to mean durable while the disk works, so what it cannot take now is shed.
            Offer::Full => return PutOutcome::Busy,
            Offer::Queued | Offer::Degraded | Offer::TooLarge => {}
        }
        // What does not lie in the arena lies where it does because there was no room.
        let in_host = self.arena.locate(&payload).is_some() && self.insert_host(&mut state, key, payload, checksum);
        if matches!(offer, Offer::Degraded | Offer::TooLarge) {
            if !in_host {
                return PutOutcome::Busy;
            }
            self.note_unsaved(&mut state, key, admitted);
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
        let owner = self.namespaces.owner(key.namespace);
        let State { host, leases, .. } = state;
        let inserted = host.insert(key, payload, checksum, owner, |block: &BlockKey| {
            leases.must_stay(block)
        });
        let (is_in, evicted) = match inserted {
            Ok(evicted) => (true, evicted),
            Err(no_room) => (false, no_room.evicted),
        };
        for block in evicted {
            self.refresh(state, block, Tier::Host);
        }
        is_in
    }
}
