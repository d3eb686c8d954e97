//! GetBlocks: messages of about 1 MiB, the next one read while one is sent, payloads shared with the host tier.
//!
//! Memory of a stream is bounded by what is read ahead, also when its reader stands still: two messages here and one on its
//! way out. Reading happens on the I/O door, a message at a time, since any block may be on disk; that hop costs some
//! tens of microseconds per MiB.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use http::{Request, Response};
use kvasir_block::{BlockHash, Checksum, LayerBlockKey, NamespaceId};
use kvasir_cache::{BlockCache, GetOptions, GetOutcome, LeaseId};
use kvasir_proto::{
    EntryHead, InvalidMessage, convert,
    frame::{self, BulkMessage, Incoming, Rope},
    v1,
};
use prost::Message;
use tokio::time::timeout;
use tonic::{Status, body::Body};

use super::{
    deadline,
    status::{observed, of_cache, of_message, stopping, too_many_streams},
};
use crate::{
    metrics,
    served::{Served, StreamSlot},
};

const CALL: &str = "get_blocks";

/// Payload bytes of a message, about: frames of 1 MiB are where loopback is fastest and a reader can start early.
const MESSAGE_BYTES: usize = 1 << 20;
/// Entries of a message; reached by misses and tiny blocks only.
const MESSAGE_ENTRIES_MAX: usize = 4096;
/// Messages read at a time: the one that is wanted and the one after it.
const READ_AHEAD: usize = 2;

/// What is asked for.
struct Wanted {
    namespace: NamespaceId,
    hashes: Vec<BlockHash>,
    layers: Range<u16>,
    /// Blocks after it are answered `TOO_LATE`.
    deadline: Option<Instant>,
    lease: Option<LeaseId>,
    /// How long computing a block takes the caller.
    recompute: Option<Duration>,
    _slot: StreamSlot,
}

pub(super) async fn serve(
    served: Arc<Served>,
    request: Request<Body>,
    span: tracing::Span,
) -> Result<Response<Body>, Status> {
    let slot = served
        .stream_slot()
        .ok_or_else(|| too_many_streams(served.config.streams_max))?;
    let deadline = deadline::of(request.headers());
    let mut incoming = Incoming::request(request.into_body(), served.config.control_bytes_max());
    let message = timeout(served.config.message_timeout.get(), incoming.message())
        .await
        .map_err(|_| Status::deadline_exceeded("the request did not arrive: send one message and close"))??
        .ok_or_else(|| Status::invalid_argument("the request is missing: send one message and close"))?;
    let request = v1::GetBlocksRequest::decode(message)
        .map_err(|error| Status::invalid_argument(format!("not a GetBlocksRequest: {error}")))?;

    let checked = check(&request, served.config.hashes_max).map_err(|error| of_message(&error))?;
    let (namespace, hashes, layers) = checked;
    let schema = served.cache()?.schema(namespace).ok_or_else(|| {
        Status::not_found(format!(
            "namespace: {namespace} is not open here, open it with its schema first"
        ))
    })?;
    if layers.end > schema.layers {
        let problem = format!("{}: the namespace has layers 0 to {}", layers.end, schema.layers);
        return Err(of_message(&InvalidMessage::new("layer_end", problem)));
    }
    let wanted = Arc::new(Wanted {
        namespace,
        hashes,
        layers,
        deadline,
        lease: (request.lease != 0).then(|| LeaseId::from_u64(request.lease)),
        recompute: (request.recompute_us_per_block != 0).then(|| Duration::from_micros(request.recompute_us_per_block)),
        _slot: slot,
    });
    let total = wanted.hashes.len() * wanted.layers.len();
    let entries = (MESSAGE_BYTES / schema.layer_block_bytes()).clamp(1, MESSAGE_ENTRIES_MAX);
    let messages = stream::iter((0..total).step_by(entries))
        .map(move |start| {
            let range = start..(start + entries).min(total);
            let reading = read(Arc::clone(&served), Arc::clone(&wanted), range);
            observed(CALL, span.clone(), reading)
        })
        .buffered(READ_AHEAD);
    Ok(frame::response(messages.boxed()))
}

/// The request's fields, checked as far as they can be without the schema.
fn check(
    request: &v1::GetBlocksRequest,
    hashes_max: usize,
) -> Result<(NamespaceId, Vec<BlockHash>, Range<u16>), InvalidMessage> {
    let namespace = convert::namespace(&request.namespace)?;
    let hashes = convert::hashes("hashes", &request.hashes, hashes_max)?;
    let layer = |field: &str, value: u32| {
        u16::try_from(value).map_err(|_| InvalidMessage::new(field, format!("{value}: layers end at 65535")))
    };
    let layers = layer("layer_start", request.layer_start)?..layer("layer_end", request.layer_end)?;
    if layers.is_empty() {
        let problem = format!("{}: must be above layer_start {}", layers.end, layers.start);
        return Err(InvalidMessage::new("layer_end", problem));
    }
    Ok((namespace, hashes, layers))
}

async fn read(served: Arc<Served>, wanted: Arc<Wanted>, range: Range<usize>) -> Result<Rope, Status> {
    let stop = served.stopping.clone();
    let reading = served.with_cache(move |cache| read_message(cache, &wanted, range));
    tokio::select! {
        biased;
        () = stop.cancelled() => Err(stopping()),
        message = reading => Ok(message??.encode()?),
    }
}

/// Reads the blocks of one message; counted through all layers, in the order they are wanted.
fn read_message(cache: &BlockCache, wanted: &Wanted, range: Range<usize>) -> Result<BulkMessage, Status> {
    let mut message = BulkMessage {
        header: v1::BlockBatch {
            namespace: convert::namespace_bytes(wanted.namespace),
            entries: Vec::with_capacity(range.len()),
        },
        payload: Rope::new(),
    };
    let keys: Vec<LayerBlockKey> = range
        .map(|i| LayerBlockKey {
            namespace: wanted.namespace,
            hash: wanted.hashes[i % wanted.hashes.len()],
            // Below the schema's layers, which are u16.
            layer: wanted.layers.start + (i / wanted.hashes.len()) as u16,
        })
        .collect();
    let options = GetOptions {
        deadline: wanted.deadline,
        lease: wanted.lease,
        recompute: wanted.recompute,
        ..GetOptions::default()
    };
    let outcomes = cache.get_in_time(&keys, &options).map_err(|error| of_cache(&error))?;
    let mut too_late = 0;
    for (key, outcome) in keys.iter().zip(outcomes) {
        let mut head = EntryHead {
            hash: key.hash,
            layer: key.layer,
            length: 0,
            checksum: Checksum::from_u32(0),
        };
        let outcome = match outcome {
            GetOutcome::Hit { payload, checksum, .. } => {
                head.length = payload.len();
                head.checksum = checksum;
                message.payload.push(payload);
                v1::BlockOutcome::Hit
            }
            GetOutcome::Miss => v1::BlockOutcome::Miss,
            GetOutcome::Corrupt => v1::BlockOutcome::Corrupt,
            GetOutcome::Busy => v1::BlockOutcome::Busy,
            GetOutcome::TooLate => {
                too_late += 1;
                v1::BlockOutcome::TooLate
            }
        };
        message.header.entries.push(head.to_wire(outcome));
    }
    metrics::shed("too_late", too_late);
    Ok(message)
}
