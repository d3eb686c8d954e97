//! Decode: one context per stream, one query at a time; queries of several streams may share a scan (`searches`).

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream, stream::BoxStream};
use kvasir_block::{BlockHash, NamespaceId};
use kvasir_cache::retrieve::{
    AttendOptions, Certificate, Context, Form, Found, HeadRows, IndexChoice, Report, Shortfall,
};
use kvasir_proto::{
    InvalidMessage, convert,
    v1::{self, decode_reply, decode_request, retrieval_server::Retrieval},
};
use kvasir_runtime::request_id::RequestId;
use tonic::{Request, Response, Status, Streaming};

use super::{
    indexes,
    status::{observed, of_cache, of_message, refused, stopping, too_many_streams},
};
use crate::{
    metrics,
    row_cache::SentRows,
    searches::Asked,
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
            sent: None,
            span,
            _slot: slot,
        };
        Ok(Response::new(stream::try_unfold(call, Call::next).boxed()))
    }

    async fn put_queries(
        &self,
        request: Request<v1::PutQueriesRequest>,
    ) -> Result<Response<v1::PutQueriesReply>, Status> {
        let span = RequestId::of(&request).span("put_queries");
        let put = indexes::put_queries(&self.0, request.into_inner());
        observed("put_queries", span, put).await.map(Response::new)
    }

    async fn build_index(
        &self,
        request: Request<v1::BuildIndexRequest>,
    ) -> Result<Response<v1::BuildIndexReply>, Status> {
        let span = RequestId::of(&request).span("build_index");
        let asked = indexes::build_index(&self.0, request.into_inner());
        observed("build_index", span, asked).await.map(Response::new)
    }
}

/// What a message leads to.
enum Turn {
    Reply(Box<v1::DecodeReply>),
    Silent,
    End,
}

struct Call {
    served: Arc<Served>,
    requests: Streaming<v1::DecodeRequest>,
    context: Option<Arc<Context>>,
    sent: Option<SentRows>,
    span: tracing::Span,
    _slot: StreamSlot,
}

impl Call {
    async fn next(mut self) -> Result<Option<(v1::DecodeReply, Self)>, Status> {
        loop {
            match self.turn().await? {
                Turn::Reply(reply) => return Ok(Some((*reply, self))),
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
            Some(decode_request::Request::Hint(hint)) => {
                self.hint(&hint).inspect_err(|status| refused("hint", &span, status))?;
                return Ok(Turn::Silent);
            }
            None => return Err(Status::invalid_argument("request: is empty, send open, query or hint")),
        };
        Ok(Turn::Reply(Box::new(reply)))
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
        let index = index_choice(&open.index).map_err(|error| of_message(&error.inside("open")))?;
        let (q_heads, scale) = (open.q_heads as usize, open.softmax_scale);
        let opened = self
            .served
            .with_cache(move |cache| cache.open_context(namespace, &hashes, q_heads, scale, index))
            .await?;
        let context = opened.map_err(|error| of_cache(&error))?;
        self.sent = self.row_cache(&context, open.row_cache_rows as usize);
        let opened = v1::Opened {
            tokens: u32::try_from(context.tokens()).unwrap_or(u32::MAX),
            index: context.serving().index.to_owned(),
            index_reason: context.serving().reason.to_owned(),
            basis: context
                .basis_id()
                .map_or_else(Bytes::new, |id| Bytes::copy_from_slice(id.as_bytes())),
        };
        self.context = Some(Arc::new(context));
        Ok(v1::DecodeReply {
            result: Some(decode_reply::Result::Opened(opened)),
            ..v1::DecodeReply::default()
        })
    }

    /// The account of the rows that the caller keeps; none where it keeps none, or where that would take too much memory here.
    fn row_cache(&self, context: &Context, rows: usize) -> Option<SentRows> {
        let schema = context.schema();
        let (layers, kv_heads) = (usize::from(schema.layers), usize::from(schema.kv_heads));
        let kept = rows.min(context.tokens());
        let bytes = kept.saturating_mul(layers * kv_heads * SentRows::ROW_BYTES);
        let fits = bytes <= self.served.config.row_cache_bytes_max.as_usize();
        (rows > 0 && fits).then(|| SentRows::new(rows, layers, kv_heads))
    }

    /// Takes a forecast of queries.
    fn hint(&self, hint: &v1::Hint) -> Result<(), Status> {
        let Some(context) = self.context.clone() else {
            return Err(Status::invalid_argument("hint: no context is open, send open first"));
        };
        let layer = layer(hint.layer, &context).map_err(|error| of_message(&error.inside("hint")))?;
        let count = context.q_heads() * usize::from(context.schema().head_dim);
        convert::floats("q", &hint.q, count).map_err(|error| of_message(&error.inside("hint")))?;
        // A scan of every key gains nothing from a forecast of the queries, but its blocks can be there in time.
        self.served.searches.hint(self.served.cache()?, context, layer);
        Ok(())
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

    async fn answer(&mut self, query: v1::Query) -> Result<v1::DecodeReply, Status> {
        let Some(context) = self.context.clone() else {
            return Err(Status::invalid_argument("query: no context is open, send open first"));
        };
        let (sequence, wire_layer) = (query.sequence, query.layer);
        let asked = checked(query, &context, self.served.config.reply_bytes_max.as_usize())
            .map_err(|error| of_message(&error.inside("query")))?;
        let (layer, form) = (asked.layer, asked.form);
        let cache = self.served.cache()?;
        let searched = self.served.searches.answer(cache, Arc::clone(&context), asked).await?;
        let answer = searched.map_err(|error| of_cache(&error))?;
        let name = match form {
            Form::Rows { .. } => "rows",
            Form::Attend { .. } => "attend",
        };
        metrics::retrieved(name, answer.report.shortfall.is_some());
        Ok(v1::DecodeReply {
            sequence,
            layer: wire_layer,
            result: Some(self.result(layer, answer.found, &context)),
            report: Some(v1::RetrievalReport {
                search_us: micros(answer.search),
                waited_us: micros(answer.waited),
                ..wire_report(answer.report)
            }),
        })
    }

    fn result(&mut self, layer: u16, found: Found, context: &Context) -> decode_reply::Result {
        let row_bytes = usize::from(context.schema().head_dim) * context.schema().dtype.bytes();
        match found {
            Found::Rows(heads) => {
                let heads = heads
                    .into_iter()
                    .enumerate()
                    .map(|(kv_head, rows)| match &mut self.sent {
                        Some(sent) => missing_rows(sent.missing(layer, kv_head, &rows.positions), rows, row_bytes),
                        None => all_rows(rows),
                    });
                decode_reply::Result::Rows(v1::RowsResult { heads: heads.collect() })
            }
            Found::Attend { o, lse } => decode_reply::Result::Attend(v1::AttendResult {
                o: convert::float_bytes(&o),
                lse: convert::float_bytes(&lse),
            }),
        }
    }
}

fn index_choice(name: &str) -> Result<IndexChoice, InvalidMessage> {
    match name {
        "" => Ok(IndexChoice::Best),
        "flat" => Ok(IndexChoice::Flat),
        "sketch" => Ok(IndexChoice::Sketch),
        "roar" => Ok(IndexChoice::Roar),
        "wave" => Ok(IndexChoice::Wave),
        other => {
            let shown: String = other.chars().take(40).collect();
            let problem = format!(
                "{shown:?} is no index: say \"flat\", \"sketch\", \"roar\", \"wave\", or leave it empty for the best there is"
            );
            Err(InvalidMessage::new("index", problem))
        }
    }
}

fn layer(layer: u32, context: &Context) -> Result<u16, InvalidMessage> {
    let layers = context.schema().layers;
    let found = u16::try_from(layer).ok().filter(|layer| *layer < layers);
    found.ok_or_else(|| {
        let problem = format!("{layer}: the namespace has layers 0 to {}", layers - 1);
        InvalidMessage::new("layer", problem)
    })
}

fn all_rows(rows: HeadRows) -> v1::HeadRows {
    v1::HeadRows {
        positions: rows.positions,
        keys: rows.keys,
        values: rows.values,
        ..v1::HeadRows::default()
    }
}

/// Of `rows`, the keys and values at the indices `sent`.
fn missing_rows(sent: Vec<u32>, rows: HeadRows, row_bytes: usize) -> v1::HeadRows {
    let pick = |all: &Bytes| -> Bytes {
        let mut picked = BytesMut::with_capacity(sent.len() * row_bytes);
        for &at in &sent {
            picked.extend_from_slice(&all[at as usize * row_bytes..][..row_bytes]);
        }
        picked.freeze()
    };
    let (keys, values) = if sent.len() == rows.positions.len() {
        (rows.keys, rows.values)
    } else {
        (pick(&rows.keys), pick(&rows.values))
    };
    v1::HeadRows {
        positions: rows.positions,
        keys,
        values,
        sent,
        partial: true,
    }
}

/// A query's fields, as far as the wire has rules for them; the cache checks the rest.
fn checked(query: v1::Query, context: &Context, reply_bytes_max: usize) -> Result<Asked, InvalidMessage> {
    let schema = context.schema();
    let layer = layer(query.layer, context)?;
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
        Some(v1::query::Form::Attend(attend)) => attend_form(&attend).map_err(|error| error.inside("attend"))?,
        None => return Err(InvalidMessage::new("form", "is missing: ask for rows or attend")),
    };
    Ok(Asked {
        layer,
        q,
        form,
        excluded: excluded.collect::<Result<_, _>>()?,
        deadline: deadline(query.deadline_ms),
    })
}

fn attend_form(attend: &v1::Attend) -> Result<Form, InvalidMessage> {
    let certificate = match v1::Certificate::try_from(attend.certificate) {
        Ok(v1::Certificate::None) => Certificate::None,
        Ok(v1::Certificate::Statistical) => Certificate::Statistical,
        Ok(v1::Certificate::Deterministic) => Certificate::Deterministic,
        Err(_) => {
            let problem = format!("{} is no kind of certificate", attend.certificate);
            return Err(InvalidMessage::new("certificate", problem));
        }
    };
    Ok(Form::Attend {
        target_mass: attend.target_mass,
        k_max: (attend.k_max > 0).then_some(attend.k_max as usize),
        options: AttendOptions {
            tail: attend.tail,
            certificate,
            missed_mass_max: attend.missed_mass_max,
            unbiased: attend.unbiased,
            effort: attend.effort,
        },
    })
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

/// When an answer is of no use any more; 0 is never.
fn deadline(ms: u32) -> Option<Instant> {
    (ms > 0).then(|| Instant::now() + Duration::from_millis(ms.into()))
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
        missed_mass_bound,
        escalated,
        keys_rescored,
        index,
        index_reason,
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
        missed_mass_bound,
        escalated,
        keys_rescored,
        index: index.to_owned(),
        index_reason: index_reason.to_owned(),
        ..v1::RetrievalReport::default()
    }
}
