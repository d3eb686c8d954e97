//! What hooks may watch on a GPU: queries of a layer, a forecast of the next layer's, partials from elsewhere.

use std::ops::Range;

use half::f16;
use kvasir_cuda::{Dtype, Partials, Rows, RowsOut, Sums, linear, merge, rms_norm, round};

use super::{
    GpuModel,
    layout::{RowLayout, SequenceRows},
    pages::DevicePages,
    scratch::{SAMPLED_ROWS, Scratch},
    step_error,
};
use crate::{StepError, StepHooks, forward::check_remote};

/// Partials of a sequence that attends locally: its own, the one from elsewhere, both joined.
pub(super) struct LocalPartials([Partials; 3]);

impl GpuModel {
    /// Hands out what hooks ask to see before attention of `layer`. Each look waits for the device.
    pub(super) fn watch(
        &self,
        layout: &RowLayout,
        layer: usize,
        hooks: &mut dyn StepHooks,
        scratch: &mut Scratch,
    ) -> Result<(), StepError> {
        for (index, sequence) in layout.sequences.iter().enumerate() {
            let wants_queries = hooks.wants_queries(index);
            if sequence.local || wants_queries {
                let queries = self.queries(&scratch.q, sequence)?;
                if sequence.local {
                    hooks.remote_begin(layer, index, &queries)?;
                }
                if wants_queries {
                    hooks.queries(layer, index, &queries)?;
                }
            }
            if layer + 1 < self.weights.layers.len() && hooks.wants_predicted(index) {
                let queries = self.predict(sequence, layer + 1, scratch)?;
                hooks.predicted(layer + 1, index, &queries)?;
            }
        }
        Ok(())
    }

    /// `[tokens, q_heads, head_dim]` of a sequence.
    fn queries(&self, q: &kvasir_cuda::Buffer<u16>, sequence: &SequenceRows) -> Result<Vec<f32>, StepError> {
        let width = self.shape.q_heads * self.shape.head_dim;
        let mut out = Vec::new();
        for rows in [&sequence.prompt, &sequence.sampled] {
            let bits = q
                .download_range(rows.start * width..rows.end * width)
                .map_err(step_error)?;
            out.extend(bits.into_iter().map(|bits| f16::from_bits(bits).to_f32()));
        }
        Ok(out)
    }

    /// Queries of `layer` as the residual stream would have them now. Uses buffers that are free between rope and attention.
    fn predict(&self, sequence: &SequenceRows, layer: usize, scratch: &mut Scratch) -> Result<Vec<f32>, StepError> {
        let weights = &self.weights.layers[layer];
        for (rows, kind) in [(&sequence.prompt, Rows::Many), (&sequence.sampled, Rows::Few)] {
            self.project(rows.clone(), kind, weights, scratch).map_err(step_error)?;
        }
        self.queries(&scratch.attended, sequence)
    }

    fn project(
        &self,
        rows: Range<usize>,
        kind: Rows,
        weights: &super::weights::GpuLayer,
        scratch: &mut Scratch,
    ) -> Result<(), kvasir_cuda::GpuError> {
        let (gpu, epsilon) = (&self.gpu, self.shape.norm_epsilon);
        let norm = &weights.attention_norm;
        rms_norm(
            gpu,
            Dtype::F16,
            &scratch.x,
            norm,
            epsilon,
            rows.clone(),
            &mut scratch.normed,
        )?;
        let sums = Sums::Store(&mut scratch.qkv);
        linear(gpu, kind, &weights.qkv, &scratch.normed, rows.clone(), sums, rows.start)?;
        let pages = None::<&mut kvasir_cuda::Buffer<u16>>;
        self.rope.apply(
            gpu,
            self.kv,
            self.shape.q_heads,
            &scratch.step,
            rows,
            &scratch.qkv,
            &mut scratch.attended,
            pages,
        )
    }

    /// Local attention of the sequences that ask for it, joined with what comes from elsewhere. All of them are launched
    /// before the first wait.
    pub(super) fn attend_locally(
        &self,
        layout: &RowLayout,
        layer: usize,
        pages: &mut DevicePages,
        hooks: &mut dyn StepHooks,
        scratch: &mut Scratch,
        partials: &mut Vec<LocalPartials>,
    ) -> Result<(), StepError> {
        let (gpu, head_dim) = (&self.gpu, self.shape.head_dim);
        let locals = || {
            layout
                .sequences
                .iter()
                .enumerate()
                .filter(|(_, sequence)| sequence.local)
        };
        for (nth, (index, sequence)) in locals().enumerate() {
            let rows = sequence.sampled.clone();
            if rows.len() > SAMPLED_ROWS {
                let problem = format!("sequence {index} attends locally with {} tokens at a time", rows.len());
                return Err(StepError::Invalid(format!("{problem}; a GPU takes {SAMPLED_ROWS}")));
            }
            if partials.len() == nth {
                let heads = rows.len() * self.shape.q_heads;
                let empty = || Partials::empty(gpu, 1, heads, head_dim).map_err(step_error);
                partials.push(LocalPartials([empty()?, empty()?, empty()?]));
            }
            let out = RowsOut::Partial(&mut partials[nth].0[0]);
            let scale = self.shape.softmax_scale();
            scratch
                .decode
                .attend(gpu, &scratch.q, &scratch.step, rows, pages.layer(layer), scale, out)
                .map_err(step_error)?;
        }
        for (nth, (index, sequence)) in locals().enumerate() {
            let [own, other, joined] = &mut partials[nth].0;
            let remote = hooks.remote_finish(layer, index)?;
            let joined = match remote {
                None => &*own,
                Some(remote) => {
                    check_remote(&remote, sequence.sampled.len() * self.shape.q_heads, head_dim)?;
                    other.upload(&remote.o, &remote.lse).map_err(step_error)?;
                    merge(gpu, &[own, other], joined).map_err(step_error)?;
                    &*joined
                }
            };
            let at = sequence.sampled.start * self.shape.q_heads * head_dim;
            round(gpu, Dtype::F16, joined.o(), &mut scratch.attended, at).map_err(step_error)?;
        }
        Ok(())
    }
}
