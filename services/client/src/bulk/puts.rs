//! Puts over a connection of the pool: requests of many blocks, several on their way, answered in their order.

use std::{collections::VecDeque, future::Future, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use kvasir_proto::{
    PutOutcome,
    bulk::{self, Op, PutRow, ReplyHead, RequestHead},
    frame::Rope,
};
use tokio::time::timeout;

use super::{
    check::{self, Asked},
    pool::{Lane, Pool},
};
use crate::{ClientError, LayerBlock, Namespace, error::CallName};

/// Most requests without an answer. Their answers fit into the socket's buffers, so that neither side waits for the other.
pub(crate) const IN_FLIGHT_MAX: usize = 16;

/// Puts on their way. Dropping it closes the connection, unless nothing was on its way.
#[derive(Debug)]
pub(crate) struct BulkPuts {
    pool: Arc<Pool>,
    /// Given back at the end.
    lane: Option<Lane>,
    namespace: Namespace,
    asked: VecDeque<Asked>,
    /// What of the requests has not been handed to the system.
    out: Rope,
    /// Of the answer that is being received.
    head: Option<ReplyHead>,
    /// What has come of it, so that a wait that is dropped loses nothing.
    buffer: BytesMut,
    wait: Duration,
}

/// What `future` ends with; `None` where it has not ended after `wait`, or at once without one, which needs no runtime's clock.
pub(crate) async fn within<F: Future>(wait: Option<Duration>, future: F) -> Option<F::Output> {
    match wait {
        Some(wait) => timeout(wait, future).await.ok(),
        None => Some(future.await),
    }
}

impl BulkPuts {
    pub(crate) fn new(pool: &Arc<Pool>, lane: Lane, namespace: &Namespace, wait: Duration) -> Self {
        Self {
            pool: Arc::clone(pool),
            lane: Some(lane),
            namespace: namespace.clone(),
            asked: VecDeque::new(),
            out: Rope::new(),
            head: None,
            buffer: BytesMut::new(),
            wait,
        }
    }

    /// Most blocks of a request.
    pub(crate) fn rows_max(&self) -> usize {
        self.lane.as_ref().map_or(1, |lane| lane.welcome.rows_max as usize)
    }

    /// Whether the store has closed the connection while nothing was on its way, as it does after a while.
    pub(crate) fn is_gone(&self) -> bool {
        self.is_idle() && self.lane.as_ref().is_none_or(|lane| lane.stream.is_gone())
    }

    /// Queues a request for layer blocks that fit the schema; [`Self::sent`] sends it.
    pub(crate) fn queue(&mut self, name: &CallName, blocks: Vec<LayerBlock>) -> Result<(), ClientError> {
        let Some(lane) = &mut self.lane else {
            return Err(check::lost(name, &std::io::ErrorKind::NotConnected.into(), self.wait));
        };
        let mut table = Vec::with_capacity(blocks.len() * PutRow::BYTES);
        let mut payload_bytes = 0;
        for block in &blocks {
            payload_bytes += block.payload.len() as u64;
            let row = PutRow {
                hash: block.hash,
                layer: block.layer,
                // A layer block of the schema, which is bounded.
                length: block.payload.len() as u32,
                checksum: block.checksum,
            };
            row.encode(&mut table);
        }
        check::rows(name, blocks.len(), lane.welcome.rows_max)?;
        check::payload(name, payload_bytes, lane.welcome.payload_bytes_max)?;
        lane.next_id += 1;
        let head = RequestHead {
            payload_bytes,
            ..RequestHead::new(Op::Put, lane.next_id, self.namespace.id)
        }
        .with_table(&table);
        if self.out.is_empty() {
            let before = lane.stream.begin();
            self.out
                .push(before.map_err(|error| check::lost(name, &error, self.wait))?);
        }
        self.out.push(Bytes::from([&head.encode()[..], &table].concat()));
        self.out.extend(blocks.into_iter().map(|block| block.payload));
        self.asked.push_back(Asked {
            op: head.op,
            id: head.id,
            rows: head.rows as usize,
            keys: Vec::new(),
        });
        Ok(())
    }

    /// Waits until all that was queued has been handed to the system, which takes no more than the store and the way do. Dropping
    /// the wait loses nothing.
    pub(crate) async fn sent(&mut self, name: &CallName, wait: Option<Duration>) -> Result<(), ClientError> {
        while !self.out.is_empty() {
            let Some(lane) = &mut self.lane else {
                return Err(check::lost(name, &std::io::ErrorKind::NotConnected.into(), self.wait));
            };
            match within(wait, lane.stream.write_from(&mut self.out)).await {
                Some(written) => written.map_err(|error| check::lost(name, &error, self.wait))?,
                None => return Err(name.timed_out(self.wait)),
            }
            if self.out.is_empty() {
                lane.stream.end();
            }
        }
        Ok(())
    }

    /// The outcomes of the oldest request without an answer. Dropping the wait loses nothing.
    pub(crate) async fn reply(
        &mut self,
        name: &CallName,
        wait: Option<Duration>,
    ) -> Result<Vec<PutOutcome>, ClientError> {
        self.sent(name, wait).await?;
        if self.asked.is_empty() {
            return Err(name.broken("more outcomes than messages"));
        }
        if self.head.is_none() {
            self.fill(name, ReplyHead::BYTES, wait).await?;
            let mut bytes = [0; ReplyHead::BYTES];
            bytes.copy_from_slice(&self.buffer.split_to(ReplyHead::BYTES));
            self.head = Some(ReplyHead::decode(&bytes).map_err(|error| name.broken(error))?);
        }
        let table_bytes = self.head.as_ref().map_or(0, |head| head.table_bytes as usize);
        self.fill(name, table_bytes, wait).await?;
        let table = self.buffer.split_to(table_bytes);
        let (Some(head), Some(question)) = (self.head.take(), self.asked.pop_front()) else {
            return Err(name.broken("more outcomes than messages"));
        };
        bulk::check_table(&table, head.table).map_err(|error| name.broken(error))?;
        question.fits(&head, 0).map_err(|what| name.broken(what))?;
        if let Some(error) = check::refusal(name, &head, &table) {
            return Err(error);
        }
        if !head.last {
            return Err(name.broken("an answer to a put in more than one frame"));
        }
        bulk::put_rows(&table).map_err(|error| name.broken(error))
    }

    /// Gives the connection back, if nothing is on its way.
    pub(crate) fn close(&mut self) {
        if self.is_idle()
            && let Some(lane) = self.lane.take()
        {
            self.pool.give_back(lane);
        }
    }

    fn is_idle(&self) -> bool {
        self.asked.is_empty() && self.out.is_empty() && self.head.is_none() && self.buffer.is_empty()
    }

    /// Receives until `bytes` are in the buffer, and no more.
    async fn fill(&mut self, name: &CallName, bytes: usize, wait: Option<Duration>) -> Result<(), ClientError> {
        while self.buffer.len() < bytes {
            let Some(lane) = &mut self.lane else {
                return Err(check::lost(name, &std::io::ErrorKind::NotConnected.into(), self.wait));
            };
            let missing = bytes - self.buffer.len();
            self.buffer.reserve(missing);
            let into = &mut (&mut self.buffer).limit(missing);
            let read = match within(wait, lane.stream.read_buf(into)).await {
                Some(Ok(0)) => Err(std::io::ErrorKind::UnexpectedEof.into()),
                Some(read) => read,
                None => return Err(name.timed_out(self.wait)),
            };
            read.map_err(|error| check::lost(name, &error, self.wait))?;
        }
        Ok(())
    }
}
