//! A small namespace, as the stores that break things have it.

use kvasir_block::{BlockHash, Dtype, KvSchema, NamespaceId, RopeStyle, Tenant};
use kvasir_client::{BulkOffer, Namespace};

/// Bytes of a layer block.
pub(crate) const BYTES: usize = 64;
pub(crate) const CHAIN: [BlockHash; 2] = [BlockHash::from_bytes([1; 32]), BlockHash::from_bytes([2; 32])];

pub(crate) fn schema() -> KvSchema {
    KvSchema {
        model: "test".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: 2,
        kv_heads: 1,
        head_dim: 4,
        block_tokens: 4,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 1e5,
        rope_dims: 4,
        rope_style: RopeStyle::Halves,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "test/1".to_owned(),
    }
}

pub(crate) fn tenant() -> Tenant {
    Tenant::new("default").expect("not empty")
}

/// Open at a store that offers `bulk`.
pub(crate) fn namespace_at(bulk: Option<BulkOffer>) -> Namespace {
    Namespace {
        id: NamespaceId::new(&tenant(), &schema()),
        schema: schema(),
        layer_block_bytes: BYTES,
        message_bytes_max: 1 << 20,
        hashes_max: 100,
        epoch: 1,
        basis: None,
        bulk,
    }
}

pub(crate) fn namespace() -> Namespace {
    namespace_at(None)
}
