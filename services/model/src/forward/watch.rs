//! What hooks may watch: the queries of a layer, and a forecast of the next layer's.
//!
//! A layer changes the residual stream little, so its input, put through the next layer's norm, query projection and rope,
//! gives about the queries that the next layer will have (InfiniGen, OSDI 2024, prefetches by it). Nothing here flows back
//! into the step: its bits are the same whether someone watches or not.

use kvasir_simd::Activations;

use super::{CpuModel, Scratch, StepError, StepHooks, batch::Plan};
use crate::weights::Columns;

/// Buffers for hooks that watch, reused.
#[derive(Default)]
pub(super) struct WatchScratch {
    /// Queries of one sequence, `[tokens, q_heads, head_dim]`.
    queries: Vec<f32>,
    normed: Vec<f32>,
    quantized: Activations,
    /// The next layer's projection, `[tokens, ..]`.
    projected: Vec<f32>,
}

impl CpuModel {
    /// Hands out what hooks ask to see before attention of `layer`.
    pub(super) fn watch(
        &self,
        plan: &Plan,
        layer: usize,
        q: Columns,
        hooks: &mut dyn StepHooks,
        scratch: &mut Scratch,
    ) -> Result<(), StepError> {
        for (index, sequence) in plan.sequences.iter().enumerate() {
            if hooks.wants_queries(index) {
                let queries = &mut scratch.watch.queries;
                queries.clear();
                sequence
                    .rows
                    .clone()
                    .for_each(|row| queries.extend_from_slice(&scratch.qkv[q.row(row)]));
                hooks.queries(layer, index, queries)?;
            }
            if layer + 1 < self.weights.layers.len() && hooks.wants_predicted(index) {
                self.predict(plan, index, layer + 1, scratch);
                hooks.predicted(layer + 1, index, &scratch.watch.queries)?;
            }
        }
        Ok(())
    }

    /// Queries of `layer` as the residual stream would have them now, into `scratch.watch.queries`.
    fn predict(&self, plan: &Plan, sequence: usize, layer: usize, scratch: &mut Scratch) {
        let (hidden, weights) = (self.shape.hidden, &self.weights.layers[layer]);
        let sequence = &plan.sequences[sequence];
        let watch = &mut scratch.watch;
        let x = &scratch.x[sequence.rows.start * hidden..sequence.rows.end * hidden];
        self.norm(x, &weights.attention_norm, &mut watch.normed);
        watch.quantized.quantize(&watch.normed, hidden, &self.threads);
        let columns = weights
            .qkv
            .matmul_one(0, &watch.quantized, &mut watch.projected, &self.threads);
        watch.queries.clear();
        for (row, position) in (0..sequence.rows.len()).zip(sequence.position..) {
            let q = &mut watch.projected[columns.row(row)];
            self.rotate_queries(layer, position, q);
            watch.queries.extend_from_slice(q);
        }
    }
}
