//! Gets: in the order asked, verified, one outcome per block.

use std::{collections::VecDeque, ops::Range, time::Duration};

use bytes::Bytes;
use futures::stream;
use kvasir_block::{
    BlockHash,
    planted::{Bug, planted},
};
use kvasir_proto::{
    EntryHead, GetOutcome, convert,
    frame::{self, BulkLimits, BulkMessage, Incoming},
    v1,
};
use tokio::time::{Instant, timeout};
use tonic::{Status, body::Body};

use crate::{
    ClientError, DataPath, ErrorKind, Namespace, StoreClient,
    bulk::gets::{BulkGets, Came, Wanted},
    error::CallName,
    observe,
};

const PATH: &str = "/kvasir.v1.BlockStore/GetBlocks";

/// How long past the deadline the store may take to say which blocks came too late.
const GRACE: Duration = Duration::from_millis(250);

/// What came of one layer block; `payload` is verified and set exactly for a hit.
#[derive(Clone, Debug)]
pub struct GotBlock {
    /// Name of the block.
    pub hash: BlockHash,
    /// Layer index from 0.
    pub layer: u16,
    /// What became of it.
    pub outcome: GetOutcome,
    /// Its bytes; shared with the buffer they were received in, or lying in the memory of a store on this machine, which keeps
    /// them until they are dropped. What is kept for long is better copied.
    pub payload: Option<Bytes>,
}

/// An open stream of gets. Dropping it cancels what has not come.
#[derive(Debug)]
pub struct GetStream {
    name: CallName,
    namespace: Namespace,
    chain: Vec<BlockHash>,
    layers: Range<u16>,
    /// Blocks taken out of messages so far.
    received: usize,
    ready: VecDeque<GotBlock>,
    replies: Replies,
    call_timeout: Duration,
    /// When to give up, the grace included.
    until: Option<(Instant, Duration)>,
    failed: Option<ClientError>,
}

/// Where the blocks come from.
#[derive(Debug)]
enum Replies {
    Grpc(Incoming<Body>),
    Bulk(Box<BulkGets>),
}

impl GetStream {
    pub(crate) async fn open(
        client: &StoreClient,
        namespace: &Namespace,
        chain: &[BlockHash],
        layers: Range<u16>,
        lease: Option<u64>,
        deadline: Option<Duration>,
    ) -> Result<Self, ClientError> {
        let name = client.name("get_blocks");
        let refuse = |what: String| observe::failed(name.call, name.invalid(what));
        if chain.len() > namespace.hashes_max {
            let (asked, max) = (chain.len(), namespace.hashes_max);
            return Err(refuse(format!(
                "{asked} blocks, the store takes {max} in one call: ask in several"
            )));
        }
        if layers.is_empty() || layers.end > namespace.schema.layers {
            let (asked, held) = (&layers, namespace.schema.layers);
            return Err(refuse(format!(
                "layers {asked:?}: the namespace has layers 0..{held}, ask for at least one"
            )));
        }
        let until = deadline.map(|deadline| (Instant::now() + deadline + GRACE, deadline + GRACE));
        let wanted = Wanted {
            namespace,
            chain,
            layers: &layers,
            lease,
            deadline,
            recompute: client.config().recompute_per_block,
            verify: client.config().verify,
        };
        let replies = match bulk(client, &name, wanted).await {
            Ok(Some(gets)) => Replies::Bulk(Box::new(gets)),
            Ok(None) => Replies::Grpc(grpc(client, &name, wanted).await?),
            Err(error) => return Err(observe::failed(name.call, error)),
        };
        Ok(Self {
            name,
            namespace: namespace.clone(),
            chain: chain.to_vec(),
            layers,
            received: 0,
            ready: VecDeque::new(),
            replies,
            call_timeout: client.config().call_timeout,
            until,
            failed: None,
        })
    }

    /// The next block, or `None` at the end. A wrong checksum turns a hit into `Corrupt`. Dropping the wait loses nothing.
    ///
    /// # Errors
    /// The stream broke, no message came for the call timeout, or the deadline passed and the store did not say so.
    pub async fn next(&mut self) -> Result<Option<GotBlock>, ClientError> {
        if let Some(block) = self.ready.pop_front() {
            return Ok(Some(block));
        }
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        match self.more().await {
            Ok(()) => Ok(self.ready.pop_front()),
            Err(error) => {
                // Of a message that breaks the contract nothing is given out, also not what came before its fault.
                self.ready.clear();
                let error = observe::failed(self.name.call, error);
                self.failed = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Takes messages until one has blocks, or the end.
    async fn more(&mut self) -> Result<(), ClientError> {
        let expected = self.chain.len() * self.layers.len();
        while self.ready.is_empty() {
            let (wait, total) = self.patience();
            let replies = match &mut self.replies {
                Replies::Grpc(replies) => replies,
                Replies::Bulk(gets) => {
                    let came = timeout(wait, gets.next(&self.name)).await;
                    let Some(came) = came.map_err(|_| self.name.timed_out(total))?? else {
                        return Ok(());
                    };
                    self.take(came);
                    continue;
                }
            };
            let message = match timeout(wait, replies.message()).await {
                Ok(message) => message.map_err(|error| self.name.stream(&error))?,
                Err(_) => return Err(self.name.timed_out(total)),
            };
            let Some(message) = message else {
                if self.received < expected {
                    let what = format!("the stream ended after {} of {expected} blocks", self.received);
                    return Err(self.name.broken(what));
                }
                return Ok(());
            };
            let message = BulkMessage::parse(message, &BulkLimits::default());
            self.unpack(message.map_err(|error| self.name.broken(error))?)?;
        }
        Ok(())
    }

    /// How long to wait for the next message, and how long that is in all.
    fn patience(&self) -> (Duration, Duration) {
        match self.until {
            Some((until, total)) => {
                let left = until.saturating_duration_since(Instant::now());
                if left < self.call_timeout {
                    (left, total)
                } else {
                    (self.call_timeout, self.call_timeout)
                }
            }
            None => (self.call_timeout, self.call_timeout),
        }
    }

    /// A block of the bulk path, which is the next one that was asked for.
    fn take(&mut self, came: Came) {
        let i = self.received;
        self.received += 1;
        let (hash, layer) = (
            self.chain[i % self.chain.len()],
            // Below the schema's layers, which are u16.
            self.layers.start + (i / self.chain.len()) as u16,
        );
        observe::bytes(self.name.call, came.payload.len());
        if !came.right {
            observe::corrupt();
            tracing::warn!(?hash, layer, "received layer block is corrupt, dropping it");
            if let Replies::Bulk(gets) = &mut self.replies {
                gets.suspect((hash, layer));
            }
        }
        let outcome = if came.right { came.outcome } else { GetOutcome::Corrupt };
        self.ready.push_back(GotBlock {
            hash,
            layer,
            outcome,
            payload: (outcome == GetOutcome::Hit).then_some(came.payload),
        });
    }

    fn unpack(&mut self, message: BulkMessage) -> Result<(), ClientError> {
        let BulkMessage { header, mut payload } = message;
        if header.namespace != self.namespace.id.as_bytes()[..] {
            return Err(self.name.broken("header.namespace is another than asked for"));
        }
        let heads = convert::heads(&header, payload.len()).map_err(|error| self.name.broken_field(&error))?;
        for (i, (head, entry)) in heads.iter().zip(&header.entries).enumerate() {
            let outcome = GetOutcome::try_from(entry.outcome).map_err(|error| self.name.broken_field(&error))?;
            if let Err(problem) = self.check(head, outcome) {
                return Err(self.name.broken(format_args!("header.entries[{i}].{problem}")));
            }
            let bytes = payload.cut(head.length).unwrap_or_default();
            self.received += 1;
            self.ready.push_back(self.verified(head, outcome, bytes));
        }
        Ok(())
    }

    /// Whether the entry is the next one that was asked for.
    fn check(&self, head: &EntryHead, outcome: GetOutcome) -> Result<(), String> {
        let (layer_index, block) = (
            self.received / self.chain.len().max(1),
            self.received % self.chain.len().max(1),
        );
        if layer_index >= self.layers.len() || self.chain.is_empty() {
            return Err("hash: more blocks than asked for".to_owned());
        }
        // Below the schema's layers, which are u16.
        let layer = self.layers.start + layer_index as u16;
        if head.layer != layer {
            return Err(format!("layer: {} instead of {layer}", head.layer));
        }
        if head.hash != self.chain[block] {
            return Err(format!("hash: {:?} instead of {:?}", head.hash, self.chain[block]));
        }
        let length = if outcome == GetOutcome::Hit {
            self.namespace.layer_block_bytes
        } else {
            0
        };
        if head.length != length {
            return Err(format!("length: {} instead of {length}", head.length));
        }
        Ok(())
    }

    fn verified(&self, head: &EntryHead, outcome: GetOutcome, bytes: Bytes) -> GotBlock {
        observe::bytes(self.name.call, bytes.len());
        let hit = outcome == GetOutcome::Hit;
        let right = !hit || head.checksum.verifies(&bytes) || planted(Bug::ClientChecksumSkipped);
        if !right {
            observe::corrupt();
            tracing::warn!(hash = ?head.hash, layer = head.layer, "received layer block is corrupt, dropping it");
        }
        GotBlock {
            hash: head.hash,
            layer: head.layer,
            outcome: if right { outcome } else { GetOutcome::Corrupt },
            payload: (hit && right).then_some(bytes),
        }
    }
}

/// The bulk path, where the configuration wants it and it works.
async fn bulk(client: &StoreClient, name: &CallName, wanted: Wanted<'_>) -> Result<Option<BulkGets>, ClientError> {
    let config = client.config();
    if config.path == DataPath::Grpc {
        return Ok(None);
    }
    let must = config.path == DataPath::Bulk;
    let pool = client.bulk_pool();
    let mut fresh = false;
    loop {
        let lane = match pool.lane(name, config, fresh).await {
            Ok(Some(lane)) => lane,
            Ok(None) if must => return Err(name.no_bulk()),
            Err(error) if must => return Err(error),
            Ok(None) | Err(_) => return Ok(None),
        };
        let reused = lane.reused;
        observe::call(name.call);
        let wait = config.call_timeout;
        let opened = match timeout(wait, BulkGets::open(name, pool, lane, wanted, wait)).await {
            Ok(opened) => opened,
            Err(_) => Err(name.timed_out(wait)),
        };
        match opened {
            // It was idle, and the store closed it: another one.
            Err(error) if error.kind == ErrorKind::Unavailable && reused => fresh = true,
            Err(error) if error.kind == ErrorKind::Unavailable && !must => return Ok(None),
            other => return other.map(Some),
        }
    }
}

async fn grpc(client: &StoreClient, name: &CallName, wanted: Wanted<'_>) -> Result<Incoming<Body>, ClientError> {
    let request = v1::GetBlocksRequest {
        namespace: convert::namespace_bytes(wanted.namespace.id),
        hashes: convert::hash_bytes(wanted.chain),
        layer_start: wanted.layers.start.into(),
        layer_end: wanted.layers.end.into(),
        lease: wanted.lease.unwrap_or(0),
        recompute_us_per_block: wanted
            .recompute
            .map_or(0, |block| u64::try_from(block.as_micros()).unwrap_or(u64::MAX).max(1)),
    };
    let message = frame::encode_message(&request).map_err(Status::from);
    client.bulk(name, PATH, stream::iter([message]), wanted.deadline).await
}
