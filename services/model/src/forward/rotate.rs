//! Queries and keys on their way from the projection to attention: normed where the architecture does that, then rotated.

use kvasir_block::RopeStyle;
use kvasir_simd::{RopeTable, rms_norm};

use super::CpuModel;
use crate::ModelShape;

/// Rotary tables of a model.
pub(super) struct Ropes {
    /// Of layers that attend to the whole context.
    whole: RopeTable,
    /// Of layers that see a window, where there are such.
    window: Option<RopeTable>,
}

impl Ropes {
    pub(super) fn new(shape: &ModelShape) -> Self {
        let table = |theta| RopeTable::new(shape.context_tokens_max, shape.rope_dims, theta);
        Self {
            whole: table(shape.rope_theta),
            window: shape.sliding().map(|sliding| table(sliding.rope_theta)),
        }
    }
}

impl CpuModel {
    /// Makes a token's projected queries `[q_heads, head_dim]` those that attend, in place.
    pub(super) fn rotate_queries(&self, layer: usize, position: usize, queries: &mut [f32]) {
        let norms = self.weights.layers[layer].further_norms.as_ref();
        self.norm_and_rotate(layer, position, norms.map(|norms| &norms.query[..]), queries);
    }

    /// The same for keys, `[kv_heads, head_dim]`.
    pub(super) fn rotate_keys(&self, layer: usize, position: usize, keys: &mut [f32]) {
        let norms = self.weights.layers[layer].further_norms.as_ref();
        self.norm_and_rotate(layer, position, norms.map(|norms| &norms.key[..]), keys);
    }

    fn norm_and_rotate(&self, layer: usize, position: usize, weight: Option<&[f32]>, rows: &mut [f32]) {
        let head_dim = self.shape.head_dim;
        if let Some(weight) = weight {
            let plain = rows.to_vec();
            rms_norm(&plain, weight, self.shape.norm_epsilon, rows);
        }
        let rope = match self.shape.window(layer) {
            Some(_) => self.ropes.window.as_ref().unwrap_or(&self.ropes.whole),
            None => &self.ropes.whole,
        };
        match self.shape.rope_style() {
            RopeStyle::Interleaved => rope.rotate_interleaved(rows, head_dim, position),
            RopeStyle::Halves => rope.rotate_halves(rows, head_dim, position),
        }
    }
}
