//! Making room: victims until the bytes fit, and one run of pages out of what is free.

use kvasir_block::BlockKey;
use kvasir_device::{Arena, Buffer, Held};

use super::{
    BLOCK_OVERHEAD_BYTES, HostTier, LAYER_OVERHEAD_BYTES, NoRoom, Owner,
    policy::{Place, Verdict},
};

/// Blocks that a search passes over because they must stay, before it gives up. The next one goes on where it stopped.
const SPARED_MAX: usize = 4096;
/// Blocks that are evicted for one run of pages when a good part of the memory is free already and moving found no place.
const BEYOND_MAX: usize = 16;

/// Victims found, with what each gives.
#[derive(Default)]
struct Search {
    victims: Vec<(Place, u64)>,
    freed: u64,
    spared: usize,
}

impl HostTier {
    /// Memory for a payload, evicting blocks for it where needed; answers with the blocks it evicted. Fill it, freeze it, and
    /// [`Self::insert`] it; what a buffer holds before that is not said and must not be shared. Bytes in buffers count to the
    /// budget.
    ///
    /// # Errors
    /// [`NoRoom`] when what must stay leaves too little, or leaves no run of pages that is long enough.
    pub fn reserve(
        &mut self,
        bytes: usize,
        owner: Owner,
        must_stay: impl Fn(&BlockKey) -> bool,
    ) -> Result<(Buffer, Vec<BlockKey>), NoRoom> {
        self.reserve_for(bytes, None, owner, must_stay)
    }

    /// [`Self::reserve`]; `for_block` grows by it and does not go for its own next layer.
    pub(super) fn reserve_for(
        &mut self,
        bytes: usize,
        for_block: Option<&BlockKey>,
        owner: Owner,
        must_stay: impl Fn(&BlockKey) -> bool,
    ) -> Result<(Buffer, Vec<BlockKey>), NoRoom> {
        let must_stay = |block: &BlockKey| for_block == Some(block) || must_stay(block);
        let footprint = Arena::footprint(bytes);
        let wanted = footprint + self.overhead(for_block);
        let mut evicted = Vec::new();
        if !self.evict_until(wanted, wanted, owner, &must_stay, &mut evicted) {
            return Err(self.no_room(bytes, owner, evicted));
        }
        // Enough is free; now one run of it.
        let mut beyond = 0;
        loop {
            if let Some(buffer) = self.arena.try_reserve(bytes) {
                return Ok((buffer, evicted));
            }
            let free = self.arena.capacity() - self.arena.used();
            // Moving pays when something is free besides: payloads need somewhere to go, and few should have to.
            if free >= footprint + self.arena.capacity() / 32
                && let Some(buffer) = self.cleared(bytes)
            {
                return Ok((buffer, evicted));
            }
            // Buffers and readers may hold pages everywhere: do not empty the tier for one payload. But what is free may be in
            // pieces too small to move anything to, and whoever asks again must get further than the one before.
            beyond += usize::from(free >= 4 * footprint + self.arena.capacity() / 8);
            if beyond > BEYOND_MAX || !self.evict_one(owner, &must_stay, &mut evicted) {
                return Err(self.no_room(bytes, owner, evicted));
            }
        }
    }

    /// Room for the bookkeeping of a payload whose pages are in use already, and for the payload in its owner's budget.
    pub(super) fn make_room_for_held(
        &mut self,
        held: &Held,
        block: &BlockKey,
        owner: Owner,
        must_stay: impl Fn(&BlockKey) -> bool,
    ) -> Result<Vec<BlockKey>, NoRoom> {
        let overhead = self.overhead(Some(block));
        let must_stay = |other: &BlockKey| other == block || must_stay(other);
        let mut evicted = Vec::new();
        if self.evict_until(overhead, held.footprint() + overhead, owner, &must_stay, &mut evicted) {
            Ok(evicted)
        } else {
            Err(self.no_room(held.len(), owner, evicted))
        }
    }

    pub(super) fn no_room(&self, payload_bytes: usize, owner: Owner, evicted: Vec<BlockKey>) -> NoRoom {
        NoRoom {
            payload_bytes,
            bytes_max: self.bytes_max.min(self.shares.of(owner).bytes_max),
            evicted,
        }
    }

    /// Bookkeeping that a layer block of `block` adds.
    fn overhead(&self, block: Option<&BlockKey>) -> u64 {
        let known = block.is_some_and(|block| self.index.contains_key(block));
        LAYER_OVERHEAD_BYTES + if known { 0 } else { BLOCK_OVERHEAD_BYTES }
    }

    /// Evicts until `wanted` more bytes are within the tier's budget, and `owned` more within the owner's; false, with nothing
    /// evicted, if they cannot be.
    fn evict_until(
        &mut self,
        wanted: u64,
        owned: u64,
        owner: Owner,
        must_stay: &impl Fn(&BlockKey) -> bool,
        evicted: &mut Vec<BlockKey>,
    ) -> bool {
        let mut search = Search::default();
        let fits = self.find_victims(wanted, owned, owner, must_stay, &mut search);
        // Newest first: a policy takes back what it gave in that order.
        for &(place, gives) in search.victims.iter().rev() {
            let block = &self.blocks[place as usize];
            let (key, share) = (block.key, self.shares.at(block.share));
            share.bytes += gives;
            if !fits {
                share.policy.restored(place, &key);
            }
        }
        if fits {
            for (place, _) in search.victims {
                evicted.push(self.blocks[place as usize].key);
                self.remove_block(place);
                self.evicted_blocks += 1;
            }
        }
        fits
    }

    /// Takes victims out of their policies, and what they give out of their shares' counts, until it is enough or none is left.
    fn find_victims(
        &mut self,
        wanted: u64,
        owned: u64,
        owner: Owner,
        must_stay: &impl Fn(&BlockKey) -> bool,
        search: &mut Search,
    ) -> bool {
        let own = self.shares.index_of(owner);
        while self.shares.at(own).bytes + owned > self.shares.at(own).bytes_max {
            if !self.find_victim(own, must_stay, search) {
                return false;
            }
        }
        let bytes = self.bytes();
        let mut exhausted = Vec::new();
        while bytes + wanted > self.bytes_max + search.freed {
            let Some(share) = self.shares.fullest(&exhausted) else {
                return false;
            };
            if !self.find_victim(share, must_stay, search) {
                exhausted.push(share);
            }
        }
        true
    }

    /// The next block of a share that may go.
    fn find_victim(&mut self, share: usize, must_stay: &impl Fn(&BlockKey) -> bool, search: &mut Search) -> bool {
        let blocks = &self.blocks;
        let victim = self.shares.at(share).policy.victim(&mut |place| {
            let block = &blocks[place as usize];
            if search.spared >= SPARED_MAX {
                Verdict::Stop
            } else if must_stay(&block.key) || block.is_shared() {
                search.spared += 1;
                Verdict::Spare
            } else {
                Verdict::Evict
            }
        });
        let Some(place) = victim else { return false };
        let gives = self.blocks[place as usize].bytes();
        search.freed += gives;
        search.victims.push((place, gives));
        self.shares.at(share).bytes -= gives;
        true
    }

    /// Evicts one block for the sake of a run of pages.
    fn evict_one(&mut self, owner: Owner, must_stay: &impl Fn(&BlockKey) -> bool, evicted: &mut Vec<BlockKey>) -> bool {
        let one_more_than_free = self.bytes_max.saturating_sub(self.bytes()) + 1;
        self.evict_until(one_more_than_free, 0, owner, must_stay, evicted)
    }

    /// A run of pages made by moving payloads that nobody reads.
    fn cleared(&mut self, bytes: usize) -> Option<Buffer> {
        let arena = self.arena.clone();
        let fence = arena.fence(bytes)?;
        for &offset in fence.in_the_way() {
            self.relocate(offset)?;
        }
        fence.reserve()
    }

    /// Copies the payload at `offset` to where there is room for it.
    fn relocate(&mut self, offset: u64) -> Option<()> {
        let page = (offset / kvasir_device::PAGE_BYTES as u64) as usize;
        let place = *self.homes.get(page)?;
        let block = self.blocks.get_mut(place as usize)?;
        let layer = block.layers.iter_mut().find(|layer| layer.held.offset() == offset)?;
        let mut home = self.arena.try_reserve(layer.held.len())?;
        home.as_mut_slice().copy_from_slice(layer.held.as_slice());
        let held = self.arena.hold(&home.freeze(0..layer.held.len()))?;
        let (before, after) = (layer.held.footprint(), held.footprint());
        let moved_to = held.offset();
        layer.held = held;
        // A buffer may have been longer than the payload that was made of it.
        self.shares.at(block.share).bytes -= before - after;
        self.held_bytes -= before - after;
        self.moved_layer_blocks += 1;
        self.set_home(moved_to, place);
        Some(())
    }
}
