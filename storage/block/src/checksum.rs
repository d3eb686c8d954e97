//! Checksums of layer-block payloads.

use std::fmt;

use crc_fast::{CrcAlgorithm::Crc32Iscsi, Digest};

/// CRC-32C (Castagnoli) of a layer block's payload, made where the bytes leave the worker and verified wherever they
/// are read. Detects every error of up to three bits at these sizes (RFC 3720 §B.4 has test vectors).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Checksum(u32);

impl Checksum {
    /// Checksum of `payload`.
    pub fn of(payload: &[u8]) -> Self {
        // The algorithm's values are 32 bits wide.
        Self(crc_fast::checksum(Crc32Iscsi, payload) as u32)
    }

    /// Checksum of nothing, to [`Self::append`] to.
    pub const EMPTY: Self = Self(0);

    /// Checksum of what this one is of with `more` behind it: bytes are then verified as they come, while they are in the
    /// processor's cache.
    #[must_use]
    pub fn append(self, more: &[u8]) -> Self {
        // Between two parts the register holds the value without its last inversion.
        let mut digest = Digest::new_with_init_state(Crc32Iscsi, (!self.0).into());
        digest.update(more);
        Self(digest.finalize() as u32)
    }

    /// A checksum as it was written down.
    pub const fn from_u32(value: u32) -> Self {
        Self(value)
    }

    /// The value to write down.
    pub const fn to_u32(self) -> u32 {
        self.0
    }

    /// Whether `payload` still has this checksum.
    pub fn verifies(self, payload: &[u8]) -> bool {
        Self::of(payload) == self
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checksum({:08x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_vectors() {
        // RFC 3720 §B.4.
        assert_eq!(Checksum::of(&[0; 32]).to_u32(), 0x8A91_36AA);
        assert_eq!(Checksum::of(&[0xFF; 32]).to_u32(), 0x62A8_AB43);
    }

    #[test]
    fn parts_give_what_the_whole_gives() {
        let payload: Vec<u8> = (0..5000u32).map(|i| (i * 31) as u8).collect();
        for at in [0, 1, 7, 64, 4095, 4999, 5000] {
            let (head, tail) = payload.split_at(at);
            assert_eq!(
                Checksum::EMPTY.append(head).append(tail),
                Checksum::of(&payload),
                "{at}"
            );
        }
    }

    #[test]
    fn every_single_bit_flip_is_noticed() {
        let payload: Vec<u8> = (0..4096u32).map(|i| (i * 31) as u8).collect();
        let checksum = Checksum::of(&payload);
        for bit in 0..payload.len() * 8 {
            let mut flipped = payload.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!checksum.verifies(&flipped), "bit {bit}");
        }
    }
}
