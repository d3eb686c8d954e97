//! Schemas: the wire form of everything that changes the bytes of a block.

use bytes::Bytes;
use kvasir_block::{KvSchema, LayerBlockLayout, RopeStyle};

use super::InvalidMessage;
use crate::v1;

impl From<&KvSchema> for v1::KvSchema {
    /// Destructured so that a new field cannot be forgotten.
    fn from(schema: &KvSchema) -> Self {
        let KvSchema {
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
        } = schema;
        Self {
            model: model.clone(),
            weights_sha256: Bytes::copy_from_slice(weights_sha256),
            tokenizer_sha256: Bytes::copy_from_slice(tokenizer_sha256),
            adapter_sha256: adapter_sha256
                .as_ref()
                .map_or_else(Bytes::new, |digest| Bytes::copy_from_slice(digest)),
            layers: u32::from(*layers),
            kv_heads: u32::from(*kv_heads),
            head_dim: u32::from(*head_dim),
            block_tokens: u32::from(*block_tokens),
            dtype: dtype.name().to_owned(),
            attention: attention.clone(),
            rope_theta: *rope_theta,
            rope_dims: u32::from(*rope_dims),
            rope_style: rope_style.name().to_owned(),
            rope_scaling: rope_scaling.clone(),
            layout: LayerBlockLayout::NAME.to_owned(),
            hash_scheme: KvSchema::HASH_SCHEME.to_owned(),
            tp_rank: u32::from(*tp_rank),
            tp_world: u32::from(*tp_world),
            numerics: numerics.clone(),
        }
    }
}

impl TryFrom<v1::KvSchema> for KvSchema {
    type Error = InvalidMessage;

    fn try_from(wire: v1::KvSchema) -> Result<Self, InvalidMessage> {
        if wire.layout != LayerBlockLayout::NAME {
            return Err(only("layout", &wire.layout, LayerBlockLayout::NAME));
        }
        if wire.hash_scheme != Self::HASH_SCHEME {
            return Err(only("hash_scheme", &wire.hash_scheme, Self::HASH_SCHEME));
        }
        // Retrieval computes causal attention over all keys, and refuses another kind, which would be answered wrongly; blocks of
        // layers that see a window are kept like others.
        if wire.attention != "full" && !wire.attention.starts_with("sliding(") {
            let problem = format!("{:?}: this version knows \"full\" and \"sliding(..)\"", wire.attention);
            return Err(InvalidMessage::new("attention", problem));
        }
        let schema = Self {
            model: text("model", wire.model)?,
            weights_sha256: digest("weights_sha256", &wire.weights_sha256)?,
            tokenizer_sha256: digest("tokenizer_sha256", &wire.tokenizer_sha256)?,
            adapter_sha256: match &wire.adapter_sha256 {
                none if none.is_empty() => None,
                bytes => Some(digest("adapter_sha256", bytes)?),
            },
            layers: small("layers", wire.layers)?,
            kv_heads: small("kv_heads", wire.kv_heads)?,
            head_dim: small("head_dim", wire.head_dim)?,
            block_tokens: small("block_tokens", wire.block_tokens)?,
            dtype: wire
                .dtype
                .parse()
                .map_err(|error: kvasir_block::UnknownDtype| InvalidMessage::new("dtype", error.to_string()))?,
            attention: wire.attention,
            rope_theta: wire.rope_theta,
            rope_dims: small("rope_dims", wire.rope_dims)?,
            rope_style: RopeStyle::from_name(&wire.rope_style).ok_or_else(|| {
                InvalidMessage::new(
                    "rope_style",
                    format!("{:?}: use interleaved or halves", wire.rope_style),
                )
            })?,
            rope_scaling: text("rope_scaling", wire.rope_scaling)?,
            tp_rank: small("tp_rank", wire.tp_rank)?,
            tp_world: small("tp_world", wire.tp_world)?,
            numerics: text("numerics", wire.numerics)?,
        };
        schema
            .validate()
            .map_err(|error| InvalidMessage::new(error.field, format!("{}: {}", error.found, error.expected)))?;
        Ok(schema)
    }
}

/// Longest text field: names for people and canonical descriptions, never data.
const TEXT_BYTES_MAX: usize = 1024;

fn text(field: &str, value: String) -> Result<String, InvalidMessage> {
    if value.len() > TEXT_BYTES_MAX {
        return Err(InvalidMessage::new(
            field,
            format!("{} bytes, at most {TEXT_BYTES_MAX}", value.len()),
        ));
    }
    Ok(value)
}

fn digest(field: &str, bytes: &[u8]) -> Result<[u8; 32], InvalidMessage> {
    bytes.try_into().map_err(|_| {
        InvalidMessage::new(
            field,
            format!("a SHA-256 digest has 32 bytes, this has {}", bytes.len()),
        )
    })
}

fn small(field: &str, value: u32) -> Result<u16, InvalidMessage> {
    u16::try_from(value).map_err(|_| InvalidMessage::new(field, format!("{value}: must be at most 65535")))
}

fn only(field: &str, found: &str, known: &str) -> InvalidMessage {
    InvalidMessage::new(
        field,
        format!("{found:?}: {known:?} is the only one this version knows"),
    )
}
