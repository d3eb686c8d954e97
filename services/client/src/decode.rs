//! Retrieval: queries out, found keys or finished partial attention back, over gRPC ([`DecodeStream`]) or, for a thread of its own, over
//! a bulk connection ([`BulkDecode`]).

mod blocking;
mod reply;
mod talk;

use std::{ops::Range, time::Duration};

use bytes::Bytes;
use kvasir_block::BlockHash;
use kvasir_proto::v1;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

pub use self::blocking::BulkDecode;
use self::talk::{OUTSTANDING_MAX, Talk};
use crate::{ClientError, Namespace, StoreClient};

/// What a retrieval stream works on.
#[derive(Clone, Debug)]
pub struct OpenContext {
    /// The chain of whole blocks from the first; all must be held.
    pub chain: Vec<BlockHash>,
    /// Query heads per layer: a multiple of the schema's KV heads.
    pub q_heads: usize,
    /// Multiplied into q·k; usually `1/sqrt(head_dim)`.
    pub softmax_scale: f32,
    /// What is to serve it.
    pub index: IndexChoice,
    /// Rows per layer and KV head that the caller keeps of what it is sent, by the rule of `OpenContext` in
    /// `retrieval.proto`; 0 for none.
    pub row_cache_rows: u32,
}

/// Which index is to serve a context. The store answers with what it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IndexChoice {
    /// The best there is.
    #[default]
    Best,
    /// The exact scan.
    Flat,
    /// Sketches of the keys, and exact scores of the best.
    Sketch,
    /// The graph drawn by query samples, where one was built.
    Roar,
    /// Clusters, where they were built.
    Wave,
}

/// What serves a context.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// Tokens of the context.
    pub tokens: u32,
    /// The index.
    pub index: String,
    /// Why not a better one, or what it leaves to another; empty where there is nothing to say.
    pub index_reason: String,
}

/// How the keys that are found are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// The `k` best keys of each query head, as rows.
    Rows {
        /// Keys per query head.
        k: u32,
    },
    /// Partial attention over the fewest best keys that cover `target_mass`.
    Attend {
        /// Share of the softmax mass to cover, (0, 1]; see [`Query::local_lse`].
        target_mass: f32,
        /// Most keys per query head, 0 for no bound.
        k_max: u32,
        /// What else is wanted.
        options: AttendOptions,
    },
}

/// Options of [`Form::Attend`]. The default asks for nothing more than the keys that are attended to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttendOptions {
    /// Estimate what is not attended to; the output then includes the estimate.
    pub tail: bool,
    /// How the missed mass is to be bounded.
    pub certificate: Certificate,
    /// Largest bound that is accepted without looking further; 0 for any.
    pub missed_mass_max: f32,
    /// Unbiased output at a larger variance.
    pub unbiased: bool,
    /// Share of the keys that may be scored exactly; 0 for the store's default.
    pub effort: f32,
}

/// How the mass that a reply misses is bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Certificate {
    /// Not at all.
    #[default]
    None,
    /// From sampled keys.
    Statistical,
    /// For certain.
    Deterministic,
}

/// About what the queries of a layer will be.
#[derive(Clone, Debug)]
pub struct Hint {
    /// Layer index from 0.
    pub layer: u16,
    /// `[q_heads, head_dim]`, rotated.
    pub q: Vec<f32>,
    /// As in [`Query`].
    pub local_lse: Vec<f32>,
}

/// Queries of all heads of one layer.
#[derive(Clone, Debug)]
pub struct Query {
    /// Chosen by the caller, echoed in the reply.
    pub sequence: u64,
    /// Layer index from 0.
    pub layer: u16,
    /// `[q_heads, head_dim]`, rotated.
    pub q: Vec<f32>,
    /// What to answer with.
    pub form: Form,
    /// Token positions the caller holds itself; never searched, never counted.
    pub excluded: Vec<Range<u32>>,
    /// Time the store has; the reply then covers what was reached.
    pub deadline: Option<Duration>,
    /// Base-2 log-sum-exp of what the caller attends to by itself, `[q_heads]`, about. `target_mass` is then a share of that and
    /// the searched mass together; empty: of the searched mass alone.
    pub local_lse: Vec<f32>,
}

/// The answer to a query.
#[derive(Clone, Debug)]
pub struct Reply {
    /// That of the query.
    pub sequence: u64,
    /// That of the query.
    pub layer: u16,
    /// What was found.
    pub found: Found,
    /// What the search did, and how much it covers.
    pub report: Report,
    /// Bytes of the reply on the wire.
    pub wire_bytes: usize,
}

/// What was found.
#[derive(Clone, Debug)]
pub enum Found {
    /// One per KV head.
    Rows(Vec<HeadRows>),
    /// Partial attention.
    Attend {
        /// Outputs, `[q_heads, head_dim]`.
        o: Vec<f32>,
        /// Log-sum-exp of the scores, base 2, `[q_heads]`; `-inf` where nothing was searched.
        lse: Vec<f32>,
    },
}

/// Keys and values, `[sent, head_dim]` in the schema's dtype.
#[derive(Clone, Debug)]
pub struct HeadRows {
    /// Token positions, rising.
    pub positions: Vec<u32>,
    /// Indices into `positions`, rising, of the rows that came; the caller has kept the others. `None` where all came.
    pub sent: Option<Vec<u32>>,
    /// Keys.
    pub keys: Bytes,
    /// Values.
    pub values: Bytes,
}

/// What a search did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Keys whose score was computed exactly, summed over KV heads.
    pub keys_scanned: u64,
    /// Keys that could have been searched, summed over KV heads.
    pub keys_total: u64,
    /// Keys that took part in the result, summed over query heads.
    pub keys_attended: u64,
    /// Share of the searched softmax mass that the result covers, one per query head.
    pub mass_covered: Vec<f32>,
    /// Why the result covers less than was asked.
    pub shortfall: Option<Shortfall>,
    /// Bytes of keys and values read.
    pub bytes_read: u64,
    /// Index that served.
    pub index: String,
    /// Why another than [`Opened::index`]; empty where it is that one.
    pub index_reason: String,
    /// Bound of the missed mass, one per query head; empty without a certificate.
    pub missed_mass_bound: Vec<f32>,
    /// Keys that an approximate index chose and whose exact score was computed.
    pub keys_rescored: u64,
    /// The search had begun with a hint.
    pub hinted: bool,
    /// The bound was too large at first, and the store looked further.
    pub escalated: bool,
    /// Time of searching, a hint's included.
    pub search: Duration,
    /// Of `search`, before the query had come: a hint had begun it.
    pub hidden: Duration,
    /// Time in the store's queue before the search began.
    pub queued: Duration,
}

/// Why a result covers less than was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortfall {
    /// The deadline passed.
    Deadline,
    /// A block vanished or was corrupt.
    MissingBlocks,
    /// `k_max` was reached before `target_mass`.
    KMax,
}

/// An open context. Dropping it closes the context in the store.
#[derive(Debug)]
pub struct DecodeStream {
    talk: Talk,
    requests: mpsc::Sender<v1::DecodeRequest>,
    replies: Streaming<v1::DecodeReply>,
}

impl DecodeStream {
    pub(crate) async fn open(
        client: &StoreClient,
        namespace: &Namespace,
        open: OpenContext,
    ) -> Result<Self, ClientError> {
        let name = client.name("decode");
        let request = talk::opening(&name, namespace, &open)?;
        let (requests, queued) = mpsc::channel(OUTSTANDING_MAX);
        // The channel is new and empty: it takes this one.
        let _ = requests.try_send(request);
        let mut stub = client.retrieval();
        let opening = async {
            let request = client.request(ReceiverStream::new(queued), None);
            let mut replies = stub.decode(request).await?.into_inner();
            let first = replies.message().await?;
            Ok::<_, Status>((replies, first))
        };
        let (replies, first) = client.opening(&name, opening).await?;
        Ok(Self {
            talk: Talk::begin(name, namespace, open.q_heads, client.config().call_timeout, first)?,
            requests,
            replies,
        })
    }

    /// What serves the context.
    pub fn opened(&self) -> &Opened {
        self.talk.opened()
    }

    /// Queries sent and not answered.
    pub fn outstanding(&self) -> usize {
        self.talk.outstanding()
    }

    /// Sends a query.
    ///
    /// # Errors
    /// `Invalid` for a query of the wrong shape or when too many are unanswered (the stream lives on); else the stream
    /// broke.
    pub async fn send(&mut self, query: Query) -> Result<(), ClientError> {
        let (request, asked) = self.talk.query(query)?;
        self.put(request).await?;
        self.talk.asked(asked);
        Ok(())
    }

    /// Sends a hint, which has no reply.
    ///
    /// # Errors
    /// As for [`DecodeStream::send`].
    pub async fn hint(&mut self, hint: Hint) -> Result<(), ClientError> {
        let request = self.talk.hint(&hint)?;
        self.put(request).await
    }

    async fn put(&mut self, request: v1::DecodeRequest) -> Result<(), ClientError> {
        let wait = self.talk.call_timeout();
        match timeout(wait, self.requests.send(request)).await {
            Ok(Ok(())) => Ok(()),
            // The connection dropped the requests: the store's last words say why.
            Ok(Err(_)) => match timeout(wait, self.replies.message()).await {
                Ok(Err(status)) => Err(self.talk.fail(|name| name.status(&status))),
                Ok(Ok(_)) => {
                    let what = "the stream ended while queries were being sent";
                    Err(self.talk.fail(|name| name.broken(what)))
                }
                Err(_) => Err(self.talk.fail(|name| name.timed_out(wait))),
            },
            Err(_) => Err(self.talk.fail(|name| name.timed_out(wait))),
        }
    }

    /// The next reply, in the order asked. Dropping the wait loses nothing.
    ///
    /// # Errors
    /// `TimedOut` when it did not come by the query's deadline (or the call timeout), and the stream is then of no more
    /// use; `Invalid` when nothing was asked; else the stream broke.
    pub async fn receive(&mut self) -> Result<Reply, ClientError> {
        let (until, total) = self.talk.awaited()?;
        let wait = until.saturating_duration_since(Instant::now().into_std());
        match timeout(wait, self.replies.message()).await {
            Ok(Ok(Some(reply))) => self.talk.take(reply),
            Ok(Ok(None)) => Err(self.talk.ended()),
            Ok(Err(status)) => Err(self.talk.fail(|name| name.status(&status))),
            Err(_) => Err(self.talk.fail(|name| name.timed_out(total))),
        }
    }
}
