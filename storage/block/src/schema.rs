//! Schemas and namespaces: everything that changes the bytes of a block.

use std::fmt;

use crate::{
    BlockHash, Dtype, LayerBlockLayout,
    canonical::FieldHasher,
    hash_chain::hex,
    planted::{Bug, planted},
};

/// Style of the rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeStyle {
    /// Rotates pairs `(2i, 2i + 1)`, as llama GGUF files want.
    Interleaved,
    /// Rotates pairs `(i, i + dims / 2)`, as Hugging Face checkpoints want.
    Halves,
}

impl RopeStyle {
    /// Name used on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interleaved => "interleaved",
            Self::Halves => "halves",
        }
    }

    /// The style called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Interleaved, Self::Halves]
            .into_iter()
            .find(|style| style.name() == name)
    }
}

/// Every field that changes the bytes of a KV block. Two workers that differ in any field never share a block.
#[derive(Clone, Debug, PartialEq)]
pub struct KvSchema {
    /// Model name.
    pub model: String,
    /// SHA-256 of the weights file.
    pub weights_sha256: [u8; 32],
    /// SHA-256 over the tokenizer's vocabulary and merges.
    pub tokenizer_sha256: [u8; 32],
    /// SHA-256 of an adapter, `None` for none.
    pub adapter_sha256: Option<[u8; 32]>,
    /// Transformer layers.
    pub layers: u16,
    /// KV heads per layer.
    pub kv_heads: u16,
    /// Elements per key or value row.
    pub head_dim: u16,
    /// Tokens per block.
    pub block_tokens: u16,
    /// Element type of K and V.
    pub dtype: Dtype,
    /// Attention kind; `"full"` is causal attention over the whole context.
    pub attention: String,
    /// Rotary base.
    pub rope_theta: f32,
    /// Rotated elements per row.
    pub rope_dims: u16,
    /// How pairs are chosen.
    pub rope_style: RopeStyle,
    /// Scaling rule, `"none"` or a canonical description.
    pub rope_scaling: String,
    /// Tensor-parallel rank of the writer.
    pub tp_rank: u16,
    /// Tensor-parallel world size.
    pub tp_world: u16,
    /// How the forward pass computes: kernel family and version. Two families round differently.
    pub numerics: String,
}

/// A schema no store can serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("schema field {field} is {found}: {expected}")]
pub struct InvalidSchema {
    /// Name of the field, as in the proto.
    pub field: &'static str,
    /// What it holds.
    pub found: String,
    /// What it must hold.
    pub expected: &'static str,
}

impl KvSchema {
    /// Most bytes of one layer block; bounds every buffer that is sized by a schema from the wire.
    pub const LAYER_BLOCK_BYTES_MAX: usize = 16 << 20;

    /// Hash scheme of the token-block chain.
    pub const HASH_SCHEME: &'static str = "sha256_cbor";

    /// Where rows lie inside a layer block.
    pub const fn layout(&self) -> LayerBlockLayout {
        LayerBlockLayout {
            kv_heads: self.kv_heads as usize,
            head_dim: self.head_dim as usize,
            block_tokens: self.block_tokens as usize,
            dtype: self.dtype,
        }
    }

    /// Bytes of one layer block.
    pub const fn layer_block_bytes(&self) -> usize {
        self.layout().bytes()
    }

    /// Bytes of one block over all layers.
    pub const fn block_bytes(&self) -> usize {
        self.layer_block_bytes() * self.layers as usize
    }

    /// Checks the ranges that sizes and loops rely on.
    ///
    /// # Errors
    /// [`InvalidSchema`] with the first field that is out of range.
    pub fn validate(&self) -> Result<(), InvalidSchema> {
        let positive = [
            ("layers", self.layers),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("block_tokens", self.block_tokens),
            ("tp_world", self.tp_world),
        ];
        for (field, value) in positive {
            if value == 0 {
                return Err(InvalidSchema {
                    field,
                    found: "0".to_owned(),
                    expected: "must be at least 1",
                });
            }
        }
        if self.model.is_empty() {
            return Err(InvalidSchema {
                field: "model",
                found: "empty".to_owned(),
                expected: "must name the model",
            });
        }
        if self.tp_rank >= self.tp_world {
            return Err(InvalidSchema {
                field: "tp_rank",
                found: self.tp_rank.to_string(),
                expected: "must be below tp_world",
            });
        }
        // In u64: three u16 and a few constants cannot overflow it, as they could a 32-bit usize.
        let bytes = 2
            * u64::from(self.kv_heads)
            * u64::from(self.head_dim)
            * u64::from(self.block_tokens)
            * self.dtype.bytes() as u64;
        if bytes > Self::LAYER_BLOCK_BYTES_MAX as u64 {
            return Err(InvalidSchema {
                field: "block_tokens",
                found: format!("{} ({bytes} bytes per layer block)", self.block_tokens),
                expected: "a layer block may have at most 16 MiB",
            });
        }
        Ok(())
    }

    /// The fingerprint: SHA-256 of the canonical, length-prefixed encoding of all fields.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = FieldHasher::new("kvasir.schema.v1");
        for (name, value) in self.fields() {
            hasher.field(name, &value);
        }
        hasher.finish()
    }

    /// Names what turns tokens into keys and queries: weights, rope, shape. What only changes how blocks are cut, named or
    /// rounded is left out, so that what was learnt about a model's keys (a sketch basis) outlives a change of it.
    pub fn model_fingerprint(&self) -> [u8; 32] {
        const LEFT_OUT: [&str; 7] = [
            "model",
            "tokenizer_sha256",
            "block_tokens",
            "dtype",
            "numerics",
            "layout",
            "hash_scheme",
        ];
        let mut hasher = FieldHasher::new("kvasir.model.v1");
        for (name, value) in self.fields() {
            if !LEFT_OUT.contains(&name) {
                hasher.field(name, &value);
            }
        }
        hasher.finish()
    }

    /// Name of the first field in which two schemas differ, or `None` if they are the same.
    pub fn first_difference(&self, other: &Self) -> Option<&'static str> {
        self.fields()
            .into_iter()
            .zip(other.fields())
            .find(|(a, b)| a != b)
            .map(|((name, _), _)| name)
    }

    /// All fields, canonically encoded. Destructured so that a new field cannot be forgotten.
    fn fields(&self) -> Vec<(&'static str, Vec<u8>)> {
        let Self {
            model,
            weights_sha256,
            tokenizer_sha256,
            adapter_sha256,
            layers,
            kv_heads,
            head_dim,
            block_tokens,
            dtype,
            attention,
            rope_theta,
            rope_dims,
            rope_style,
            rope_scaling,
            tp_rank,
            tp_world,
            numerics,
        } = self;
        vec![
            ("model", model.as_bytes().to_vec()),
            ("weights_sha256", weights_sha256.to_vec()),
            ("tokenizer_sha256", tokenizer_sha256.to_vec()),
            (
                "adapter_sha256",
                adapter_sha256.map_or_else(Vec::new, |digest| digest.to_vec()),
            ),
            ("layers", layers.to_le_bytes().to_vec()),
            ("kv_heads", kv_heads.to_le_bytes().to_vec()),
            ("head_dim", head_dim.to_le_bytes().to_vec()),
            ("block_tokens", block_tokens.to_le_bytes().to_vec()),
            ("dtype", dtype.name().as_bytes().to_vec()),
            ("attention", attention.as_bytes().to_vec()),
            ("rope_theta", rope_theta.to_bits().to_le_bytes().to_vec()),
            ("rope_dims", rope_dims.to_le_bytes().to_vec()),
            ("rope_style", rope_style.name().as_bytes().to_vec()),
            ("rope_scaling", rope_scaling.as_bytes().to_vec()),
            ("tp_rank", tp_rank.to_le_bytes().to_vec()),
            ("tp_world", tp_world.to_le_bytes().to_vec()),
            ("numerics", numerics.as_bytes().to_vec()),
            ("layout", LayerBlockLayout::NAME.as_bytes().to_vec()),
            ("hash_scheme", Self::HASH_SCHEME.as_bytes().to_vec()),
        ]
    }
}

/// Owner of a namespace; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tenant(String);

impl Tenant {
    /// The tenant called `name`, or `None` if that is empty.
    pub fn new(name: impl Into<String>) -> Option<Self> {
        let name = name.into();
        (!name.is_empty()).then_some(Self(name))
    }

    /// The tenant's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Id of a namespace: SHA-256 over tenant and schema fingerprint.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceId([u8; 32]);

impl NamespaceId {
    /// The namespace of `tenant` under `schema`.
    pub fn new(tenant: &Tenant, schema: &KvSchema) -> Self {
        let mut hasher = FieldHasher::new("kvasir.namespace.v1");
        if !planted(Bug::TenantDropped) {
            hasher.field("tenant", tenant.as_str().as_bytes());
        }
        hasher.field("schema", &schema.fingerprint());
        Self(hasher.finish())
    }

    /// An id as it was written down.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The id in `bytes`, or `None` unless there are exactly 32.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes to write down.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Key of the block called `hash` in this namespace.
    pub const fn block(self, hash: BlockHash) -> crate::BlockKey {
        crate::BlockKey { namespace: self, hash }
    }
}

impl fmt::Debug for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NamespaceId({}..)", hex(&self.0[..8]))
    }
}

impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

#[cfg(test)]
mod tests;
