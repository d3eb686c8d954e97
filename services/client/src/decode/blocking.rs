//! [`BulkDecode`]: a decode stream over a bulk connection, for a thread of its own.

use std::{
    io::{self, IoSlice},
    net::TcpStream,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvasir_device::stream::BusyPoll;
use kvasir_proto::{
    bulk::{Op, ReplyHead, RequestHead},
    v1,
};
use prost::Message;

use super::{
    Hint, OpenContext, Opened, Query, Reply,
    talk::{self, Talk},
};
use crate::{
    BulkConnection, ClientConfig, ClientError, Namespace,
    bulk::{check, socket::write_all},
    client::REPLY_BYTES_MAX,
    error::CallName,
    observe,
};

/// Received at a time: most replies are smaller.
const STEP_BYTES: usize = 32 << 10;

/// As [`crate::DecodeStream`], for a thread that may block: a query and its reply are a write and a read of a socket, and the store searches
/// on the thread that reads it. Dropping it closes the context in the store. After an error that is not `Invalid` it is of no more use.
#[derive(Debug)]
pub struct BulkDecode {
    talk: Talk,
    lane: Lane,
}

/// The connection.
#[derive(Debug)]
struct Lane {
    name: CallName,
    stream: TcpStream,
    poll: BusyPoll,
    namespace: kvasir_block::NamespaceId,
    next_id: u64,
    /// Of a reply that has come in part.
    received: Vec<u8>,
}

impl BulkDecode {
    pub(crate) fn open(namespace: &Namespace, config: &ClientConfig, open: &OpenContext) -> Result<Self, ClientError> {
        let name = CallName {
            call: "bulk_decode",
            url: config.url.as_str().into(),
        };
        let request = talk::opening(&name, namespace, open)?;
        let connected = BulkConnection::connect(namespace, config)?;
        let failed = |error| observe::failed(name.call, error);
        let Some(stream) = connected.into_tcp() else {
            return Err(failed(name.broken("a connection that is none by TCP")));
        };
        let mut lane = Lane {
            name: name.clone(),
            stream,
            poll: BusyPoll::new(config.decode_poll),
            namespace: namespace.id,
            next_id: 0,
            received: Vec::new(),
        };
        let first = lane
            .send(&request)
            .and_then(|()| lane.receive(Instant::now() + config.call_timeout))
            .map_err(failed)?;
        let Some(first) = first else {
            return Err(failed(name.timed_out(config.call_timeout)));
        };
        Ok(Self {
            talk: Talk::begin(name, namespace, open.q_heads, config.call_timeout, Some(first))?,
            lane,
        })
    }

    /// What serves the context.
    pub fn opened(&self) -> &Opened {
        self.talk.opened()
    }

    /// Sends a query.
    ///
    /// # Errors
    /// `Invalid` for a query of the wrong shape or when too many are unanswered (the stream lives on); else the stream broke.
    pub fn send(&mut self, query: Query) -> Result<(), ClientError> {
        let (request, asked) = self.talk.query(query)?;
        self.put(&request)?;
        self.talk.asked(asked);
        Ok(())
    }

    /// Sends a hint, which has no reply.
    ///
    /// # Errors
    /// As for [`BulkDecode::send`].
    pub fn hint(&mut self, hint: &Hint) -> Result<(), ClientError> {
        let request = self.talk.hint(hint)?;
        self.put(&request)
    }

    fn put(&mut self, request: &v1::DecodeRequest) -> Result<(), ClientError> {
        let sent = self.lane.send(request);
        sent.map_err(|error| self.talk.fail(|_| error))
    }

    /// The next reply, in the order asked; `None` where it did not come within `wait`: it may come later.
    ///
    /// # Errors
    /// `TimedOut` when it did not come by the query's deadline (or the call timeout), and the stream is then of no more use; `Invalid` when
    /// nothing was asked; else the stream broke.
    pub fn receive(&mut self, wait: Duration) -> Result<Option<Reply>, ClientError> {
        let (until, total) = self.talk.awaited()?;
        let soon = Instant::now() + wait;
        match self.lane.receive(until.min(soon)) {
            Ok(Some(reply)) => self.talk.take(reply).map(Some),
            Ok(None) if soon < until => Ok(None),
            Ok(None) => Err(self.talk.fail(|name| name.timed_out(total))),
            Err(error) => Err(self.talk.fail(|_| error)),
        }
    }
}

impl Lane {
    fn send(&mut self, request: &v1::DecodeRequest) -> Result<(), ClientError> {
        let message = request.encode_to_vec();
        self.next_id += 1;
        let head = RequestHead::new(Op::Decode, self.next_id, self.namespace).with_message(&message);
        let (head, stream) = (head.encode(), &self.stream);
        write_all(stream, &mut [IoSlice::new(&head), IoSlice::new(&message)]).map_err(|error| self.lost(&error))
    }

    /// The next reply, if it comes until `until`.
    fn receive(&mut self, until: Instant) -> Result<Option<v1::DecodeReply>, ClientError> {
        if !self.fill(ReplyHead::BYTES, until)? {
            return Ok(None);
        }
        let Some(bytes) = self.received.first_chunk() else {
            return Ok(None);
        };
        let head = ReplyHead::decode(bytes).map_err(|error| self.name.broken(error))?;
        let payload = head.payload_bytes.saturating_add(head.table_bytes.into());
        if payload > REPLY_BYTES_MAX as u64 {
            return Err(self.name.broken(format_args!("a reply of {payload} bytes")));
        }
        let whole = ReplyHead::BYTES + payload as usize;
        if !self.fill(whole, until)? {
            return Ok(None);
        }
        let rest = self.received.split_off(whole);
        let message = Bytes::from(std::mem::replace(&mut self.received, rest)).slice(ReplyHead::BYTES..);
        if let Some(refusal) = check::refusal(&self.name, &head, &message) {
            return Err(refusal);
        }
        if head.op != Op::Decode || head.table_bytes > 0 {
            return Err(self.name.broken(format_args!("an answer to {:?}", head.op)));
        }
        head.check_message(&message).map_err(|error| self.name.broken(error))?;
        let reply = v1::DecodeReply::decode(message).map_err(|error| self.name.broken(error))?;
        Ok(Some(reply))
    }

    /// Receives until `bytes` are there; false where they are not in time.
    fn fill(&mut self, bytes: usize, until: Instant) -> Result<bool, ClientError> {
        while self.received.len() < bytes {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            match self.receive_some(bytes, left) {
                Ok(0) => return Err(self.lost(&io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(self.lost(&error)),
            }
        }
        Ok(true)
    }

    fn receive_some(&mut self, wanted: usize, wait: Duration) -> io::Result<usize> {
        // The system's clock is no finer than this, and zero would be for ever.
        self.stream.set_read_timeout(Some(wait.max(Duration::from_millis(1))))?;
        let start = self.received.len();
        self.received.resize(wanted.max(start + STEP_BYTES), 0);
        let read = self.poll.receive(&self.stream, &mut self.received[start..]);
        self.received.truncate(start + read.as_ref().copied().unwrap_or(0));
        read
    }

    fn lost(&self, error: &io::Error) -> ClientError {
        check::lost(&self.name, error, Duration::ZERO)
    }
}
