//! Models that no file holds: a shape, and weights of noise. For measurements of speed at sizes whose weights are not at hand;
//! what such a model says means nothing.

use kvasir_block::{Dtype, KvSchema, RopeStyle};
use sha2::{Digest, Sha256};

use crate::{Architecture, ModelShape};

/// A shape, and what its weights of noise are made from.
#[derive(Clone, Debug, PartialEq)]
pub struct MadeUp {
    /// Public name; a part of the identity of its KV.
    pub name: String,
    /// Sizes.
    pub shape: ModelShape,
    /// Of the noise.
    pub seed: u64,
    /// About the standard deviation of a query's attention scores, in nats: how peaked attention is. Of normal scores 90 % of the
    /// softmax mass lies on 61 % of the keys if it is 1, on 4.3 % if it is 3, on 0.33 % if it is 4.
    pub score_deviation: f32,
}

impl MadeUp {
    /// The shape of Llama-3-8B, without weights, for contexts of up to `context_tokens_max` tokens.
    pub fn llama_3_8b(context_tokens_max: usize, seed: u64, score_deviation: f32) -> Self {
        Self {
            name: "made-up-llama-3-8b".to_owned(),
            shape: ModelShape {
                architecture: Architecture::Llama,
                layers: 32,
                hidden: 4096,
                feed_forward: 14_336,
                q_heads: 32,
                kv_heads: 8,
                head_dim: 128,
                vocab: 128_256,
                context_tokens_max,
                rope_theta: 500_000.0,
                rope_dims: 128,
                norm_epsilon: 1e-5,
            },
            seed,
            score_deviation,
        }
    }

    /// Identity of its KV blocks. The weights' hash is that of what they are made from.
    pub(crate) fn schema(&self, block_tokens: u16, numerics: String) -> KvSchema {
        let narrow = |size: usize| u16::try_from(size).unwrap_or(u16::MAX);
        let shape = &self.shape;
        let mut sha = Sha256::new();
        sha.update(b"noise/1");
        for number in [
            shape.layers,
            shape.hidden,
            shape.feed_forward,
            shape.q_heads,
            shape.kv_heads,
            shape.head_dim,
            shape.vocab,
            shape.rope_dims,
        ] {
            sha.update((number as u64).to_le_bytes());
        }
        sha.update(self.seed.to_le_bytes());
        sha.update(self.score_deviation.to_le_bytes());
        KvSchema {
            model: self.name.clone(),
            weights_sha256: sha.finalize().into(),
            tokenizer_sha256: [0; 32],
            adapter_sha256: None,
            layers: narrow(shape.layers),
            kv_heads: narrow(shape.kv_heads),
            head_dim: narrow(shape.head_dim),
            block_tokens,
            dtype: Dtype::F16,
            attention: "full".to_owned(),
            rope_theta: shape.rope_theta,
            rope_dims: narrow(shape.rope_dims),
            rope_style: RopeStyle::Interleaved,
            rope_scaling: "none".to_owned(),
            tp_rank: 0,
            tp_world: 1,
            numerics,
        }
    }
}
