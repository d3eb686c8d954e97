//! Gets over a connection of the pool: frames taken apart as they come, each block verified while it is received.

use std::{collections::VecDeque, io, ops::Range, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use kvasir_block::{BlockHash, Checksum};
use kvasir_proto::{
    GetOutcome,
    bulk::{self, FRAME_BYTES, GetRow, Op, ReplyHead, RequestHead},
};

use super::{
    check::{self, Asked},
    pool::{Lane, Pool},
};
use crate::{ClientError, Namespace, error::CallName};

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) namespace: &'a Namespace,
    pub(crate) chain: &'a [BlockHash],
    pub(crate) layers: &'a Range<u16>,
    pub(crate) lease: Option<u64>,
    pub(crate) deadline: Option<Duration>,
    pub(crate) recompute: Option<Duration>,
    pub(crate) verify: bool,
}

/// An answer that is being received.
#[derive(Debug)]
pub(crate) struct BulkGets {
    pool: Arc<Pool>,
    /// Given back with the last block.
    lane: Option<Lane>,
    asked: Asked,
    namespace: Namespace,
    verify: bool,
    /// Rows of frames whose table has come.
    announced: usize,
    part: Part,
    /// What has come of the part, so that a wait that is dropped loses nothing.
    buffer: BytesMut,
    wait: Duration,
}

#[derive(Debug)]
enum Part {
    Head,
    Table(ReplyHead),
    Payload(Frame),
}

#[derive(Debug)]
struct Frame {
    rows: VecDeque<GetRow>,
    last: bool,
    /// The rows say places in the store's memory.
    placed: bool,
    /// Payload bytes of the frame that have not come.
    left: usize,
    /// Of the block at hand: checksum of its first bytes, and how many those are.
    checksum: Checksum,
    summed: usize,
}

/// A block as it came.
#[derive(Debug)]
pub(crate) struct Came {
    pub(crate) outcome: GetOutcome,
    pub(crate) payload: Bytes,
    /// Its checksum was right, or it is no hit.
    pub(crate) right: bool,
}

impl BulkGets {
    /// Asks, and waits until the store begins to answer.
    pub(crate) async fn open(
        name: &CallName,
        pool: &Arc<Pool>,
        mut lane: Lane,
        wanted: Wanted<'_>,
        wait: Duration,
    ) -> Result<Self, ClientError> {
        let Wanted { namespace, chain, .. } = wanted;
        check::rows(name, chain.len(), lane.welcome.rows_max)?;
        let table = bulk::hash_table(chain);
        lane.next_id += 1;
        let head = RequestHead {
            receiver_verifies: true,
            layers: wanted.layers.clone(),
            deadline: wanted.deadline,
            lease: wanted.lease.unwrap_or(0),
            recompute: wanted.recompute,
            ..RequestHead::new(Op::GetChain, lane.next_id, namespace.id)
        }
        .with_table(&table);
        let mut request = head.encode().to_vec();
        request.extend_from_slice(&table);
        let sent = lane.stream.write_all(&request).await;
        sent.map_err(|error| check::lost(name, &error, wait))?;
        let asked = Asked {
            op: head.op,
            id: head.id,
            rows: chain.len() * wanted.layers.len(),
            keys: Vec::new(),
        };
        let mut gets = Self {
            pool: Arc::clone(pool),
            lane: Some(lane),
            asked,
            namespace: namespace.clone(),
            verify: wanted.verify,
            announced: 0,
            part: Part::Head,
            buffer: BytesMut::new(),
            wait,
        };
        gets.announcement(name).await?;
        Ok(gets)
    }

    /// The next block, or `None` at the end. Dropping the wait loses nothing.
    pub(crate) async fn next(&mut self, name: &CallName) -> Result<Option<Came>, ClientError> {
        loop {
            self.announcement(name).await?;
            let Part::Payload(frame) = &mut self.part else {
                continue;
            };
            let Some(row) = frame.rows.front().copied() else {
                if frame.last {
                    if let Some(lane) = self.lane.take() {
                        self.pool.give_back(lane);
                    }
                    return Ok(None);
                }
                self.part = Part::Head;
                continue;
            };
            if frame.placed && row.outcome == GetOutcome::Hit {
                frame.rows.pop_front();
                let payload = self.lane.as_ref().and_then(|lane| lane.stream.placed(&row));
                let payload = payload.ok_or_else(|| name.broken("a place outside of the store's memory"))?;
                return Ok(Some(Came {
                    outcome: row.outcome,
                    right: !self.verify || row.checksum.verifies(&payload),
                    payload,
                }));
            }
            let length = row.length as usize;
            loop {
                let have = self.buffer.len().min(length);
                if self.verify && frame.summed < have {
                    frame.checksum = frame.checksum.append(&self.buffer[frame.summed..have]);
                    frame.summed = have;
                }
                if have == length {
                    break;
                }
                self.buffer.reserve(length - have);
                let into = &mut (&mut self.buffer).limit(frame.left);
                let read = read(self.lane.as_mut(), into).await;
                frame.left -= read.map_err(|error| check::lost(name, &error, self.wait))?;
            }
            let right = !self.verify || row.outcome != GetOutcome::Hit || frame.checksum == row.checksum;
            frame.rows.pop_front();
            (frame.checksum, frame.summed) = (Checksum::EMPTY, 0);
            return Ok(Some(Came {
                outcome: row.outcome,
                payload: self.buffer.split_to(length).freeze(),
                right,
            }));
        }
    }

    /// Tells the store which block came wrong, so that it looks at its own bytes. Does not wait: what does not go at once ends
    /// the connection with this stream.
    pub(crate) fn suspect(&mut self, key: (BlockHash, u16)) {
        let Some(lane) = &mut self.lane else { return };
        let table = bulk::key_table(&[key]);
        let head = RequestHead::new(Op::Suspect, 0, self.namespace.id).with_table(&table);
        let mut request = head.encode().to_vec();
        request.extend_from_slice(&table);
        if lane.stream.try_write(&request).ok() != Some(request.len()) {
            // Never given back: the store may have got half a request. Its epoch is nobody's.
            lane.welcome.epoch = 0;
        }
    }

    /// Receives head and table of the next frame, unless one is at hand.
    async fn announcement(&mut self, name: &CallName) -> Result<(), ClientError> {
        loop {
            match &self.part {
                Part::Payload(_) => return Ok(()),
                Part::Head => {
                    self.fill(name, ReplyHead::BYTES).await?;
                    let mut bytes = [0; ReplyHead::BYTES];
                    bytes.copy_from_slice(&self.buffer.split_to(ReplyHead::BYTES));
                    let head = ReplyHead::decode(&bytes).map_err(|error| name.broken(error))?;
                    self.part = Part::Table(head);
                }
                Part::Table(head) => {
                    let head = head.clone();
                    self.fill(name, head.table_bytes as usize).await?;
                    let table = self.buffer.split_to(head.table_bytes as usize);
                    bulk::check_table(&table, head.table).map_err(|error| name.broken(error))?;
                    self.asked
                        .fits(&head, self.announced)
                        .map_err(|what| name.broken(what))?;
                    if let Some(error) = check::refusal(name, &head, &table) {
                        return Err(error);
                    }
                    let block_bytes = self.namespace.layer_block_bytes;
                    let rows = check::get_rows(&head, &table, block_bytes).map_err(|error| name.broken(error))?;
                    self.announced += rows.len();
                    // The rows add up to it, so it fits; a store that makes huge frames does not make us reserve one.
                    let left = head.payload_bytes as usize;
                    self.buffer = BytesMut::with_capacity(left.min(FRAME_BYTES.max(block_bytes)));
                    self.part = Part::Payload(Frame {
                        rows: rows.into(),
                        last: head.last,
                        placed: head.placed,
                        left,
                        checksum: Checksum::EMPTY,
                        summed: 0,
                    });
                }
            }
        }
    }

    /// Receives until `bytes` are in the buffer, and no more.
    async fn fill(&mut self, name: &CallName, bytes: usize) -> Result<(), ClientError> {
        while self.buffer.len() < bytes {
            let missing = bytes - self.buffer.len();
            self.buffer.reserve(missing);
            let into = &mut (&mut self.buffer).limit(missing);
            let read = read(self.lane.as_mut(), into).await;
            read.map_err(|error| check::lost(name, &error, self.wait))?;
        }
        Ok(())
    }
}

/// Some bytes, at least one; an end is an error.
async fn read(lane: Option<&mut Lane>, into: &mut impl BufMut) -> io::Result<usize> {
    let Some(lane) = lane else {
        return Err(io::ErrorKind::NotConnected.into());
    };
    match lane.stream.read_buf(into).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        read => Ok(read),
    }
}
