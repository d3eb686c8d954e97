//! Leases: promises to keep blocks until given back or expired. Pure: time comes in as an argument.
//!
//! Invariant: `pins` counts, for each block, the leases that name it; a block without leases is not in it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_block::{
    BlockKey,
    planted::{Bug, planted},
};

/// Names a lease; never 0 and never used twice, also over restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(u64);

impl LeaseId {
    /// An id as it was written down.
    pub const fn from_u64(value: u64) -> Self {
        Self(value)
    }

    /// The value to write down.
    pub const fn to_u64(self) -> u64 {
        self.0
    }
}

#[derive(Debug)]
struct Lease {
    blocks: Arc<[BlockKey]>,
    /// `None` for a lease that is only given back: an open context's.
    expires: Option<Instant>,
}

#[derive(Debug)]
pub(crate) struct Leases {
    max: usize,
    next: u64,
    leases: HashMap<LeaseId, Lease>,
    by_expiry: BTreeSet<(Instant, LeaseId)>,
    pins: HashMap<BlockKey, u32>,
    pub(crate) refused: u64,
}

impl Leases {
    /// No leases yet; ids of another `epoch` are other ids.
    pub(crate) fn new(max: usize, epoch: u64) -> Self {
        // An epoch is in milliseconds: a million leases in each before ids could meet.
        let next = (epoch << 20) | 1;
        Self {
            max,
            next,
            leases: HashMap::new(),
            by_expiry: BTreeSet::new(),
            pins: HashMap::new(),
            refused: 0,
        }
    }

    /// Pins `blocks` for `lease_for`, or until released; `None` when there are too many leases.
    pub(crate) fn grant(
        &mut self,
        blocks: Vec<BlockKey>,
        now: Instant,
        lease_for: Option<Duration>,
    ) -> Option<LeaseId> {
        self.expire(now);
        if self.leases.len() >= self.max {
            self.refused += 1;
            return None;
        }
        let id = LeaseId(self.next);
        self.next += 1;
        for block in &blocks {
            *self.pins.entry(*block).or_default() += 1;
        }
        let expires = lease_for.map(|lease_for| now + lease_for);
        if let Some(expires) = expires {
            self.by_expiry.insert((expires, id));
        }
        let blocks = blocks.into();
        self.leases.insert(id, Lease { blocks, expires });
        Some(id)
    }

    /// Gives a lease back; an unknown one may have expired and is ignored.
    pub(crate) fn release(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.remove(&id) else { return };
        if let Some(expires) = lease.expires {
            self.by_expiry.remove(&(expires, id));
        }
        for block in lease.blocks.iter() {
            if let Some(count) = self.pins.get_mut(block) {
                *count -= 1;
                if *count == 0 {
                    self.pins.remove(block);
                }
            }
        }
    }

    /// Ends what expired.
    pub(crate) fn expire(&mut self, now: Instant) {
        while let Some(&(expires, id)) = self.by_expiry.first()
            && expires <= now
        {
            self.release(id);
        }
    }

    /// Whether a lease was granted and has not ended.
    pub(crate) fn is_live(&self, id: LeaseId) -> bool {
        self.leases.contains_key(&id)
    }

    /// The blocks of a lease, in the order of their chain.
    pub(crate) fn blocks(&self, id: LeaseId) -> Option<Arc<[BlockKey]>> {
        self.leases.get(&id).map(|lease| Arc::clone(&lease.blocks))
    }

    pub(crate) fn is_pinned(&self, block: &BlockKey) -> bool {
        self.pins.contains_key(block)
    }

    /// Whether nothing may evict or forget a block.
    pub(crate) fn must_stay(&self, block: &BlockKey) -> bool {
        self.is_pinned(block) && !planted(Bug::LeasedBlockEvicted)
    }

    pub(crate) fn len(&self) -> usize {
        self.leases.len()
    }

    pub(crate) fn pinned_blocks(&self) -> usize {
        self.pins.len()
    }
}

#[cfg(test)]
mod tests {
    use kvasir_block::{BlockHash, NamespaceId};

    use super::*;

    fn block(i: u8) -> BlockKey {
        NamespaceId::from_bytes([0; 32]).block(BlockHash::from_bytes([i; 32]))
    }

    #[test]
    fn pins_count_until_the_last_lease_ends() {
        let (mut leases, start) = (Leases::new(10, 5), Instant::now());
        let second = Duration::from_secs(1);
        let a = leases.grant(vec![block(1), block(2)], start, Some(second)).unwrap();
        let b = leases.grant(vec![block(2)], start, Some(3 * second)).unwrap();
        assert_ne!(a, b);
        leases.expire(start + second / 2);
        assert!(leases.is_pinned(&block(1)) && leases.is_pinned(&block(2)));
        leases.expire(start + second);
        assert!(!leases.is_pinned(&block(1)) && leases.is_pinned(&block(2)));
        leases.release(a);
        assert!(leases.is_pinned(&block(2)), "an expired lease is released once");
        leases.release(b);
        assert_eq!(
            (leases.len(), leases.pinned_blocks(), leases.by_expiry.len()),
            (0, 0, 0)
        );
    }

    #[test]
    fn bounded_and_expired_leases_make_place() {
        let (mut leases, start) = (Leases::new(1, 5), Instant::now());
        let second = Duration::from_secs(1);
        assert!(leases.grant(vec![block(1)], start, Some(second)).is_some());
        assert!(leases.grant(vec![block(2)], start, Some(second)).is_none());
        assert_eq!(leases.refused, 1);
        assert!(leases.grant(vec![block(2)], start + second, None).is_some());
        leases.expire(start + 1000 * second);
        assert!(leases.is_pinned(&block(2)), "a context's lease does not expire");
    }

    #[test]
    fn ids_differ_between_epochs() {
        let id = |epoch| Leases::new(1, epoch).grant(vec![], Instant::now(), None).unwrap();
        assert_ne!(id(1_760_000_000_000), id(1_760_000_000_001));
        assert_ne!(id(0).to_u64(), 0);
    }
}
