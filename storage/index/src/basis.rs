//! The directions in which keys are sketched: per layer and KV head, in the metric of the queries.
//!
//! A sketch keeps `rank` numbers of a key instead of `head_dim`: `z = keys . (k - mean)`. For a query, `y = queries . q`, and
//! `y . z` approximates `q . k - q . mean`. With `M = E[q qT]` over all positions up to the window, the directions are the
//! leading ones of `M^(1/2) (k - mean)`: those along which keys differ as queries see them. Rows are scaled so that each `z`
//! has about unit spread over the calibration text, which is what lets one scale serve a whole block of quantised sketches.
//!
//! A basis belongs to a model, not to a document; it must have seen queries of the whole window, because rotary embedding
//! turns the slow dimensions with the position. [`Moments`] gathers what a basis is made of, [`Streaming`] decides which
//! heads need none, and `FORMAT.md` beside the codec has the bytes of the file.

mod codec;
mod moments;
mod streaming;
mod symmetric;

use sha2::{Digest, Sha256};

use crate::IndexError;

pub use moments::{Calibrated, Moments};
pub use streaming::{OutsideMass, Streaming};

/// Directions of one KV head.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadBasis {
    /// Mean key, `[head_dim]`.
    pub mean: Vec<f32>,
    /// What keys are multiplied by, `[rank, head_dim]`, most important direction first.
    pub keys: Vec<f32>,
    /// What queries are multiplied by, `[rank, head_dim]`.
    pub queries: Vec<f32>,
    /// The head attends to sink and window only: it needs no index. True for whoever attends to at least the first
    /// [`Streaming::SINK`] and the last [`Streaming::WINDOW`] tokens by itself; with fewer, the mark says nothing.
    pub streaming: bool,
}

/// Bases of all heads of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
    /// The model that it was calibrated for: a name of whatever turns tokens into rotated queries and keys (weights, rope,
    /// shape), given by the caller and compared as it is. Kvasir's is `KvSchema::model_fingerprint`.
    pub model: [u8; 32],
    /// Layers of the model.
    pub layers: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Elements per key.
    pub head_dim: usize,
    /// Directions per head.
    pub rank: usize,
    /// `[layers * kv_heads]`, layer after layer.
    pub heads: Vec<HeadBasis>,
}

impl Basis {
    /// Directions that a calibration keeps if not told otherwise: at 4 bits each a sketch has 16 bytes.
    pub const RANK: usize = 32;

    /// Directions of one KV head of one layer.
    ///
    /// # Panics
    /// If there is no such head.
    pub fn head(&self, layer: usize, kv_head: usize) -> &HeadBasis {
        assert!(kv_head < self.kv_heads, "basis: {} KV heads", self.kv_heads);
        &self.heads[layer * self.kv_heads + kv_head]
    }

    /// Heads that need no index.
    pub fn streaming_heads(&self) -> usize {
        self.heads.iter().filter(|head| head.streaming).count()
    }

    /// The name of this basis: SHA-256 of its file. Part of the name of every sketch that is made with it.
    pub fn id(&self) -> [u8; 32] {
        Sha256::digest(self.encode()).into()
    }

    /// Checks that this basis is for the model named `model` with these sizes.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] naming what differs.
    pub fn check(&self, model: &[u8; 32], layers: usize, kv_heads: usize, head_dim: usize) -> Result<(), IndexError> {
        let sizes = [
            ("layers", self.layers, layers),
            ("KV heads", self.kv_heads, kv_heads),
            ("elements per key", self.head_dim, head_dim),
        ];
        for (what, found, expected) in sizes {
            if found != expected {
                return Err(IndexError::Unusable(format!(
                    "the basis has {found} {what}, and the model {expected}: calibrate one for this model"
                )));
            }
        }
        if self.model != *model {
            return Err(IndexError::Unusable(
                "the basis was calibrated for other weights or another rotary embedding: calibrate one for this model"
                    .to_owned(),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
