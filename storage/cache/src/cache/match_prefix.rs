//! Match: how much of a chain is held without a gap, and a lease on it.

use std::time::{Duration, Instant};

use kvasir_block::{BlockHash, BlockKey, NamespaceId};

use super::{BlockCache, Tier};
use crate::{CacheError, LeaseId};

/// How much of a chain is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixMatch {
    /// Blocks from the start, without a gap, whose layers are all held.
    pub hit_blocks: usize,
    /// Of those, blocks whose layers are all in memory.
    pub host_blocks: usize,
    /// Of the others, blocks whose layers are all in memory or on disk.
    pub disk_blocks: usize,
    /// Of the others, blocks that need the object tier.
    pub object_blocks: usize,
    /// Keeps the hit until released or expired. `None` when none was asked for, nothing was hit, or too many are held.
    pub lease: Option<LeaseId>,
    /// How long it lasts: what was asked for, at most `lease_max`.
    pub lease_for: Duration,
}

impl BlockCache {
    /// Matches a chain from its first block. No I/O: a few hash lookups per block.
    ///
    /// # Errors
    /// `UnknownNamespace`.
    pub fn match_prefix(
        &self,
        namespace: NamespaceId,
        hashes: &[BlockHash],
        lease: Option<Duration>,
    ) -> Result<PrefixMatch, CacheError> {
        let layers = usize::from(self.shared.schema_of(namespace)?.layers);
        let mut state = self.shared.state.lock();
        state.host.note_chain(namespace, hashes);
        let chain = hashes.iter().map(|&hash| namespace.block(hash));
        for block in chain.clone() {
            state.reuse.note_asked(&block);
        }
        let mut hit: Vec<BlockKey> = Vec::new();
        let [mut host_blocks, mut disk_blocks, mut object_blocks] = [0; 3];
        for block in chain {
            match self.shared.held_in(&mut state, &block, layers) {
                Some(Tier::Host) => host_blocks += 1,
                Some(Tier::Disk) => disk_blocks += 1,
                Some(Tier::Object) => object_blocks += 1,
                None => break,
            }
            hit.push(block);
        }
        // From the tail to the head, so that eviction takes the tail first and what is left is still a prefix.
        for block in hit.iter().rev() {
            state.host.touch(block);
        }
        let hit_blocks = hit.len();
        let lease_for = lease.map(|wish| wish.min(self.shared.config.lease_max));
        let lease = match lease_for {
            Some(lease_for) if hit_blocks > 0 && !lease_for.is_zero() => {
                state.leases.grant(hit, Instant::now(), Some(lease_for))
            }
            _ => None,
        };
        let lease_for = lease.and(lease_for).unwrap_or_default();
        drop(state);
        if let Some(lease) = lease
            && host_blocks < hit_blocks
        {
            self.shared.look_ahead_first(lease, layers);
        }
        Ok(PrefixMatch {
            hit_blocks,
            host_blocks,
            disk_blocks,
            object_blocks,
            lease,
            lease_for,
        })
    }
}
