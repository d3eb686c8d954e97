//! The host tier: layer blocks in an arena of shared memory, under a byte budget.
//!
//! Not synchronised: its owner keeps it under the lock that also guards leases, so that a lease and an eviction cannot
//! cross. Nothing here does I/O. Payload bytes are copied only where a payload is given that does not lie in the arena, and
//! where one is moved to join free memory; who fills a buffer of [`HostTier::reserve`] has no copy made.
//!
//! Invariants: `bytes() <= bytes_max` whenever a call returns, whoever still holds payloads that were evicted; every block is
//! known to its share's policy, once; `homes` names for each payload's first page the block it belongs to.
//! Eviction takes whole blocks: a block that misses one layer is of no use to a prefix.

mod chains;
mod policy;
mod room;
mod shares;

use std::collections::HashMap;

use bytes::Bytes;
use kvasir_block::{BlockHash, BlockKey, Checksum, LayerBlockKey, NamespaceId};
use kvasir_device::{Arena, ArenaConfig, ArenaError, Held, HugePages, PAGE_BYTES};

use self::{
    chains::{Absent, Descent},
    policy::Place,
    shares::Shares,
};
pub use self::{policy::HostPolicy, shares::Owner};

/// Counted for each layer block besides its pages: its slot here, its run's entry in the arena's tables.
const LAYER_OVERHEAD_BYTES: u64 = 160;
/// Counted for each block: key, table slots, its place in the order of eviction.
const BLOCK_OVERHEAD_BYTES: u64 = 256;
/// No block.
const NOBODY: Place = Place::MAX;

/// How much, of what, and who goes first.
#[derive(Clone, Copy, Debug)]
pub struct HostConfig {
    /// Most bytes: payloads in whole pages, and their bookkeeping. The arena's own tables come on top, half a percent.
    pub bytes_max: u64,
    /// How victims are chosen.
    pub policy: HostPolicy,
    /// Whether to ask for large pages.
    pub huge_pages: HugePages,
}

/// A layer block that does not fit: the budget is too small for it, or everything else must stay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no room for {payload_bytes} bytes in the host tier of {bytes_max}: what is in it is leased or being read; wait or raise host_bytes_max"
)]
pub struct NoRoom {
    /// Bytes that were offered.
    pub payload_bytes: usize,
    /// The budget: the tier's, or the owner's where that is what was in the way.
    pub bytes_max: u64,
    /// Blocks that went before it showed; almost always none.
    pub evicted: Vec<BlockKey>,
}

/// What a host tier holds and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostStats {
    /// Bytes in use, bookkeeping included; never above `bytes_max`.
    pub bytes: u64,
    /// The budget.
    pub bytes_max: u64,
    /// Of `bytes`: in buffers that are being filled, or held by readers after eviction.
    pub bytes_elsewhere: u64,
    /// Blocks held, whole or in part.
    pub blocks: u64,
    /// Layer blocks held.
    pub layer_blocks: u64,
    /// Blocks evicted since the start.
    pub evicted_blocks: u64,
    /// Payloads moved since the start, to join free memory.
    pub moved_layer_blocks: u64,
}

/// Layer blocks in memory, at most `bytes_max` of them with their bookkeeping.
#[derive(Debug)]
pub struct HostTier {
    bytes_max: u64,
    arena: Arena,
    index: HashMap<BlockKey, Place>,
    blocks: Vec<Block>,
    free: Vec<Place>,
    /// By page of the arena: the block whose payload starts there.
    homes: Vec<Place>,
    shares: Shares,
    absent: Absent,
    held_bytes: u64,
    layer_blocks: u64,
    evicted_blocks: u64,
    moved_layer_blocks: u64,
}

#[derive(Debug)]
struct Block {
    key: BlockKey,
    /// By rising layer.
    layers: Vec<Layer>,
    share: usize,
    depth: Option<u32>,
}

#[derive(Debug)]
struct Layer {
    number: u16,
    checksum: Checksum,
    held: Held,
}

impl Block {
    fn find(&self, layer: u16) -> Result<usize, usize> {
        self.layers.binary_search_by_key(&layer, |layer| layer.number)
    }

    fn is_shared(&self) -> bool {
        self.layers.iter().any(|layer| layer.held.is_shared())
    }

    /// What comes back when it goes.
    fn bytes(&self) -> u64 {
        let payloads: u64 = self.layers.iter().map(|layer| layer.held.footprint()).sum();
        payloads + self.layers.len() as u64 * LAYER_OVERHEAD_BYTES + BLOCK_OVERHEAD_BYTES
    }
}

impl HostTier {
    /// An empty tier. Its memory is taken from the system as it is used.
    ///
    /// # Errors
    /// [`ArenaError`] when the system gives no shared memory.
    pub fn new(config: HostConfig) -> Result<Self, ArenaError> {
        let arena = Arena::new(ArenaConfig {
            bytes: config.bytes_max,
            huge_pages: config.huge_pages,
        })?;
        Ok(Self {
            bytes_max: config.bytes_max,
            arena,
            index: HashMap::new(),
            blocks: Vec::new(),
            free: Vec::new(),
            homes: Vec::new(),
            shares: Shares::new(config.policy, config.bytes_max),
            absent: Absent::default(),
            held_bytes: 0,
            layer_blocks: 0,
            evicted_blocks: 0,
            moved_layer_blocks: 0,
        })
    }

    /// Where payloads lie.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Gives an owner a budget of its own: the most that it may hold. See [`Owner`] for what others can take from it.
    pub fn set_budget(&mut self, owner: Owner, bytes_max: u64) {
        self.shares.set_budget(owner, bytes_max);
    }

    /// Keeps `payload`, evicting other blocks for it where needed; answers with the blocks it evicted. A payload in the arena is kept
    /// as it is, another is copied into it. A key that is there already keeps its first bytes. Blocks for which `must_stay` holds,
    /// and those that someone reads, are not evicted.
    ///
    /// # Errors
    /// [`NoRoom`] when what must stay leaves too little.
    pub fn insert(
        &mut self,
        key: LayerBlockKey,
        payload: Bytes,
        checksum: Checksum,
        owner: Owner,
        must_stay: impl Fn(&BlockKey) -> bool,
    ) -> Result<Vec<BlockKey>, NoRoom> {
        if self.contains(key) {
            return Ok(Vec::new());
        }
        let block = key.block();
        let (held, evicted) = match self.arena.hold(&payload) {
            Some(held) => {
                let evicted = self.make_room_for_held(&held, &block, owner, must_stay)?;
                (held, evicted)
            }
            None => {
                let (mut buffer, evicted) = self.reserve_for(payload.len(), Some(&block), owner, must_stay)?;
                buffer.as_mut_slice().copy_from_slice(&payload);
                let copy = buffer.freeze(0..payload.len());
                let held = self
                    .arena
                    .hold(&copy)
                    .ok_or_else(|| self.no_room(payload.len(), owner, Vec::new()))?;
                (held, evicted)
            }
        };
        let place = match self.index.get(&block) {
            Some(&place) => place,
            None => self.add_block(block, owner),
        };
        self.set_home(held.offset(), place);
        self.held_bytes += held.footprint();
        let added = held.footprint() + LAYER_OVERHEAD_BYTES;
        let at = &mut self.blocks[place as usize];
        self.shares.at(at.share).bytes += added;
        let index = at.find(key.layer).unwrap_or_else(|index| index);
        at.layers.insert(
            index,
            Layer {
                number: key.layer,
                checksum,
                held,
            },
        );
        self.layer_blocks += 1;
        debug_assert!(self.bytes() <= self.bytes_max, "the budget is a promise");
        Ok(evicted)
    }

    /// The payload under `key` as it was put, with the checksum that came with it. Not verified here: that is done
    /// outside the owner's lock. Does not touch recency, see [`Self::touch`]. Its memory stays as it is while the payload lives, also
    /// when the block is evicted meanwhile.
    pub fn get(&self, key: LayerBlockKey) -> Option<(Bytes, Checksum)> {
        let block = self.block(&key.block())?;
        let layer = &block.layers[block.find(key.layer).ok()?];
        Some((layer.held.bytes(), layer.checksum))
    }

    /// Whether `key` is here.
    pub fn contains(&self, key: LayerBlockKey) -> bool {
        self.block(&key.block())
            .is_some_and(|block| block.find(key.layer).is_ok())
    }

    /// How many layers of a block are here.
    pub fn layer_count(&self, block: &BlockKey) -> usize {
        self.block(block).map_or(0, |block| block.layers.len())
    }

    /// Layers of a block that are here, rising.
    pub fn layers(&self, block: &BlockKey) -> impl Iterator<Item = u16> {
        self.block(block)
            .into_iter()
            .flat_map(|block| block.layers.iter().map(|layer| layer.number))
    }

    /// Says that a block was matched. Touch a chain from its tail to its head: eviction then takes the tail first, and what is
    /// left is still a prefix.
    pub fn touch(&mut self, block: &BlockKey) {
        if let Some(&place) = self.index.get(block) {
            let share = self.blocks[place as usize].share;
            self.shares.at(share).policy.touched(place);
        }
    }

    /// Learns from a chain that was asked for, from its first block on, which block continues which: those that are here, and a
    /// bounded number of those that may come. Only a policy that asks for it pays for it.
    pub fn note_chain(&mut self, namespace: NamespaceId, chain: &[BlockHash]) {
        if !self.shares.want_links() {
            return;
        }
        let mut above = None;
        for (depth, &hash) in (0_u32..).zip(chain) {
            let key = namespace.block(hash);
            let parent = depth.checked_sub(1).map(|before| chain[before as usize]);
            let here = self.index.get(&key).copied();
            match here {
                Some(place) => self.descend(place, depth, above),
                None => self.absent.note(key, Descent { depth, parent }),
            }
            above = here;
        }
    }

    /// Forgets one layer block; true if it was here.
    pub fn remove(&mut self, key: LayerBlockKey) -> bool {
        let Some(&place) = self.index.get(&key.block()) else {
            return false;
        };
        let block = &mut self.blocks[place as usize];
        let Ok(index) = block.find(key.layer) else {
            return false;
        };
        let layer = block.layers.remove(index);
        let share = block.share;
        let empty = block.layers.is_empty();
        self.shares.at(share).bytes -= layer.held.footprint() + LAYER_OVERHEAD_BYTES;
        self.held_bytes -= layer.held.footprint();
        self.layer_blocks -= 1;
        if empty {
            self.shares.at(share).policy.removed(place);
            self.remove_block(place);
        }
        true
    }

    /// Bytes in use: pages of the arena, whoever holds them, and bookkeeping.
    pub fn bytes(&self) -> u64 {
        self.arena.used() + self.bookkeeping_bytes()
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

    /// Counts and sizes.
    pub fn stats(&self) -> HostStats {
        let used = self.arena.used();
        HostStats {
            bytes: used + self.bookkeeping_bytes(),
            bytes_max: self.bytes_max,
            bytes_elsewhere: used.saturating_sub(self.held_bytes),
            blocks: self.index.len() as u64,
            layer_blocks: self.layer_blocks,
            evicted_blocks: self.evicted_blocks,
            moved_layer_blocks: self.moved_layer_blocks,
        }
    }

    /// Bytes that the blocks of an owner's share hold: its own if it has a budget, else all that have none.
    pub fn owner_bytes(&self, owner: Owner) -> u64 {
        self.shares.of(owner).bytes
    }

    fn bookkeeping_bytes(&self) -> u64 {
        self.layer_blocks * LAYER_OVERHEAD_BYTES + self.index.len() as u64 * BLOCK_OVERHEAD_BYTES
    }

    fn block(&self, key: &BlockKey) -> Option<&Block> {
        self.index.get(key).map(|&place| &self.blocks[place as usize])
    }

    fn add_block(&mut self, key: BlockKey, owner: Owner) -> Place {
        let share = self.shares.index_of(owner);
        let block = Block {
            key,
            layers: Vec::new(),
            share,
            depth: None,
        };
        let place = match self.free.pop() {
            Some(place) => {
                self.blocks[place as usize] = block;
                place
            }
            None => {
                self.blocks.push(block);
                (self.blocks.len() - 1) as Place
            }
        };
        self.index.insert(key, place);
        let share = self.shares.at(share);
        share.bytes += BLOCK_OVERHEAD_BYTES;
        share.policy.added(place, &key);
        if let Some(Descent { depth, parent }) = self.absent.take(&key) {
            let parent = parent.and_then(|hash| self.index.get(&key.namespace.block(hash)));
            self.descend(place, depth, parent.copied());
        }
        place
    }

    /// Remembers a block's depth, and links it to its parent where that is here and one block higher.
    fn descend(&mut self, place: Place, depth: u32, parent: Option<Place>) {
        let child = &mut self.blocks[place as usize];
        if *child.depth.get_or_insert(depth) != depth {
            return;
        }
        let share = child.share;
        let Some(parent) = parent else { return };
        let above = &self.blocks[parent as usize];
        if above.share == share && above.depth.is_some_and(|above| above + 1 == depth) {
            self.shares.at(share).policy.linked(place, parent);
        }
    }

    /// Gives the place back of a block that its policy has forgotten, with what is left of it.
    fn remove_block(&mut self, place: Place) {
        let block = &mut self.blocks[place as usize];
        let bytes = block.bytes();
        let layers = std::mem::take(&mut block.layers);
        self.shares.at(block.share).bytes -= bytes;
        self.index.remove(&block.key);
        self.free.push(place);
        self.layer_blocks -= layers.len() as u64;
        self.held_bytes -= layers.iter().map(|layer| layer.held.footprint()).sum::<u64>();
    }

    fn set_home(&mut self, offset: u64, place: Place) {
        let page = (offset / PAGE_BYTES as u64) as usize;
        if self.homes.len() <= page {
            self.homes.resize(page + 1, NOBODY);
        }
        self.homes[page] = place;
    }
}

#[cfg(test)]
mod tests;
