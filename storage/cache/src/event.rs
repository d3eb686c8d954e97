//! Events: which blocks are available, to whoever watches.
//!
//! A subscription starts with a consistent snapshot and goes on with changes. Its queue is bounded: a reader that falls
//! behind is told how many events it missed and its subscription ends; subscribing again makes it whole.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use kvasir_block::{BlockHash, NamespaceId};
use parking_lot::{Condvar, Mutex};

use crate::Tier;

/// Hashes in one snapshot event.
const SNAPSHOT_HASHES: usize = 1024;

/// What an event says about its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// They were available when the subscription began.
    Snapshot,
    /// The snapshot is complete; no blocks.
    SnapshotEnd,
    /// They became available: all their layers are held.
    Stored,
    /// They ceased to be.
    Removed,
}

/// Blocks that are, became, or ceased to be available.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockEvent {
    /// Changes when the cache starts anew.
    pub epoch: u64,
    /// Rises inside an epoch. A snapshot carries the number of the last change it includes; a subscription to one
    /// namespace sees gaps.
    pub sequence: u64,
    /// What happened.
    pub kind: EventKind,
    /// Whose blocks; `None` at the end of the snapshot of all namespaces.
    pub namespace: Option<NamespaceId>,
    /// Which blocks.
    pub hashes: Vec<BlockHash>,
    /// Where they are, or were.
    pub tier: Tier,
}

/// One step of a subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventStep {
    /// Something to know.
    Event(BlockEvent),
    /// The reader fell behind by so many events; `Closed` follows. Subscribe again.
    Lagged {
        /// Events that were not delivered.
        missed: u64,
    },
    /// Nothing will come any more: the cache closed, or the reader lagged.
    Closed,
}

#[derive(Debug)]
pub(crate) struct Hub {
    epoch: u64,
    sequence: u64,
    queue_max: usize,
    subscribers_max: usize,
    subscribers: Vec<Arc<Mailbox>>,
    pub(crate) lagged: u64,
}

#[derive(Debug)]
struct Mailbox {
    namespace: Option<NamespaceId>,
    inner: Mutex<Inner>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// Not yet asked for; not counted against the bound, it is as large as what is held.
    snapshot: VecDeque<BlockEvent>,
    changes: VecDeque<BlockEvent>,
    missed: u64,
    closed: bool,
    waker: Option<Waker>,
}

/// A reader's end. Dropping it ends the subscription.
#[derive(Debug)]
pub struct Subscription {
    mailbox: Arc<Mailbox>,
}

impl Hub {
    pub(crate) fn new(epoch: u64, queue_max: usize, subscribers_max: usize) -> Self {
        Self {
            epoch,
            sequence: 0,
            queue_max,
            subscribers_max,
            subscribers: Vec::new(),
            lagged: 0,
        }
    }

    /// A new subscription that begins with `available`, or `None` when there are too many.
    pub(crate) fn subscribe(
        &mut self,
        namespace: Option<NamespaceId>,
        available: impl Iterator<Item = (NamespaceId, Vec<BlockHash>)>,
    ) -> Option<Subscription> {
        self.drop_departed();
        if self.subscribers.len() >= self.subscribers_max {
            return None;
        }
        let event = |kind, namespace, hashes| BlockEvent {
            epoch: self.epoch,
            sequence: self.sequence,
            kind,
            namespace,
            hashes,
            tier: Tier::Host,
        };
        let mut snapshot = VecDeque::new();
        for (namespace, hashes) in available {
            let parts = hashes.chunks(SNAPSHOT_HASHES);
            snapshot.extend(parts.map(|part| event(EventKind::Snapshot, Some(namespace), part.to_vec())));
        }
        snapshot.push_back(event(EventKind::SnapshotEnd, namespace, Vec::new()));
        let inner = Inner {
            snapshot,
            ..Inner::default()
        };
        let mailbox = Arc::new(Mailbox {
            namespace,
            inner: Mutex::new(inner),
            arrived: Condvar::new(),
        });
        self.subscribers.push(Arc::clone(&mailbox));
        Some(Subscription { mailbox })
    }

    /// Tells everyone concerned. Never waits for a reader.
    pub(crate) fn publish(&mut self, kind: EventKind, namespace: NamespaceId, hash: BlockHash, tier: Tier) {
        self.sequence += 1;
        let (epoch, sequence) = (self.epoch, self.sequence);
        let concerned = self
            .subscribers
            .iter()
            .filter(|to| to.namespace.is_none_or(|only| only == namespace));
        for mailbox in concerned {
            let mut inner = mailbox.inner.lock();
            if inner.closed || inner.missed > 0 {
                inner.missed += u64::from(!inner.closed);
                continue;
            }
            if inner.changes.len() >= self.queue_max {
                // The snapshot and the queue are of no use without what comes next.
                inner.missed = inner.changes.len() as u64 + 1;
                inner.changes.clear();
                inner.snapshot.clear();
                self.lagged += 1;
            } else {
                let hashes = vec![hash];
                inner.changes.push_back(BlockEvent {
                    epoch,
                    sequence,
                    kind,
                    namespace: Some(namespace),
                    hashes,
                    tier,
                });
            }
            mailbox.wake(inner.waker.take());
        }
    }

    pub(crate) fn close(&mut self) {
        for mailbox in self.subscribers.drain(..) {
            let mut inner = mailbox.inner.lock();
            inner.closed = true;
            mailbox.wake(inner.waker.take());
        }
    }

    pub(crate) fn subscribers(&mut self) -> usize {
        self.drop_departed();
        self.subscribers.len()
    }

    fn drop_departed(&mut self) {
        self.subscribers.retain(|mailbox| Arc::strong_count(mailbox) > 1);
    }
}

impl Mailbox {
    fn wake(&self, waker: Option<Waker>) {
        self.arrived.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Inner {
    fn step(&mut self) -> Option<EventStep> {
        if self.missed > 0 {
            self.closed = true;
            return Some(EventStep::Lagged {
                missed: std::mem::take(&mut self.missed),
            });
        }
        let event = self.snapshot.pop_front().or_else(|| self.changes.pop_front());
        event
            .map(EventStep::Event)
            .or_else(|| self.closed.then_some(EventStep::Closed))
    }
}

impl Subscription {
    /// The next step, waiting for it at most `timeout`; `None` when nothing came.
    pub fn next(&self, timeout: Duration) -> Option<EventStep> {
        let deadline = Instant::now() + timeout;
        let mut inner = self.mailbox.inner.lock();
        loop {
            if let Some(step) = inner.step() {
                return Some(step);
            }
            if self.mailbox.arrived.wait_until(&mut inner, deadline).timed_out() {
                return inner.step();
            }
        }
    }

    /// The next step for an async reader (`std::future::poll_fn(|cx| subscription.poll_next(cx))`); one reader at a time.
    pub fn poll_next(&self, context: &mut Context<'_>) -> Poll<EventStep> {
        let mut inner = self.mailbox.inner.lock();
        match inner.step() {
            Some(step) => Poll::Ready(step),
            None => {
                inner.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(i: u8) -> NamespaceId {
        NamespaceId::from_bytes([i; 32])
    }

    fn hash(i: u8) -> BlockHash {
        BlockHash::from_bytes([i; 32])
    }

    fn drain(subscription: &Subscription) -> Vec<EventStep> {
        std::iter::from_fn(|| subscription.next(Duration::ZERO))
            .take(20)
            .take_while(|s| *s != EventStep::Closed)
            .collect()
    }

    fn kinds(steps: &[EventStep]) -> Vec<Option<(EventKind, u64)>> {
        let kind = |step: &EventStep| match step {
            EventStep::Event(event) => Some((event.kind, event.sequence)),
            _ => None,
        };
        steps.iter().map(kind).collect()
    }

    #[test]
    fn snapshot_then_changes_of_the_namespace_asked_for() {
        let mut hub = Hub::new(7, 10, 10);
        hub.publish(EventKind::Stored, namespace(1), hash(1), Tier::Host);
        let one = hub
            .subscribe(Some(namespace(1)), [(namespace(1), vec![hash(1)])].into_iter())
            .unwrap();
        let all = hub.subscribe(None, std::iter::empty()).unwrap();
        hub.publish(EventKind::Stored, namespace(2), hash(2), Tier::Host);
        hub.publish(EventKind::Removed, namespace(1), hash(1), Tier::Disk);
        use EventKind::*;
        assert_eq!(
            kinds(&drain(&one)),
            [Some((Snapshot, 1)), Some((SnapshotEnd, 1)), Some((Removed, 3))]
        );
        assert_eq!(
            kinds(&drain(&all)),
            [Some((SnapshotEnd, 1)), Some((Stored, 2)), Some((Removed, 3))]
        );
        hub.close();
        assert_eq!(one.next(Duration::ZERO), Some(EventStep::Closed));
    }

    #[test]
    fn a_large_snapshot_comes_in_parts() {
        let mut hub = Hub::new(7, 10, 10);
        let hashes: Vec<_> = (0..2500u32)
            .map(|i| BlockHash::from_bytes(std::array::from_fn(|b| (i >> (b % 4)) as u8)))
            .collect();
        let subscription = hub
            .subscribe(None, [(namespace(1), hashes.clone())].into_iter())
            .unwrap();
        let steps = drain(&subscription);
        let got: Vec<_> = steps
            .iter()
            .flat_map(|s| {
                if let EventStep::Event(e) = s {
                    e.hashes.clone()
                } else {
                    vec![]
                }
            })
            .collect();
        assert_eq!((steps.len(), got), (4, hashes));
    }

    #[test]
    fn a_slow_reader_is_told_and_let_go() {
        let mut hub = Hub::new(7, 3, 10);
        let slow = hub.subscribe(None, std::iter::empty()).unwrap();
        for i in 0..6 {
            hub.publish(EventKind::Stored, namespace(1), hash(i), Tier::Host);
        }
        assert_eq!(slow.next(Duration::ZERO), Some(EventStep::Lagged { missed: 6 }));
        assert_eq!(slow.next(Duration::ZERO), Some(EventStep::Closed));
        assert_eq!(hub.lagged, 1);
    }

    #[test]
    fn bounded_in_subscribers_and_departed_ones_make_place() {
        let mut hub = Hub::new(7, 3, 1);
        let first = hub.subscribe(None, std::iter::empty()).unwrap();
        assert!(hub.subscribe(None, std::iter::empty()).is_none());
        drop(first);
        assert!(hub.subscribe(None, std::iter::empty()).is_some());
    }

    #[test]
    fn an_async_reader_is_woken() {
        use std::{
            sync::atomic::{AtomicU32, Ordering},
            task::Wake,
        };
        struct Count(AtomicU32);
        impl Wake for Count {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let mut hub = Hub::new(7, 3, 1);
        let subscription = hub.subscribe(None, std::iter::empty()).unwrap();
        let count = Arc::new(Count(AtomicU32::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let mut context = Context::from_waker(&waker);
        assert!(
            subscription.poll_next(&mut context).is_ready(),
            "the end of the snapshot"
        );
        assert!(subscription.poll_next(&mut context).is_pending());
        hub.publish(EventKind::Stored, namespace(1), hash(1), Tier::Host);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(subscription.poll_next(&mut context).is_ready());
    }
}
