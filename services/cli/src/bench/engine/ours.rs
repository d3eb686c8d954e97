//! Our forward, driven without a worker.

use std::time::Instant;

use anyhow::Result;
use kvasir_block::LayerBlockLayout;
use kvasir_model::{
    Attention, LoadOptions, Logits, Model, ModelFile, PageId, PagePool, Sampler, Sampling, StepSequence,
};
use kvasir_worker::WorkerConfig;

use super::Case;

pub(super) struct Ours {
    model: Model,
    pool: PagePool,
    pages: Vec<Option<PageId>>,
    /// Prompt tokens per step, as the worker has it.
    chunk: usize,
}

impl Ours {
    pub(super) fn load(file: &ModelFile, threads: usize, tokens_max: usize) -> Result<Self> {
        let worker = WorkerConfig::default();
        let block_tokens = worker.block_tokens;
        let schema = file.schema(block_tokens);
        let layout: LayerBlockLayout = schema.layout();
        let count = tokens_max.div_ceil(usize::from(block_tokens));
        Ok(Self {
            model: Model::load(file, &LoadOptions { threads, block_tokens })?,
            pool: PagePool::new(layout, file.shape().layers, count)?,
            pages: (0..count as u32).map(|page| Some(PageId(page))).collect(),
            chunk: worker.step_tokens_max,
        })
    }

    /// Seconds for the timed part of a case.
    pub(super) fn run(&mut self, case: &Case, tokens: &[u32]) -> Result<f64> {
        let (context, timed) = tokens[..case.context + case.tokens].split_at(case.context);
        self.prefill(context, 0)?;
        let begun = Instant::now();
        if case.decode {
            let mut sampler = Sampler::new(Sampling {
                temperature: 0.0,
                top_p: 1.0,
                seed: 0,
            });
            let mut next = timed[0];
            for step in 0..timed.len() {
                let logits = self.step(&[next], case.context + step, Logits::Last)?;
                next = sampler.sample(&logits);
            }
        } else {
            self.prefill(timed, case.context)?;
        }
        Ok(begun.elapsed().as_secs_f64())
    }

    /// A prompt in steps of the worker's size; logits of the last token only, as a worker wants them.
    fn prefill(&mut self, tokens: &[u32], position: usize) -> Result<()> {
        let steps = tokens.len().div_ceil(self.chunk);
        for (index, chunk) in tokens.chunks(self.chunk).enumerate() {
            let logits = if index + 1 == steps { Logits::Last } else { Logits::None };
            self.step(chunk, position + index * self.chunk, logits)?;
        }
        Ok(())
    }

    fn step(&mut self, tokens: &[u32], position: usize, logits: Logits) -> Result<Vec<f32>> {
        let sequence = StepSequence {
            tokens,
            position,
            pages: &self.pages,
            attention: Attention::Full,
            logits,
        };
        let output = self.model.step(&[sequence], &mut self.pool, &mut ())?;
        Ok(output.rows.into_iter().next().unwrap_or_default())
    }
}
