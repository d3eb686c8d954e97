//! Block events of the device tier: a snapshot, then changes, to a bounded number of bounded readers.

use std::collections::HashSet;

use kvasir_block::{BlockHash, NamespaceId};
use kvasir_proto::{BlockEvents, EventKind, convert::Tier};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::device_tier::Change;

/// Blocks named in one event of a snapshot: 32 KiB of hashes.
const SNAPSHOT_HASHES: usize = 1024;
/// Events that a reader may be behind; then its watch ends and it must begin anew.
const EVENTS_BEHIND_MAX: usize = 1024;
/// Readers at a time: routers and people who look.
const WATCHERS_MAX: usize = 64;

/// What the compute thread tells, and who listens.
#[derive(Debug)]
pub(crate) struct EventHub {
    epoch: u64,
    namespace: NamespaceId,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    sequence: u64,
    held: HashSet<BlockHash>,
    watchers: Vec<mpsc::Sender<BlockEvents>>,
}

/// One reader's events. After [`Watch::next`] gave `None`, the reader was too slow or the worker is gone.
#[derive(Debug)]
pub(crate) struct Watch {
    snapshot: std::vec::IntoIter<BlockEvents>,
    changes: mpsc::Receiver<BlockEvents>,
}

impl EventHub {
    pub(crate) fn new(epoch: u64, namespace: NamespaceId) -> Self {
        Self {
            epoch,
            namespace,
            inner: Mutex::default(),
        }
    }

    /// Tells everyone; never waits. A reader that is too far behind is dropped, which it notices.
    pub(crate) fn publish(&self, changes: &[Change]) {
        if changes.is_empty() {
            return;
        }
        let mut inner = self.inner.lock();
        for run in changes.chunk_by(|a, b| kind(a) == kind(b)) {
            let hashes: Vec<BlockHash> = run
                .iter()
                .map(|change| match change {
                    Change::Stored(hash) => {
                        inner.held.insert(*hash);
                        *hash
                    }
                    Change::Removed(hash) => {
                        inner.held.remove(hash);
                        *hash
                    }
                })
                .collect();
            inner.sequence += 1;
            let event = self.event(inner.sequence, kind(&run[0]), hashes);
            inner.watchers.retain(|watcher| watcher.try_send(event.clone()).is_ok());
        }
    }

    /// A new reader, with what is held now; `None` when there are too many.
    pub(crate) fn watch(&self) -> Option<Watch> {
        let mut inner = self.inner.lock();
        inner.watchers.retain(|watcher| !watcher.is_closed());
        if inner.watchers.len() >= WATCHERS_MAX {
            return None;
        }
        let (sender, changes) = mpsc::channel(EVENTS_BEHIND_MAX);
        inner.watchers.push(sender);
        let held: Vec<BlockHash> = inner.held.iter().copied().collect();
        let parts = held
            .chunks(SNAPSHOT_HASHES)
            .map(|part| self.event(inner.sequence, EventKind::Snapshot, part.to_vec()));
        let end = self.event(inner.sequence, EventKind::SnapshotEnd, Vec::new());
        let snapshot: Vec<BlockEvents> = parts.chain([end]).collect();
        Some(Watch {
            snapshot: snapshot.into_iter(),
            changes,
        })
    }

    pub(crate) fn namespace(&self) -> NamespaceId {
        self.namespace
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    fn event(&self, sequence: u64, kind: EventKind, hashes: Vec<BlockHash>) -> BlockEvents {
        BlockEvents {
            epoch: self.epoch,
            sequence,
            kind,
            namespace: Some(self.namespace),
            hashes,
            tier: Some(Tier::Device),
        }
    }
}

fn kind(change: &Change) -> EventKind {
    match change {
        Change::Stored(_) => EventKind::Stored,
        Change::Removed(_) => EventKind::Removed,
    }
}

impl Watch {
    /// The next event; `None` when the reader was dropped for being slow.
    pub(crate) async fn next(&mut self) -> Option<BlockEvents> {
        match self.snapshot.next() {
            Some(event) => Some(event),
            None => self.changes.recv().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u64) -> BlockHash {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&n.to_le_bytes());
        BlockHash::from_bytes(bytes)
    }

    fn hub() -> EventHub {
        EventHub::new(9, NamespaceId::from_bytes([7; 32]))
    }

    #[tokio::test]
    async fn a_watch_begins_with_what_is_held_and_goes_on_without_a_gap() {
        let hub = hub();
        hub.publish(&[
            Change::Stored(hash(1)),
            Change::Stored(hash(2)),
            Change::Removed(hash(1)),
        ]);
        let mut watch = hub.watch().expect("there is room");
        hub.publish(&[Change::Stored(hash(3))]);
        let mut seen = Vec::new();
        for _ in 0..3 {
            let event = watch.next().await.expect("an event");
            assert_eq!((event.epoch, event.tier), (9, Some(Tier::Device)));
            seen.push((event.kind, event.sequence, event.hashes));
        }
        let expected = [
            (EventKind::Snapshot, 2, vec![hash(2)]),
            (EventKind::SnapshotEnd, 2, vec![]),
            (EventKind::Stored, 3, vec![hash(3)]),
        ];
        assert_eq!(seen, expected);
    }

    #[tokio::test]
    async fn a_reader_that_is_too_slow_is_dropped_and_others_are_not_held_up() {
        let hub = hub();
        let mut slow = hub.watch().expect("there is room");
        for n in 0..EVENTS_BEHIND_MAX as u64 + 5 {
            hub.publish(&[Change::Stored(hash(n))]);
        }
        let mut events = 0;
        while slow.next().await.is_some() {
            events += 1;
        }
        assert_eq!(events, 1 + EVENTS_BEHIND_MAX);
        let mut fresh = hub.watch().expect("there is room");
        let first = fresh.next().await.expect("a snapshot");
        assert_eq!(first.hashes.len(), SNAPSHOT_HASHES);
    }

    #[test]
    fn readers_are_bounded_and_leave() {
        let hub = hub();
        let watchers: Vec<Watch> = std::iter::from_fn(|| hub.watch()).collect();
        assert_eq!(watchers.len(), WATCHERS_MAX);
        drop(watchers);
        assert!(hub.watch().is_some());
    }
}
