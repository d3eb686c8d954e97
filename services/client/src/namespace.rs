//! What the store says about a namespace and a prefix.

use std::time::Duration;

use kvasir_block::{KvSchema, NamespaceId};

use crate::BulkOffer;

/// An open namespace and the limits of the store that holds it.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// Its id.
    pub id: NamespaceId,
    /// The schema of its blocks.
    pub schema: KvSchema,
    /// Bytes of one layer block.
    pub layer_block_bytes: usize,
    /// Largest message that the store accepts, in bytes.
    pub message_bytes_max: usize,
    /// Most block hashes in one call.
    pub hashes_max: usize,
    /// Changes when the store starts anew: what was known about its blocks is then history.
    pub epoch: u64,
    /// Id of the basis that the store sketches this namespace's keys with; `None` where it has none.
    pub basis: Option<[u8; 32]>,
    /// The store's faster paths to blocks, if it has any.
    pub bulk: Option<BulkOffer>,
}

/// How much of a chain the store holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixMatch {
    /// Blocks from the start, without a gap, whose layers are all held.
    pub hit_blocks: usize,
    /// Of those, blocks whose layers are all in the store's memory.
    pub host_blocks: usize,
    /// Of the others, blocks whose layers are all in its memory or on its disk.
    pub disk_blocks: usize,
    /// Of the others, blocks that need the object tier.
    pub object_blocks: usize,
    /// Keeps the hit until released or expired; `None` when none was asked for, nothing was hit, or too many are out.
    pub lease: Option<u64>,
    /// How long the lease lasts.
    pub lease_for: Duration,
}

impl PrefixMatch {
    /// What the store says about a chain of `asked` blocks, if it can be.
    pub(crate) fn checked(self, asked: usize) -> Result<Self, String> {
        let Self {
            hit_blocks,
            host_blocks,
            disk_blocks,
            object_blocks,
            ..
        } = self;
        if hit_blocks > asked || host_blocks + disk_blocks + object_blocks > hit_blocks {
            return Err(format!(
                "{host_blocks} of {hit_blocks} hits in memory, {disk_blocks} on disk and {object_blocks} in objects, of {asked} \
                 blocks asked for"
            ));
        }
        Ok(self)
    }
}
