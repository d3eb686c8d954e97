//! Fixed-size heads as bytes, and the tables that need no row type of their own.

use kvasir_block::{BlockHash, Checksum};

use super::BulkError;

/// Writes fields one after another into a head of `N` bytes that ends with its own checksum.
pub(super) struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    pub(super) fn new(magic: [u8; 4]) -> Self {
        Self { bytes: [0; N], at: 0 }.bytes(&magic)
    }

    pub(super) fn bytes(mut self, field: &[u8]) -> Self {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
        self
    }

    pub(super) fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    pub(super) fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// The head: zeros up to its checksum, and that.
    pub(super) fn finish(mut self) -> [u8; N] {
        debug_assert!(self.at <= N - 4, "fields beyond the head");
        let checksum = Checksum::of(&self.bytes[..N - 4]);
        self.bytes[N - 4..].copy_from_slice(&checksum.to_u32().to_le_bytes());
        self.bytes
    }
}

/// Reads the fields back, after magic and checksum were found right.
pub(super) struct Reader<'a, const N: usize> {
    bytes: &'a [u8; N],
    at: usize,
}

impl<'a, const N: usize> Reader<'a, N> {
    pub(super) fn new(bytes: &'a [u8; N], magic: [u8; 4], what: &'static str) -> Result<Self, BulkError> {
        let found = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if found != magic {
            return Err(BulkError::Magic { what, found });
        }
        let checksum = Checksum::from_u32(u32_at(bytes, N - 4));
        if !checksum.verifies(&bytes[..N - 4]) {
            return Err(BulkError::Damaged { what });
        }
        Ok(Self { bytes, at: 4 })
    }

    pub(super) fn array<const M: usize>(&mut self) -> [u8; M] {
        let mut field = [0; M];
        field.copy_from_slice(&self.bytes[self.at..self.at + M]);
        self.at += M;
        field
    }

    pub(super) fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

pub(super) fn hash_at(bytes: &[u8], at: usize) -> BlockHash {
    let mut hash = [0; BlockHash::BYTES];
    hash.copy_from_slice(&bytes[at..at + BlockHash::BYTES]);
    BlockHash::from_bytes(hash)
}

/// Bytes of a row that names a layer block: hash, layer, two zeros.
pub(super) const KEY_ROW_BYTES: usize = BlockHash::BYTES + 4;

/// A table of block hashes.
pub fn hash_table(hashes: &[BlockHash]) -> Vec<u8> {
    let mut table = Vec::with_capacity(hashes.len() * BlockHash::BYTES);
    for hash in hashes {
        table.extend_from_slice(hash.as_bytes());
    }
    table
}

/// The hashes of a table.
pub fn hash_rows(table: &[u8]) -> impl ExactSizeIterator<Item = BlockHash> + '_ {
    table.chunks_exact(BlockHash::BYTES).map(|row| hash_at(row, 0))
}

/// A table of layer blocks.
pub fn key_table(keys: &[(BlockHash, u16)]) -> Vec<u8> {
    let mut table = Vec::with_capacity(keys.len() * KEY_ROW_BYTES);
    for (hash, layer) in keys {
        table.extend_from_slice(hash.as_bytes());
        table.extend_from_slice(&layer.to_le_bytes());
        table.extend_from_slice(&[0; 2]);
    }
    table
}

/// The layer blocks of a table.
pub fn key_rows(table: &[u8]) -> impl ExactSizeIterator<Item = (BlockHash, u16)> + '_ {
    table
        .chunks_exact(KEY_ROW_BYTES)
        .map(|row| (hash_at(row, 0), u16::from_le_bytes([row[32], row[33]])))
}

/// A table of a byte per block: whether it is held.
pub fn presence_table(held: &[bool]) -> Vec<u8> {
    held.iter().map(|&held| u8::from(held)).collect()
}

/// What such a table says.
pub fn presence_rows(table: &[u8]) -> impl ExactSizeIterator<Item = bool> + '_ {
    table.iter().map(|&byte| byte != 0)
}

/// A table of numbers of places.
pub fn number_table(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// The numbers of a table.
pub fn number_rows(table: &[u8]) -> impl ExactSizeIterator<Item = u64> + '_ {
    table.chunks_exact(8).map(|row| u64_at(row, 0))
}
