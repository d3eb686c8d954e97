//! Heads of layer blocks inside a packed payload, and what became of them.

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum, KvSchema, LayerBlockKey, NamespaceId};

use super::{InvalidMessage, hash};
use crate::v1;

/// What a packed payload says about one of its layer blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryHead {
    /// Name of the block.
    pub hash: BlockHash,
    /// Layer index from 0.
    pub layer: u16,
    /// Bytes of this entry in the payload.
    pub length: usize,
    /// CRC-32C of those bytes.
    pub checksum: Checksum,
}

impl EntryHead {
    /// Key of this layer block inside `namespace`.
    pub const fn key(&self, namespace: NamespaceId) -> LayerBlockKey {
        LayerBlockKey {
            namespace,
            hash: self.hash,
            layer: self.layer,
        }
    }

    /// The entry as the wire has it.
    pub fn to_wire(&self, outcome: v1::BlockOutcome) -> v1::BlockEntry {
        v1::BlockEntry {
            hash: Bytes::copy_from_slice(self.hash.as_bytes()),
            layer: u32::from(self.layer),
            // Entries are bounded by KvSchema::LAYER_BLOCK_BYTES_MAX, far below u32::MAX.
            length: self.length as u32,
            crc32c: self.checksum.to_u32(),
            outcome: outcome.into(),
        }
    }

    /// Checks that a block to be put fits `schema`: its layer exists and its length is that of a layer block.
    ///
    /// # Errors
    /// [`InvalidMessage`] naming the field and both sizes.
    pub fn fits(&self, schema: &KvSchema) -> Result<(), InvalidMessage> {
        if self.layer >= schema.layers {
            let problem = format!(
                "{} does not exist: the namespace has {} layers",
                self.layer, schema.layers
            );
            return Err(InvalidMessage::new("layer", problem));
        }
        let expected = schema.layer_block_bytes();
        if self.length != expected {
            let problem = format!(
                "a layer block of this namespace has {expected} bytes, this has {}",
                self.length
            );
            return Err(InvalidMessage::new("length", problem));
        }
        Ok(())
    }
}

impl TryFrom<&v1::BlockEntry> for EntryHead {
    type Error = InvalidMessage;

    fn try_from(entry: &v1::BlockEntry) -> Result<Self, InvalidMessage> {
        let v1::BlockEntry {
            hash: name,
            layer,
            length,
            crc32c,
            outcome: _,
        } = entry;
        let layer = u16::try_from(*layer)
            .map_err(|_| InvalidMessage::new("layer", format!("{layer} does not exist: layers end at 65535")))?;
        Ok(Self {
            hash: hash("hash", name)?,
            layer,
            length: *length as usize,
            checksum: Checksum::from_u32(*crc32c),
        })
    }
}

/// The heads of a batch whose payload has `payload_bytes`.
///
/// # Errors
/// When an entry is malformed, or the lengths do not add up to the payload.
pub fn heads(batch: &v1::BlockBatch, payload_bytes: usize) -> Result<Vec<EntryHead>, InvalidMessage> {
    let mut heads = Vec::with_capacity(batch.entries.len());
    let mut sum = 0usize;
    for (index, entry) in batch.entries.iter().enumerate() {
        let head = EntryHead::try_from(entry).map_err(|error| error.inside(&format!("header.entries[{index}]")))?;
        sum = sum.saturating_add(head.length);
        heads.push(head);
    }
    if sum != payload_bytes {
        let problem = format!("the entries' lengths add up to {sum} bytes, the payload has {payload_bytes}");
        return Err(InvalidMessage::new("payload", problem));
    }
    Ok(heads)
}

/// What became of a layer block that was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PutOutcome {
    /// Accepted now; durable once flushed.
    Stored,
    /// Was there already.
    Present,
    /// Shed because a queue was full. Nothing is wrong; put it later or not at all.
    Busy,
    /// The checksum did not match the payload; not stored.
    ChecksumMismatch,
}

impl From<PutOutcome> for v1::BlockOutcome {
    fn from(outcome: PutOutcome) -> Self {
        match outcome {
            PutOutcome::Stored => Self::Stored,
            PutOutcome::Present => Self::Present,
            PutOutcome::Busy => Self::Busy,
            PutOutcome::ChecksumMismatch => Self::ChecksumMismatch,
        }
    }
}

impl TryFrom<i32> for PutOutcome {
    type Error = InvalidMessage;

    fn try_from(value: i32) -> Result<Self, InvalidMessage> {
        match v1::BlockOutcome::try_from(value) {
            Ok(v1::BlockOutcome::Stored) => Ok(Self::Stored),
            Ok(v1::BlockOutcome::Present) => Ok(Self::Present),
            Ok(v1::BlockOutcome::Busy) => Ok(Self::Busy),
            Ok(v1::BlockOutcome::ChecksumMismatch) => Ok(Self::ChecksumMismatch),
            _ => Err(InvalidMessage::new(
                "outcomes",
                format!("{value} is no outcome of a put"),
            )),
        }
    }
}

/// What became of a layer block that was asked for, without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GetOutcome {
    /// The bytes are in the payload.
    Hit,
    /// Not held.
    Miss,
    /// Held, but its checksum was wrong. To the caller a miss.
    Corrupt,
    /// Shed because a queue was full.
    Busy,
    /// The deadline passed before its turn.
    TooLate,
}

impl From<GetOutcome> for v1::BlockOutcome {
    fn from(outcome: GetOutcome) -> Self {
        match outcome {
            GetOutcome::Hit => Self::Hit,
            GetOutcome::Miss => Self::Miss,
            GetOutcome::Corrupt => Self::Corrupt,
            GetOutcome::Busy => Self::Busy,
            GetOutcome::TooLate => Self::TooLate,
        }
    }
}

impl TryFrom<i32> for GetOutcome {
    type Error = InvalidMessage;

    fn try_from(value: i32) -> Result<Self, InvalidMessage> {
        match v1::BlockOutcome::try_from(value) {
            Ok(v1::BlockOutcome::Hit) => Ok(Self::Hit),
            Ok(v1::BlockOutcome::Miss) => Ok(Self::Miss),
            Ok(v1::BlockOutcome::Corrupt) => Ok(Self::Corrupt),
            Ok(v1::BlockOutcome::Busy) => Ok(Self::Busy),
            Ok(v1::BlockOutcome::TooLate) => Ok(Self::TooLate),
            _ => Err(InvalidMessage::new(
                "outcome",
                format!("{value} is no outcome of a get"),
            )),
        }
    }
}
