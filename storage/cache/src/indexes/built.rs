//! A built index: what it is called, which files it has, and what they say.
//!
//! An index covers the first blocks of a chain, and is named by the hash of the last of them, which stands for all tokens before it.
//! Each layer and KV head has a file (`storage/index/FORMAT.md`), a record of the tiers under that name. What it is whole by is
//! one more record, the *manifest*, which is written last. Bytes of the manifest, little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | magic `KVIX` |
//! | 4 | 2 | version, 1 |
//! | 6 | 2 | kind: 3 roar, 4 wave, as in index files |
//! | 8 | 4 | tokens covered |
//! | 12 | 4 | heads: layers times KV heads |
//! | 16 | (heads + 7) / 8 | a bit per head, layer after layer: whether it has a file (streaming heads have none) |
//!
//! Its checksum is the record's, which the tiers verify.

use kvasir_block::{BlockKey, LayerBlockKey};
use kvasir_index::{IndexError, KeyIndex, Origin, Roar, Wave};
use sha2::{Digest, Sha256};

use super::derived;

/// Indexes that are built over a context, beside the sketches that need no building.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BuiltIndex {
    /// A graph over keys, drawn by query samples (RetrievalAttention).
    Roar,
    /// Clusters of keys in segments of 8,192 (RetroInfer).
    Wave,
}

/// Records of one kind under one name.
const SLOTS: u16 = 1 << 15;
/// Of them, the one of the manifest.
const MANIFEST: u16 = SLOTS - 1;
const MAGIC: [u8; 4] = *b"KVIX";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 16;

/// Name of an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct IndexName {
    /// Last block that it covers.
    pub(crate) end: BlockKey,
    pub(crate) kind: BuiltIndex,
}

/// The index of one KV head.
#[derive(Debug)]
pub(crate) enum HeadIndex {
    Roar(Roar),
    Wave(Wave),
}

/// What says that an index is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) tokens: u32,
    /// Whether a head has a file, layer after layer.
    pub(crate) heads: Vec<bool>,
}

impl BuiltIndex {
    /// Its name in requests and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Roar => "roar",
            Self::Wave => "wave",
        }
    }

    const fn number(self) -> u16 {
        match self {
            Self::Roar => kvasir_index::Kind::Roar as u16,
            Self::Wave => kvasir_index::Kind::Wave as u16,
        }
    }

    const fn first_slot(self) -> u16 {
        match self {
            Self::Roar => 0,
            Self::Wave => SLOTS,
        }
    }
}

impl IndexName {
    /// Where the file of head `head` (of all layers) lies; `None` where there are more heads than slots.
    pub(crate) fn file(self, head: usize) -> Option<LayerBlockKey> {
        let slot = u16::try_from(head).ok().filter(|slot| *slot < MANIFEST)?;
        Some(self.derived().layer(self.kind.first_slot() + slot))
    }

    pub(crate) fn manifest(self) -> LayerBlockKey {
        self.derived().layer(self.kind.first_slot() + MANIFEST)
    }

    fn derived(self) -> BlockKey {
        derived::indexes_of(self.end.namespace).block(self.end.hash)
    }

    /// What the file of head `head` must say that it was built from.
    pub(crate) fn origin(self, head: usize) -> Origin {
        let mut hasher = Sha256::new();
        hasher.update(b"kvasir.index.v1");
        hasher.update(self.kind.number().to_le_bytes());
        hasher.update(self.end.namespace.as_bytes());
        hasher.update(self.end.hash.as_bytes());
        hasher.update((head as u64).to_le_bytes());
        Origin(hasher.finalize().into())
    }

    /// Reads the file of head `head` over `keys` keys.
    pub(crate) fn decode(self, head: usize, keys: usize, file: &[u8]) -> Result<HeadIndex, IndexError> {
        let index = match self.kind {
            BuiltIndex::Roar => HeadIndex::Roar(Roar::decode(file, self.origin(head))?),
            BuiltIndex::Wave => HeadIndex::Wave(Wave::decode(file, self.origin(head))?),
        };
        match index.keys().keys() {
            found if found == keys => Ok(index),
            found => Err(IndexError::Unusable(format!("it has {found} keys, not {keys}"))),
        }
    }
}

impl HeadIndex {
    pub(crate) fn keys(&self) -> &dyn KeyIndex {
        match self {
            Self::Roar(roar) => roar,
            Self::Wave(wave) => wave,
        }
    }
}

impl Manifest {
    pub(crate) fn encode(&self, kind: BuiltIndex) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + self.heads.len().div_ceil(8));
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend(kind.number().to_le_bytes());
        out.extend(self.tokens.to_le_bytes());
        out.extend((self.heads.len() as u32).to_le_bytes());
        for eight in self.heads.chunks(8) {
            let bits = eight.iter().enumerate();
            out.push(bits.fold(0, |byte, (bit, has)| byte | u8::from(*has) << bit));
        }
        out
    }

    /// The manifest in `bytes`, for `tokens` tokens and `heads` heads; `None` if it is none.
    pub(crate) fn decode(bytes: &[u8], kind: BuiltIndex, tokens: u32, heads: usize) -> Option<Self> {
        let (header, bits) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let expected = Self {
            tokens,
            heads: vec![false; heads],
        }
        .encode(kind);
        if *header != expected[..HEADER_BYTES] || bytes.len() != expected.len() {
            return None;
        }
        let has = |head: usize| bits[head / 8] >> (head % 8) & 1 == 1;
        Some(Self {
            tokens,
            heads: (0..heads).map(has).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_is_read_for_what_it_was_written_for() {
        let manifest = Manifest {
            tokens: 640,
            heads: (0..13).map(|head| head % 3 != 2).collect(),
        };
        let bytes = manifest.encode(BuiltIndex::Wave);
        assert_eq!(
            bytes,
            [
                b'K',
                b'V',
                b'I',
                b'X',
                1,
                0,
                4,
                0,
                128,
                2,
                0,
                0,
                13,
                0,
                0,
                0,
                0b1101_1011,
                0b0001_0110
            ],
            "as the table says"
        );
        assert_eq!(Manifest::decode(&bytes, BuiltIndex::Wave, 640, 13), Some(manifest));
        for (bytes, kind, tokens, heads) in [
            (&bytes[..], BuiltIndex::Roar, 640, 13),
            (&bytes[..], BuiltIndex::Wave, 641, 13),
            (&bytes[..], BuiltIndex::Wave, 640, 14),
            (&bytes[..17], BuiltIndex::Wave, 640, 13),
            (&bytes[..3], BuiltIndex::Wave, 640, 13),
        ] {
            assert_eq!(Manifest::decode(bytes, kind, tokens, heads), None);
        }
    }
}
