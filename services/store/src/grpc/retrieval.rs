//! Decode: one context per stream, one query at a time, on the threads for retrieval.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, stream, stream::BoxStream};
use kvasir_block::{BlockHash, NamespaceId};
use kvasir_cache::retrieve::{Context, Form, Found, HeadRows, Query, Report, Shortfall};
use kvasir_proto::{
    InvalidMessage, convert,
    v1::{self, decode_reply, decode_request, retrieval_server::Retrieval},
};
use kvasir_runtime::request_id::RequestId;
use tonic::{Request, Response, Status, Streaming};

use super::status::{observed, of_cache, of_message, refused, stopping, too_many_streams};
use crate::{
    metrics,
    served::{Served, StreamSlot},
};

const CALL: &str = "decode";

/// More query heads than any model has; checked before a buffer is sized by it.
const Q_HEADS_MAX: u32 = 4096;
/// Ranges that a caller holds itself: a sink, a window, and some.
const EXCLUDED_MAX: usize = 1024;

#[derive(Clone, Debug)]
pub(super) struct RetrievalApi(pub(super) Arc<Served>);

#[tonic::async_trait]
impl Retrieval for RetrievalApi {
    type DecodeStream = BoxStream<'static, Result<v1::DecodeReply, Status>>;

    async fn decode(
        &self,
        request: Request<Streaming<v1::DecodeRequest>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let span = RequestId::of(&request).span(CALL);
        let slot = self.0.stream_slot().ok_or_else(|| {
            let status = too_many_streams(self.0.config.streams_max);
            refused(CALL, &span, &status);
            status
        })?;
        let call = Call {
            served: Arc::clone(&self.0),
            requests: request.into_inner(),
            context: None,
            span,
            _slot: slot,
        };
        Ok(Response::new(stream::try_unfold(call, Call::next).boxed()))
    }
}

/// What a message leads to.
enum Turn {
    Reply(v1::DecodeReply),
    Silent,
    End,
}

struct Call {
    served: Arc<Served>,
    requests: Streaming<v1::DecodeRequest>,
    context: Option<Arc<Context>>,
    span: tracing::Span,
    _slot: StreamSlot,
}

impl Call {
    async fn next(mut self) -> Result<Option<(v1::DecodeReply, Self)>, Status> {
        loop {
            match self.turn().await? {
                Turn::Reply(reply) => return Ok(Some((reply, self))),
                Turn::Silent => {}
                Turn::End => return Ok(None),
            }
        }
    }

    /// Takes one message.
    async fn turn(&mut self) -> Result<Turn, Status> {
        let stop = self.served.stopping.clone();
        let message = tokio::select! {
            biased;
            () = stop.cancelled() => Err(stopping()),
            message = self.requests.message() => message,
        };
        let span = self.span.clone();
        let request = match message {
            Ok(Some(v1::DecodeRequest { request })) => request,
            Ok(None) => return Ok(Turn::End),
            Err(status) => {
                refused(CALL, &span, &status);
                return Err(status);
            }
        };
        let reply = match request {
            Some(decode_request::Request::Open(open)) => observed("open_context", span, self.open(open)).await?,
            Some(decode_request::Request::Query(query)) => observed(CALL, span, self.answer(query)).await?,
            // The exact scan takes nothing from a forecast of the queries.
            Some(decode_request::Request::Hint(_)) => return Ok(Turn::Silent),
            None => return Err(Status::invalid_argument("request: is empty, send open, query or hint")),
        };
        Ok(Turn::Reply(reply))
    }

    async fn open(&mut self, open: v1::OpenContext) -> Result<v1::DecodeReply, Status> {
        if self.context.is_some() {
            return Err(Status::invalid_argument(
                "open: this stream has a context, open another stream for another one",
            ));
        }
        let (namespace, hashes) = self
            .context_of(&open)
            .map_err(|error| of_message(&error.inside("open")))?;
        let (q_heads, scale) = (open.q_heads as usize, open.softmax_scale);
        let opened = self
            .served
            .with_cache(move |cache| cache.open_context(namespace, &hashes, q_heads, scale))
            .await?;
        let context = opened.map_err(|error| of_cache(&error))?;
        let opened = v1::Opened {
            tokens: u32::try_from(context.tokens()).unwrap_or(u32::MAX),
            index: context.index().to_owned(),
            index_reason: match open.index.as_str() {
                "" | "best" => String::new(),
                index if index == context.index() => String::new(),
                _ => format!("this store has the index {:?} only", context.index()),
            },
            basis: bytes::Bytes::new(),
        };
        self.context = Some(Arc::new(context));
        Ok(v1::DecodeReply {
            result: Some(decode_reply::Result::Opened(opened)),
            ..v1::DecodeReply::default()
        })
    }

    fn context_of(&self, open: &v1::OpenContext) -> Result<(NamespaceId, Vec<BlockHash>), InvalidMessage> {
        let namespace = convert::namespace(&open.namespace)?;
        let hashes = convert::hashes("hashes", &open.hashes, self.served.config.hashes_max)?;
        if open.q_heads == 0 || open.q_heads > Q_HEADS_MAX {
            let problem = format!("{}: must be 1 to {Q_HEADS_MAX}", open.q_heads);
            return Err(InvalidMessage::new("q_heads", problem));
        }
        if !open.softmax_scale.is_finite() {
            return Err(InvalidMessage::new("softmax_scale", "must be finite"));
        }
        Ok((namespace, hashes))
    }

    async fn answer(&self, query: v1::Query) -> Result<v1::DecodeReply, Status> {
        let Some(context) = self.context.clone() else {
            return Err(Status::invalid_argument("query: no context is open, send open first"));
        };
        let deadline = deadline(query.deadline_ms);
        let (sequence, wire_layer) = (query.sequence, query.layer);
        let asked = Asked::of(query, &context, self.served.config.reply_bytes_max.as_usize())
            .map_err(|error| of_message(&error.inside("query")))?;
        let form = asked.form;
        let cache = self.served.cache()?;
        let arrived = Instant::now();
        let (queued, search, answer) = self
            .served
            .retrieval
            .run(move || {
                let begun = Instant::now();
                let query = Query {
                    layer: asked.layer,
                    q: &asked.q,
                    form: asked.form,
                    excluded: &asked.excluded,
                    deadline,
                };
                let answer = cache.retrieve(&context, &query);
                (begun - arrived, begun.elapsed(), answer)
            })
            .await?;
        let (found, report) = answer.map_err(|error| of_cache(&error))?;
        let name = match form {
            Form::Rows { .. } => "rows",
            Form::Attend { .. } => "attend",
        };
        metrics::retrieved(name, report.shortfall.is_some());
        Ok(v1::DecodeReply {
            sequence,
            layer: wire_layer,
            result: Some(result(found)),
            report: Some(v1::RetrievalReport {
                index: self.context.as_ref().map_or("", |context| context.index()).to_owned(),
                search_us: micros(search),
                waited_us: micros(queued),
                ..wire_report(report)
            }),
        })
    }
}

/// A query's fields, checked.
struct Asked {
    layer: u16,
    q: Vec<f32>,
    form: Form,
    excluded: Vec<Range<u32>>,
}

impl Asked {
    fn of(query: v1::Query, context: &Context, reply_bytes_max: usize) -> Result<Self, InvalidMessage> {
        let schema = context.schema();
        let layer = u16::try_from(query.layer)
            .ok()
            .filter(|layer| *layer < schema.layers)
            .ok_or_else(|| {
                let problem = format!("{}: the namespace has layers 0 to {}", query.layer, schema.layers - 1);
                InvalidMessage::new("layer", problem)
            })?;
        let head_dim = usize::from(schema.head_dim);
        let q = convert::floats("q", &query.q, context.q_heads() * head_dim)?;
        if query.excluded.len() > EXCLUDED_MAX {
            let problem = format!(
                "{} ranges, at most {EXCLUDED_MAX}: join neighbours",
                query.excluded.len()
            );
            return Err(InvalidMessage::new("excluded", problem));
        }
        let excluded = query.excluded.into_iter().enumerate().map(|(i, range)| {
            Range::try_from(range).map_err(|error: InvalidMessage| error.inside(&format!("excluded[{i}]")))
        });
        let form = match query.form {
            Some(v1::query::Form::Rows(v1::Rows { k })) => {
                let k = k as usize;
                // The union of a KV head's query heads, at most all tokens; keys and values and a position each.
                let rows = k
                    .saturating_mul(context.q_heads())
                    .min(usize::from(schema.kv_heads) * context.tokens());
                let bytes = rows.saturating_mul(2 * head_dim * schema.dtype.bytes() + 4);
                if bytes > reply_bytes_max {
                    let problem = format!(
                        "{k}: the reply could have {bytes} bytes, store.reply_bytes_max is {reply_bytes_max}: ask for fewer keys"
                    );
                    return Err(InvalidMessage::new("rows.k", problem));
                }
                Form::Rows { k }
            }
            Some(v1::query::Form::Attend(v1::Attend { target_mass, k_max, .. })) => Form::Attend {
                target_mass,
                k_max: (k_max > 0).then_some(k_max as usize),
            },
            None => return Err(InvalidMessage::new("form", "is missing: ask for rows or attend")),
        };
        Ok(Self {
            layer,
            q,
            form,
            excluded: excluded.collect::<Result<_, _>>()?,
        })
    }
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

/// When an answer is of no use any more; 0 is never.
fn deadline(ms: u32) -> Option<Instant> {
    (ms > 0).then(|| Instant::now() + Duration::from_millis(ms.into()))
}

fn result(found: Found) -> decode_reply::Result {
    match found {
        Found::Rows(heads) => {
            let heads = heads.into_iter().map(
                |HeadRows {
                     positions,
                     keys,
                     values,
                 }| v1::HeadRows {
                    positions,
                    keys,
                    values,
                    sent: Vec::new(),
                    partial: false,
                },
            );
            decode_reply::Result::Rows(v1::RowsResult { heads: heads.collect() })
        }
        Found::Attend { o, lse } => decode_reply::Result::Attend(v1::AttendResult {
            o: convert::float_bytes(&o),
            lse: convert::float_bytes(&lse),
        }),
    }
}

fn wire_report(report: Report) -> v1::RetrievalReport {
    use v1::retrieval_report::Shortfall as Wire;
    let Report {
        keys_scanned,
        keys_total,
        keys_attended,
        mass_covered,
        shortfall,
        bytes_read,
    } = report;
    let shortfall = match shortfall {
        None => Wire::None,
        Some(Shortfall::Deadline) => Wire::Deadline,
        Some(Shortfall::MissingBlocks) => Wire::MissingBlocks,
        Some(Shortfall::KMax) => Wire::KMax,
    };
    v1::RetrievalReport {
        keys_scanned,
        keys_total,
        keys_attended,
        mass_covered,
        shortfall: shortfall.into(),
        bytes_read,
        ..v1::RetrievalReport::default()
    }
}
