//! The bytes of segment files; `FORMAT.md` tells the same to people.
//!
//! A header binds its bytes to one place: it names its own segment and offset, so bytes that were copied, shifted or left
//! over from an older file are never taken for a record.

use kvasir_block::{
    Checksum, LayerBlockKey,
    planted::{Bug, planted},
};

/// Version of segment files that this crate writes, and the newest it reads.
pub const SEGMENT_FORMAT: u32 = 2;

pub(crate) const SEGMENT_HEADER_BYTES: usize = 64;
/// What direct I/O reads and writes.
pub(crate) const PAGE: u64 = 4096;
pub(crate) const RECORD_HEADER_BYTES: usize = 128;
/// Records start at multiples of this.
pub(crate) const RECORD_ALIGN: u64 = 64;
/// Largest payload a record may claim; bounds the buffer that a header read from disk can ask for.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 64 << 20;

const SEGMENT_MAGIC: [u8; 8] = *b"KVSEGMNT";
const RECORD_MAGIC: [u8; 4] = *b"KVRC";

/// Number of a segment on its disk; rises, is never used twice.
pub(crate) type SegmentId = u64;

/// What a segment's records must name. Generation 0 is format 1, which had none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) id: SegmentId,
    /// Tells apart two files that were given the same id, by a restored folder or a lost index.
    pub(crate) generation: u64,
}

impl Identity {
    /// Where the first record of such a segment lies.
    pub(crate) const fn first_record(self) -> u64 {
        if self.generation == 0 {
            SEGMENT_HEADER_BYTES as u64
        } else {
            PAGE
        }
    }
}

/// What the first bytes of a segment file say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentHeader {
    /// A header of this segment.
    Valid(Identity),
    /// Written by a newer version of this crate.
    Newer(u32),
    /// Torn, flipped or foreign.
    Broken,
}

impl SegmentHeader {
    pub(crate) fn encode(identity: Identity) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        bytes[..8].copy_from_slice(&SEGMENT_MAGIC);
        bytes[8..12].copy_from_slice(&SEGMENT_FORMAT.to_le_bytes());
        bytes[16..24].copy_from_slice(&identity.id.to_le_bytes());
        bytes[24..32].copy_from_slice(&identity.generation.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; SEGMENT_HEADER_BYTES]) -> Self {
        if bytes[..8] != SEGMENT_MAGIC || !sealed(bytes) {
            return Self::Broken;
        }
        let id = u64_at(bytes, 16);
        match (u32_at(bytes, 8), u64_at(bytes, 24)) {
            (1, _) => Self::Valid(Identity { id, generation: 0 }),
            (SEGMENT_FORMAT, generation @ 1..) => Self::Valid(Identity { id, generation }),
            (newer, _) if newer > SEGMENT_FORMAT => Self::Newer(newer),
            _ => Self::Broken,
        }
    }
}

/// What stands before each payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHeader {
    pub(crate) segment: Identity,
    /// Of this header, in bytes from the start of the file.
    pub(crate) offset: u64,
    pub(crate) key: LayerBlockKey,
    pub(crate) payload_bytes: u32,
    pub(crate) payload_checksum: Checksum,
}

impl RecordHeader {
    pub(crate) fn encode(&self) -> [u8; RECORD_HEADER_BYTES] {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        bytes[..4].copy_from_slice(&RECORD_MAGIC);
        bytes[4..6].copy_from_slice(&version_of(self.segment.generation).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.segment.id.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes[24..24 + LayerBlockKey::BYTES].copy_from_slice(&self.key.to_bytes());
        bytes[92..96].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[96..100].copy_from_slice(&self.payload_checksum.to_u32().to_le_bytes());
        bytes[100..108].copy_from_slice(&self.segment.generation.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    /// The header in `bytes` read at `offset` of segment `id`, or `None` if it is not a whole header of that place. Its
    /// generation is for the caller to compare: where a segment's own header is lost, its records tell it.
    pub(crate) fn decode(bytes: &[u8; RECORD_HEADER_BYTES], id: SegmentId, offset: u64) -> Option<Self> {
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if bytes[..4] != RECORD_MAGIC || !sealed(bytes) {
            return None;
        }
        let generation = u64_at(bytes, 100);
        let header = Self {
            segment: Identity {
                id: u64_at(bytes, 8),
                generation,
            },
            offset: u64_at(bytes, 16),
            key: LayerBlockKey::from_bytes(&bytes[24..24 + LayerBlockKey::BYTES]).ok()?,
            payload_bytes: u32_at(bytes, 92),
            payload_checksum: Checksum::from_u32(u32_at(bytes, 96)),
        };
        let here = (header.segment.id == id && header.offset == offset) || planted(Bug::MisplacedRecordAccepted);
        let here = here && version == version_of(generation);
        (here && header.payload_bytes as usize <= PAYLOAD_BYTES_MAX).then_some(header)
    }

    /// Bytes of the record that a file has at `offset` from when it was an older segment than `id`; `None` where there is none.
    pub(crate) fn left_over(bytes: &[u8; RECORD_HEADER_BYTES], id: SegmentId, offset: u64) -> Option<u64> {
        let older = u64_at(bytes, 8);
        if bytes[..4] != RECORD_MAGIC || older >= id {
            return None;
        }
        let header = Self::decode(bytes, older, offset)?;
        Some(record_bytes(header.payload_bytes as usize))
    }
}

const fn version_of(generation: u64) -> u16 {
    if generation == 0 { 1 } else { 2 }
}

/// Bytes of a record on disk: header, payload, zeros up to the next multiple of [`RECORD_ALIGN`].
pub(crate) const fn record_bytes(payload_bytes: usize) -> u64 {
    (RECORD_HEADER_BYTES as u64 + payload_bytes as u64).next_multiple_of(RECORD_ALIGN)
}

/// Writes the CRC-32C of everything before it into the last four bytes.
fn seal(bytes: &mut [u8]) {
    let (body, crc) = bytes.split_at_mut(bytes.len() - 4);
    crc.copy_from_slice(&Checksum::of(body).to_u32().to_le_bytes());
}

fn sealed(bytes: &[u8]) -> bool {
    let (body, crc) = bytes.split_at(bytes.len() - 4);
    Checksum::of(body).to_u32().to_le_bytes() == crc
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use kvasir_block::{BlockHash, NamespaceId};

    use super::*;

    const NINE: Identity = Identity { id: 9, generation: 5 };

    fn header() -> RecordHeader {
        RecordHeader {
            segment: Identity {
                id: 7,
                generation: 0x0102_0304,
            },
            offset: 4096,
            key: NamespaceId::from_bytes([1; 32])
                .block(BlockHash::from_bytes([2; 32]))
                .layer(3),
            payload_bytes: 49_152,
            payload_checksum: Checksum::from_u32(0xDEAD_BEEF),
        }
    }

    #[test]
    fn headers_round_trip_and_belong_to_one_place() {
        let bytes = header().encode();
        assert_eq!(RecordHeader::decode(&bytes, 7, 4096), Some(header()));
        assert_eq!(RecordHeader::decode(&bytes, 8, 4096), None, "another segment");
        assert_eq!(RecordHeader::decode(&bytes, 7, 4160), None, "another offset");
        assert_eq!(
            SegmentHeader::decode(&SegmentHeader::encode(NINE)),
            SegmentHeader::Valid(NINE)
        );
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let record = header().encode();
        for bit in 0..record.len() * 8 {
            let mut flipped = record;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(RecordHeader::decode(&flipped, 7, 4096), None, "bit {bit}");
        }
        let segment = SegmentHeader::encode(NINE);
        for bit in 0..segment.len() * 8 {
            let mut flipped = segment;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHeader::decode(&flipped), SegmentHeader::Broken, "bit {bit}");
        }
    }

    #[test]
    fn a_claim_beyond_the_limit_is_refused() {
        let huge = RecordHeader {
            payload_bytes: PAYLOAD_BYTES_MAX as u32 + 1,
            ..header()
        };
        assert_eq!(RecordHeader::decode(&huge.encode(), 7, 4096), None);
    }

    #[test]
    fn a_newer_format_is_told_apart_from_damage() {
        let mut bytes = SegmentHeader::encode(NINE);
        bytes[8..12].copy_from_slice(&(SEGMENT_FORMAT + 1).to_le_bytes());
        seal(&mut bytes);
        assert_eq!(SegmentHeader::decode(&bytes), SegmentHeader::Newer(SEGMENT_FORMAT + 1));
    }

    /// Format 1: no generation, records of version 1.
    #[test]
    fn the_older_format_is_still_read() {
        let old = RecordHeader {
            segment: Identity { id: 7, generation: 0 },
            ..header()
        };
        let bytes = old.encode();
        assert_eq!(&bytes[..8], b"KVRC\x01\x00\x00\x00");
        assert_eq!(RecordHeader::decode(&bytes, 7, 4096), Some(old));
        let mut bytes = SegmentHeader::encode(Identity { id: 9, generation: 0 });
        bytes[8] = 1;
        seal(&mut bytes);
        assert_eq!(
            SegmentHeader::decode(&bytes),
            SegmentHeader::Valid(Identity { id: 9, generation: 0 })
        );
    }

    /// The layout of `FORMAT.md`, byte for byte: a change here is a new version, not an edit.
    #[test]
    fn golden_bytes() {
        let bytes = header().encode();
        assert_eq!(&bytes[..8], b"KVRC\x02\x00\x00\x00");
        assert_eq!(&bytes[8..24], &[7, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            (&bytes[24..56], &bytes[56..88], &bytes[88..90]),
            (&[1; 32][..], &[2; 32][..], &[0, 3][..])
        );
        assert_eq!(&bytes[90..100], &[0, 0, 0, 0xC0, 0, 0, 0xEF, 0xBE, 0xAD, 0xDE]);
        assert_eq!(
            &bytes[100..124],
            b"\x04\x03\x02\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
        );
        assert_eq!(
            &SegmentHeader::encode(NINE)[..32],
            b"KVSEGMNT\x02\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0"
        );
        assert_eq!(
            (record_bytes(0), record_bytes(1), record_bytes(49_152)),
            (128, 192, 49_280)
        );
    }
}
