//! The directions in which keys are sketched: per layer and KV head, in the metric of the queries.
//!
//! A sketch keeps `rank` numbers of a key instead of `head_dim`: `z = keys . (k - mean)`. For a query, `y = queries . q`, and
//! `y . z` approximates `q . k - q . mean`. With `M = E[q qT]` over all positions up to the window, the directions are the
//! leading ones of `M^(1/2) (k - mean)`: those along which keys differ as queries see them. Rows are scaled so that each `z`
//! has about unit spread over the calibration text, which is what lets one scale serve a whole block of quantised sketches.
//!
//! A basis belongs to a model, not to a document; it must have seen queries of the whole window, because rotary embedding
//! turns the slow dimensions with the position.

/// Directions of one KV head.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadBasis {
    /// Mean key, `[head_dim]`.
    pub mean: Vec<f32>,
    /// What keys are multiplied by, `[rank, head_dim]`, most important direction first.
    pub keys: Vec<f32>,
    /// What queries are multiplied by, `[rank, head_dim]`.
    pub queries: Vec<f32>,
    /// The head attends to sink and window only: it needs no index.
    pub streaming: bool,
}

/// Bases of all heads of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Basis {
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
    /// Directions of one KV head of one layer.
    ///
    /// # Panics
    /// If there is no such head.
    pub fn head(&self, layer: usize, kv_head: usize) -> &HeadBasis {
        assert!(kv_head < self.kv_heads, "basis: {} KV heads", self.kv_heads);
        &self.heads[layer * self.kv_heads + kv_head]
    }
}
