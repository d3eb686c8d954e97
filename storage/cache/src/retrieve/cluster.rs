//! Layers of open contexts whose sketches are put in clusters, in the background, so that searches read fewer of them.
//!
//! A thread clusters a copy, segment by segment, and puts it in the place of what it was made from when it is done: queries go on with what
//! is there, and nobody waits for a lock meanwhile. What clustering gives is a function of the sketches and values, so when it is
//! done changes no answer but for the order of its sums and for candidates at the edge.
//!
//! Queries leave blocks out that their caller holds itself (sink and window), and do not read them; segments have them nonetheless, so
//! the thread reads and sketches them for itself.
//!
//! Longer chains have sketches of their own, which are clustered likewise: they share the blocks' sketches, not what is made of many.

use std::sync::{Arc, Weak, atomic::Ordering};

use kvasir_block::{KvSchema, LayerBlockKey};
use kvasir_index::Excluded;

use super::{
    blocks::ContextBlocks,
    context::{ContextBudget, Payload},
    sketches::{LayerSketches, encode_layer},
};
use crate::{GetOutcome, cache::Shared, namespace::NamespaceBasis};

/// Whether a layer is to be clustered.
pub(super) mod state {
    /// Nobody asked for it.
    pub(in crate::retrieve) const NEW: u8 = 0;
    /// It is, or was, or cannot be.
    pub(in crate::retrieve) const ASKED: u8 = 1;
    /// It was to be, and there was no room.
    pub(in crate::retrieve) const NO_ROOM: u8 = 2;
}

/// A layer of a chain that is to be clustered. It keeps no chain alive.
#[derive(Debug)]
pub(crate) struct ClusterJob {
    blocks: Weak<ContextBlocks>,
    layer: u16,
    schema: Arc<KvSchema>,
    basis: Arc<NamespaceBasis>,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClusterEnd {
    Clustered,
    /// `context_bytes_max` leaves none for a copy and what is added.
    NoRoom,
    /// Nobody has the context open any more, or the cache closes.
    Dropped,
    /// A query added sketches meanwhile: another one will ask again.
    Changed,
    /// A block is not to be had.
    Missing,
}

/// Bytes of the contexts' budget, given back on drop.
struct Taken<'a> {
    budget: &'a ContextBudget,
    bytes: u64,
}

impl<'a> Taken<'a> {
    fn take(budget: &'a ContextBudget, bytes: u64) -> Option<Self> {
        budget.take(bytes).then(|| Self { budget, bytes })
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

impl ContextBlocks {
    /// A query found what it wants of a layer: it is clustered when there is time, once.
    pub(super) fn cluster_later(
        self: &Arc<Self>,
        shared: &Shared,
        layer: u16,
        payloads: &[Option<Payload>],
        sketches: &LayerSketches,
        excluded: &Excluded,
        basis: &Arc<NamespaceBasis>,
    ) {
        if !shared.clusters() {
            return;
        }
        let state = &self.clustering[usize::from(layer)];
        let before = state.load(Ordering::Relaxed);
        let is_there = |at: usize| payloads[at].is_some() && sketches.has(at);
        let is_whole = || (0..self.len()).all(|at| is_there(at) || self.is_excluded(at, excluded));
        let is_worth = match before {
            state::ASKED => false,
            state::NO_ROOM => shared.contexts.has(sketches.bytes() + sketches.clustered_bytes()),
            _ => sketches.next_segment().is_some() && is_whole(),
        };
        let asks = |from| state.compare_exchange(from, state::ASKED, Ordering::Relaxed, Ordering::Relaxed);
        if !is_worth || asks(before).is_err() {
            return;
        }
        let job = ClusterJob {
            blocks: Arc::downgrade(self),
            layer,
            schema: Arc::clone(self.schema()),
            basis: Arc::clone(basis),
        };
        if !shared.cluster_later(job) {
            state.store(state::NEW, Ordering::Relaxed);
        }
    }
}

impl ClusterJob {
    /// Clusters a copy and puts it where the sketches were. `goes_on` waits until it may do the next segment; false where it is to end.
    pub(crate) fn run(&self, shared: &Shared, goes_on: &dyn Fn() -> bool) -> ClusterEnd {
        let end = self.try_run(shared, goes_on);
        let next = match end {
            ClusterEnd::NoRoom => state::NO_ROOM,
            ClusterEnd::Changed => state::NEW,
            ClusterEnd::Clustered | ClusterEnd::Dropped | ClusterEnd::Missing => return end,
        };
        if let Some(blocks) = self.blocks.upgrade() {
            blocks.clustering[usize::from(self.layer)].store(next, Ordering::Relaxed);
        }
        end
    }

    fn try_run(&self, shared: &Shared, goes_on: &dyn Fn() -> bool) -> ClusterEnd {
        if !goes_on() {
            return ClusterEnd::Dropped;
        }
        let Some(before) =
            (self.blocks.upgrade()).map(|blocks| Arc::clone(&blocks.sketches[usize::from(self.layer)].lock()))
        else {
            return ClusterEnd::Dropped;
        };
        let more = before.clustered_bytes();
        let Some(mut taken) = Taken::take(&shared.contexts, before.bytes() + more) else {
            return ClusterEnd::NoRoom;
        };
        let mut copy = LayerSketches::clone(&before);
        // A query that adds sketches need not copy them.
        let before = {
            let known = Arc::downgrade(&before);
            drop(before);
            known
        };
        while let Some(segment) = copy.next_segment() {
            if !goes_on() || self.blocks.strong_count() == 0 {
                return ClusterEnd::Dropped;
            }
            let Some(payloads) = self.payloads(shared, segment.clone()) else {
                return ClusterEnd::Missing;
            };
            if !self.cluster(shared, &mut copy, segment.start, &payloads) {
                return ClusterEnd::Missing;
            }
        }
        let Some(blocks) = self.blocks.upgrade() else {
            return ClusterEnd::Dropped;
        };
        let mut held = blocks.sketches[usize::from(self.layer)].lock();
        if Arc::as_ptr(&held) != before.as_ptr() {
            return ClusterEnd::Changed;
        }
        let old = std::mem::replace(&mut *held, Arc::new(copy));
        blocks.held_bytes.fetch_add(more, Ordering::Relaxed);
        taken.bytes -= more;
        drop(held);
        drop(old);
        ClusterEnd::Clustered
    }

    /// Payloads of some blocks: those that are held, and others read now; `None` where one is not to be had.
    fn payloads(&self, shared: &Shared, segment: std::ops::Range<usize>) -> Option<Vec<(LayerBlockKey, Payload)>> {
        let found: Vec<(LayerBlockKey, Option<Payload>)> = {
            let blocks = self.blocks.upgrade()?;
            let held = Arc::clone(&blocks.layers[usize::from(self.layer)].lock());
            let of = |at: usize| (blocks.keys()[at].layer(self.layer), held.get(at).cloned().flatten());
            segment.map(of).collect()
        };
        let read = |(key, held): (LayerBlockKey, Option<Payload>)| {
            let payload = held.or_else(|| match shared.read(key) {
                GetOutcome::Hit { payload, .. } if payload.len() == self.schema.layer_block_bytes() => {
                    Some(Payload::new(payload))
                }
                _ => None,
            });
            Some((key, payload?))
        };
        found.into_iter().map(read).collect()
    }

    /// Clusters the segment whose first block is `first`, which are sketched where they were not; false where one cannot be.
    fn cluster(
        &self,
        shared: &Shared,
        copy: &mut LayerSketches,
        first: usize,
        blocks: &[(LayerBlockKey, Payload)],
    ) -> bool {
        let layout = self.schema.layout();
        for (at, (key, payload)) in (first..).zip(blocks) {
            if copy.has(at) {
                continue;
            }
            let made = shared.sketches_made(&[*key], &self.basis).pop().flatten();
            if made.is_some_and(|made| copy.set(at, &made, &layout)) {
                continue;
            }
            let Some(new) = encode_layer(payload.halves(), &layout, self.basis.basis(), self.layer) else {
                return false;
            };
            if !copy.set(at, &new, &layout) {
                return false;
            }
            shared.counters.sketched_blocks.add(1);
            shared.keep_sketch(*key, &self.basis, new);
        }
        let halves: Vec<_> = blocks.iter().map(|(_, payload)| payload.halves()).collect();
        copy.cluster_next(&halves, &layout)
    }
}
