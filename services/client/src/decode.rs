//! Retrieval: queries out, found keys or finished partial attention back.

mod reply;

use std::{collections::VecDeque, ops::Range, time::Duration};

use bytes::Bytes;
use kvasir_block::BlockHash;
use kvasir_proto::{convert, v1};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::{ClientError, Namespace, StoreClient, client::millis, error::CallName, observe};

/// Queries sent and not answered; the store works on one at a time, so more would only wait there.
const OUTSTANDING_MAX: usize = 64;

/// How long past its deadline a query's reply may take to arrive: it then says that it fell short.
const GRACE: Duration = Duration::from_millis(250);

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
    name: CallName,
    namespace: Namespace,
    q_heads: usize,
    opened: Opened,
    requests: mpsc::Sender<v1::DecodeRequest>,
    replies: Streaming<v1::DecodeReply>,
    outstanding: VecDeque<Outstanding>,
    call_timeout: Duration,
    failed: Option<ClientError>,
}

/// A query whose reply has not come.
#[derive(Clone, Copy, Debug)]
struct Outstanding {
    sequence: u64,
    layer: u16,
    form: Form,
    /// When to give up, and how long that is in all.
    until: Option<(Instant, Duration)>,
}

impl DecodeStream {
    pub(crate) async fn open(
        client: &StoreClient,
        namespace: &Namespace,
        open: OpenContext,
    ) -> Result<Self, ClientError> {
        let name = client.name("decode");
        if open.chain.len() > namespace.hashes_max {
            let (asked, max) = (open.chain.len(), namespace.hashes_max);
            let what = format!("a context of {asked} blocks, the store takes {max}: raise its hashes_max");
            return Err(observe::failed(name.call, name.invalid(what)));
        }
        let (requests, queued) = mpsc::channel(OUTSTANDING_MAX);
        let request = v1::OpenContext {
            namespace: convert::namespace_bytes(namespace.id),
            hashes: convert::hash_bytes(&open.chain),
            q_heads: u32::try_from(open.q_heads).unwrap_or(u32::MAX),
            softmax_scale: open.softmax_scale,
            index: match open.index {
                IndexChoice::Best => "",
                IndexChoice::Flat => "flat",
                IndexChoice::Sketch => "sketch",
                IndexChoice::Roar => "roar",
                IndexChoice::Wave => "wave",
            }
            .to_owned(),
            row_cache_rows: open.row_cache_rows,
        };
        let request = v1::DecodeRequest {
            request: Some(v1::decode_request::Request::Open(request)),
        };
        // The channel is new and empty: it takes this one.
        let _ = requests.try_send(request);
        let mut stub = client.retrieval();
        let call_timeout = client.config().call_timeout;
        let opening = async {
            let request = client.request(ReceiverStream::new(queued), None);
            let mut replies = stub.decode(request).await?.into_inner();
            let first = replies.message().await?;
            Ok::<_, Status>((replies, first))
        };
        let (replies, first) = client.opening(&name, opening).await?;
        let opened = match first.and_then(|reply| reply.result) {
            Some(v1::decode_reply::Result::Opened(opened)) => opened,
            _ => {
                return Err(observe::failed(
                    name.call,
                    name.broken("the first reply does not open the context"),
                ));
            }
        };
        Ok(Self {
            name,
            namespace: namespace.clone(),
            q_heads: open.q_heads,
            opened: Opened {
                tokens: opened.tokens,
                index: opened.index,
                index_reason: opened.index_reason,
            },
            requests,
            replies,
            outstanding: VecDeque::new(),
            call_timeout,
            failed: None,
        })
    }

    /// What serves the context.
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    /// Queries sent and not answered.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Sends a query.
    ///
    /// # Errors
    /// `Invalid` for a query of the wrong shape or when too many are unanswered (the stream lives on); else the stream
    /// broke.
    pub async fn send(&mut self, query: Query) -> Result<(), ClientError> {
        self.check_alive()?;
        self.check_query(query.layer, query.q.len(), query.local_lse.len())?;
        if self.outstanding.len() >= OUTSTANDING_MAX {
            let problem = format!("{OUTSTANDING_MAX} queries are unanswered: receive before sending more");
            return Err(observe::failed(self.name.call, self.name.invalid(problem)));
        }
        let form = match query.form {
            Form::Rows { k } => v1::query::Form::Rows(v1::Rows { k }),
            Form::Attend {
                target_mass,
                k_max,
                options,
            } => v1::query::Form::Attend(v1::Attend {
                target_mass,
                k_max,
                tail: options.tail,
                certificate: match options.certificate {
                    Certificate::None => v1::Certificate::None,
                    Certificate::Statistical => v1::Certificate::Statistical,
                    Certificate::Deterministic => v1::Certificate::Deterministic,
                }
                .into(),
                missed_mass_max: options.missed_mass_max,
                unbiased: options.unbiased,
                effort: options.effort,
            }),
        };
        let request = v1::Query {
            sequence: query.sequence,
            layer: query.layer.into(),
            q: convert::float_bytes(&query.q),
            excluded: query.excluded.into_iter().map(v1::TokenRange::from).collect(),
            deadline_ms: query.deadline.map_or(0, millis),
            local_lse: convert::float_bytes(&query.local_lse),
            form: Some(form),
        };
        let request = v1::DecodeRequest {
            request: Some(v1::decode_request::Request::Query(request)),
        };
        self.put(request).await?;
        self.outstanding.push_back(Outstanding {
            sequence: query.sequence,
            layer: query.layer,
            form: query.form,
            until: query.deadline.map(|wait| (Instant::now() + wait + GRACE, wait + GRACE)),
        });
        Ok(())
    }

    /// Sends a hint, which has no reply.
    ///
    /// # Errors
    /// As for [`DecodeStream::send`].
    pub async fn hint(&mut self, hint: Hint) -> Result<(), ClientError> {
        self.check_alive()?;
        self.check_query(hint.layer, hint.q.len(), hint.local_lse.len())?;
        let hint = v1::Hint {
            layer: hint.layer.into(),
            q: convert::float_bytes(&hint.q),
            local_lse: convert::float_bytes(&hint.local_lse),
        };
        self.put(v1::DecodeRequest {
            request: Some(v1::decode_request::Request::Hint(hint)),
        })
        .await
    }

    /// Whether a layer may be asked with so many values, and so many of the local log-sum-exp.
    fn check_query(&self, layer: u16, values: usize, local: usize) -> Result<(), ClientError> {
        let head_dim = usize::from(self.namespace.schema.head_dim);
        let problem = if values != self.q_heads * head_dim {
            let heads = self.q_heads;
            format!(
                "q: {values} values, {heads} heads of {head_dim} are {}",
                heads * head_dim
            )
        } else if local != 0 && local != self.q_heads {
            format!("local_lse: {local} values for {} heads", self.q_heads)
        } else if layer >= self.namespace.schema.layers {
            format!("layer: {layer} of {}", self.namespace.schema.layers)
        } else {
            return Ok(());
        };
        Err(observe::failed(self.name.call, self.name.invalid(problem)))
    }

    async fn put(&mut self, request: v1::DecodeRequest) -> Result<(), ClientError> {
        match timeout(self.call_timeout, self.requests.send(request)).await {
            Ok(Ok(())) => Ok(()),
            // The connection dropped the requests: the store's last words say why.
            Ok(Err(_)) => match timeout(self.call_timeout, self.replies.message()).await {
                Ok(Err(status)) => Err(self.fail(self.name.status(&status))),
                Ok(Ok(_)) => Err(self.fail(self.name.broken("the stream ended while queries were being sent"))),
                Err(_) => Err(self.fail(self.name.timed_out(self.call_timeout))),
            },
            Err(_) => Err(self.fail(self.name.timed_out(self.call_timeout))),
        }
    }

    /// The next reply, in the order asked. Dropping the wait loses nothing.
    ///
    /// # Errors
    /// `TimedOut` when it did not come by the query's deadline (or the call timeout), and the stream is then of no more
    /// use; `Invalid` when nothing was asked; else the stream broke.
    pub async fn receive(&mut self) -> Result<Reply, ClientError> {
        self.check_alive()?;
        let Some(asked) = self.outstanding.front().copied() else {
            return Err(observe::failed(
                self.name.call,
                self.name.invalid("no query is unanswered: send one first"),
            ));
        };
        let (wait, total) = match asked.until {
            Some((until, total)) => (until.saturating_duration_since(Instant::now()), total),
            None => (self.call_timeout, self.call_timeout),
        };
        let reply = match timeout(wait, self.replies.message()).await {
            Ok(Ok(Some(reply))) => reply,
            Ok(Ok(None)) => {
                let what = format!("the stream ended with {} queries unanswered", self.outstanding.len());
                return Err(self.fail(self.name.broken(what)));
            }
            Ok(Err(status)) => return Err(self.fail(self.name.status(&status))),
            Err(_) => return Err(self.fail(self.name.timed_out(total))),
        };
        self.outstanding.pop_front();
        match self.checked(&asked, reply) {
            Ok(reply) => {
                observe::bytes(self.name.call, reply.wire_bytes);
                Ok(reply)
            }
            Err(error) => Err(self.fail(self.name.broken_field(&error))),
        }
    }

    fn check_alive(&self) -> Result<(), ClientError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn fail(&mut self, error: ClientError) -> ClientError {
        let error = observe::failed(self.name.call, error);
        self.failed = Some(error.clone());
        error
    }
}
