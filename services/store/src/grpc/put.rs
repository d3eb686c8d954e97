//! PutBlocks: a message at a time, cut into layer blocks without copying; one outcome per block.
//!
//! The cache copies a block once, when it keeps it: a part of a message would keep all of the message in memory.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::stream;
use http::{Request, Response};
use kvasir_block::{Checksum, LayerBlockKey};
use kvasir_cache::{BlockCache, CacheError, PutOutcome};
use kvasir_proto::{
    convert,
    frame::{self, BulkMessage, Incoming, Rope},
    v1,
};
use tokio::time::timeout;
use tonic::{Status, body::Body};

use super::status::{observed, of_cache, of_message, refused, stopping, too_many_streams};
use crate::{
    metrics,
    served::{Served, StreamSlot},
};

const CALL: &str = "put_blocks";

/// A layer block cut out of a message.
type Entry = (LayerBlockKey, Bytes, Checksum);

struct Call {
    served: Arc<Served>,
    incoming: Incoming<Body>,
    span: tracing::Span,
    _slot: StreamSlot,
}

pub(super) fn serve(
    served: Arc<Served>,
    request: Request<Body>,
    span: tracing::Span,
) -> Result<Response<Body>, Status> {
    let slot = served
        .stream_slot()
        .ok_or_else(|| too_many_streams(served.config.streams_max))?;
    let incoming = Incoming::request(request.into_body(), served.config.message_bytes_max.as_usize());
    let call = Call {
        served,
        incoming,
        span,
        _slot: slot,
    };
    Ok(frame::response(Box::pin(stream::try_unfold(call, Call::next))))
}

impl Call {
    /// Takes the next message and says what became of its blocks.
    async fn next(mut self) -> Result<Option<(Rope, Self)>, Status> {
        let stop = self.served.stopping.clone();
        let announced = tokio::select! {
            biased;
            () = stop.cancelled() => Err(stopping()),
            announced = self.incoming.announced() => announced.map_err(Status::from),
        };
        let span = self.span.clone();
        match announced {
            Ok(None) => Ok(None),
            Ok(Some(bytes)) => {
                let reply = observed(CALL, span, self.message(bytes)).await?;
                Ok(Some((reply, self)))
            }
            Err(status) => {
                refused(CALL, &span, &status);
                Err(status)
            }
        }
    }

    async fn message(&mut self, bytes: usize) -> Result<Rope, Status> {
        let _room = self.served.put_room(bytes).await?;
        let wait = self.served.config.message_timeout.get();
        let message = match timeout(wait, self.incoming.message()).await {
            Ok(message) => message?.unwrap_or_default(),
            Err(_) => {
                return Err(Status::deadline_exceeded(format!(
                    "a message of {bytes} bytes did not arrive within {wait:?}: the sender is stuck, or the way is slow"
                )));
            }
        };
        let message = BulkMessage::parse(message, &self.served.config.bulk_limits())?;
        let cache = self.served.cache()?;
        let entries = cut(&cache, message)?;
        let outcomes = put_patiently(&self.served, &cache, &entries).await?;
        let outcomes = outcomes.into_iter().map(|outcome| wire(outcome).into()).collect();
        Ok(frame::encode_message(&v1::PutBlocksReply { outcomes })?)
    }
}

/// First and longest pause before a put is tried again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

/// Stores blocks, and those that find no thread or no room in the flush queue again, until `put_wait_max` has passed: meanwhile
/// the sender is held back by flow control, which loses less than an answer of `BUSY`.
async fn put_patiently(served: &Served, cache: &Arc<BlockCache>, entries: &[Entry]) -> Result<Vec<PutOutcome>, Status> {
    let until = Instant::now() + served.config.put_wait_max.get();
    let (mut pause, longest) = PAUSES;
    let mut outcomes = vec![PutOutcome::Busy; entries.len()];
    loop {
        let is_open = |i: &usize| outcomes[*i] == PutOutcome::Busy;
        let open: Vec<usize> = (0..entries.len()).filter(is_open).collect();
        let batch = open.iter().map(|&i| entries[i].clone()).collect();
        let (cache, left) = (Arc::clone(cache), until.saturating_duration_since(Instant::now()));
        let Some(tried) = served.io.run_within(left, move || put_all(&cache, batch)).await? else {
            metrics::shed("busy", open.len());
            return Ok(outcomes);
        };
        for (i, outcome) in open.into_iter().zip(tried.map_err(|error| of_cache(&error))?) {
            outcomes[i] = outcome;
        }
        if !outcomes.contains(&PutOutcome::Busy) || Instant::now() + pause >= until {
            return Ok(outcomes);
        }
        tokio::select! {
            () = served.stopping.cancelled() => return Ok(outcomes),
            () = tokio::time::sleep(pause) => pause = (2 * pause).min(longest),
        }
    }
}

/// The message's layer blocks, all checked against the schema before any is stored.
fn cut(cache: &BlockCache, message: BulkMessage) -> Result<Vec<Entry>, Status> {
    let BulkMessage { header, mut payload } = message;
    let namespace = convert::namespace(&header.namespace).map_err(|error| of_message(&error.inside("header")))?;
    let schema = cache.schema(namespace).ok_or_else(|| {
        Status::not_found(format!(
            "header.namespace: {namespace} is not open here, open it with its schema first"
        ))
    })?;
    let heads = convert::heads(&header, payload.len()).map_err(|error| of_message(&error))?;
    let mut entries = Vec::with_capacity(heads.len());
    for (i, head) in heads.iter().enumerate() {
        head.fits(&schema)
            .map_err(|error| of_message(&error.inside(&format!("header.entries[{i}]"))))?;
        let bytes = payload.cut(head.length).unwrap_or_default();
        entries.push((head.key(namespace), bytes, head.checksum));
    }
    Ok(entries)
}

fn put_all(cache: &BlockCache, entries: Vec<Entry>) -> Result<Vec<PutOutcome>, CacheError> {
    entries
        .into_iter()
        .map(|(key, payload, checksum)| cache.put(key, payload, checksum))
        .collect()
}

fn wire(outcome: PutOutcome) -> v1::BlockOutcome {
    match outcome {
        PutOutcome::Stored => v1::BlockOutcome::Stored,
        PutOutcome::Present => v1::BlockOutcome::Present,
        PutOutcome::Busy => v1::BlockOutcome::Busy,
        PutOutcome::ChecksumMismatch => v1::BlockOutcome::ChecksumMismatch,
    }
}
