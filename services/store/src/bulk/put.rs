//! Puts: each block is received where it will rest, verified as it comes, and kept as soon as there is room.

use std::{
    thread,
    time::{Duration, Instant},
};

use kvasir_cache::{BlockCache, CacheError, PutOutcome};
use kvasir_proto::{
    EntryHead, PutOutcome as Kept,
    bulk::{self, FRAME_BYTES, PutRow, ReplyHead, RequestHead, Status},
};

use super::{
    answer::{Problem, schema},
    connection::Connection,
};
use crate::metrics;

/// First and longest pause before room is looked for again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));

/// The rows, all of which fit the schema.
pub(super) fn fitting(cache: &BlockCache, head: &RequestHead, rows: Vec<PutRow>) -> Result<Vec<PutRow>, Problem> {
    let schema = schema(cache, head)?;
    for (i, row) in rows.iter().enumerate() {
        let entry = EntryHead {
            hash: row.hash,
            layer: row.layer,
            length: row.length as usize,
            checksum: row.checksum,
        };
        if let Err(error) = entry.fits(&schema) {
            return Err(Problem::Refused(
                Status::Invalid,
                error.inside(&format!("rows[{i}]")).to_string(),
            ));
        }
    }
    Ok(rows)
}

/// Receives each block where it will rest. While there is no room nothing is received, so that the sender is held back by the
/// connection itself.
pub(super) fn put(
    connection: &Connection<'_>,
    cache: &BlockCache,
    head: &RequestHead,
    rows: &[PutRow],
) -> Result<(), Problem> {
    let mut outcomes = Vec::with_capacity(rows.len());
    let mut patience = Patience::new(connection);
    let mut failed = None;
    for row in rows {
        if failed.is_some() {
            connection.discard(row.length.into())?;
            continue;
        }
        match take(connection, cache, head, row, &mut patience)? {
            Ok(outcome) => outcomes.push(said(outcome)),
            // Told when the rest has come.
            Err(error) => failed = Some(error),
        }
        patience.took(row.length);
    }
    if let Some(error) = failed {
        return Err(error.into());
    }
    let busy = outcomes.iter().filter(|outcome| **outcome == Kept::Busy).count();
    if busy > 0 {
        metrics::shed("busy", busy);
    }
    let table = bulk::put_reply_rows(&outcomes);
    let reply = ReplyHead::new(head.op, head.id).with_table(outcomes.len(), &table);
    Ok(connection.send(&[&reply.encode(), &table])?)
}

/// One block, whose bytes are off the connection afterwards.
fn take(
    connection: &Connection<'_>,
    cache: &BlockCache,
    head: &RequestHead,
    row: &PutRow,
    patience: &mut Patience<'_, '_>,
) -> Result<Result<PutOutcome, CacheError>, Problem> {
    let room = loop {
        match cache.reserve(head.namespace) {
            Ok(None) if patience.wait() => {}
            other => break other,
        }
    };
    let mut room = match room {
        Ok(Some(room)) => room,
        other => {
            connection.discard(row.length.into())?;
            return Ok(other.map(|_| PutOutcome::Busy));
        }
    };
    connection.receive_into(&mut room)?;
    let received = room.freeze();
    let key = head.namespace.block(row.hash).layer(row.layer);
    loop {
        match cache.put_reserved(key, &received, row.checksum) {
            Ok(PutOutcome::Busy) if patience.wait() => {}
            other => return Ok(other),
        }
    }
}

/// How long a put waits for room: `put_wait_max` for each MiB of it, which is what a message of a gRPC stream has. Once that was in
/// vain the rest of the request waits no more.
struct Patience<'c, 'a> {
    connection: &'c Connection<'a>,
    until: Option<Instant>,
    pause: Duration,
    taken: usize,
    given_up: bool,
}

impl<'c, 'a> Patience<'c, 'a> {
    fn new(connection: &'c Connection<'a>) -> Self {
        Self {
            connection,
            until: None,
            pause: PAUSES.0,
            taken: 0,
            given_up: false,
        }
    }

    /// Waits a moment; false when that has gone on for long enough, or the store stops.
    fn wait(&mut self) -> bool {
        let now = Instant::now();
        let until = *self
            .until
            .get_or_insert(now + self.connection.served.config.put_wait_max.get());
        self.given_up |= now + self.pause > until || self.connection.is_stopping();
        if self.given_up {
            return false;
        }
        thread::sleep(self.pause);
        self.pause = (2 * self.pause).min(PAUSES.1);
        true
    }

    /// Notes that a block is off the connection, whatever became of it.
    fn took(&mut self, bytes: u32) {
        self.pause = PAUSES.0;
        self.taken += bytes as usize;
        if self.taken >= FRAME_BYTES {
            (self.taken, self.until) = (0, None);
        }
    }
}

const fn said(outcome: PutOutcome) -> Kept {
    match outcome {
        PutOutcome::Stored => Kept::Stored,
        PutOutcome::Present => Kept::Present,
        PutOutcome::Busy => Kept::Busy,
        PutOutcome::ChecksumMismatch => Kept::ChecksumMismatch,
    }
}
