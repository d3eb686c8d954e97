//! Puts: batched, bounded, one outcome per block.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use kvasir_block::{BlockHash, Checksum};
use kvasir_proto::{
    EntryHead, PutOutcome, convert,
    frame::{BulkLimits, BulkMessage, Incoming, Rope, StreamError},
    v1,
};
use prost::Message;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;

use crate::{ClientError, Namespace, StoreClient, error::CallName, observe};

const PATH: &str = "/kvasir.v1.BlockStore/PutBlocks";

/// Messages between the stream and the connection. What is unanswered is bounded in bytes; this only decouples.
const QUEUE: usize = 4;

/// Room that a message needs beside its payload: fields, tags and per entry at most 64 bytes.
const ENTRY_BYTES: usize = 64;
const HEAD_BYTES: usize = 128;

/// One layer block on its way to the store.
#[derive(Clone, Debug)]
pub struct LayerBlock {
    /// Name of the block.
    pub hash: BlockHash,
    /// Layer index from 0.
    pub layer: u16,
    /// CRC-32C of the payload, made where the bytes were made.
    pub checksum: Checksum,
    /// Keys and values, exactly a layer block of the namespace.
    pub payload: Bytes,
}

/// An open stream of puts. After an error it is of no more use: every call repeats the error. Dropping it cancels what is
/// unanswered; [`PutStream::finish`] ends it in order.
#[derive(Debug)]
pub struct PutStream {
    name: CallName,
    namespace: Namespace,
    call_timeout: Duration,
    in_flight_bytes_max: usize,
    batch_bytes: usize,
    /// `None` once closed.
    messages: Option<mpsc::Sender<Rope>>,
    replies: Incoming<Body>,
    batch: BulkMessage,
    batch_blocks: Vec<(BlockHash, u16)>,
    unanswered: VecDeque<Sent>,
    unanswered_bytes: usize,
    outcomes: Vec<(BlockHash, u16, PutOutcome)>,
    failed: Option<ClientError>,
}

/// A message whose outcomes have not come.
#[derive(Debug)]
struct Sent {
    blocks: Vec<(BlockHash, u16)>,
    bytes: usize,
}

impl PutStream {
    pub(crate) async fn open(client: &StoreClient, namespace: &Namespace) -> Result<Self, ClientError> {
        let name = client.name("put_blocks");
        let (messages, queued) = mpsc::channel(QUEUE);
        let replies = client
            .bulk(&name, PATH, ReceiverStream::new(queued).map(Ok), None)
            .await?;
        let config = client.config();
        Ok(Self {
            name,
            namespace: namespace.clone(),
            call_timeout: config.call_timeout,
            in_flight_bytes_max: config.in_flight_bytes_max,
            batch_bytes: config.batch_bytes,
            messages: Some(messages),
            replies,
            batch: BulkMessage::default(),
            batch_blocks: Vec::new(),
            unanswered: VecDeque::new(),
            unanswered_bytes: 0,
            outcomes: Vec::new(),
            failed: None,
        })
    }

    /// Queues a block; batches of about 1 MiB leave by themselves. Waits while too many bytes are unanswered.
    ///
    /// # Errors
    /// `Invalid` for a block that is none of the namespace (the stream lives on); else the stream broke.
    pub async fn put(&mut self, block: LayerBlock) -> Result<(), ClientError> {
        self.check_alive()?;
        let head = EntryHead {
            hash: block.hash,
            layer: block.layer,
            length: block.payload.len(),
            checksum: block.checksum,
        };
        if let Err(error) = head.fits(&self.namespace.schema) {
            return Err(observe::failed(self.name.call, self.name.invalid(error)));
        }
        let entries = self.batch_blocks.len() + 1;
        let message_bytes = self.batch.payload.len() + head.length + entries * ENTRY_BYTES + HEAD_BYTES;
        if !self.batch_blocks.is_empty()
            && (message_bytes > self.namespace.message_bytes_max || entries > BulkLimits::default().entries_max)
        {
            self.flush().await?;
        }
        self.batch
            .header
            .entries
            .push(head.to_wire(v1::BlockOutcome::Unspecified));
        self.batch.payload.push(block.payload);
        self.batch_blocks.push((block.hash, block.layer));
        if self.batch.payload.len() >= self.batch_bytes {
            self.flush().await?;
        }
        Ok(())
    }

    /// Sends what is batched.
    ///
    /// # Errors
    /// The stream broke, or no outcome came for the call timeout while too much was unanswered.
    pub async fn flush(&mut self) -> Result<(), ClientError> {
        self.check_alive()?;
        if self.batch_blocks.is_empty() {
            return Ok(());
        }
        let bytes = self.batch.payload.len();
        while !self.unanswered.is_empty() && self.unanswered_bytes + bytes > self.in_flight_bytes_max {
            self.wait_for_reply().await?;
        }
        // From here to the push below nothing is awaited that would lose the batch when dropped.
        while !self.has_room().await? {}
        let mut batch = std::mem::take(&mut self.batch);
        batch.header.namespace = convert::namespace_bytes(self.namespace.id);
        let frames = match batch.encode() {
            Ok(frames) => frames,
            Err(error) => return Err(self.fail(self.name.invalid(error))),
        };
        let blocks = std::mem::take(&mut self.batch_blocks);
        if let Some(messages) = &self.messages
            && messages.try_send(frames).is_err()
        {
            return Err(self.why_it_ended().await);
        }
        observe::bytes(self.name.call, bytes);
        self.unanswered_bytes += bytes;
        self.unanswered.push_back(Sent { blocks, bytes });
        Ok(())
    }

    /// Outcomes that have come since the last call, in the order of the puts; does not wait. Should the stream have
    /// broken, the next call that can fail says so.
    pub fn outcomes(&mut self) -> Vec<(BlockHash, u16, PutOutcome)> {
        while self.failed.is_none() && !self.unanswered.is_empty() {
            let Some(reply) = self.replies.message().now_or_never() else {
                break;
            };
            // The error is kept for the next call.
            if self.take_reply(reply).is_err() {
                break;
            }
        }
        std::mem::take(&mut self.outcomes)
    }

    /// Payload bytes sent and not yet answered.
    pub fn unanswered_bytes(&self) -> usize {
        self.unanswered_bytes
    }

    /// Sends what is batched, closes, and waits for every outcome: those since the last call of [`Self::outcomes`].
    ///
    /// # Errors
    /// The stream broke: blocks without an outcome may or may not be held.
    pub async fn finish(mut self) -> Result<Vec<(BlockHash, u16, PutOutcome)>, ClientError> {
        self.flush().await?;
        self.messages = None;
        while !self.unanswered.is_empty() {
            self.wait_for_reply().await?;
        }
        match timeout(self.call_timeout, self.replies.message()).await {
            Ok(Ok(None)) => Ok(self.outcomes),
            Ok(Ok(Some(_))) => Err(self.fail(self.name.broken("more outcomes than messages"))),
            Ok(Err(error)) => Err(self.fail(self.name.stream(&error))),
            Err(_) => Err(self.fail(self.name.timed_out(self.call_timeout))),
        }
    }

    /// Whether the queue to the connection has a place; if not, waits for one or for a reply.
    async fn has_room(&mut self) -> Result<bool, ClientError> {
        let Some(messages) = &self.messages else {
            return Ok(true);
        };
        if messages.capacity() > 0 && !messages.is_closed() {
            return Ok(true);
        }
        let waited = timeout(self.call_timeout, async {
            tokio::select! {
                place = messages.reserve() => Err(place.is_ok()),
                reply = self.replies.message() => Ok(reply),
            }
        })
        .await;
        match waited {
            Ok(Ok(reply)) => self.take_reply(reply).map(|()| false),
            Ok(Err(true)) => Ok(true),
            Ok(Err(false)) => Err(self.why_it_ended().await),
            Err(_) => Err(self.fail(self.name.timed_out(self.call_timeout))),
        }
    }

    /// The connection takes no more: the store's last words say why.
    async fn why_it_ended(&mut self) -> ClientError {
        loop {
            if let Err(error) = self.wait_for_reply().await {
                return error;
            }
        }
    }

    async fn wait_for_reply(&mut self) -> Result<(), ClientError> {
        match timeout(self.call_timeout, self.replies.message()).await {
            Ok(reply) => self.take_reply(reply),
            Err(_) => Err(self.fail(self.name.timed_out(self.call_timeout))),
        }
    }

    fn take_reply(&mut self, reply: Result<Option<Rope>, StreamError>) -> Result<(), ClientError> {
        let recorded = match reply {
            Ok(Some(message)) => self.record(message),
            Ok(None) => {
                let blocks: usize = self.unanswered.iter().map(|sent| sent.blocks.len()).sum();
                Err(self
                    .name
                    .broken(format_args!("the stream ended with {blocks} blocks unanswered")))
            }
            Err(error) => Err(self.name.stream(&error)),
        };
        recorded.map_err(|error| self.fail(error))
    }

    /// Joins a reply with the message it answers.
    fn record(&mut self, reply: Rope) -> Result<(), ClientError> {
        let reply = v1::PutBlocksReply::decode(reply).map_err(|error| self.name.broken(error))?;
        let Some(sent) = self.unanswered.pop_front() else {
            return Err(self.name.broken("more outcomes than messages"));
        };
        if reply.outcomes.len() != sent.blocks.len() {
            let what = format!("{} outcomes for {} blocks", reply.outcomes.len(), sent.blocks.len());
            return Err(self.name.broken(what));
        }
        self.unanswered_bytes -= sent.bytes;
        for ((hash, layer), outcome) in sent.blocks.into_iter().zip(reply.outcomes) {
            let outcome = PutOutcome::try_from(outcome).map_err(|error| self.name.broken_field(&error))?;
            self.outcomes.push((hash, layer, outcome));
        }
        Ok(())
    }

    fn check_alive(&self) -> Result<(), ClientError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Notes the error that ends the stream.
    fn fail(&mut self, error: ClientError) -> ClientError {
        self.messages = None;
        let error = observe::failed(self.name.call, error);
        self.failed = Some(error.clone());
        error
    }
}
