//! The host tier: layer blocks in memory under a byte budget.
//!
//! Not synchronised: its owner keeps it under the lock that also guards leases, so that a lease and an eviction cannot
//! cross. Nothing here does I/O or copies payload bytes.
//!
//! Invariants: `bytes <= bytes_max` whenever a call returns; every block in `index` is in the recency list, once.
//! Eviction takes whole blocks: a block that misses one layer is of no use to a prefix.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use kvasir_block::{BlockKey, Checksum, LayerBlockKey};

/// Counted for each layer block besides its payload: map nodes, the buffer's own header.
const LAYER_OVERHEAD_BYTES: u64 = 160;
/// Counted for each block: key, list links, table slot.
const BLOCK_OVERHEAD_BYTES: u64 = 256;
/// No neighbour in the recency list.
const NONE: usize = usize::MAX;

/// A layer block that does not fit: the budget is too small for it, or everything else must stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no room for {payload_bytes} bytes in the host tier of {bytes_max}: what is in it is leased; wait or raise host_bytes_max"
)]
pub struct NoRoom {
    /// Bytes that were offered.
    pub payload_bytes: usize,
    /// The budget.
    pub bytes_max: u64,
}

/// Layer blocks in memory, at most `bytes_max` of them with their bookkeeping.
#[derive(Debug)]
pub struct HostTier {
    bytes_max: u64,
    bytes: u64,
    layer_blocks: u64,
    evicted_blocks: u64,
    index: HashMap<BlockKey, usize>,
    nodes: Vec<Node>,
    free: Vec<usize>,
    youngest: usize,
    oldest: usize,
}

#[derive(Debug)]
struct Node {
    key: BlockKey,
    layers: BTreeMap<u16, Slot>,
    younger: usize,
    older: usize,
}

#[derive(Debug)]
struct Slot {
    payload: Bytes,
    checksum: Checksum,
}

impl HostTier {
    /// An empty tier of at most `bytes_max` bytes.
    pub fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            bytes: 0,
            layer_blocks: 0,
            evicted_blocks: 0,
            index: HashMap::new(),
            nodes: Vec::new(),
            free: Vec::new(),
            youngest: NONE,
            oldest: NONE,
        }
    }

    /// Keeps `payload`, evicting other blocks for it where needed; answers with the blocks it evicted. A key that is
    /// there already keeps its first bytes. Blocks for which `must_stay` holds are not evicted.
    ///
    /// # Errors
    /// [`NoRoom`] when what must stay leaves too little; nothing was evicted in vain.
    pub fn insert(
        &mut self,
        key: LayerBlockKey,
        payload: Bytes,
        checksum: Checksum,
        must_stay: impl Fn(&BlockKey) -> bool,
    ) -> Result<Vec<BlockKey>, NoRoom> {
        let block = key.block();
        if self.contains(key) {
            return Ok(Vec::new());
        }
        let new_block = if self.index.contains_key(&block) {
            0
        } else {
            BLOCK_OVERHEAD_BYTES
        };
        let wanted = payload.len() as u64 + LAYER_OVERHEAD_BYTES + new_block;
        let Some(evicted) = self.make_room(wanted, &block, must_stay) else {
            return Err(NoRoom {
                payload_bytes: payload.len(),
                bytes_max: self.bytes_max,
            });
        };
        let at = match self.index.get(&block) {
            Some(&at) => at,
            None => self.add_block(block),
        };
        self.nodes[at].layers.insert(key.layer, Slot { payload, checksum });
        self.bytes += wanted;
        self.layer_blocks += 1;
        debug_assert!(self.bytes <= self.bytes_max, "the budget is a promise");
        Ok(evicted)
    }

    /// The payload under `key` as it was put, with the checksum that came with it. Not verified here: that is done
    /// outside the owner's lock. Does not touch recency, see [`Self::touch`].
    pub fn get(&self, key: LayerBlockKey) -> Option<(Bytes, Checksum)> {
        let slot = self.node(&key.block())?.layers.get(&key.layer)?;
        Some((slot.payload.clone(), slot.checksum))
    }

    /// Whether `key` is here.
    pub fn contains(&self, key: LayerBlockKey) -> bool {
        self.node(&key.block())
            .is_some_and(|node| node.layers.contains_key(&key.layer))
    }

    /// How many layers of a block are here.
    pub fn layer_count(&self, block: &BlockKey) -> usize {
        self.node(block).map_or(0, |node| node.layers.len())
    }

    /// Layers of a block that are here, rising.
    pub fn layers(&self, block: &BlockKey) -> impl Iterator<Item = u16> {
        self.node(block)
            .into_iter()
            .flat_map(|node| node.layers.keys().copied())
    }

    /// Makes a block the youngest. Touch a chain from its tail to its head: eviction then takes the tail first, and what is
    /// left is still a prefix.
    pub fn touch(&mut self, block: &BlockKey) {
        if let Some(&at) = self.index.get(block) {
            self.unlink(at);
            self.link_youngest(at);
        }
    }

    /// Forgets one layer block; true if it was here.
    pub fn remove(&mut self, key: LayerBlockKey) -> bool {
        let block = key.block();
        let Some(&at) = self.index.get(&block) else {
            return false;
        };
        let Some(slot) = self.nodes[at].layers.remove(&key.layer) else {
            return false;
        };
        self.bytes -= slot.payload.len() as u64 + LAYER_OVERHEAD_BYTES;
        self.layer_blocks -= 1;
        if self.nodes[at].layers.is_empty() {
            self.remove_block(at);
        }
        true
    }

    /// Bytes kept, bookkeeping included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The budget.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Layer blocks kept.
    pub fn layer_blocks(&self) -> u64 {
        self.layer_blocks
    }

    /// Blocks evicted since the start.
    pub fn evicted_blocks(&self) -> u64 {
        self.evicted_blocks
    }

    /// Evicts the oldest blocks that may go until `wanted` bytes fit; `None`, with nothing evicted, if they cannot.
    fn make_room(
        &mut self,
        wanted: u64,
        for_block: &BlockKey,
        must_stay: impl Fn(&BlockKey) -> bool,
    ) -> Option<Vec<BlockKey>> {
        let mut free = self.bytes_max - self.bytes;
        let (mut victims, mut kept) = (Vec::new(), Vec::new());
        let mut at = self.oldest;
        while free < wanted && at != NONE {
            let node = &self.nodes[at];
            // The block that grows is not evicted for its own next layer.
            if node.key == *for_block || must_stay(&node.key) {
                kept.push(at);
            } else {
                free += self.block_bytes(at);
                victims.push(at);
            }
            at = node.younger;
        }
        // What must stay was passed over: make it young, so that the next search does not visit it again.
        for at in kept {
            self.unlink(at);
            self.link_youngest(at);
        }
        if free < wanted {
            return None;
        }
        let mut evicted = Vec::with_capacity(victims.len());
        for at in victims {
            evicted.push(self.nodes[at].key);
            self.bytes -= self.block_bytes(at) - BLOCK_OVERHEAD_BYTES;
            self.layer_blocks -= self.nodes[at].layers.len() as u64;
            self.nodes[at].layers.clear();
            self.remove_block(at);
            self.evicted_blocks += 1;
        }
        Some(evicted)
    }

    fn block_bytes(&self, at: usize) -> u64 {
        let payloads: u64 = self.nodes[at]
            .layers
            .values()
            .map(|slot| slot.payload.len() as u64 + LAYER_OVERHEAD_BYTES)
            .sum();
        payloads + BLOCK_OVERHEAD_BYTES
    }

    fn node(&self, block: &BlockKey) -> Option<&Node> {
        self.index.get(block).map(|&at| &self.nodes[at])
    }

    fn add_block(&mut self, key: BlockKey) -> usize {
        let node = Node {
            key,
            layers: BTreeMap::new(),
            younger: NONE,
            older: NONE,
        };
        let at = match self.free.pop() {
            Some(at) => {
                self.nodes[at] = node;
                at
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        };
        self.index.insert(key, at);
        self.link_youngest(at);
        at
    }

    /// Gives an empty block's place back.
    fn remove_block(&mut self, at: usize) {
        debug_assert!(self.nodes[at].layers.is_empty());
        self.unlink(at);
        self.index.remove(&self.nodes[at].key);
        self.free.push(at);
        self.bytes -= BLOCK_OVERHEAD_BYTES;
    }

    fn link_youngest(&mut self, at: usize) {
        self.nodes[at].older = self.youngest;
        self.nodes[at].younger = NONE;
        match self.youngest {
            NONE => self.oldest = at,
            before => self.nodes[before].younger = at,
        }
        self.youngest = at;
    }

    fn unlink(&mut self, at: usize) {
        let (younger, older) = (self.nodes[at].younger, self.nodes[at].older);
        match younger {
            NONE => self.youngest = older,
            younger => self.nodes[younger].older = older,
        }
        match older {
            NONE => self.oldest = younger,
            older => self.nodes[older].younger = younger,
        }
    }
}

#[cfg(test)]
mod tests;
