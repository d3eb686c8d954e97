//! Blocks of seeded random bytes, complete with hashes and checksums.

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum, Dtype, ExtraKeys, KvSchema, RopeStyle, block_hashes};
use kvasir_client::LayerBlock;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A chain of blocks that some model could have made.
#[derive(Clone, Debug)]
pub struct Blocks {
    /// Names of the blocks, from the first.
    pub chain: Vec<BlockHash>,
    /// All layer blocks: layer after layer, inside a layer in the order of the chain.
    pub layer_blocks: Vec<LayerBlock>,
}

impl Blocks {
    /// `count` blocks for `schema`; the same seed gives the same bytes.
    pub fn random(seed: u64, schema: &KvSchema, count: usize) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let block_tokens = usize::from(schema.block_tokens);
        let tokens: Vec<u32> = (0..count * block_tokens)
            .map(|_| random.random_range(0..50_000))
            .collect();
        let chain = block_hashes(&tokens, block_tokens, &ExtraKeys::default());
        let mut layer_blocks = Vec::new();
        for layer in 0..schema.layers {
            for hash in &chain {
                let mut payload = vec![0; schema.layout().bytes()];
                random.fill(&mut payload[..]);
                layer_blocks.push(LayerBlock {
                    hash: *hash,
                    layer,
                    checksum: Checksum::of(&payload),
                    payload: Bytes::from(payload),
                });
            }
        }
        Self { chain, layer_blocks }
    }
}

/// The schema of a model that is small enough to send around: 2 layers, 2 KV heads of 8, 4 tokens per block.
pub fn small_schema() -> KvSchema {
    KvSchema {
        model: "small".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: 2,
        kv_heads: 2,
        head_dim: 8,
        block_tokens: 4,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 10_000.0,
        rope_dims: 8,
        rope_style: RopeStyle::Interleaved,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "testkit/1".to_owned(),
    }
}
