//! What must hold of a store's answers, whatever socket they come from. Pure.

use std::{io, time::Duration};

use kvasir_block::BlockHash;
use kvasir_proto::{
    GetOutcome,
    bulk::{BulkError, GetRow, Op, Refusal, ReplyHead, Status, Welcome, reply_text},
};

use crate::{ClientError, ErrorKind, PrefixMatch, error::CallName};

/// A request on its way.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) op: Op,
    pub(crate) id: u64,
    pub(crate) rows: usize,
    /// Of a get by keys.
    pub(crate) keys: Vec<(BlockHash, u16)>,
}

impl Asked {
    /// Whether the frame goes on with the answer to this request, of which `first` rows have come.
    pub(crate) fn fits(&self, head: &ReplyHead, first: usize) -> Result<(), String> {
        if head.id == 0 && head.status != Status::Ok {
            // What it could not read, the store answers so: in its own words.
            return Ok(());
        }
        if head.id != self.id || head.op != self.op {
            return Err(format!(
                "an answer to {:?} {} instead of {:?} {}",
                head.op, head.id, self.op, self.id
            ));
        }
        if head.status != Status::Ok {
            return Ok(());
        }
        let (from, rows) = (head.first as usize, head.rows as usize);
        if from != first || rows > self.rows - first {
            return Err(format!(
                "rows {from} to {} of {}, of which {first} came",
                from + rows,
                self.rows
            ));
        }
        if head.last && self.op != Op::Match && first + rows < self.rows {
            return Err(format!("the answer ended after {} of {} rows", first + rows, self.rows));
        }
        if !head.last && rows == 0 {
            return Err("a frame without rows that is not the last".to_owned());
        }
        Ok(())
    }
}

/// The store's answer to the greeting.
pub(crate) fn welcome(name: &CallName, bytes: &[u8; Welcome::BYTES], epoch: u64) -> Result<Welcome, ClientError> {
    match Welcome::decode(bytes).map_err(|error| name.broken(error))? {
        Ok(welcome) if welcome.epoch == epoch => Ok(welcome),
        Ok(_) => Err(name.error(ErrorKind::Unavailable, Refusal::Stale)),
        Err(Refusal::Full) => Err(name.error(ErrorKind::Exhausted, Refusal::Full)),
        Err(refusal @ (Refusal::Version | Refusal::Foreign)) => Err(name.invalid(refusal)),
        Err(refusal) => Err(name.error(ErrorKind::Unavailable, refusal)),
    }
}

/// The rows of a frame of a get, whose lengths are those of layer blocks and add up to its payload.
pub(crate) fn get_rows(head: &ReplyHead, table: &[u8], block_bytes: usize) -> Result<Vec<GetRow>, BulkError> {
    let mut rows = Vec::with_capacity(head.rows as usize);
    let mut sum = 0u64;
    for bytes in table.chunks_exact(GetRow::bytes(head.placed)) {
        let row = GetRow::decode(bytes, head.placed)?;
        if row.outcome == GetOutcome::Hit && row.length as usize != block_bytes {
            return Err(field("length", format!("{} instead of {block_bytes}", row.length)));
        }
        sum += u64::from(row.length);
        rows.push(row);
    }
    let expected = if head.placed { 0 } else { sum };
    if expected != head.payload_bytes {
        let problem = format!("{}, but the rows add up to {expected}", head.payload_bytes);
        return Err(field("payload_bytes", problem));
    }
    Ok(rows)
}

fn field(field: &'static str, problem: String) -> BulkError {
    BulkError::Field { field, problem }
}

/// What a match says.
pub(crate) fn matched(head: &ReplyHead, asked: usize) -> Result<PrefixMatch, String> {
    let [hit_blocks, host_blocks, disk_blocks] =
        [head.hit_blocks, head.host_blocks, head.disk_blocks].map(|blocks| blocks as usize);
    let matched = PrefixMatch {
        hit_blocks,
        host_blocks,
        disk_blocks,
        object_blocks: hit_blocks.saturating_sub(host_blocks + disk_blocks),
        lease: (head.lease != 0).then_some(head.lease),
        lease_for: Duration::from_millis(head.lease_ms.into()),
    };
    matched.checked(asked)
}

/// The store's refusal of a request, if it is one.
pub(crate) fn refusal(name: &CallName, head: &ReplyHead, table: &[u8]) -> Option<ClientError> {
    let kind = match head.status {
        Status::Ok => return None,
        Status::NotFound => ErrorKind::NotFound,
        Status::Invalid => ErrorKind::Invalid,
        Status::Exhausted => ErrorKind::Exhausted,
        Status::Unavailable => ErrorKind::Unavailable,
        Status::Internal => ErrorKind::Internal,
    };
    Some(name.error(kind, reply_text(table)))
}

/// A connection that broke or stood still.
pub(crate) fn lost(name: &CallName, error: &io::Error, waited: Duration) -> ClientError {
    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
        return name.timed_out(waited);
    }
    let what = format!("the connection broke in mid-stream ({error}); open the stream again, or go on without");
    name.error(ErrorKind::Unavailable, what)
}

/// Whether so many rows fit into a request.
pub(crate) fn rows(name: &CallName, rows: usize, rows_max: u32) -> Result<(), ClientError> {
    if rows > rows_max as usize {
        let what = format!("{rows} blocks, the store takes {rows_max} in one call: ask in several");
        return Err(name.invalid(what));
    }
    Ok(())
}

/// Whether so many bytes fit into a put.
pub(crate) fn payload(name: &CallName, bytes: u64, bytes_max: u64) -> Result<(), ClientError> {
    if bytes > bytes_max {
        let what = format!("{bytes} bytes of blocks, the store takes {bytes_max} in one put: put in several");
        return Err(name.invalid(what));
    }
    Ok(())
}
