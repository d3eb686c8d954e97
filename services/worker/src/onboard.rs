//! Match and get path: blocks on their way from the store into pages.
//!
//! A task reads the stream and hands layer blocks over through a bounded channel, some at a time; only the compute thread fills
//! pages. Blocks come layer after layer, inside a layer in the order of the chain, so one number says how far a load
//! is. A block that does not come cuts the hit: blocks before it are still of use once all their layers are there,
//! blocks from it on are computed.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use kvasir_block::BlockHash;
use kvasir_client::{ClientError, ErrorKind, GetOutcome, Namespace, StoreClient};
use kvasir_model::{PageId, PagePool};
use tokio::{runtime::Handle, sync::mpsc};

use crate::{
    compute::ComputeHandle,
    offload::Offload,
    store_session::{Lease, StoreSession},
};

/// Batches between the task and the compute thread.
pub(crate) const ARRIVALS_MAX: usize = 4;
/// Bytes after which a batch is handed over: few enough to fill pages while the next ones come, and enough that waking the other
/// thread, which takes as long as copying 48 KiB, does not count. A layer's end hands over too, since nobody can go on before.
const BATCH_BYTES: usize = 1 << 20;

/// What the store holds of a chain.
#[derive(Debug)]
pub(crate) struct StoreHit {
    pub(crate) blocks: usize,
    /// Keeps them from eviction until dropped.
    pub(crate) lease: Option<Lease>,
}

/// Asks the store how much of `chain` it holds, within `timeout`; nothing when it does not answer.
pub(crate) async fn match_prefix(
    session: &Arc<StoreSession>,
    client: &StoreClient,
    offload: &Offload,
    chain: &[BlockHash],
    lease: Duration,
    timeout: Duration,
) -> StoreHit {
    let nothing = StoreHit { blocks: 0, lease: None };
    let Some(namespace) = session.namespace() else {
        return nothing;
    };
    let asked = &chain[..chain.len().min(namespace.hashes_max)];
    let matching = client.match_prefix(namespace.id, asked, Some(lease));
    let matched = match tokio::time::timeout(timeout, matching).await {
        Ok(Ok(matched)) => matched,
        Ok(Err(error)) => {
            tracing::warn!(%error, "matching a prefix failed, computing it");
            session.lost(&error);
            return nothing;
        }
        Err(_) => {
            tracing::warn!(?timeout, "matching a prefix took too long, computing it");
            return nothing;
        }
    };
    // More than was asked for cannot be; fewer than before means that the store let blocks go.
    let blocks = matched.hit_blocks.min(asked.len());
    offload.note_held(&asked[..blocks]);
    offload.note_missing(&asked[blocks..]);
    StoreHit {
        blocks,
        lease: matched.lease.map(|id| session.lease(id)),
    }
}

/// One step of a load.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// The next layer blocks in order; `None` for one that is missing, corrupt, shed or late.
    Blocks(Vec<Option<Bytes>>),
    /// The stream ended early.
    Failed(String),
}

/// Which blocks a load brings.
pub(crate) struct Wanted {
    pub(crate) client: StoreClient,
    pub(crate) namespace: Namespace,
    pub(crate) chain: Vec<BlockHash>,
    pub(crate) lease: Option<Lease>,
    /// Longest wait for each next block.
    pub(crate) timeout: Duration,
}

/// Reads the blocks of `wanted` and hands them over, until the receiver leaves. Wakes the compute thread after the first
/// block and at the end; in between it looks by itself.
pub(crate) async fn load(
    session: Arc<StoreSession>,
    wanted: Wanted,
    arrivals: mpsc::Sender<Arrival>,
    compute: ComputeHandle,
) {
    let mut batch = Vec::new();
    if let Err(error) = read(&wanted, &arrivals, &compute, &mut batch).await {
        tracing::warn!(%error, "loading blocks failed, computing the rest");
        session.lost(&error);
        // The receiver may have left; then nobody needs to know.
        let _left = arrivals.send(Arrival::Blocks(batch)).await;
        let _left = arrivals.send(Arrival::Failed(error.to_string())).await;
    }
    drop(arrivals);
    compute.wake().await;
}

/// On an error `batch` has what came before it and was not handed over.
async fn read(
    wanted: &Wanted,
    arrivals: &mpsc::Sender<Arrival>,
    compute: &ComputeHandle,
    batch: &mut Vec<Option<Bytes>>,
) -> Result<(), ClientError> {
    let late = |_| ClientError {
        kind: ErrorKind::TimedOut,
        message: format!("no layer block came for {:?}", wanted.timeout),
    };
    let layers = wanted.namespace.schema.layers;
    let lease = wanted.lease.as_ref().map(Lease::id);
    let opening = wanted
        .client
        .get_blocks(&wanted.namespace, &wanted.chain, 0..layers, lease, None);
    let mut stream = tokio::time::timeout(wanted.timeout, opening).await.map_err(late)??;
    let (blocks, mut bytes, mut first) = (wanted.chain.len(), 0, true);
    for place in 0..usize::from(layers) * blocks {
        let turn = (place / blocks, wanted.chain[place % blocks]);
        let next = tokio::time::timeout(wanted.timeout, stream.next())
            .await
            .map_err(late)??;
        let Some(block) = next else {
            return Err(broken(format!("the stream ended after {place} layer blocks")));
        };
        if (usize::from(block.layer), block.hash) != turn {
            return Err(broken(format!(
                "layer block {place} is not the one whose turn it was (layer {})",
                turn.0
            )));
        }
        let payload = block.payload.filter(|_| block.outcome == GetOutcome::Hit);
        bytes += payload.as_ref().map_or(0, Bytes::len);
        batch.push(payload);
        if bytes < BATCH_BYTES && !(place + 1).is_multiple_of(blocks) {
            continue;
        }
        bytes = 0;
        if arrivals.send(Arrival::Blocks(std::mem::take(batch))).await.is_err() {
            return Ok(());
        }
        if std::mem::take(&mut first) {
            compute.wake().await;
        }
    }
    Ok(())
}

fn broken(message: String) -> ClientError {
    ClientError {
        kind: ErrorKind::Internal,
        message,
    }
}

/// The compute thread's side of a load.
#[derive(Debug)]
pub(crate) struct Onboard {
    /// Index in the chain of the first block that is loaded.
    first: usize,
    pages: Vec<PageId>,
    layers: usize,
    arrivals: mpsc::Receiver<Arrival>,
    /// Arrivals taken so far; their place in the order is (taken / pages, taken % pages).
    taken: usize,
    /// Blocks from `first` on that are or may still become whole.
    whole: usize,
    bytes: u64,
    failure: Option<String>,
}

/// Why a layer cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Cut(pub(crate) String);

impl Onboard {
    /// A load into `pages` of the blocks from index `first` of a chain on.
    pub(crate) fn new(first: usize, pages: Vec<PageId>, layers: usize, arrivals: mpsc::Receiver<Arrival>) -> Self {
        let whole = pages.len();
        Self {
            first,
            pages,
            layers,
            arrivals,
            taken: 0,
            whole,
            bytes: 0,
            failure: None,
        }
    }

    /// Fills pages with what has arrived; does not wait.
    pub(crate) fn pump(&mut self, pool: &mut PagePool) {
        while !self.is_over() {
            match self.arrivals.try_recv() {
                Ok(arrival) => self.take(arrival, pool),
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => self.fail("the load ended early".to_owned()),
            }
        }
    }

    /// Waits until `layer` of every block is in its page.
    ///
    /// # Errors
    /// [`Cut`] when a block will not come, whichever layer was its first to miss.
    pub(crate) fn wait(
        &mut self,
        layer: usize,
        pool: &mut PagePool,
        timeout: Duration,
        runtime: &Handle,
    ) -> Result<(), Cut> {
        self.pump(pool);
        while !self.is_cut() && self.taken < (layer + 1) * self.pages.len() {
            let next = runtime.block_on(async { tokio::time::timeout(timeout, self.arrivals.recv()).await });
            match next {
                Ok(Some(arrival)) => self.take(arrival, pool),
                Ok(None) => self.fail("the load ended early".to_owned()),
                Err(_) => self.fail(format!("no layer block came for {timeout:?}")),
            }
        }
        if self.is_cut() {
            let (whole, wanted) = (self.whole, self.pages.len());
            return Err(Cut(self
                .failure
                .clone()
                .unwrap_or_else(|| format!("{whole} of {wanted} matched blocks came whole"))));
        }
        Ok(())
    }

    /// Whether something has arrived.
    pub(crate) fn has_begun(&self) -> bool {
        self.taken > 0 || self.is_over()
    }

    /// Whether nothing more is to come: what is whole is whole in all layers.
    pub(crate) fn is_over(&self) -> bool {
        self.whole == 0 || self.taken >= (self.layers - 1) * self.pages.len() + self.whole
    }

    /// Whether blocks at the end will not come.
    pub(crate) fn is_cut(&self) -> bool {
        self.whole < self.pages.len()
    }

    /// Blocks that were to be loaded.
    pub(crate) fn wanted(&self) -> usize {
        self.pages.len()
    }

    /// Index of the first block, and the pages of those that are whole; meaningful when it is over.
    pub(crate) fn loaded(&self) -> (usize, &[PageId]) {
        (self.first, &self.pages[..self.whole])
    }

    /// Payload bytes filled into pages since the last call.
    pub(crate) fn take_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.bytes)
    }

    fn take(&mut self, arrival: Arrival, pool: &mut PagePool) {
        match arrival {
            Arrival::Blocks(payloads) => payloads.into_iter().for_each(|payload| self.fill(payload, pool)),
            Arrival::Failed(why) => self.fail(why),
        }
    }

    fn fill(&mut self, payload: Option<Bytes>, pool: &mut PagePool) {
        let (layer, index) = (self.taken / self.pages.len(), self.taken % self.pages.len());
        self.taken += 1;
        if index >= self.whole {
            return;
        }
        match payload.map(|payload| (pool.fill(layer, self.pages[index], &payload), payload.len())) {
            Some((Ok(()), bytes)) => self.bytes += bytes as u64,
            Some((Err(error), _)) => {
                self.failure = Some(error.to_string());
                self.whole = index;
            }
            None => self.whole = index,
        }
    }

    /// The stream is over: whole is what has its last layer.
    fn fail(&mut self, why: String) {
        let last_layer = self.taken.saturating_sub((self.layers - 1) * self.pages.len());
        self.whole = self.whole.min(last_layer);
        self.failure = Some(why);
    }
}

#[cfg(test)]
mod tests;
