//! A decode stream's state, whatever way its messages come.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use kvasir_block::{BlockHash, NamespaceId};
use kvasir_cache::retrieve::{Context, Form};
use kvasir_proto::{
    InvalidMessage, convert,
    v1::{self, decode_reply},
};
use tonic::Status;

use super::{ask, reply};
use crate::{
    ahead::{Asking, Forecast},
    grpc::status::{of_cache, of_message, too_many_streams},
    metrics,
    row_cache::SentRows,
    searches::{Answer, Asked},
    served::{Served, StreamSlot},
};

/// More query heads than any model has; checked before a buffer is sized by it.
const Q_HEADS_MAX: u32 = 4096;

/// One context, and what its queries have been like.
pub(super) struct Session {
    pub(super) served: Arc<Served>,
    context: Option<Arc<Context>>,
    sent: Option<SentRows>,
    /// As the last query: what the next one will ask for is thought to be the same.
    asking: Option<Asking>,
    _slot: StreamSlot,
}

/// A query that is being answered.
pub(super) struct Pending {
    pub(super) context: Arc<Context>,
    sequence: u64,
    layer: u16,
    form: Form,
}

impl Session {
    /// Without a context. A place among the streams is taken.
    pub(super) fn new(served: &Arc<Served>) -> Result<Self, Status> {
        let slot = served
            .stream_slot()
            .ok_or_else(|| too_many_streams(served.config.streams_max))?;
        Ok(Self {
            served: Arc::clone(served),
            context: None,
            sent: None,
            asking: None,
            _slot: slot,
        })
    }

    pub(super) async fn open(&mut self, open: v1::OpenContext) -> Result<v1::DecodeReply, Status> {
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

    /// What a hint says about the queries to come.
    pub(super) fn forecast(&self, hint: &v1::Hint) -> Result<(Arc<Context>, Forecast), Status> {
        let Some(context) = self.context.clone() else {
            return Err(Status::invalid_argument("hint: no context is open, send open first"));
        };
        let inside = |error: InvalidMessage| of_message(&error.inside("hint"));
        let count = context.q_heads() * usize::from(context.schema().head_dim);
        let forecast = Forecast {
            layer: ask::layer(hint.layer, &context).map_err(inside)?,
            q: convert::floats("q", &hint.q, count).map_err(inside)?,
            local_lse: ask::local_lse(&hint.local_lse, context.q_heads()).map_err(inside)?,
            asking: self.asking.clone(),
        };
        Ok((context, forecast))
    }

    /// Takes a query.
    pub(super) fn ask(&mut self, query: v1::Query) -> Result<(Asked, Pending), Status> {
        let Some(context) = self.context.clone() else {
            return Err(Status::invalid_argument("query: no context is open, send open first"));
        };
        let sequence = query.sequence;
        let asked = ask::checked(query, &context, self.served.config.reply_bytes_max.as_usize())
            .map_err(|error| of_message(&error.inside("query")))?;
        let pending = Pending {
            context,
            sequence,
            layer: asked.layer,
            form: asked.form,
        };
        self.asking = Some(Asking {
            form: asked.form,
            excluded: asked.excluded.clone(),
            took: self.last_took(),
        });
        Ok((asked, pending))
    }

    fn last_took(&self) -> Option<Duration> {
        self.asking.as_ref().and_then(|asking| asking.took)
    }

    /// The reply to the last query.
    pub(super) fn reply(&mut self, pending: &Pending, answer: Answer) -> v1::DecodeReply {
        if let Some(asking) = &mut self.asking {
            asking.took = Some(answer.times.search);
        }
        let name = match pending.form {
            Form::Rows { .. } => "rows",
            Form::Attend { .. } => "attend",
        };
        metrics::retrieved(name, answer.report.shortfall.is_some());
        v1::DecodeReply {
            sequence: pending.sequence,
            layer: pending.layer.into(),
            report: Some(reply::report(answer.report, answer.times)),
            result: Some(reply::result(
                pending.layer,
                answer.found,
                &pending.context,
                self.sent.as_mut(),
            )),
        }
    }
}
