//! Checked conversions between messages and domain types.
//!
//! Every conversion from the wire validates; the error names the field as a caller wrote it (`hashes[3]`,
//! `header.entries[0].layer`). Conversions to the wire cannot fail.

mod entry;
mod event;
mod schema;

use bytes::Bytes;
use kvasir_block::{BlockHash, NamespaceId};

use crate::v1;

pub use entry::{EntryHead, GetOutcome, PutOutcome, heads};
pub use event::{BlockEvents, EventKind, Tier};

/// A message that breaks the contract of `kvasir.v1`: which field, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidMessage {
    /// Path of the field inside the message, for example `hashes[3]`.
    pub field: String,
    /// What it holds and what it must hold.
    pub problem: String,
}

impl InvalidMessage {
    /// The error that `field` has `problem`.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// The same error, seen from the message that holds the field under `parent`.
    #[must_use]
    pub fn inside(mut self, parent: &str) -> Self {
        self.field = format!("{parent}.{}", self.field);
        self
    }
}

/// The block hash in `bytes`.
///
/// # Errors
/// When there are not 32 bytes; the error names `field`.
pub fn hash(field: &str, bytes: &[u8]) -> Result<BlockHash, InvalidMessage> {
    BlockHash::from_slice(bytes)
        .ok_or_else(|| InvalidMessage::new(field, format!("a block hash has 32 bytes, this has {}", bytes.len())))
}

/// The chain of block hashes in field `name`, at most `hashes_max` of them.
///
/// # Errors
/// When one does not have 32 bytes (the error names its index) or there are too many.
pub fn hashes(name: &str, list: &[Bytes], hashes_max: usize) -> Result<Vec<BlockHash>, InvalidMessage> {
    if list.len() > hashes_max {
        return Err(InvalidMessage::new(
            name,
            format!(
                "{} hashes, at most {hashes_max} are accepted: ask in several calls",
                list.len()
            ),
        ));
    }
    list.iter()
        .enumerate()
        .map(|(index, bytes)| hash_at(name, index, bytes))
        .collect()
}

/// As [`hash`], formatting the field's name only when it is needed.
fn hash_at(name: &str, index: usize, bytes: &[u8]) -> Result<BlockHash, InvalidMessage> {
    BlockHash::from_slice(bytes).map_or_else(|| hash(&format!("{name}[{index}]"), bytes), Ok)
}

/// The namespace id in field `namespace`.
///
/// # Errors
/// When there are not 32 bytes.
pub fn namespace(bytes: &[u8]) -> Result<NamespaceId, InvalidMessage> {
    NamespaceId::from_slice(bytes).ok_or_else(|| {
        let problem = format!(
            "a namespace id has 32 bytes, this has {}: take it from OpenNamespace",
            bytes.len()
        );
        InvalidMessage::new("namespace", problem)
    })
}

/// The namespace id in field `namespace`, where empty means none.
///
/// # Errors
/// When there are neither 0 nor 32 bytes.
pub fn optional_namespace(bytes: &[u8]) -> Result<Option<NamespaceId>, InvalidMessage> {
    if bytes.is_empty() {
        Ok(None)
    } else {
        namespace(bytes).map(Some)
    }
}

/// A namespace id as the wire has it.
pub fn namespace_bytes(namespace: NamespaceId) -> Bytes {
    Bytes::copy_from_slice(namespace.as_bytes())
}

/// Block hashes as the wire has them, slices of one allocation.
pub fn hash_bytes(hashes: &[BlockHash]) -> Vec<Bytes> {
    let mut packed = Vec::with_capacity(hashes.len() * BlockHash::BYTES);
    for hash in hashes {
        packed.extend_from_slice(hash.as_bytes());
    }
    let packed = Bytes::from(packed);
    (0..hashes.len())
        .map(|i| packed.slice(i * BlockHash::BYTES..(i + 1) * BlockHash::BYTES))
        .collect()
}

/// Token positions as a range.
impl TryFrom<v1::TokenRange> for std::ops::Range<u32> {
    type Error = InvalidMessage;

    fn try_from(range: v1::TokenRange) -> Result<Self, InvalidMessage> {
        if range.start > range.end {
            return Err(InvalidMessage::new(
                "start",
                format!("{} lies behind end {}: ranges are [start, end)", range.start, range.end),
            ));
        }
        Ok(range.start..range.end)
    }
}

impl From<std::ops::Range<u32>> for v1::TokenRange {
    fn from(range: std::ops::Range<u32>) -> Self {
        Self {
            start: range.start,
            end: range.end,
        }
    }
}

/// Little-endian f32 in field `name`, exactly `count` of them.
///
/// # Errors
/// When the length differs or a value is not finite.
pub fn floats(name: &str, bytes: &[u8], count: usize) -> Result<Vec<f32>, InvalidMessage> {
    if bytes.len() != count * 4 {
        let problem = format!(
            "{count} little-endian f32 have {} bytes, this has {}",
            count * 4,
            bytes.len()
        );
        return Err(InvalidMessage::new(name, problem));
    }
    let values = float_values(bytes);
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(InvalidMessage::new(format!("{name}[{index}]"), "must be finite")),
        None => Ok(values),
    }
}

/// Little-endian f32 as values; a tail of less than four bytes is left out. Infinities pass: an empty partial has
/// `lse = -inf`.
pub fn float_values(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
        .collect()
}

/// Values as little-endian f32.
pub fn float_bytes(values: &[f32]) -> Bytes {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect::<Vec<u8>>()
        .into()
}

#[cfg(test)]
mod tests;
