//! Put path: whole blocks on their way from pages to the store, through a queue that drops rather than stalls.
//!
//! The compute thread *offers* a block before the step that completes it; an accepted block has room for all its layers,
//! because a block without some of its layers is of no use to anyone. It then pushes layer after layer while the next
//! layer computes. Tasks ([`drain`]) take them out and tell what became of them. A block whose layers are all held is
//! *known* and not offered again; one that was shed, lost or dropped is forgotten, so that it may be offered again.

mod drain;
mod known;
mod step;

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum};
use kvasir_client::{LayerBlock, PutOutcome};
use kvasir_model::{PageId, PagePool, PoolError};
use metrics::Counter;
use parking_lot::Mutex;
use tokio::sync::{Notify, futures::Notified};

use self::known::Known;
use crate::metrics::OffloadMetrics;

pub(crate) use drain::drain;
pub use step::PushStep;

/// Names remembered as held by the store: 64 Ki blocks are 4 Mi tokens, and about 6 MB.
const KNOWN_BLOCKS_MAX: usize = 64 << 10;

/// The queue and what is known about its blocks. Shared by the compute thread and the drain tasks.
#[derive(Debug)]
pub(crate) struct Offload {
    layers: usize,
    layer_block_bytes: usize,
    bytes_max: usize,
    inner: Mutex<Inner>,
    arrived: Notify,
    changed: Notify,
    metrics: OffloadMetrics,
}

#[derive(Debug)]
struct Inner {
    /// Bytes in the queue or promised to layers that are still to come.
    bytes: usize,
    queue: VecDeque<Pushed>,
    /// Blocks on their way.
    under_way: HashMap<BlockHash, Progress>,
    known: Known,
    closed: bool,
}

#[derive(Debug, Default)]
struct Progress {
    pushed: usize,
    held: usize,
}

/// One layer of an accepted block, as the compute thread leaves it: without its checksum, which takes longer than all
/// else that a push costs that thread.
#[derive(Clone, Debug)]
pub(crate) struct Pushed {
    pub(crate) hash: BlockHash,
    pub(crate) layer: u16,
    /// Apart from the page it came from, so nothing writes to it any more.
    pub(crate) payload: Bytes,
}

impl Pushed {
    /// With its checksum: reads the whole payload.
    pub(crate) fn summed(self) -> LayerBlock {
        LayerBlock {
            hash: self.hash,
            layer: self.layer,
            checksum: Checksum::of(&self.payload),
            payload: self.payload,
        }
    }
}

/// What became of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offer {
    /// There is room for all layers; push each, or [`Offload::abandon`].
    Accepted,
    /// The store holds it, or it is on its way.
    Needless,
    /// The queue is full: dropped and counted.
    Dropped,
}

/// Where the blocks of a chain stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// On their way.
    pub(crate) under_way: usize,
    /// Indices of blocks that are neither held nor on their way.
    pub(crate) missing: Vec<usize>,
}

impl Offload {
    pub(crate) fn new(layers: usize, layer_block_bytes: usize, bytes_max: usize, metrics: OffloadMetrics) -> Self {
        Self {
            layers,
            layer_block_bytes,
            bytes_max,
            inner: Mutex::new(Inner {
                bytes: 0,
                queue: VecDeque::new(),
                under_way: HashMap::new(),
                known: Known::new(KNOWN_BLOCKS_MAX),
                closed: false,
            }),
            arrived: Notify::new(),
            changed: Notify::new(),
            metrics,
        }
    }

    /// Bytes of a whole block.
    pub(crate) fn block_bytes(&self) -> usize {
        self.layers * self.layer_block_bytes
    }

    /// Asks for room for all layers of a block.
    pub(crate) fn offer(&self, hash: BlockHash) -> Offer {
        let mut inner = self.inner.lock();
        if inner.known.contains(&hash) || inner.under_way.contains_key(&hash) {
            return Offer::Needless;
        }
        if inner.closed || inner.bytes + self.block_bytes() > self.bytes_max {
            self.metrics.dropped.increment(1);
            return Offer::Dropped;
        }
        inner.bytes += self.block_bytes();
        inner.under_way.insert(hash, Progress::default());
        self.metrics.queue_bytes.set(inner.bytes as f64);
        Offer::Accepted
    }

    /// Takes one layer of an accepted block from its page, apart from which its bytes are, since the page may be evicted and
    /// written again before the store has them.
    pub(crate) fn push_page(&self, pool: &PagePool, layer: usize, hash: BlockHash, page: PageId) {
        match pool.page_bytes(layer, page) {
            Ok(payload) => self.push(Pushed {
                hash,
                layer: layer as u16,
                payload,
            }),
            Err(PoolError::NoRoom) => self.give_up(hash, &self.metrics.dropped),
            Err(error) => {
                tracing::error!(%error, "a page could not be read, its block is not pushed");
                self.abandon(hash);
            }
        }
    }

    /// Takes one layer of an accepted block.
    fn push(&self, block: Pushed) {
        let mut inner = self.inner.lock();
        if let Some(progress) = inner.under_way.get_mut(&block.hash) {
            progress.pushed += 1;
            inner.queue.push_back(block);
            drop(inner);
            self.arrived.notify_one();
        }
    }

    /// Gives up a block whose remaining layers will not come, or that was shed or lost on the way.
    pub(crate) fn abandon(&self, hash: BlockHash) {
        self.give_up(hash, &self.metrics.abandoned);
    }

    fn give_up(&self, hash: BlockHash, counted_as: &Counter) {
        let mut inner = self.inner.lock();
        if let Some(progress) = inner.under_way.remove(&hash) {
            let before = inner.queue.len();
            inner.queue.retain(|block| block.hash != hash);
            let waiting = before - inner.queue.len() + self.layers - progress.pushed;
            inner.bytes -= waiting * self.layer_block_bytes;
            self.metrics.queue_bytes.set(inner.bytes as f64);
            counted_as.increment(1);
        }
        drop(inner);
        self.changed.notify_waiters();
    }

    /// Notes how long a step waited for room on its way to this queue.
    pub(crate) fn waited(&self, time: Duration) {
        self.metrics.waited.record(time.as_secs_f64());
    }

    /// The next layer block to send; `None` when the queue is closed and empty.
    pub(crate) async fn take(&self) -> Option<Pushed> {
        loop {
            let arrived = self.arrived.notified();
            {
                let mut inner = self.inner.lock();
                if let Some(block) = inner.queue.pop_front() {
                    inner.bytes -= self.layer_block_bytes;
                    self.metrics.queue_bytes.set(inner.bytes as f64);
                    return Some(block);
                }
                if inner.closed {
                    return None;
                }
            }
            arrived.await;
        }
    }

    /// Notes what the store answered for one layer.
    pub(crate) fn answered(&self, hash: BlockHash, outcome: PutOutcome) {
        match outcome {
            PutOutcome::Stored | PutOutcome::Present => {
                let mut inner = self.inner.lock();
                let Some(progress) = inner.under_way.get_mut(&hash) else {
                    return;
                };
                progress.held += 1;
                if outcome == PutOutcome::Stored {
                    self.metrics.pushed_bytes.increment(self.layer_block_bytes as u64);
                }
                if progress.held == self.layers {
                    inner.under_way.remove(&hash);
                    inner.known.insert(hash);
                    drop(inner);
                    self.changed.notify_waiters();
                }
            }
            PutOutcome::Busy | PutOutcome::ChecksumMismatch => {
                if outcome == PutOutcome::ChecksumMismatch {
                    tracing::error!(block = %hash, "the store refused a block for its checksum, bytes changed on the way");
                }
                self.abandon(hash);
            }
        }
    }

    /// Notes blocks that the store is known to hold, because it said so.
    pub(crate) fn note_held(&self, hashes: &[BlockHash]) {
        let mut inner = self.inner.lock();
        for hash in hashes {
            inner.known.insert(*hash);
        }
    }

    /// Forgets blocks that the store turned out not to hold.
    pub(crate) fn note_missing(&self, hashes: &[BlockHash]) {
        let mut inner = self.inner.lock();
        for hash in hashes {
            inner.known.remove(hash);
        }
    }

    /// Forgets everything known: another store, or a store that started anew.
    pub(crate) fn forget_all(&self) {
        self.inner.lock().known.clear();
    }

    /// Where the blocks of `chain` stand.
    pub(crate) fn standing(&self, chain: &[BlockHash]) -> Standing {
        let inner = self.inner.lock();
        let mut standing = Standing::default();
        for (index, hash) in chain.iter().enumerate() {
            if inner.under_way.contains_key(hash) {
                standing.under_way += 1;
            } else if !inner.known.contains(hash) {
                standing.missing.push(index);
            }
        }
        standing
    }

    /// Ends at the next change of standing. Take it before looking, then await it.
    pub(crate) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    /// Takes no more offers; [`Offload::take`] ends when the queue is empty.
    pub(crate) fn close(&self) {
        self.inner.lock().closed = true;
        // Also those that are about to wait.
        self.arrived.notify_waiters();
    }

    /// Ends when nothing is on its way: everything accepted was pushed and answered, or given up.
    pub(crate) async fn idle(&self) {
        loop {
            let changed = self.changed();
            if self.is_idle() {
                return;
            }
            changed.await;
        }
    }

    /// Whether nothing is on its way.
    pub(crate) fn is_idle(&self) -> bool {
        self.inner.lock().under_way.is_empty()
    }

    /// Layer blocks in the queue.
    pub(crate) fn queued(&self) -> usize {
        self.inner.lock().queue.len()
    }
}

#[cfg(test)]
mod tests;
