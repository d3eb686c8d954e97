//! What moves between the tiers, decided in one place: promotion, admission to the disk, and what the disk may forget.
//!
//! Everything is decided by observed reuse (`reuse.rs`):
//! - *Promotion*: what was read from a slower tier is kept in memory when it was read `promote_after_reads` times of late.
//! - *Admission*: with [`Admission::Always`] each put is queued for the disk. With [`Admission::Reuse`] only blocks that a match
//!   asked for before the request that put them; the others stay in memory only, and are queued when they are hit there. So a
//!   block that nobody asks for twice costs no disk write.
//! - *Demotion*: eviction from memory costs nothing, since the disk has what was admitted. What it does not have although it was
//!   to (a failing disk) is offered again at each hit.
//! - *Reclaim*: leased blocks and those that matches asked for twice of late are written again, the most asked for first while
//!   there is room; others go to the object tier where there is one, and are forgotten where there is none. What was made of a
//!   block (`indexes/derived.rs`) has its block's fate.

use std::{
    sync::{Arc, Weak},
    time::Instant,
};

use bytes::Bytes;
use kvasir_block::{BlockKey, Checksum, LayerBlockKey};
use kvasir_tier::{DiskWatch, Fate, Heat, Offer};

use super::{Shared, State, Tier};

/// How often a match must have asked for a block, the one before its put included, for it to count as reused.
const REUSED_ASKED: u32 = 2;

/// Which puts are written to disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Admission {
    /// All: what was answered as stored is durable after the next flush.
    #[default]
    Always,
    /// Those of blocks that were asked for before; others are held in memory until they are hit again, or evicted.
    Reuse,
}

impl Shared {
    /// Whether a slower tier than memory has `key`.
    pub(super) fn is_below(&self, key: LayerBlockKey) -> bool {
        self.disk.contains(key) || self.object.as_ref().is_some_and(|object| object.contains(key))
    }

    /// Notes that `keys` were read below memory, and says which of them to keep there.
    pub(super) fn are_worth_promoting(&self, keys: &[LayerBlockKey]) -> Vec<bool> {
        let mut state = self.state.lock();
        let promote_after = self.config.promote_after_reads;
        keys.iter()
            .map(|key| state.reuse.note_read(*key) >= promote_after)
            .collect()
    }

    /// Whether a put of `block` goes to disk.
    pub(super) fn admits(&self, state: &State, block: &BlockKey) -> bool {
        match self.config.disk_admission {
            Admission::Always => true,
            Admission::Reuse => state.reuse.asked(block) >= REUSED_ASKED,
        }
    }

    /// `key` is in memory only, and may be worth a place on disk once it is hit.
    pub(super) fn note_unsaved(&self, state: &mut State, key: LayerBlockKey, admitted: bool) {
        let counter = if admitted {
            &self.counters.put_host_only
        } else {
            &self.counters.admission_skipped
        };
        counter.add(1);
        state.unsaved.insert(key);
    }

    /// Offers to the disk what was hit in memory and is nowhere else.
    pub(super) fn save(&self, hit: Vec<(LayerBlockKey, Bytes, Checksum)>) {
        for (key, payload, checksum) in hit {
            let mut state = self.state.lock();
            if !state.unsaved.contains(&key) {
                continue;
            }
            match self.disk.offer(key, payload, checksum) {
                Offer::Queued => {
                    state.unsaved.remove(&key);
                    self.counters.saved.add(1);
                }
                Offer::Present => {
                    state.unsaved.remove(&key);
                }
                // Once more when it is hit again.
                Offer::Full | Offer::Degraded | Offer::TooLarge => {}
            }
        }
    }
}

/// Says what the disk tier may forget: what is neither leased nor hot; and takes what goes to the object tier instead.
pub(super) struct ReclaimWatch(pub(super) Weak<Shared>);

impl ReclaimWatch {
    pub(super) fn of(shared: &Arc<Shared>) -> Arc<Self> {
        Arc::new(Self(Arc::downgrade(shared)))
    }
}

impl DiskWatch for ReclaimWatch {
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut(&BlockKey)) {
        let Some(shared) = self.0.upgrade() else { return };
        let mut state = shared.state.lock();
        state.leases.expire(Instant::now());
        for block in blocks {
            // What was made of a block stays and goes with it.
            let base = shared.indexes.derived.base(block).map_or(*block, |(base, _)| base);
            if !state.leases.must_stay(&base) {
                forget(block);
                shared.refresh(&mut state, *block, Tier::Disk);
            }
        }
    }

    fn fate(&self, block: &BlockKey) -> Fate {
        let Some(shared) = self.0.upgrade() else {
            return Fate::default();
        };
        let made_of = shared.indexes.derived.base(block);
        let base = made_of.map_or(*block, |(base, _)| base);
        let state = shared.state.lock();
        let heat = match state.reuse.asked(&base) {
            _ if state.leases.must_stay(&base) => Heat::Leased,
            asked @ REUSED_ASKED.. => Heat::Warm(asked),
            _ => Heat::Cold,
        };
        let worth = made_of.is_none_or(|(_, kind)| Shared::is_worth_demoting(kind));
        Fate {
            heat,
            demote: shared.object.is_some() && worth,
        }
    }

    fn demote(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> bool {
        let Some(shared) = self.0.upgrade() else { return false };
        let Some(object) = &shared.object else { return false };
        let offer = object.offer(key, payload, checksum);
        shared.counters.demoted.add(u64::from(offer == Offer::Queued));
        matches!(offer, Offer::Queued | Offer::Present)
    }
}
