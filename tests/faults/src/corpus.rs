//! Payloads that check themselves: every byte follows from tenant, key, generation and length.

use bytes::Bytes;
use kvasir_block::{
    BlockHash, BlockKey, Dtype, ExtraKeys, KvSchema, LayerBlockKey, NamespaceId, RopeStyle, Tenant, block_hashes,
};

/// Bytes of a layer block per token of its block: K and V of one head of 64 in f16.
const BYTES_PER_TOKEN: usize = 256;

/// A schema with `layers` layers and layer blocks of `layer_block_bytes`, a multiple of 256.
///
/// # Panics
/// When the size is no such multiple.
pub fn schema(layers: u16, layer_block_bytes: usize) -> KvSchema {
    assert!(
        layer_block_bytes.is_multiple_of(BYTES_PER_TOKEN) && layer_block_bytes > 0,
        "{layer_block_bytes} is no multiple of {BYTES_PER_TOKEN}"
    );
    KvSchema {
        model: "faults".to_owned(),
        weights_sha256: [3; 32],
        tokenizer_sha256: [4; 32],
        adapter_sha256: None,
        layers,
        kv_heads: 1,
        head_dim: 64,
        block_tokens: (layer_block_bytes / BYTES_PER_TOKEN) as u16,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 10_000.0,
        rope_dims: 64,
        rope_style: RopeStyle::Halves,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "faults/1".to_owned(),
    }
}

/// A tenant of that name.
///
/// # Panics
/// When no tenant can have it.
pub fn tenant(name: &str) -> Tenant {
    match Tenant::new(name) {
        Some(tenant) => tenant,
        None => panic!("{name:?} is no tenant's name"),
    }
}

/// The names of `blocks` blocks of a prompt made from `seed`.
pub fn chain(seed: u64, blocks: usize) -> Vec<BlockHash> {
    // Two tokens a block say seed and place; names do not depend on how many tokens a schema's block has.
    let tokens: Vec<u32> = (0..blocks as u64)
        .flat_map(|block| {
            let mut state = seed ^ block.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            [next(&mut state) as u32, next(&mut state) as u32]
        })
        .collect();
    block_hashes(&tokens, 2, &ExtraKeys::none())
}

/// A tenant's blocks: a chain under a schema, and the bytes that belong under each key.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// Whose they are.
    pub tenant: Tenant,
    /// What they look like.
    pub schema: KvSchema,
    /// Under which namespace they are found.
    pub namespace: NamespaceId,
    /// Their names, from the first.
    pub chain: Vec<BlockHash>,
}

impl Corpus {
    /// `blocks` blocks for `tenant`, named by `seed`.
    pub fn new(tenant_name: &str, schema: &KvSchema, seed: u64, blocks: usize) -> Self {
        let tenant = tenant(tenant_name);
        Self {
            namespace: NamespaceId::new(&tenant, schema),
            tenant,
            schema: schema.clone(),
            chain: chain(seed, blocks),
        }
    }

    /// Every layer block: block after block, its layers rising.
    pub fn keys(&self) -> impl Iterator<Item = LayerBlockKey> {
        self.chain.iter().flat_map(|&hash| self.layers_of(hash))
    }

    /// The layer blocks of one block.
    pub fn layers_of(&self, hash: BlockHash) -> impl Iterator<Item = LayerBlockKey> + use<> {
        let block = BlockKey {
            namespace: self.namespace,
            hash,
        };
        (0..self.schema.layers).map(move |layer| block.layer(layer))
    }

    /// The one right payload of `key`.
    pub fn payload(&self, key: LayerBlockKey) -> Bytes {
        self.payload_of(key, 0)
    }

    /// What `key` would hold in another life of the world: right in form, wrong as an answer for any generation but 0.
    pub fn payload_of(&self, key: LayerBlockKey, generation: u32) -> Bytes {
        payload(&self.tenant, key, generation, self.schema.layer_block_bytes())
    }

    /// Whether `bytes` are what was put under `key`.
    pub fn is_right(&self, key: LayerBlockKey, bytes: &[u8]) -> bool {
        self.payload(key) == bytes
    }
}

/// The keyed stream: `bytes` bytes that follow from what they belong to.
pub fn payload(tenant: &Tenant, key: LayerBlockKey, generation: u32, bytes: usize) -> Bytes {
    let mut state = 0x6B76_6173_6972_0001 ^ bytes as u64;
    // Not by the key's own encoding: that is one of the things that are tested with these bytes.
    let parts: [&[u8]; 5] = [
        tenant.as_str().as_bytes(),
        key.namespace.as_bytes(),
        key.hash.as_bytes(),
        &key.layer.to_le_bytes(),
        &generation.to_le_bytes(),
    ];
    for part in parts {
        for word in part.chunks(8) {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            state ^= u64::from_le_bytes(padded);
            state = next(&mut state);
        }
    }
    let mut out = Vec::with_capacity(bytes.next_multiple_of(8));
    while out.len() < bytes {
        out.extend_from_slice(&next(&mut state).to_le_bytes());
    }
    out.truncate(bytes);
    Bytes::from(out)
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn payloads_follow_from_everything_they_belong_to() {
        let schema = schema(3, 1024);
        let corpora = [
            Corpus::new("a", &schema, 1, 4),
            Corpus::new("b", &schema, 1, 4),
            Corpus::new("a", &schema, 2, 4),
        ];
        let mut seen = HashSet::new();
        for corpus in &corpora {
            for key in corpus.keys() {
                for generation in 0..2 {
                    let payload = corpus.payload_of(key, generation);
                    assert_eq!(payload.len(), schema.layer_block_bytes());
                    assert!(seen.insert(payload), "{key:?}, generation {generation}");
                }
                assert!(corpus.is_right(key, &corpus.payload(key)));
                let mut wrong = corpus.payload(key).to_vec();
                wrong[1023] ^= 1;
                assert!(!corpus.is_right(key, &wrong));
            }
        }
        assert_eq!(seen.len(), 3 * 4 * 3 * 2);
    }
}
