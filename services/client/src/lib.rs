//! The only client of the store: streams, deadlines, retries, verification.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "seam")]

use std::{ops::Range, time::Duration};

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum, KvSchema, NamespaceId, Tenant};
pub use kvasir_proto::{BlockEvents, GetOutcome, PutOutcome};

#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// `http://127.0.0.1:7401`
    pub url: String,
    pub connect_timeout: Duration,
    /// Deadline of one unary call.
    pub call_timeout: Duration,
    /// Tries of one unary call, the first included.
    pub attempts_max: u32,
}
impl ClientConfig {
    pub fn to(_url: impl Into<String>) -> Self { unimplemented!() }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind { /** Not reachable, or gone in mid-call: go on without. */ Unavailable, /** The deadline passed. */ TimedOut, /** The store does not know the namespace or context: open it again, or compute. */ NotFound, /** The store is full or overloaded. */ Exhausted, /** The call was wrong: repeating it changes nothing. */ Invalid, /** The store broke the protocol or failed. */ Internal }
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ClientError { pub kind: ErrorKind, pub message: String }

/// Cheap to clone; connects lazily and reconnects by itself.
#[derive(Clone, Debug)]
pub struct StoreClient;
impl StoreClient {
    pub fn new(_config: ClientConfig) -> Result<Self, ClientError> { unimplemented!() }
    pub async fn open_namespace(&self, _tenant: &Tenant, _schema: &KvSchema) -> Result<Namespace, ClientError> { unimplemented!() }
    pub async fn match_prefix(&self, _namespace: NamespaceId, _chain: &[BlockHash], _lease: Option<Duration>) -> Result<PrefixMatch, ClientError> { unimplemented!() }
    pub async fn release(&self, _lease: u64) -> Result<(), ClientError> { unimplemented!() }
    pub async fn stat(&self) -> Result<kvasir_proto::v1::StatReply, ClientError> { unimplemented!() }
    /// Opens a stream of puts.
    pub async fn put_blocks(&self, _namespace: &Namespace) -> Result<PutStream, ClientError> { unimplemented!() }
    /// Layer blocks in the order asked: layer after layer, inside a layer in the order of `chain`.
    pub async fn get_blocks(&self, _namespace: &Namespace, _chain: &[BlockHash], _layers: Range<u16>, _lease: Option<u64>, _deadline: Option<Duration>) -> Result<GetStream, ClientError> { unimplemented!() }
    /// A retrieval stream for one decoding sequence.
    pub async fn decode(&self, _namespace: &Namespace, _open: OpenContext) -> Result<DecodeStream, ClientError> { unimplemented!() }
    /// `None` watches all namespaces.
    pub async fn watch_events(&self, _namespace: Option<NamespaceId>) -> Result<EventStream, ClientError> { unimplemented!() }
}

/// An open namespace and the limits of the store that holds it.
#[derive(Clone, Debug)]
pub struct Namespace {
    pub id: NamespaceId,
    pub schema: KvSchema,
    pub layer_block_bytes: usize,
    pub message_bytes_max: usize,
    pub hashes_max: usize,
    pub epoch: u64,
}
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixMatch { pub hit_blocks: usize, pub host_blocks: usize, pub lease: Option<u64>, pub lease_for: Duration }

/// One layer block on its way to the store.
#[derive(Clone, Debug)]
pub struct LayerBlock { pub hash: BlockHash, pub layer: u16, pub checksum: Checksum, pub payload: Bytes }
pub struct PutStream;
impl PutStream {
    /// Queues a block; batches of about 1 MiB leave by themselves. Waits when too much is unanswered.
    pub async fn put(&mut self, _block: LayerBlock) -> Result<(), ClientError> { unimplemented!() }
    /// Sends what is batched.
    pub async fn flush(&mut self) -> Result<(), ClientError> { unimplemented!() }
    /// Outcomes that have come since the last call, in the order of the puts; does not wait.
    pub fn outcomes(&mut self) -> Vec<(BlockHash, u16, PutOutcome)> { unimplemented!() }
    /// Sends what is batched, closes, and waits for every outcome.
    pub async fn finish(self) -> Result<Vec<(BlockHash, u16, PutOutcome)>, ClientError> { unimplemented!() }
}

/// What came of one layer block; `payload` is verified and set exactly for a hit.
#[derive(Clone, Debug)]
pub struct GotBlock { pub hash: BlockHash, pub layer: u16, pub outcome: GetOutcome, pub payload: Option<Bytes> }
pub struct GetStream;
impl GetStream {
    /// The next block, or `None` at the end. A wrong checksum turns a hit into `Corrupt`.
    pub async fn next(&mut self) -> Result<Option<GotBlock>, ClientError> { unimplemented!() }
}

#[derive(Clone, Debug)]
pub struct OpenContext { pub chain: Vec<BlockHash>, pub q_heads: usize, pub softmax_scale: f32 }
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form { Rows { k: u32 }, Attend { target_mass: f32, k_max: u32 } }
#[derive(Clone, Debug)]
pub struct Query { pub sequence: u64, pub layer: u16, /** `[q_heads, head_dim]`, rotated. */ pub q: Vec<f32>, pub form: Form, pub excluded: Vec<Range<u32>>, pub deadline: Option<Duration> }
#[derive(Clone, Debug)]
pub struct Reply { pub sequence: u64, pub layer: u16, pub found: Found, pub report: Report, /** Bytes of the reply on the wire. */ pub wire_bytes: usize }
#[derive(Clone, Debug)]
pub enum Found { /** One per KV head. */ Rows(Vec<HeadRows>), Attend { o: Vec<f32>, lse: Vec<f32> } }
/// Keys and values `[positions, head_dim]` in the schema's dtype.
#[derive(Clone, Debug)]
pub struct HeadRows { pub positions: Vec<u32>, pub keys: Bytes, pub values: Bytes }
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report { pub keys_scanned: u64, pub keys_total: u64, pub keys_attended: u64, pub mass_covered: Vec<f32>, pub shortfall: Option<Shortfall>, pub bytes_read: u64 }
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortfall { Deadline, MissingBlocks, KMax }
pub struct DecodeStream;
impl DecodeStream {
    /// Tokens of the context and the index that serves it.
    pub fn opened(&self) -> (u32, &str) { unimplemented!() }
    pub async fn send(&mut self, _query: Query) -> Result<(), ClientError> { unimplemented!() }
    /// The next reply, in the order asked.
    pub async fn receive(&mut self) -> Result<Reply, ClientError> { unimplemented!() }
}
pub struct EventStream;
impl EventStream {
    /// The next event; `None` when the store ended the stream (watch again).
    pub async fn next(&mut self) -> Result<Option<BlockEvents>, ClientError> { unimplemented!() }
}
