//! One step on the device.

use std::{ops::Range, sync::Arc};

use kvasir_cuda::{
    Dtype, GpuError, KvView, Prefill, PrefillSequence, Query, Rows, RowsOut, StepRow, Sums, embed, linear, rms_norm,
    silu_mul,
};

use super::{
    GpuModel,
    layout::{RowLayout, SequenceRows},
    output::drawn_rows,
    pages::DevicePages,
    scratch::{Room, SAMPLED_ROWS, Scratch},
    sending::{Sending, Wanted},
    sparse::GpuSparse,
    step_error,
};
use crate::{PagePool, StepError, StepHooks, StepOutput, StepSequence, forward::Plan};

/// Fewest rows and tables that buffers are made for.
const ROWS_MIN: usize = 256;
const TABLES_MIN: usize = 32;

const ELSEWHERE: &str = "the pool lies in the host's memory, and the model on a GPU: make it with Model::pool";

impl GpuModel {
    pub(crate) fn step(
        &mut self,
        batch: &[StepSequence<'_>],
        pool: &mut PagePool,
        hooks: &mut dyn StepHooks,
    ) -> Result<StepOutput, StepError> {
        let sparse_from = self.sparse.as_ref().map(GpuSparse::from);
        let plan = Plan::new(batch, pool, &self.shape, &self.schema, 1, sparse_from)?;
        let layout = RowLayout::new(batch, &plan, pool.layout().block_tokens)?;
        let vocab = self.shape.vocab;
        if pool.device_mut().is_none() {
            return Err(StepError::Invalid(ELSEWHERE.to_owned()));
        }
        if layout.rows.is_empty() {
            return Ok(StepOutput::empty(vocab, batch.len()));
        }
        let draws = drawn_rows(batch, &layout);
        let mut scratch = self.scratch_for(&layout, draws.len(), pool.pages())?;
        let mut sparse = self.sparse.take();
        let set = scratch.draws.set(&self.gpu, &draws).map_err(step_error);
        let done = set.and_then(|()| self.compute(&layout, draws.len(), pool, hooks, sparse.as_mut(), &mut scratch));
        let output = done.and_then(|()| {
            self.output(batch, &layout, draws.len(), &mut scratch)
                .map_err(step_error)
        });
        (self.sparse, self.scratch) = (sparse, Some(scratch));
        if let Some(pages) = pool.device_mut() {
            pages.end_sending();
        }
        output
    }

    /// Sends the wanted pages as they are, and tells hooks of each layer.
    pub(crate) fn send_pages(&self, pool: &mut PagePool, hooks: &mut dyn StepHooks) -> Result<(), StepError> {
        let Some(pages) = pool.device_mut() else {
            return Err(StepError::Invalid(ELSEWHERE.to_owned()));
        };
        let mut sending = Sending::new(pages.begin_sending(hooks.wanted_pages()).map_err(step_error)?);
        let layers = self.weights.layers.len();
        let sent = (0..layers).try_for_each(|layer| {
            let mut wanted = Wanted { pool, hooks };
            sending.send(layer, &mut wanted)?;
            sending.tell_landed(layer + 1, &mut wanted);
            Ok(())
        });
        // Also where the device failed: who was not told of a layer waits for it.
        sending.tell_all(layers, &mut Wanted { pool, hooks });
        if let Some(pages) = pool.device_mut() {
            pages.end_sending();
        }
        sent
    }

    /// Buffers with room for the step; a step that needs more than any before gets new ones.
    fn scratch_for(&mut self, layout: &RowLayout, drawn: usize, pages: usize) -> Result<Scratch, StepError> {
        let needed = Room {
            rows: layout.rows.len().next_power_of_two().max(ROWS_MIN),
            sampled: layout.sampled().len().next_power_of_two(),
            drawn: drawn.next_power_of_two(),
            tables: layout.tables.len().next_power_of_two().max(TABLES_MIN),
            pages,
        };
        let old = self.scratch.take();
        let had = old.as_ref().map(|scratch| scratch.room);
        if let (Some(scratch), Some(had)) = (old, had)
            && had.rows >= needed.rows
            && had.sampled >= needed.sampled
            && had.drawn >= needed.drawn
            && had.tables >= needed.tables
            && had.pages == pages
        {
            return Ok(scratch);
        }
        let room = had.map_or(needed, |had| Room {
            rows: needed.rows.max(had.rows),
            sampled: needed.sampled.max(had.sampled),
            drawn: needed.drawn.max(had.drawn),
            tables: needed.tables.max(had.tables),
            pages,
        });
        let page_tokens = usize::from(self.schema.block_tokens);
        Scratch::new(&self.gpu, &self.shape, self.kv, page_tokens, room).map_err(step_error)
    }

    fn compute(
        &self,
        layout: &RowLayout,
        drawn: usize,
        pool: &mut PagePool,
        hooks: &mut dyn StepHooks,
        mut sparse: Option<&mut GpuSparse>,
        scratch: &mut Scratch,
    ) -> Result<(), StepError> {
        let sequences = &layout.sequences;
        let plain = layout.prompt == 0
            && layout.rows.len() <= SAMPLED_ROWS
            && hooks.wanted_pages().is_empty()
            && (0..sequences.len()).all(|index| !sequences[index].local && !hooks.wants_queries(index));
        if plain {
            return self.sampled_alone(layout, drawn, pool, hooks, scratch);
        }
        scratch
            .step
            .set(&self.gpu, &layout.rows, &layout.tables)
            .map_err(step_error)?;
        let device = |pool: &mut PagePool, act: &mut dyn FnMut(&mut DevicePages) -> Result<(), GpuError>| {
            pool.device_mut().map_or(Ok(()), act).map_err(step_error)
        };
        let mut any = false;
        device(pool, &mut |pages| {
            any = pages.begin_sending(hooks.wanted_pages())?;
            Ok(())
        })?;
        let mut sending = Sending::new(any);
        self.embed(layout.rows.len(), scratch).map_err(step_error)?;
        let layers = self.weights.layers.len();
        let mut partials = Vec::new();
        for layer in 0..layers {
            let last = layer + 1 == layers;
            hooks.before_layer(layer, pool)?;
            device(pool, &mut |pages| {
                pages.join()?;
                self.before_attention(layer, layout.prompt, layout.rows.len(), pages, scratch)
            })?;
            sending.send(layer, &mut Wanted { pool, hooks })?;
            self.watch(layout, layer, hooks, scratch)?;
            device(pool, &mut |pages| {
                if !last {
                    self.attend_prompts(layout, layer, pages, sparse.as_deref_mut(), scratch)?;
                }
                let alone = layout.sequences.iter().filter(|sequence| !sequence.local);
                alone
                    .map(|sequence| sequence.sampled.clone())
                    .try_for_each(|rows| self.attend_sampled(rows, layer, pages, scratch))
            })?;
            if let Some(pages) = pool.device_mut() {
                self.attend_locally(layout, layer, pages, hooks, scratch, &mut partials)?;
            }
            let prompt = if last { 0 } else { layout.prompt };
            self.after_attention(layer, layout.prompt, prompt, layout.rows.len(), scratch)
                .map_err(step_error)?;
            // What was sent is told as it arrives; nobody waits for it but the step's end.
            sending.tell_landed(layer + 1, &mut Wanted { pool, hooks });
        }
        self.finish(layout.sampled(), drawn, scratch).map_err(step_error)?;
        let waited = sending.tell_all(layers, &mut Wanted { pool, hooks });
        if !waited.is_zero() {
            hooks.waited_for_room(waited);
        }
        Ok(())
    }

    /// A step of sampled rows alone: recorded once for each number of rows that is a power of two, and replayed.
    fn sampled_alone(
        &self,
        layout: &RowLayout,
        drawn: usize,
        pool: &mut PagePool,
        hooks: &mut dyn StepHooks,
        scratch: &mut Scratch,
    ) -> Result<(), StepError> {
        let layers = self.weights.layers.len();
        for layer in 0..layers {
            hooks.before_layer(layer, pool)?;
        }
        if let Some(pages) = pool.device_mut() {
            self.replay(layout, drawn, pages, scratch).map_err(step_error)?;
        }
        (0..layers).for_each(|layer| hooks.after_layer(layer, pool));
        Ok(())
    }

    fn replay(
        &self,
        layout: &RowLayout,
        drawn: usize,
        pages: &mut DevicePages,
        scratch: &mut Scratch,
    ) -> Result<(), GpuError> {
        let count = layout.rows.len().next_power_of_two().min(scratch.room.sampled);
        // A graph draws from all of its rows or from none.
        let drawn = if drawn > 0 { count.min(scratch.room.drawn) } else { 0 };
        let mut rows = layout.rows.clone();
        rows.resize(count, StepRow::default());
        scratch.step.set(&self.gpu, &rows, &layout.tables)?;
        pages.join()?;
        if !scratch
            .recorded_over
            .as_ref()
            .is_some_and(|over| Arc::ptr_eq(over, pages.identity()))
        {
            scratch.graphs.clear();
            scratch.recorded_over = Some(Arc::clone(pages.identity()));
        }
        if let Some(graph) = scratch.graphs.get(&(count, drawn)) {
            return graph.replay();
        }
        // Kernels are loaded by their first launch, which cannot be recorded.
        if scratch.launched.insert((count, drawn)) {
            return self.sampled_rows(count, drawn, pages, scratch);
        }
        let graph = self
            .gpu
            .clone()
            .record(|_| self.sampled_rows(count, drawn, pages, scratch))?;
        graph.replay()?;
        scratch.graphs.insert((count, drawn), graph);
        Ok(())
    }

    fn sampled_rows(
        &self,
        count: usize,
        drawn: usize,
        pages: &mut DevicePages,
        scratch: &mut Scratch,
    ) -> Result<(), GpuError> {
        self.embed(count, scratch)?;
        for layer in 0..self.weights.layers.len() {
            self.before_attention(layer, 0, count, pages, scratch)?;
            self.attend_sampled(0..count, layer, pages, scratch)?;
            self.after_attention(layer, 0, 0, count, scratch)?;
        }
        self.finish(0..count, drawn, scratch)
    }

    fn embed(&self, rows: usize, scratch: &mut Scratch) -> Result<(), GpuError> {
        embed(
            &self.gpu,
            &self.weights.embedding,
            &scratch.step,
            0..rows,
            &mut scratch.x,
        )
    }

    /// Norm, projections, rope and the way into pages. Rows below `prompt` are prompt rows.
    fn before_attention(
        &self,
        layer: usize,
        prompt: usize,
        rows: usize,
        pages: &mut DevicePages,
        scratch: &mut Scratch,
    ) -> Result<(), GpuError> {
        let (gpu, weights) = (&self.gpu, &self.weights.layers[layer]);
        let (norm, epsilon) = (&weights.attention_norm, self.shape.norm_epsilon);
        rms_norm(gpu, Dtype::F16, &scratch.x, norm, epsilon, 0..rows, &mut scratch.normed)?;
        for (rows, kind) in kinds(0, prompt, rows) {
            let sums = Sums::Store(&mut scratch.qkv);
            linear(gpu, kind, &weights.qkv, &scratch.normed, rows.clone(), sums, rows.start)?;
        }
        self.rope.apply(
            gpu,
            self.kv,
            self.shape.q_heads,
            &scratch.step,
            0..rows,
            &scratch.qkv,
            &mut scratch.q,
            Some(pages.layer(layer)),
        )
    }

    /// Dense prompts of all sequences in one launch; a sparse one has lists of its own.
    fn attend_prompts(
        &self,
        layout: &RowLayout,
        layer: usize,
        pages: &mut DevicePages,
        sparse: Option<&mut GpuSparse>,
        scratch: &mut Scratch,
    ) -> Result<(), GpuError> {
        let (width, scale) = (self.shape.q_heads * self.shape.head_dim, self.shape.softmax_scale());
        let pool = &*pages.layer(layer);
        let prompts = || {
            let all = layout.sequences.iter().enumerate();
            all.filter(|(_, sequence)| !sequence.prompt.is_empty())
        };
        let prefilled = |(index, sequence): (usize, &SequenceRows)| {
            Ok::<_, GpuError>(PrefillSequence {
                rows: sequence.rows(),
                view: KvView::of_step(self.kv, pool, &scratch.step, index, sequence.prompt_end)?,
            })
        };
        let prefill = Prefill {
            rows: layout.prompt,
            q_heads: self.shape.q_heads,
            scale,
            products: self.products,
        };
        let (out, lse) = (&mut scratch.attended, &mut scratch.lse);
        let query = Query::rows(&scratch.q, Dtype::F16, 0..layout.prompt, width)?;
        let dense = prompts().filter(|(_, sequence)| sequence.sparse.is_empty());
        let dense = dense.map(prefilled).collect::<Result<Vec<_>, _>>()?;
        prefill.attend_batch(&self.gpu, query, &dense, &self.dense, out, 0, lse)?;
        let Some(sparse) = sparse else { return Ok(()) };
        for (index, sequence) in prompts().filter(|(_, sequence)| !sequence.sparse.is_empty()) {
            let one = prefilled((index, sequence))?;
            let own = Query::rows(&scratch.q, Dtype::F16, sequence.rows(), width)?;
            let rows = sparse.rows(sequence);
            let tiles = sparse.planner.build(&self.gpu, layer, own, &rows, &one.view, scale)?;
            prefill.attend_batch(&self.gpu, query, &[one], tiles, out, 0, lse)?;
        }
        Ok(())
    }

    fn attend_sampled(
        &self,
        rows: Range<usize>,
        layer: usize,
        pages: &mut DevicePages,
        scratch: &mut Scratch,
    ) -> Result<(), GpuError> {
        for first in rows.clone().step_by(SAMPLED_ROWS) {
            let some = first..rows.end.min(first + SAMPLED_ROWS);
            scratch.decode.attend(
                &self.gpu,
                &scratch.q,
                &scratch.step,
                some,
                pages.layer(layer),
                self.shape.softmax_scale(),
                RowsOut::Rounded(&mut scratch.attended),
            )?;
        }
        Ok(())
    }

    /// Attention's output projection and the feed-forward, each added to the residual stream; of the prompt rows, which end
    /// at `end`, the last `prompt`.
    fn after_attention(
        &self,
        layer: usize,
        end: usize,
        prompt: usize,
        rows: usize,
        scratch: &mut Scratch,
    ) -> Result<(), GpuError> {
        let (gpu, weights, inner) = (&self.gpu, &self.weights.layers[layer], self.shape.feed_forward);
        let first = end - prompt;
        for (rows, kind) in kinds(first, end, rows) {
            let (to, sums) = (rows.start, Sums::Add(&mut scratch.x));
            linear(gpu, kind, &weights.attention_output, &scratch.attended, rows, sums, to)?;
        }
        let (norm, epsilon) = (&weights.feed_forward_norm, self.shape.norm_epsilon);
        rms_norm(
            gpu,
            Dtype::F16,
            &scratch.x,
            norm,
            epsilon,
            first..rows,
            &mut scratch.normed,
        )?;
        for (rows, kind) in kinds(first, end, rows) {
            let (to, sums) = (rows.start, Sums::Store(&mut scratch.gate_up));
            linear(gpu, kind, &weights.gate_up, &scratch.normed, rows, sums, to)?;
        }
        silu_mul(
            gpu,
            Dtype::F16,
            &scratch.gate_up,
            inner,
            first..rows,
            &mut scratch.inner,
        )?;
        for (rows, kind) in kinds(first, end, rows) {
            let (to, sums) = (rows.start, Sums::Add(&mut scratch.x));
            linear(gpu, kind, &weights.down, &scratch.inner, rows, sums, to)?;
        }
        Ok(())
    }

    /// Final norm and output matrix over the sampled rows, and tokens drawn from the first `drawn` of them.
    fn finish(&self, sampled: Range<usize>, drawn: usize, scratch: &mut Scratch) -> Result<(), GpuError> {
        let (gpu, norm, epsilon) = (&self.gpu, &self.weights.output_norm, self.shape.norm_epsilon);
        rms_norm(
            gpu,
            Dtype::F16,
            &scratch.x,
            norm,
            epsilon,
            sampled.clone(),
            &mut scratch.normed,
        )?;
        let sums = Sums::StoreF32(&mut scratch.logits);
        linear(gpu, Rows::Few, self.weights.output(), &scratch.normed, sampled, sums, 0)?;
        scratch.draws.sample(gpu, &scratch.logits, drawn)
    }
}

/// Prompt rows from `first` to `prompt`, and sampled rows up to `rows`, each with its kernels.
fn kinds(first: usize, prompt: usize, rows: usize) -> [(Range<usize>, Rows); 2] {
    [(first..prompt, Rows::Many), (prompt..rows, Rows::Few)]
}
