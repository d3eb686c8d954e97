//! What a client asks for.

use std::{ops::Range, time::Duration};

use kvasir_block::{BlockHash, Checksum, NamespaceId};

use super::{
    BulkError, ROWS_MAX, check_message, check_table,
    wire::{KEY_ROW_BYTES, Reader, Writer, hash_at, u32_at},
};

const MAGIC: [u8; 4] = *b"KVRQ";

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Layer blocks by key; a row is a key.
    Get,
    /// Layers of a chain, layer after layer; a row is a hash.
    GetChain,
    /// Stores layer blocks; a row is a [`PutRow`].
    Put,
    /// Which blocks have all their layers; a row is a hash.
    Exists,
    /// How much of a chain is held without a gap; a row is a hash.
    Match,
    /// Gives back places in shared memory: a row is the place's number, eight bytes. Not answered.
    Return,
    /// Layer blocks whose bytes came wrong to a client that verifies: the store looks at its own and drops what is bad. A row is
    /// a key. Not answered.
    Suspect,
    /// A message of a decode stream, as payload: a `DecodeRequest`, answered with a `DecodeReply`, or not at all where it is a hint. A
    /// connection has one stream at a time; a refusal ends it.
    Decode,
}

impl Op {
    const ALL: [(u8, Self); 8] = [
        (1, Self::Get),
        (2, Self::GetChain),
        (3, Self::Put),
        (4, Self::Exists),
        (5, Self::Match),
        (6, Self::Return),
        (7, Self::Suspect),
        (8, Self::Decode),
    ];

    pub(super) fn code(self) -> u8 {
        // Each is in the table.
        Self::ALL
            .iter()
            .find(|(_, op)| *op == self)
            .map_or(0, |(code, _)| *code)
    }

    pub(super) fn from_code(code: u8) -> Result<Self, BulkError> {
        let op = Self::ALL.iter().find(|(value, _)| *value == code).map(|(_, op)| *op);
        op.ok_or_else(|| BulkError::field("op", format!("{code} is no request of this version")))
    }

    /// Bytes of a row in the table of a request.
    pub const fn row_bytes(self) -> usize {
        match self {
            Self::Get | Self::Suspect => KEY_ROW_BYTES,
            Self::GetChain | Self::Exists | Self::Match => BlockHash::BYTES,
            Self::Put => PutRow::BYTES,
            Self::Return => 8,
            // It has no table.
            Self::Decode => 1,
        }
    }

    /// Name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get | Self::GetChain => "bulk_get",
            Self::Put => "bulk_put",
            Self::Exists => "bulk_exists",
            Self::Match => "bulk_match",
            Self::Return => "bulk_return",
            Self::Suspect => "bulk_suspect",
            Self::Decode => "bulk_decode",
        }
    }
}

/// The head of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestHead {
    /// What is asked for.
    pub op: Op,
    /// The client verifies what it gets, so that the store need not verify bytes of its memory.
    pub receiver_verifies: bool,
    /// Chosen by the client; the reply repeats it.
    pub id: u64,
    /// Where the blocks are.
    pub namespace: NamespaceId,
    /// Layers of [`Op::GetChain`].
    pub layers: Range<u16>,
    /// How long the client waits: what has not been read by then is too late. Zero or more microseconds.
    pub deadline: Option<Duration>,
    /// For a get, the lease that covers the blocks; 0 for none. For a match, the lease that is wished for in milliseconds. For a decode,
    /// the checksum of its message.
    pub lease: u64,
    /// For a get, how long computing a block, all of its layers, takes the client: what would take longer to read is too late at
    /// once. Whole microseconds, at least one; `None` where it is not known.
    pub recompute: Option<Duration>,
    /// Rows of the table.
    pub rows: u32,
    /// Bytes of the payloads behind the table.
    pub payload_bytes: u64,
    /// Checksum of the table.
    pub table: Checksum,
}

impl RequestHead {
    /// Bytes of it.
    pub const BYTES: usize = 96;

    /// A request for nothing yet.
    pub fn new(op: Op, id: u64, namespace: NamespaceId) -> Self {
        Self {
            op,
            receiver_verifies: false,
            id,
            namespace,
            layers: 0..0,
            deadline: None,
            lease: 0,
            recompute: None,
            rows: 0,
            payload_bytes: 0,
            table: Checksum::of(&[]),
        }
    }

    /// Announces `table`.
    #[must_use]
    pub fn with_table(mut self, table: &[u8]) -> Self {
        // Callers keep to ROWS_MAX.
        self.rows = (table.len() / self.op.row_bytes()) as u32;
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

    /// As bytes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let deadline = self.deadline.map_or(0, |left| {
            u64::try_from(left.as_micros())
                .unwrap_or(u64::MAX - 1)
                .saturating_add(1)
        });
        let recompute = self
            .recompute
            .map_or(0, |block| u64::try_from(block.as_micros()).unwrap_or(u64::MAX).max(1));
        Writer::new(MAGIC)
            .u8(self.op.code())
            .u8(u8::from(self.receiver_verifies))
            .u16(self.layers.start)
            .u16(self.layers.end)
            .u16(0)
            .u32(self.rows)
            .u64(self.id)
            .u64(deadline)
            .u64(self.lease)
            .u64(self.payload_bytes)
            .u32(self.table.to_u32())
            .bytes(self.namespace.as_bytes())
            .u64(recompute)
            .finish()
    }

    /// Reads it back; its lengths are then bounded.
    ///
    /// # Errors
    /// Bytes that are no request, or more rows than [`ROWS_MAX`].
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, BulkError> {
        let mut reader = Reader::new(bytes, MAGIC, "the request")?;
        let op = Op::from_code(reader.u8())?;
        let receiver_verifies = reader.u8() & 1 != 0;
        let layers = reader.u16()..reader.u16();
        reader.u16();
        let rows = reader.u32();
        if rows as usize > ROWS_MAX {
            return Err(BulkError::field(
                "rows",
                format!("{rows}: at most {ROWS_MAX}, ask in several requests"),
            ));
        }
        let (id, deadline) = (reader.u64(), reader.u64());
        let (lease, payload_bytes) = (reader.u64(), reader.u64());
        let table = Checksum::from_u32(reader.u32());
        let namespace = NamespaceId::from_bytes(reader.array());
        let recompute = reader.u64();
        if payload_bytes != 0 && !matches!(op, Op::Put | Op::Decode) {
            return Err(BulkError::field(
                "payload_bytes",
                format!("{payload_bytes}: only a put or a decode carries payloads"),
            ));
        }
        if rows != 0 && op == Op::Decode {
            return Err(BulkError::field("rows", format!("{rows}: a decode has none")));
        }
        Ok(Self {
            op,
            receiver_verifies,
            id,
            namespace,
            layers,
            deadline: deadline.checked_sub(1).map(Duration::from_micros),
            lease,
            recompute: (recompute != 0).then(|| Duration::from_micros(recompute)),
            rows,
            payload_bytes,
            table,
        })
    }

    /// Bytes of the table.
    pub fn table_bytes(&self) -> usize {
        self.rows as usize * self.op.row_bytes()
    }
}

/// A layer block that is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutRow {
    /// Name of the block.
    pub hash: BlockHash,
    /// Layer index from 0.
    pub layer: u16,
    /// Bytes of its payload.
    pub length: u32,
    /// CRC-32C of the payload.
    pub checksum: Checksum,
}

impl PutRow {
    /// Bytes of a row.
    pub const BYTES: usize = 44;

    /// Adds the row to a table.
    pub fn encode(&self, table: &mut Vec<u8>) {
        table.extend_from_slice(self.hash.as_bytes());
        table.extend_from_slice(&self.layer.to_le_bytes());
        table.extend_from_slice(&[0; 2]);
        table.extend_from_slice(&self.length.to_le_bytes());
        table.extend_from_slice(&self.checksum.to_u32().to_le_bytes());
    }

    /// The rows of the table behind `head`, whose lengths add up to what it announced.
    ///
    /// # Errors
    /// A damaged table, or lengths that do not add up.
    pub fn decode_all(head: &RequestHead, table: &[u8]) -> Result<Vec<Self>, BulkError> {
        check_table(table, head.table)?;
        let rows: Vec<Self> = table
            .chunks_exact(Self::BYTES)
            .map(|row| Self {
                hash: hash_at(row, 0),
                layer: u16::from_le_bytes([row[32], row[33]]),
                length: u32_at(row, 36),
                checksum: Checksum::from_u32(u32_at(row, 40)),
            })
            .collect();
        let sum: u64 = rows.iter().map(|row| u64::from(row.length)).sum();
        if sum != head.payload_bytes {
            let problem = format!("{}, but the rows add up to {sum}", head.payload_bytes);
            return Err(BulkError::field("payload_bytes", problem));
        }
        Ok(rows)
    }
}
