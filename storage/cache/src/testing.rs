//! What several tests need: a small schema, and payloads that say which block they belong to.

use bytes::Bytes;
use kvasir_block::{Dtype, KvSchema, LayerBlockKey, RopeStyle};

/// 512 bytes per layer block.
pub(crate) fn schema(layers: u16) -> KvSchema {
    KvSchema {
        model: "test".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers,
        kv_heads: 2,
        head_dim: 8,
        block_tokens: 8,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 1e5,
        rope_dims: 8,
        rope_style: RopeStyle::Interleaved,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "test/1".to_owned(),
    }
}

/// The one right payload of `key`: made from the key alone, so that any reader can tell.
pub(crate) fn payload(key: LayerBlockKey, bytes: usize) -> Bytes {
    let mut state = u64::from(crc(&key.to_bytes())) | 1;
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(&(state >> 16).to_le_bytes()[..4]);
    }
    out.truncate(bytes);
    Bytes::from(out)
}

fn crc(bytes: &[u8]) -> u32 {
    kvasir_block::Checksum::of(bytes).to_u32()
}
