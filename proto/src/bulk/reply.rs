//! What a store answers.

use std::ops::Range;

use kvasir_block::Checksum;

use super::{
    BulkError, Op, ROWS_MAX, TEXT_BYTES_MAX, check_message,
    wire::{Reader, Writer, u32_at, u64_at},
};
use crate::{GetOutcome, PutOutcome, convert::Tier};

const MAGIC: [u8; 4] = *b"KVRP";

/// Whether a request was served. All but `Ok` come with a text instead of a table, in the words that gRPC would use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Served; each row has its outcome.
    Ok,
    /// The namespace is not open here.
    NotFound,
    /// The request was wrong.
    Invalid,
    /// A limit was reached.
    Exhausted,
    /// The store is stopping.
    Unavailable,
    /// The store failed.
    Internal,
}

impl Status {
    const ALL: [(u8, Self); 6] = [
        (0, Self::Ok),
        (1, Self::NotFound),
        (2, Self::Invalid),
        (3, Self::Exhausted),
        (4, Self::Unavailable),
        (5, Self::Internal),
    ];

    /// Name in metrics, as gRPC has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::NotFound => "NOT_FOUND",
            Self::Invalid => "INVALID_ARGUMENT",
            Self::Exhausted => "RESOURCE_EXHAUSTED",
            Self::Unavailable => "UNAVAILABLE",
            Self::Internal => "INTERNAL",
        }
    }
}

/// The head of a frame of a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyHead {
    /// What was asked for.
    pub op: Op,
    /// Whether it was served.
    pub status: Status,
    /// Whether this frame ends the reply.
    pub last: bool,
    /// Of a get: the rows say places in shared memory and no payload follows.
    pub placed: bool,
    /// The request's id.
    pub id: u64,
    /// Index of the first row among all rows of the reply. A match has no rows: there its bytes are those of `disk_blocks`.
    pub first: u32,
    /// Rows in this frame.
    pub rows: u32,
    /// Bytes of the table, or of the text.
    pub table_bytes: u32,
    /// Bytes of the payloads behind the table.
    pub payload_bytes: u64,
    /// Of a match: blocks held without a gap.
    pub hit_blocks: u32,
    /// Those of them whose layers are all in memory.
    pub host_blocks: u32,
    /// Those of the others whose layers are all in memory or on disk; what is left needs the object tier.
    pub disk_blocks: u32,
    /// Of a match: the lease, 0 for none. Of a decode: the checksum of its message.
    pub lease: u64,
    /// Of a match: milliseconds that the lease lasts.
    pub lease_ms: u32,
    /// Checksum of the table or text.
    pub table: Checksum,
}

impl ReplyHead {
    /// Bytes of it.
    pub const BYTES: usize = 64;

    /// A whole reply of no rows.
    pub fn new(op: Op, id: u64) -> Self {
        Self {
            op,
            status: Status::Ok,
            last: true,
            placed: false,
            id,
            first: 0,
            rows: 0,
            table_bytes: 0,
            payload_bytes: 0,
            hit_blocks: 0,
            host_blocks: 0,
            disk_blocks: 0,
            lease: 0,
            lease_ms: 0,
            table: Checksum::of(&[]),
        }
    }

    /// Announces a table of `rows` rows.
    #[must_use]
    pub fn with_table(mut self, rows: usize, table: &[u8]) -> Self {
        // At most ROWS_MAX rows of few bytes.
        self.rows = rows as u32;
        self.table_bytes = table.len() as u32;
        self.table = Checksum::of(table);
        self
    }

    /// Announces the message of a decode.
    #[must_use]
    pub fn with_message(mut self, message: &[u8]) -> Self {
        self.payload_bytes = message.len() as u64;
        self.lease = Checksum::of(message).to_u32().into();
        self
    }

    /// Whether `message` is the one that was announced.
    ///
    /// # Errors
    /// [`BulkError::Damaged`] when not.
    pub fn check_message(&self, message: &[u8]) -> Result<(), BulkError> {
        check_message(message, self.lease)
    }

    /// A refusal in words, cut to [`TEXT_BYTES_MAX`]; the text follows the head.
    pub fn refusal(op: Op, id: u64, status: Status, text: &str) -> (Self, Vec<u8>) {
        let text = &text.as_bytes()[..text.floor_char_boundary(TEXT_BYTES_MAX)];
        let head = Self {
            status,
            ..Self::new(op, id)
        };
        (head.with_table(0, text), text.to_vec())
    }

    /// As bytes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let status = Status::ALL.iter().find(|(_, status)| *status == self.status);
        Writer::new(MAGIC)
            .u8(self.op.code())
            .u8(status.map_or(u8::MAX, |(code, _)| *code))
            .u16(u16::from(self.last) | u16::from(self.placed) << 1)
            .u64(self.id)
            .u32(if self.op == Op::Match {
                self.disk_blocks
            } else {
                self.first
            })
            .u32(self.rows)
            .u32(self.table_bytes)
            .u32(self.hit_blocks)
            .u64(self.payload_bytes)
            .u64(self.lease)
            .u32(self.host_blocks)
            .u32(self.lease_ms)
            .u32(self.table.to_u32())
            .finish()
    }

    /// Reads it back; its lengths are then bounded, but for the payload's, which the rows must add up to.
    ///
    /// # Errors
    /// Bytes that are no reply.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, BulkError> {
        let mut reader = Reader::new(bytes, MAGIC, "the reply")?;
        let op = Op::from_code(reader.u8())?;
        let code = reader.u8();
        let status = Status::ALL.iter().find(|(value, _)| *value == code);
        let (_, status) =
            status.ok_or_else(|| BulkError::field("status", format!("{code} is none of this version")))?;
        let flags = reader.u16();
        let id = reader.u64();
        let (first, disk_blocks) = match (op, reader.u32()) {
            (Op::Match, disk_blocks) => (0, disk_blocks),
            (_, first) => (first, 0),
        };
        let head = Self {
            op,
            status: *status,
            last: flags & 1 != 0,
            placed: flags & 2 != 0,
            id,
            first,
            disk_blocks,
            rows: reader.u32(),
            table_bytes: reader.u32(),
            hit_blocks: reader.u32(),
            payload_bytes: reader.u64(),
            lease: reader.u64(),
            host_blocks: reader.u32(),
            lease_ms: reader.u32(),
            table: Checksum::from_u32(reader.u32()),
        };
        if head.rows as usize > ROWS_MAX {
            return Err(BulkError::field("rows", format!("{}: at most {ROWS_MAX}", head.rows)));
        }
        let expected = match (head.status, op) {
            (Status::Ok, Op::Get | Op::GetChain) => head.rows as usize * GetRow::bytes(head.placed),
            (Status::Ok, Op::Put | Op::Exists) => head.rows as usize,
            (Status::Ok, Op::Match | Op::Return | Op::Suspect | Op::Decode) => 0,
            _ => (head.table_bytes as usize).min(TEXT_BYTES_MAX),
        };
        if head.table_bytes as usize != expected {
            let problem = format!("{} where {expected} were to be expected", head.table_bytes);
            return Err(BulkError::field("table_bytes", problem));
        }
        Ok(head)
    }
}

/// What became of a layer block that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetRow {
    /// What became of it.
    pub outcome: GetOutcome,
    /// Of a hit: where it was.
    pub tier: Tier,
    /// Of a hit: bytes of its payload.
    pub length: u32,
    /// Of a hit: CRC-32C of its payload.
    pub checksum: Checksum,
    /// Of a hit in a reply of places: where in the shared memory.
    pub place: Place,
}

/// A place in shared memory, which stays as it is until it is given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Offset of the first byte.
    pub offset: u64,
    /// What gives it back ([`Op::Return`]).
    pub number: u64,
}

impl Place {
    /// Where `length` bytes lie in memory of `arena_bytes`; `None` when they would reach beyond it.
    pub fn range(self, length: u32, arena_bytes: u64) -> Option<Range<u64>> {
        let end = self.offset.checked_add(u64::from(length))?;
        (end <= arena_bytes).then_some(self.offset..end)
    }
}

impl GetRow {
    /// Bytes of a row.
    pub const fn bytes(placed: bool) -> usize {
        if placed { 28 } else { 12 }
    }

    /// A row without a hit.
    pub fn without(outcome: GetOutcome) -> Self {
        Self {
            outcome,
            tier: Tier::Host,
            length: 0,
            checksum: Checksum::from_u32(0),
            place: Place::default(),
        }
    }

    /// Adds the row to a table.
    pub fn encode(&self, placed: bool, table: &mut Vec<u8>) {
        let outcome = match self.outcome {
            GetOutcome::Hit => 1,
            GetOutcome::Miss => 2,
            GetOutcome::Corrupt => 3,
            GetOutcome::Busy => 4,
            GetOutcome::TooLate => 5,
        };
        let tier = match self.tier {
            Tier::Host => 1,
            _ => 2,
        };
        table.extend_from_slice(&[outcome, tier, 0, 0]);
        table.extend_from_slice(&self.length.to_le_bytes());
        table.extend_from_slice(&self.checksum.to_u32().to_le_bytes());
        if placed {
            table.extend_from_slice(&self.place.offset.to_le_bytes());
            table.extend_from_slice(&self.place.number.to_le_bytes());
        }
    }

    /// The row in exactly [`Self::bytes`].
    ///
    /// # Errors
    /// An outcome that this version lacks, or a length without a hit.
    pub fn decode(row: &[u8], placed: bool) -> Result<Self, BulkError> {
        let outcome = match row[0] {
            1 => GetOutcome::Hit,
            2 => GetOutcome::Miss,
            3 => GetOutcome::Corrupt,
            4 => GetOutcome::Busy,
            5 => GetOutcome::TooLate,
            other => return Err(BulkError::field("outcome", format!("{other} is no outcome of a get"))),
        };
        let length = u32_at(row, 4);
        if outcome != GetOutcome::Hit && length != 0 {
            return Err(BulkError::field("length", format!("{length} without a hit")));
        }
        let place = if placed {
            Place {
                offset: u64_at(row, 12),
                number: u64_at(row, 20),
            }
        } else {
            Place::default()
        };
        Ok(Self {
            outcome,
            tier: if row[1] == 1 { Tier::Host } else { Tier::Disk },
            length,
            checksum: Checksum::from_u32(u32_at(row, 8)),
            place,
        })
    }
}

/// Outcomes of puts as a table.
pub fn put_reply_rows(outcomes: &[PutOutcome]) -> Vec<u8> {
    let code = |outcome: &PutOutcome| match outcome {
        PutOutcome::Stored => 1,
        PutOutcome::Present => 2,
        PutOutcome::Busy => 3,
        PutOutcome::ChecksumMismatch => 4,
    };
    outcomes.iter().map(code).collect()
}

/// The outcomes in such a table.
///
/// # Errors
/// An outcome that this version lacks.
pub fn put_rows(table: &[u8]) -> Result<Vec<PutOutcome>, BulkError> {
    let outcome = |code: &u8| match code {
        1 => Ok(PutOutcome::Stored),
        2 => Ok(PutOutcome::Present),
        3 => Ok(PutOutcome::Busy),
        4 => Ok(PutOutcome::ChecksumMismatch),
        other => Err(BulkError::field("outcome", format!("{other} is no outcome of a put"))),
    };
    table.iter().map(outcome).collect()
}

/// The text of a refusal.
pub fn reply_text(table: &[u8]) -> String {
    String::from_utf8_lossy(table).into_owned()
}
