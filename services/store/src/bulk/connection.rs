//! One connection: the greeting, then request after request.

use std::{
    cell::RefCell,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvasir_cache::{BlockCache, PutBuffer};

use kvasir_proto::bulk::{
    self, BulkError, Greeting, Op, Place, PutRow, ROWS_MAX, Refusal, ReplyHead, RequestHead, Status, Welcome,
};

use tokio::runtime::Handle;

use super::{
    Shared,
    answer::{self, Problem},
    decode, put,
    socket::Socket,
};
use crate::{grpc::Exchange, local::Places, metrics, served::Served};

/// Most payload bytes of a put. Each block goes straight to its room, so this bounds time rather than memory.
const PAYLOAD_BYTES_MAX: u64 = 1 << 30;

/// Bytes that are received to be thrown away, at a time.
const SCRATCH_BYTES: usize = 64 << 10;

/// How long a connection may do nothing whose peer holds places: they end with it, and it may be reading them.
const HOLDING_IDLE: Duration = Duration::from_secs(365 * 24 * 3600);

pub(super) struct Connection<'a> {
    shared: &'a Shared,
    pub(super) served: &'a Served,
    pub(super) socket: &'a Socket,
    /// Of a peer on this machine: what it holds.
    places: Option<RefCell<Places>>,
    /// Its decode stream, if it has one open.
    pub(super) decoding: RefCell<Option<Exchange>>,
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error("the peer was cut off, or too slow: {0}")]
    Socket(#[from] io::Error),
    #[error("the peer broke the protocol: {0}")]
    Protocol(#[from] BulkError),
    #[error("let nobody in: {0}")]
    Refused(#[from] Refusal),
}

impl<'a> Connection<'a> {
    pub(super) fn new(shared: &'a Shared, socket: &'a Arc<Socket>) -> Self {
        Self {
            shared,
            served: &shared.served,
            socket,
            places: socket
                .is_local()
                .then(|| RefCell::new(Places::new(&shared.budget, &shared.served.config))),
            decoding: RefCell::new(None),
        }
    }

    /// What is served, for what outlives a call.
    pub(super) fn arc(&self) -> &'a Arc<Served> {
        &self.shared.served
    }

    /// The store's asynchronous side.
    pub(super) fn runtime(&self) -> &'a Handle {
        &self.shared.runtime
    }

    /// What the peer holds.
    pub(super) fn into_places(self) -> Option<Places> {
        self.places.map(RefCell::into_inner)
    }

    /// Whether hits may be answered with places.
    pub(super) fn is_local(&self) -> bool {
        self.places.is_some()
    }

    /// A place for bytes of the arena, held until the peer returns it. `None` where they lie elsewhere or the peer holds all that it
    /// may: they then go over the socket.
    pub(super) fn place(&self, cache: &BlockCache, payload: &Bytes) -> Option<Place> {
        let mut places = self.places.as_ref()?.borrow_mut();
        let range = cache.locate(payload)?;
        let number = places.hold(payload)?;
        Some(Place {
            offset: range.start,
            number,
        })
    }

    fn returned(&self, table: &[u8]) {
        if let Some(places) = &self.places {
            let mut places = places.borrow_mut();
            for number in bulk::number_rows(table) {
                places.give_back(number);
            }
        }
    }

    fn idle_max(&self) -> Duration {
        match &self.places {
            Some(places) if !places.borrow().is_empty() => HOLDING_IDLE,
            _ => self.served.config.bulk_idle_timeout.get(),
        }
    }

    /// Serves until the peer ends it, breaks it or is idle for too long, or the store stops.
    pub(super) fn serve(&self) -> Result<(), Ended> {
        if !self.greeted()? {
            return Ok(());
        }
        let config = &self.served.config;
        let (mut bytes, mut table) = ([0; RequestHead::BYTES], Vec::new());
        while !self.is_stopping() {
            let idle = Instant::now() + self.idle_max();
            if !self
                .socket
                .receive_head(&mut bytes, idle, config.message_timeout.get())?
            {
                break;
            }
            let started = Instant::now();
            let head = match RequestHead::decode(&bytes) {
                Ok(head) => head,
                Err(error) => return Err(self.broken(&error)),
            };
            table.resize(head.table_bytes(), 0);
            self.socket
                .receive(&mut table, started + config.message_timeout.get())?;
            let call = head.op.name();
            match self.answer(&head, &table, started) {
                Ok(()) => metrics::served(call, started.elapsed()),
                Err(Problem::Ended(ended)) => {
                    metrics::refused(call, "CANCELLED");
                    return Err(ended);
                }
                Err(Problem::Refused(status, text)) => {
                    metrics::refused(call, status.name());
                    if status == Status::Internal {
                        tracing::error!(call, text, "call failed");
                    }
                    let (reply, text) = ReplyHead::refusal(head.op, head.id, status, &text);
                    self.send(&[&reply.encode(), &text])?;
                }
            }
        }
        Ok(())
    }

    fn answer(&self, head: &RequestHead, table: &[u8], started: Instant) -> Result<(), Problem> {
        if let Err(error) = kvasir_proto::bulk::check_table(table, head.table) {
            // Where a put's payload ends is then unknown.
            return Err(Problem::Ended(self.broken(&error)));
        }
        match head.op {
            Op::Put => return self.put(head, table),
            Op::Decode => return decode::decode(self, head),
            _ => {}
        }
        let cache = self.served.cache().map_err(answer::stopping)?;
        match head.op {
            Op::Get | Op::GetChain => answer::get(self, &cache, head, table, started),
            Op::Exists => answer::exists(self, &cache, head, table),
            Op::Match => answer::matched(self, &cache, head, table),
            Op::Suspect => answer::suspect(&cache, head, table),
            Op::Return => {
                self.returned(table);
                Ok(())
            }
            Op::Put | Op::Decode => Ok(()),
        }
    }

    /// Takes the payloads of a put, wherever they go, so that the next request is found.
    fn put(&self, head: &RequestHead, table: &[u8]) -> Result<(), Problem> {
        let rows = PutRow::decode_all(head, table).map_err(|error| Problem::Ended(self.broken(&error)))?;
        if head.payload_bytes > PAYLOAD_BYTES_MAX {
            let bytes = head.payload_bytes;
            let error = format!("payload_bytes: {bytes}, at most {PAYLOAD_BYTES_MAX} are taken: put in several");
            return Err(Problem::Refused(Status::Exhausted, error)).inspect_err(|_| self.socket.end_reading());
        }
        let cache = match self.served.cache().map_err(answer::stopping) {
            Ok(cache) => cache,
            Err(problem) => return self.discard(head.payload_bytes).and(Err(problem)),
        };
        match put::fitting(&cache, head, rows) {
            Ok(rows) => put::put(self, &cache, head, &rows),
            Err(problem) => self.discard(head.payload_bytes).and(Err(problem)),
        }
    }

    /// Receives payload that nobody wants.
    pub(super) fn discard(&self, bytes: u64) -> Result<(), Problem> {
        let mut scratch = [0; SCRATCH_BYTES];
        let mut left = bytes;
        while left > 0 {
            let step = left.min(SCRATCH_BYTES as u64) as usize;
            self.receive(&mut scratch[..step])?;
            left -= step as u64;
        }
        Ok(())
    }

    /// Receives a part of a payload.
    pub(super) fn receive(&self, into: &mut [u8]) -> Result<(), Problem> {
        let until = Instant::now() + self.served.config.message_timeout.get();
        self.socket
            .receive(into, until)
            .map_err(|error| Problem::Ended(error.into()))
    }

    /// Receives a layer block into its room.
    pub(super) fn receive_into(&self, room: &mut PutBuffer) -> Result<(), Problem> {
        let until = Instant::now() + self.served.config.message_timeout.get();
        loop {
            let part = room.next_part();
            if part.is_empty() {
                return Ok(());
            }
            let bytes = part.len();
            let received = self.socket.receive(part, until);
            received.map_err(|error| Problem::Ended(error.into()))?;
            room.fill(bytes);
        }
    }

    /// Whether the store is stopping.
    pub(super) fn is_stopping(&self) -> bool {
        self.shared.is_stopping()
    }

    /// Sends a frame.
    pub(super) fn send(&self, parts: &[&[u8]]) -> Result<(), Ended> {
        let until = Instant::now() + self.served.config.bulk_stall_timeout.get();
        Ok(self.socket.send(parts, until)?)
    }

    /// The first bytes; false for a peer that said nothing.
    fn greeted(&self) -> Result<bool, Ended> {
        let patience = self.served.config.message_timeout.get();
        let mut bytes = [0; Greeting::BYTES];
        if !self
            .socket
            .receive_head(&mut bytes, Instant::now() + patience, patience)?
        {
            return Ok(false);
        }
        let greeting = Greeting::decode(&bytes)?;
        let refusal = if greeting.version != kvasir_proto::bulk::VERSION {
            Some(Refusal::Version)
        } else if greeting.epoch != self.shared.epoch || !same(&greeting.token, &self.shared.token) {
            Some(Refusal::Stale)
        } else if self.shared.is_stopping() {
            Some(Refusal::Stopping)
        } else {
            None
        };
        if let Some(refusal) = refusal {
            metrics::refused("bulk_connect", "UNAUTHENTICATED");
            self.send(&[&Welcome::encode(Err(refusal))])?;
            return Err(refusal.into());
        }
        let mut welcome = Welcome {
            epoch: self.shared.epoch,
            rows_max: self.served.config.hashes_max.min(ROWS_MAX) as u32,
            payload_bytes_max: PAYLOAD_BYTES_MAX,
            arena_bytes: 0,
        };
        if !self.is_local() {
            self.send(&[&Welcome::encode(Ok(welcome))])?;
            return Ok(true);
        }
        let Ok(cache) = self.served.cache() else {
            self.send(&[&Welcome::encode(Err(Refusal::Stopping))])?;
            return Err(Refusal::Stopping.into());
        };
        let (arena, bytes) = cache.arena_file();
        welcome.arena_bytes = bytes;
        let welcome = Welcome::encode(Ok(welcome));
        let sent = kvasir_device::socket::send_descriptor(self.socket, &welcome, arena)?;
        self.send(&[&welcome[sent..]])?;
        Ok(true)
    }

    /// Says what is wrong, as far as the peer can still be told; the connection ends.
    pub(super) fn broken(&self, error: &BulkError) -> Ended {
        metrics::refused("bulk", "INVALID_ARGUMENT");
        let (reply, text) = ReplyHead::refusal(Op::Get, 0, Status::Invalid, &error.to_string());
        match self.send(&[&reply.encode(), &text]) {
            Ok(()) => error.clone().into(),
            Err(ended) => ended,
        }
    }
}

/// Compares without telling by the time it takes how much was right.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}
