//! The chained hash that names a token block, in vLLM's `sha256_cbor` scheme.
//!
//! `h[i] = SHA-256(CBOR([h[i-1], [tokens of block i], extra keys or null]))`, with `h[-1] = SHA-256("vllm-none-hash")`
//! encoded as CBOR text. CBOR is the canonical encoding of RFC 8949 §4.2: shortest heads, definite lengths.
//! Source: vLLM `v1/core/kv_cache_utils.py`, `utils/hashing.py`; its test vectors are tests below.

use std::fmt;

use sha2::{Digest, Sha256};

/// Name of a token block: a hash over the block's tokens and everything before them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// Bytes of a hash.
    pub const BYTES: usize = 32;

    /// A hash as it was written down.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The hash in `bytes`, or `None` unless there are exactly [`Self::BYTES`].
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes to write down.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for BlockHash {
    /// The first 8 bytes in hex: enough to tell blocks apart in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({}..)", hex(&self.0[..8]))
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// What besides the tokens shapes the KV of a chain. Same order and place as vLLM's extra keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtraKeys {
    cache_salt: Option<String>,
}

impl ExtraKeys {
    /// No extra keys.
    pub const fn none() -> Self {
        Self { cache_salt: None }
    }

    /// Isolates a chain: part of the first block's hash and through it of every later one. Empty means none.
    pub fn with_cache_salt(salt: &str) -> Self {
        Self {
            cache_salt: (!salt.is_empty()).then(|| salt.to_owned()),
        }
    }
}

/// Names the blocks of one growing token sequence, each as soon as it is whole.
#[derive(Clone, Debug)]
pub struct HashChain {
    block_tokens: usize,
    extra: ExtraKeys,
    parent: BlockHash,
    hashes: Vec<BlockHash>,
    tail: Vec<u32>,
}

impl HashChain {
    /// An empty chain.
    ///
    /// # Panics
    /// If `block_tokens` is 0; schemas refuse that value before.
    pub fn new(block_tokens: usize, extra: ExtraKeys) -> Self {
        assert!(block_tokens > 0, "a block holds at least one token");
        Self {
            block_tokens,
            extra,
            parent: root(),
            hashes: Vec::new(),
            tail: Vec::with_capacity(block_tokens),
        }
    }

    /// Appends one token; answers with the name of the block it completed, if it did.
    pub fn push(&mut self, token: u32) -> Option<BlockHash> {
        self.tail.push(token);
        if self.tail.len() < self.block_tokens {
            return None;
        }
        // The salt stands in the first block only: the chain carries it on.
        let salt = if self.hashes.is_empty() {
            self.extra.cache_salt.as_deref()
        } else {
            None
        };
        self.parent = block_hash(&self.parent, &self.tail, salt);
        self.hashes.push(self.parent);
        self.tail.clear();
        Some(self.parent)
    }

    /// Names of the whole blocks so far.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }

    /// Tokens appended so far.
    pub fn token_count(&self) -> usize {
        self.hashes.len() * self.block_tokens + self.tail.len()
    }
}

/// Names of the whole blocks of `tokens`.
pub fn block_hashes(tokens: &[u32], block_tokens: usize, extra: &ExtraKeys) -> Vec<BlockHash> {
    let mut chain = HashChain::new(block_tokens, extra.clone());
    for &token in tokens {
        chain.push(token);
    }
    chain.hashes
}

/// Parent of the first block: what vLLM uses when no seed is set.
fn root() -> BlockHash {
    let mut cbor = Vec::new();
    cbor_text(&mut cbor, "vllm-none-hash");
    BlockHash(Sha256::digest(&cbor).into())
}

fn block_hash(parent: &BlockHash, tokens: &[u32], salt: Option<&str>) -> BlockHash {
    let mut cbor = Vec::with_capacity(48 + tokens.len() * 5);
    cbor_head(&mut cbor, CBOR_ARRAY, 3);
    cbor_head(&mut cbor, CBOR_BYTES, parent.0.len() as u64);
    cbor.extend_from_slice(&parent.0);
    cbor_head(&mut cbor, CBOR_ARRAY, tokens.len() as u64);
    for &token in tokens {
        cbor_head(&mut cbor, CBOR_UNSIGNED, u64::from(token));
    }
    match salt {
        None => cbor.push(CBOR_NULL),
        Some(salt) => {
            // One entry of the extra-keys tuple: ("cache_salt", salt).
            cbor_head(&mut cbor, CBOR_ARRAY, 1);
            cbor_head(&mut cbor, CBOR_ARRAY, 2);
            cbor_text(&mut cbor, "cache_salt");
            cbor_text(&mut cbor, salt);
        }
    }
    BlockHash(Sha256::digest(&cbor).into())
}

const CBOR_UNSIGNED: u8 = 0 << 5;
const CBOR_BYTES: u8 = 2 << 5;
const CBOR_TEXT: u8 = 3 << 5;
const CBOR_ARRAY: u8 = 4 << 5;
const CBOR_NULL: u8 = 0xF6;

/// Head of a CBOR item: major type and its argument in the shortest form.
fn cbor_head(out: &mut Vec<u8>, major: u8, argument: u64) {
    match argument {
        0..24 => out.push(major | argument as u8),
        24..0x100 => out.extend([major | 24, argument as u8]),
        0x100..0x1_0000 => {
            out.push(major | 25);
            out.extend((argument as u16).to_be_bytes());
        }
        0x1_0000..0x1_0000_0000 => {
            out.push(major | 26);
            out.extend((argument as u32).to_be_bytes());
        }
        _ => {
            out.push(major | 27);
            out.extend(argument.to_be_bytes());
        }
    }
}

fn cbor_text(out: &mut Vec<u8>, text: &str) {
    cbor_head(out, CBOR_TEXT, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed with vLLM's own code.
    const NONE: &str = "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0";
    const B0: &str = "cd7c51bc5a8fc8643f383a2b9e01522fba7473c669e9270c7b0bf7bf7fd01682";
    const B1: &str = "2533ea50426b36e9e4d68296cac6bce8cf602e46957d0fe40b368b33d87bf3bf";
    const B0_SALTED: &str = "d4fdd9f3dab139eafd01550f43781481256e9531b59b55ea4656df8f49124fcf";

    fn tokens() -> Vec<u32> {
        (1..=32).collect()
    }

    #[test]
    fn vllm_vectors() {
        assert_eq!(root().to_string(), NONE);
        let hashes = block_hashes(&tokens(), 16, &ExtraKeys::none());
        assert_eq!(hashes.iter().map(ToString::to_string).collect::<Vec<_>>(), [B0, B1]);
    }

    #[test]
    fn vllm_vector_with_salt() {
        let hashes = block_hashes(&tokens(), 16, &ExtraKeys::with_cache_salt("tenant-a"));
        assert_eq!(hashes[0].to_string(), B0_SALTED);
        assert_ne!(
            hashes[1].to_string(),
            B1,
            "the salt reaches later blocks through the chain"
        );
    }

    #[test]
    fn an_open_tail_has_no_name() {
        let mut chain = HashChain::new(16, ExtraKeys::none());
        let named = tokens()[..31].iter().filter_map(|&token| chain.push(token)).count();
        assert_eq!((named, chain.token_count()), (1, 31));
    }

    #[test]
    fn one_changed_token_changes_every_later_name() {
        let plain = block_hashes(&tokens(), 8, &ExtraKeys::none());
        for position in 0..32 {
            let mut changed = tokens();
            changed[position] += 100_000;
            let hashes = block_hashes(&changed, 8, &ExtraKeys::none());
            for block in 0..4 {
                assert_eq!(
                    hashes[block] == plain[block],
                    block < position / 8,
                    "position {position} block {block}"
                );
            }
        }
    }
}
