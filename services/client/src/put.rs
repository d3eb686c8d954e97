//! Puts: batched, bounded, one outcome per block.

mod way;

use std::collections::VecDeque;

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum};
use kvasir_proto::{EntryHead, PutOutcome};

use self::way::Way;
use crate::{ClientError, Namespace, StoreClient, error::CallName, observe};

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

/// An open stream of puts, over the path that [`crate::ClientConfig::path`] says. After an error it is of no more use: every call
/// repeats the error. Dropping it cancels what is unanswered; [`PutStream::finish`] ends it in order.
#[derive(Debug)]
pub struct PutStream {
    client: StoreClient,
    name: CallName,
    namespace: Namespace,
    in_flight_bytes_max: usize,
    batch_bytes: usize,
    way: Way,
    batch: Vec<LayerBlock>,
    /// Payload bytes of the batch.
    batched_bytes: usize,
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
        let way = Way::open(client, &name, namespace).await?;
        let config = client.config();
        Ok(Self {
            name,
            namespace: namespace.clone(),
            in_flight_bytes_max: config.in_flight_bytes_max,
            batch_bytes: config.batch_bytes,
            client: client.clone(),
            way,
            batch: Vec::new(),
            batched_bytes: 0,
            unanswered: VecDeque::new(),
            unanswered_bytes: 0,
            outcomes: Vec::new(),
            failed: None,
        })
    }

    /// Queues a block; batches of about 1 MiB leave by themselves. Waits while too many bytes are unanswered, or the store takes no
    /// more.
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
        let entries = self.batch.len() + 1;
        let message_bytes = self.batched_bytes + head.length + entries * ENTRY_BYTES + HEAD_BYTES;
        if !self.batch.is_empty()
            && (message_bytes > self.namespace.message_bytes_max || entries > self.way.entries_max())
        {
            self.flush().await?;
        }
        self.batched_bytes += head.length;
        self.batch.push(block);
        if self.batched_bytes >= self.batch_bytes {
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
        if !self.batch.is_empty() {
            self.send_batch().await?;
        }
        let sent = self.way.sent(&self.name).await;
        sent.map_err(|error| self.fail(error))
    }

    async fn send_batch(&mut self) -> Result<(), ClientError> {
        let bytes = self.batched_bytes;
        while !self.unanswered.is_empty()
            && (self.unanswered_bytes + bytes > self.in_flight_bytes_max
                || self.unanswered.len() >= self.way.messages_max())
        {
            self.wait_for_reply().await?;
        }
        if self.unanswered.is_empty() && self.way.is_gone() {
            let way = Way::open(&self.client, &self.name, &self.namespace).await;
            self.way = way.map_err(|error| self.fail(error))?;
        }
        // From here to the push below nothing is awaited that would lose the batch when dropped.
        while let Some(reply) = self.way.room(&self.name).await.transpose() {
            self.take_reply(reply.map(Some))?;
        }
        let batch = std::mem::take(&mut self.batch);
        self.batched_bytes = 0;
        let blocks = batch.iter().map(|block| (block.hash, block.layer)).collect();
        match self.way.send(&self.name, &self.namespace, batch) {
            Ok(true) => {}
            Ok(false) => return Err(self.why_it_ended().await),
            Err(error) => return Err(self.fail(error)),
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
            let Some(reply) = self.way.reply_now(&self.name) else {
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
        self.way.no_more();
        while !self.unanswered.is_empty() {
            self.wait_for_reply().await?;
        }
        let ended = self.way.end(&self.name).await;
        ended.map_err(|error| self.fail(error))?;
        Ok(self.outcomes)
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
        let reply = self.way.reply(&self.name).await;
        self.take_reply(reply)
    }

    fn take_reply(&mut self, reply: Result<Option<Vec<PutOutcome>>, ClientError>) -> Result<(), ClientError> {
        let recorded = match reply {
            Ok(Some(outcomes)) => self.record(outcomes),
            Ok(None) => {
                let blocks: usize = self.unanswered.iter().map(|sent| sent.blocks.len()).sum();
                Err(self
                    .name
                    .broken(format_args!("the stream ended with {blocks} blocks unanswered")))
            }
            Err(error) => Err(error),
        };
        recorded.map_err(|error| self.fail(error))
    }

    /// Joins a reply with the message it answers.
    fn record(&mut self, outcomes: Vec<PutOutcome>) -> Result<(), ClientError> {
        let Some(sent) = self.unanswered.pop_front() else {
            return Err(self.name.broken("more outcomes than messages"));
        };
        if outcomes.len() != sent.blocks.len() {
            let what = format!("{} outcomes for {} blocks", outcomes.len(), sent.blocks.len());
            return Err(self.name.broken(what));
        }
        self.unanswered_bytes -= sent.bytes;
        let outcomes = sent.blocks.into_iter().zip(outcomes);
        self.outcomes
            .extend(outcomes.map(|((hash, layer), outcome)| (hash, layer, outcome)));
        Ok(())
    }

    fn check_alive(&self) -> Result<(), ClientError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Notes the error that ends the stream.
    fn fail(&mut self, error: ClientError) -> ClientError {
        self.way.no_more();
        let error = observe::failed(self.name.call, error);
        self.failed = Some(error.clone());
        error
    }
}
