//! What each request does with the cache.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_block::{BlockHash, LayerBlockKey};
use kvasir_cache::{BlockCache, CacheError, ErrorKind, GetOptions, GetOutcome, LeaseId, Tier};
use kvasir_proto::{
    GetOutcome as Said,
    bulk::{self, FRAME_BYTES, GetRow, Op, ReplyHead, RequestHead, Status},
    convert,
};

use super::connection::{Connection, Ended};
use crate::{door::Lost, metrics};

/// Rows of a frame of a get; reached by misses and tiny blocks only.
const FRAME_ROWS_MAX: usize = 4096;

/// Bytes of blocks that are looked for at a time where places are answered: nothing is sent, so frames may stand for more.
const PLACED_BYTES: usize = 8 << 20;

/// Why a request has no answer of its own.
pub(super) enum Problem {
    /// The peer is told in words, and the connection lives on.
    Refused(Status, String),
    /// The connection does not.
    Ended(Ended),
}

impl From<Ended> for Problem {
    fn from(ended: Ended) -> Self {
        Self::Ended(ended)
    }
}

impl From<CacheError> for Problem {
    fn from(error: CacheError) -> Self {
        let status = match error.kind() {
            ErrorKind::UnknownNamespace | ErrorKind::NotHeld => Status::NotFound,
            ErrorKind::LimitReached => Status::Exhausted,
            ErrorKind::Locked => Status::Unavailable,
            ErrorKind::Disk => Status::Internal,
            ErrorKind::SchemaMismatch
            | ErrorKind::BasisMismatch
            | ErrorKind::Config
            | ErrorKind::InvalidArgument
            | ErrorKind::Unsupported => Status::Invalid,
        };
        Self::Refused(status, error.to_string())
    }
}

pub(super) fn stopping(lost: Lost) -> Problem {
    Problem::Refused(Status::Unavailable, lost.to_string())
}

/// What a get wants, in its order.
enum Wanted {
    Keys(Vec<(BlockHash, u16)>),
    Chain(Vec<BlockHash>, u16),
}

impl Wanted {
    fn key(&self, head: &RequestHead, i: usize) -> LayerBlockKey {
        let (hash, layer) = match self {
            Self::Keys(keys) => keys[i],
            // Below the end of the layers, which is u16.
            Self::Chain(chain, first) => (chain[i % chain.len()], first + (i / chain.len()) as u16),
        };
        head.namespace.block(hash).layer(layer)
    }
}

/// Frame after frame of about 1 MiB, each read when the one before it has left.
pub(super) fn get(
    connection: &Connection<'_>,
    cache: &BlockCache,
    head: &RequestHead,
    table: &[u8],
    started: Instant,
) -> Result<(), Problem> {
    let schema = schema(cache, head)?;
    let (wanted, total) = match head.op {
        Op::GetChain => {
            let layers = &head.layers;
            if layers.is_empty() || layers.end > schema.layers {
                let held = schema.layers;
                let text = format!("layers {layers:?}: the namespace has layers 0 to {held}, ask for at least one");
                return Err(Problem::Refused(Status::Invalid, text));
            }
            let chain: Vec<_> = bulk::hash_rows(table).collect();
            let total = chain.len() * layers.len();
            (Wanted::Chain(chain, layers.start), total)
        }
        _ => {
            let keys: Vec<_> = bulk::key_rows(table).collect();
            let total = keys.len();
            (Wanted::Keys(keys), total)
        }
    };
    let options = GetOptions {
        deadline: head.deadline.and_then(|left| started.checked_add(left)),
        lease: (head.lease != 0).then(|| LeaseId::from_u64(head.lease)),
        verify: !head.receiver_verifies,
        recompute: head.recompute,
    };
    let at_a_time = if connection.is_local() {
        PLACED_BYTES
    } else {
        FRAME_BYTES
    };
    let at_a_time = (at_a_time / schema.layer_block_bytes()).clamp(1, FRAME_ROWS_MAX);
    let (mut keys, mut frame) = (Vec::new(), Frame::default());
    let mut first = 0;
    loop {
        let end = (first + at_a_time).min(total);
        keys.clear();
        keys.extend((first..end).map(|i| wanted.key(head, i)));
        for outcome in cache.get_in_time(&keys, &options)? {
            let (mut row, payload) = row(outcome);
            if let Some(payload) = payload {
                let place = connection.place(cache, &payload);
                if !frame.takes(place.is_some(), payload.len()) {
                    frame.send(connection, head, false)?;
                }
                frame.placed = place.is_some();
                match place {
                    Some(place) => row.place = place,
                    None => frame.push_payload(payload),
                }
                frame.hits += 1;
            }
            frame.rows.push(row);
        }
        frame.send(connection, head, end == total)?;
        first = end;
        if first == total {
            return Ok(());
        }
    }
}

/// A frame of a get in the making. All its hits are places, or all come with their bytes.
#[derive(Default)]
struct Frame {
    /// Rows of the frames before it.
    first: usize,
    rows: Vec<GetRow>,
    hits: usize,
    placed: bool,
    payloads: Vec<Bytes>,
    payload_bytes: usize,
    table: Vec<u8>,
}

impl Frame {
    /// Whether another hit may go with it.
    fn takes(&self, placed: bool, bytes: usize) -> bool {
        self.hits == 0 || (placed == self.placed && (placed || self.payload_bytes + bytes <= FRAME_BYTES))
    }

    fn push_payload(&mut self, payload: Bytes) {
        self.payload_bytes += payload.len();
        self.payloads.push(payload);
    }

    /// Sends it and begins the next one.
    fn send(&mut self, connection: &Connection<'_>, head: &RequestHead, last: bool) -> Result<(), Ended> {
        self.table.clear();
        for row in &self.rows {
            row.encode(self.placed, &mut self.table);
        }
        // Fewer rows than a chain and its layers can have.
        let mut reply = ReplyHead::new(head.op, head.id).with_table(self.rows.len(), &self.table);
        reply.first = self.first as u32;
        reply.last = last;
        reply.placed = self.placed;
        reply.payload_bytes = self.payload_bytes as u64;
        let reply = reply.encode();
        let mut parts: Vec<&[u8]> = Vec::with_capacity(2 + self.payloads.len());
        parts.extend([&reply[..], &self.table]);
        parts.extend(self.payloads.iter().map(|payload| &payload[..]));
        connection.send(&parts)?;
        self.first += self.rows.len();
        self.rows.clear();
        self.payloads.clear();
        (self.hits, self.placed, self.payload_bytes) = (0, false, 0);
        Ok(())
    }
}

fn row(outcome: GetOutcome) -> (GetRow, Option<Bytes>) {
    let said = match outcome {
        GetOutcome::Hit {
            payload,
            checksum,
            tier,
        } => {
            let row = GetRow {
                tier: match tier {
                    Tier::Host => convert::Tier::Host,
                    Tier::Disk => convert::Tier::Disk,
                    Tier::Object => convert::Tier::Object,
                },
                // A layer block of a schema, which is bounded.
                length: payload.len() as u32,
                checksum,
                ..GetRow::without(Said::Hit)
            };
            return (row, Some(payload));
        }
        GetOutcome::Miss => Said::Miss,
        GetOutcome::Corrupt => Said::Corrupt,
        GetOutcome::Busy => Said::Busy,
        GetOutcome::TooLate => {
            metrics::shed("too_late", 1);
            Said::TooLate
        }
    };
    (GetRow::without(said), None)
}

pub(super) fn exists(
    connection: &Connection<'_>,
    cache: &BlockCache,
    head: &RequestHead,
    table: &[u8],
) -> Result<(), Problem> {
    let hashes: Vec<_> = bulk::hash_rows(table).collect();
    let held = bulk::presence_table(&cache.contains_blocks(head.namespace, &hashes)?);
    let reply = ReplyHead::new(head.op, head.id).with_table(hashes.len(), &held);
    Ok(connection.send(&[&reply.encode(), &held])?)
}

pub(super) fn matched(
    connection: &Connection<'_>,
    cache: &BlockCache,
    head: &RequestHead,
    table: &[u8],
) -> Result<(), Problem> {
    let hashes: Vec<_> = bulk::hash_rows(table).collect();
    let lease = (head.lease > 0).then(|| Duration::from_millis(head.lease));
    let matched = cache.match_prefix(head.namespace, &hashes, lease)?;
    let reply = ReplyHead {
        // At most the rows of a request; a lease lasts at most lease_max.
        hit_blocks: matched.hit_blocks as u32,
        host_blocks: matched.host_blocks as u32,
        disk_blocks: matched.disk_blocks as u32,
        lease: matched.lease.map_or(0, LeaseId::to_u64),
        lease_ms: matched.lease_for.as_millis() as u32,
        ..ReplyHead::new(head.op, head.id)
    };
    Ok(connection.send(&[&reply.encode()])?)
}

/// Looks at blocks whose bytes came wrong to a reader: a bad one is dropped by being read and verified.
pub(super) fn suspect(cache: &BlockCache, head: &RequestHead, table: &[u8]) -> Result<(), Problem> {
    let keys: Vec<_> = bulk::key_rows(table)
        .map(|(hash, layer)| head.namespace.block(hash).layer(layer))
        .collect();
    tracing::warn!(layer_blocks = keys.len(), "a reader got wrong bytes, verifying ours");
    metrics::suspected(keys.len());
    for key in keys {
        // Not answered, so neither is what is wrong with the question.
        if cache.get_many(&[key], &GetOptions::default()).is_err() {
            break;
        }
    }
    Ok(())
}

pub(super) fn schema(
    cache: &BlockCache,
    head: &RequestHead,
) -> Result<std::sync::Arc<kvasir_block::KvSchema>, Problem> {
    cache.schema(head.namespace).ok_or_else(|| {
        let namespace = head.namespace;
        let text = format!("namespace: {namespace} is not open here, open it with its schema first");
        Problem::Refused(Status::NotFound, text)
    })
}
