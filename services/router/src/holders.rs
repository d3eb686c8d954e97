//! Who is believed to hold which block: the router's view of the workers' and the store's block events.
//!
//! Derived data. It may lag, and it may forget; then a worker computes what it could have found. A holder's part starts
//! anew with every snapshot, so a watch that was cut and opened again leaves nothing stale behind.

use std::collections::HashMap;

use kvasir_block::{BlockHash, NamespaceId};
use kvasir_prefix::PrefixMap;
use kvasir_proto::{BlockEvents, EventKind};
use parking_lot::Mutex;

use crate::{metrics, policy::WorkerId};

/// Someone who holds blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Holder {
    /// A worker's device tier: only this worker can use it.
    Worker(WorkerId),
    /// The store: every worker can load from it.
    Store,
}

/// All holders' blocks.
#[derive(Debug)]
pub(crate) struct Holders {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    map: PrefixMap<Holder>,
    /// Whether a watch on the store is open. What a store that is away holds cannot be loaded.
    store_watched: bool,
    /// Forgotten blocks that were already counted.
    forgotten: u64,
}

/// Blocks of one prompt, from its start without a gap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hits {
    by_worker: HashMap<WorkerId, usize>,
    /// Blocks in the store.
    pub(crate) store_blocks: usize,
}

impl Hits {
    /// Blocks that `worker` holds itself.
    pub(crate) fn device_blocks(&self, worker: WorkerId) -> usize {
        self.by_worker.get(&worker).copied().unwrap_or(0)
    }
}

impl Holders {
    /// Remembers at most `blocks_max` blocks.
    pub(crate) fn new(blocks_max: usize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                map: PrefixMap::new(blocks_max),
                store_watched: false,
                forgotten: 0,
            }),
        }
    }

    /// How much of `chain` each holder has.
    pub(crate) fn lookup(&self, namespace: NamespaceId, chain: &[BlockHash]) -> Hits {
        let inner = self.inner.lock();
        let mut hits = Hits::default();
        for (holder, blocks) in inner.map.longest_prefix(namespace, chain) {
            match holder {
                Holder::Worker(worker) => {
                    hits.by_worker.insert(worker, blocks);
                }
                Holder::Store if inner.store_watched => hits.store_blocks = blocks,
                Holder::Store => {}
            }
        }
        hits
    }

    /// A watch on `holder` opened or ended.
    fn watched(&self, holder: Holder, open: bool) {
        if holder == Holder::Store {
            self.inner.lock().store_watched = open;
        }
    }

    /// Forgets what `holder` had.
    fn forget(&self, holder: Holder) {
        let mut inner = self.inner.lock();
        inner.map.remove_holder(holder);
        inner.publish();
    }

    fn note(&self, holder: Holder, event: &BlockEvents) {
        let Some(namespace) = event.namespace else { return };
        let mut inner = self.inner.lock();
        for &hash in &event.hashes {
            let key = namespace.block(hash);
            match event.kind {
                EventKind::Snapshot | EventKind::Stored => {
                    inner.map.insert(key, holder);
                }
                EventKind::Removed => {
                    inner.map.remove(key, holder);
                }
                EventKind::SnapshotEnd => {}
            }
        }
        inner.publish();
    }
}

impl Inner {
    fn publish(&mut self) {
        let forgotten = self.map.forgotten();
        metrics::prefix_map(self.map.len(), self.map.max_blocks(), forgotten - self.forgotten);
        self.forgotten = forgotten;
    }
}

/// One open watch: applies events in order, and notices when they stop making sense. Dropping it ends the watch; a
/// worker's blocks stay believed in, since it is asked only while it can be reached.
#[derive(Debug)]
pub(crate) struct Feed<'a> {
    holders: &'a Holders,
    holder: Holder,
    last: Option<(u64, u64)>,
}

/// The stream contradicts itself: watch again, the snapshot makes it whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FeedError {
    #[error("the holder started anew in mid-stream (epoch {was}, then {is})")]
    EpochChanged { was: u64, is: u64 },
    #[error("events came out of order (number {was}, then {is})")]
    OutOfOrder { was: u64, is: u64 },
}

impl<'a> Feed<'a> {
    /// A watch that was just opened: everything known of the holder is forgotten, its snapshot follows.
    pub(crate) fn open(holder: Holder, holders: &'a Holders) -> Self {
        holders.forget(holder);
        holders.watched(holder, true);
        Self {
            holders,
            holder,
            last: None,
        }
    }

    /// Applies the next event. Numbers may jump (a watch on one namespace does not see the others) but never fall.
    pub(crate) fn apply(&mut self, event: &BlockEvents) -> Result<(), FeedError> {
        if let Some((epoch, sequence)) = self.last {
            if epoch != event.epoch {
                return Err(FeedError::EpochChanged {
                    was: epoch,
                    is: event.epoch,
                });
            }
            if event.sequence < sequence {
                return Err(FeedError::OutOfOrder {
                    was: sequence,
                    is: event.sequence,
                });
            }
        }
        self.last = Some((event.epoch, event.sequence));
        self.holders.note(self.holder, event);
        Ok(())
    }
}

impl Drop for Feed<'_> {
    fn drop(&mut self) {
        self.holders.watched(self.holder, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Holder = Holder::Worker(WorkerId(0));
    const B: Holder = Holder::Worker(WorkerId(1));

    fn namespace() -> NamespaceId {
        NamespaceId::from_bytes([9; 32])
    }

    fn chain(blocks: u8) -> Vec<BlockHash> {
        (0..blocks).map(|i| BlockHash::from_bytes([i; 32])).collect()
    }

    fn event(epoch: u64, sequence: u64, kind: EventKind, blocks: std::ops::Range<u8>) -> BlockEvents {
        BlockEvents {
            epoch,
            sequence,
            kind,
            namespace: Some(namespace()),
            hashes: blocks.map(|i| BlockHash::from_bytes([i; 32])).collect(),
            tier: None,
        }
    }

    /// Blocks of a chain of 4 at worker 0, worker 1 and the store.
    fn held(holders: &Holders) -> (usize, usize, usize) {
        let hits = holders.lookup(namespace(), &chain(4));
        (
            hits.device_blocks(WorkerId(0)),
            hits.device_blocks(WorkerId(1)),
            hits.store_blocks,
        )
    }

    #[test]
    fn events_build_the_view() {
        let holders = Holders::new(100);
        let mut a = Feed::open(A, &holders);
        let mut b = Feed::open(B, &holders);
        let mut store = Feed::open(Holder::Store, &holders);
        type Step = (EventKind, std::ops::Range<u8>, (usize, usize, usize));
        let steps: [(u8, Step); 7] = [
            (0, (EventKind::Snapshot, 0..2, (2, 0, 0))),
            (0, (EventKind::SnapshotEnd, 0..0, (2, 0, 0))),
            (1, (EventKind::Stored, 0..1, (2, 1, 0))),
            (2, (EventKind::Snapshot, 0..4, (2, 1, 4))),
            (0, (EventKind::Stored, 2..4, (4, 1, 4))),
            (0, (EventKind::Removed, 1..2, (1, 1, 4))),
            (1, (EventKind::Removed, 0..1, (1, 0, 4))),
        ];
        for (number, (who, (kind, blocks, expected))) in steps.into_iter().enumerate() {
            let feed = [&mut a, &mut b, &mut store]
                .into_iter()
                .nth(usize::from(who))
                .expect("a feed");
            let event = event(1, number as u64, kind, blocks);
            feed.apply(&event).expect("in order");
            assert_eq!(held(&holders), expected, "after step {number}");
        }
    }

    #[test]
    fn a_store_that_is_away_cannot_be_loaded_from() {
        let holders = Holders::new(100);
        let mut store = Feed::open(Holder::Store, &holders);
        store.apply(&event(1, 1, EventKind::Snapshot, 0..4)).expect("in order");
        assert_eq!(held(&holders), (0, 0, 4));
        drop(store);
        assert_eq!(held(&holders), (0, 0, 0));
    }

    #[test]
    fn a_new_watch_leaves_nothing_stale() {
        let holders = Holders::new(100);
        let mut feed = Feed::open(A, &holders);
        feed.apply(&event(1, 5, EventKind::Snapshot, 0..4)).expect("in order");
        drop(feed);
        assert_eq!(held(&holders), (4, 0, 0), "a cut watch is no reason to forget");
        let mut feed = Feed::open(A, &holders);
        feed.apply(&event(2, 0, EventKind::Snapshot, 0..1))
            .expect("a new epoch");
        assert_eq!(held(&holders), (1, 0, 0));
    }

    #[test]
    fn contradictions_are_noticed() {
        let table = [
            ((1, 5), (1, 5), Ok(())),
            ((1, 5), (1, 9), Ok(())),
            ((1, 5), (1, 4), Err(FeedError::OutOfOrder { was: 5, is: 4 })),
            ((1, 5), (2, 0), Err(FeedError::EpochChanged { was: 1, is: 2 })),
        ];
        for (first, second, expected) in table {
            let holders = Holders::new(100);
            let mut feed = Feed::open(A, &holders);
            feed.apply(&event(first.0, first.1, EventKind::Stored, 0..1))
                .expect("the first");
            let found = feed.apply(&event(second.0, second.1, EventKind::Stored, 1..2));
            assert_eq!(found, expected, "{first:?} then {second:?}");
        }
    }

    #[test]
    fn the_view_is_bounded() {
        let holders = Holders::new(3);
        let mut feed = Feed::open(A, &holders);
        feed.apply(&event(1, 1, EventKind::Snapshot, 0..200)).expect("in order");
        assert_eq!(holders.inner.lock().map.len(), 3);
        assert_eq!(held(&holders), (0, 0, 0), "what is left has lost its start");
    }
}
