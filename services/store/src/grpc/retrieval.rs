//! Decode: one context per stream, one query at a time; queries of several streams may share a scan (`searches`). Hints are taken
//! while a query is being answered, so that the next layer's search begins at once (`ahead`).

mod ask;
mod reply;

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, stream, stream::BoxStream};
use kvasir_block::{BlockHash, NamespaceId};
use kvasir_cache::retrieve::{Context, Form};
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
    ahead::{Ahead, Asking, Forecast},
    metrics,
    row_cache::SentRows,
    served::{Served, StreamSlot},
};

const CALL: &str = "decode";

/// More query heads than any model has; checked before a buffer is sized by it.
const Q_HEADS_MAX: u32 = 4096;

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
            asking: None,
            ahead: None,
            next: None,
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
    /// As the last query: what the next one will ask for is thought to be the same.
    asking: Option<Asking>,
    /// The search that the last hint began.
    ahead: Option<Ahead>,
    /// What came while a query was being answered, and is no hint.
    next: Option<Result<Option<v1::DecodeRequest>, Status>>,
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

    async fn message(&mut self) -> Result<Option<v1::DecodeRequest>, Status> {
        let stop = self.served.stopping.clone();
        if let Some(next) = self.next.take() {
            return next;
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => Err(stopping()),
            message = self.requests.message() => message,
        }
    }

    /// Waits for `work`, and takes the hints that come meanwhile.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Status> {
        tokio::pin!(work);
        loop {
            let message = tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                message = self.requests.message(), if self.next.is_none() => message,
            };
            match message {
                Ok(Some(v1::DecodeRequest {
                    request: Some(decode_request::Request::Hint(hint)),
                })) => self.hint(&hint)?,
                other => self.next = Some(other),
            }
        }
    }

    /// Takes one message.
    async fn turn(&mut self) -> Result<Turn, Status> {
        let message = self.message().await;
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
                self.hint(&hint)?;
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
        let index = ask::index_choice(&open.index).map_err(|error| of_message(&error.inside("open")))?;
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

    /// Takes a forecast of queries, in the place of the one before.
    fn hint(&mut self, hint: &v1::Hint) -> Result<(), Status> {
        self.ahead = None;
        let begun = self.begin_ahead(hint);
        self.ahead = begun.inspect_err(|status| refused("hint", &self.span, status))?;
        Ok(())
    }

    fn begin_ahead(&self, hint: &v1::Hint) -> Result<Option<Ahead>, Status> {
        let Some(context) = self.context.clone() else {
            return Err(Status::invalid_argument("hint: no context is open, send open first"));
        };
        let layer = ask::layer(hint.layer, &context).map_err(|error| of_message(&error.inside("hint")))?;
        let count = context.q_heads() * usize::from(context.schema().head_dim);
        let q = convert::floats("q", &hint.q, count).map_err(|error| of_message(&error.inside("hint")))?;
        let forecast = Forecast {
            layer,
            q,
            local_lse: ask::local_lse(&hint.local_lse, context.q_heads())
                .map_err(|error| of_message(&error.inside("hint")))?,
            asking: self.asking.clone(),
        };
        let begun = self.served.searches.hint(self.served.cache()?, context, forecast);
        begun.map_err(|error| of_cache(&error))
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
        let asked = ask::checked(query, &context, self.served.config.reply_bytes_max.as_usize())
            .map_err(|error| of_message(&error.inside("query")))?;
        let (layer, form) = (asked.layer, asked.form);
        self.asking = Some(Asking {
            form,
            excluded: asked.excluded.clone(),
        });
        let (served, cache, ahead) = (Arc::clone(&self.served), self.served.cache()?, self.ahead.take());
        let search = served.searches.answer(cache, Arc::clone(&context), asked, ahead);
        let answer = self.meanwhile(search).await??.map_err(|error| of_cache(&error))?;
        let name = match form {
            Form::Rows { .. } => "rows",
            Form::Attend { .. } => "attend",
        };
        metrics::retrieved(name, answer.report.shortfall.is_some());
        Ok(v1::DecodeReply {
            sequence,
            layer: wire_layer,
            report: Some(reply::report(answer.report, answer.times)),
            result: Some(reply::result(layer, answer.found, &context, self.sent.as_mut())),
        })
    }
}
