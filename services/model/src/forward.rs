//! The forward: from tokens to logits, with keys and values in pages.
//!
//! Invariant kept here: a token's KV and logits have the same bits in any batch, any chunking, on any thread count. So
//! K and V go through their f16 pages before they are attended to, whether they were computed in this step or loaded; the
//! kernels treat rows independently; and attention is summed over fixed runs of positions (`batch::SPLIT_TOKENS`), never
//! over whatever a step happens to hold.

mod attention;
mod batch;
mod rotate;
mod rows;
mod sparse;
mod watch;
mod window;

use std::time::Duration;

use kvasir_block::KvSchema;
use kvasir_simd::{Activations, Partial, Pool, add_assign, gelu_mul, matmul, rms_norm, silu_mul, to_f16};

use self::{attention::AttentionScratch, rotate::Ropes, rows::for_rows, watch::WatchScratch};
use crate::{
    Architecture, LoadError, ModelFile, ModelShape, PageId, PagePool, SparsePrefill,
    sampler::Drawer,
    weights::{Columns, LayerWeights, ModelWeights},
};

pub use self::batch::{Attention, Logits, StepSequence};
pub(crate) use self::{
    attention::check_remote,
    batch::{Plan, Sequence as PlannedSequence, Span},
};

/// Threads that a model may be asked for.
const THREADS_MAX: usize = 1024;

/// How a model is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Threads that share each kernel, the stepping one included.
    pub threads: usize,
    /// Tokens per page; decides the schema.
    pub block_tokens: u16,
}

/// The step was given up by a hook; nothing that was computed may be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the step was aborted: {0}")]
pub struct StepAborted(pub String);

/// Why a step has no output. Pages of the step's tokens may hold anything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A hook gave the step up.
    #[error(transparent)]
    Aborted(#[from] StepAborted),
    /// The batch, or what a hook returned, cannot be; found before anything was written where the batch is at fault.
    #[error("invalid step: {0}")]
    Invalid(String),
    /// The GPU failed. It is of no more use to this process.
    #[error("the GPU failed: {0}; restart the process, and look at nvidia-smi if it happens again")]
    Gpu(String),
}

/// What a worker does between the layers of a step. Called on the stepping thread.
pub trait StepHooks {
    /// Before a layer reads or writes the pool: may wait for pages of this layer and fill them.
    ///
    /// # Errors
    /// [`StepAborted`] gives the step up.
    fn before_layer(&mut self, _layer: usize, _pool: &mut PagePool) -> Result<(), StepAborted> {
        Ok(())
    }

    /// Pages whose bytes [`StepHooks::after_layer`] will ask for, the most wanted first. Asked once a step: a GPU sends them to the
    /// host as each layer is done, while the next ones compute. What finds no room there is not sent, and nobody waits for
    /// its readers: asking for it is answered with [`crate::PoolError::NoRoom`].
    fn wanted_pages(&self) -> &[PageId] {
        &[]
    }

    /// How long a GPU's step waited for wanted pages to land before it gave the GPU more to do, to have room for those of the next
    /// layer: called once a step, where it did. The GPU has work meanwhile.
    fn waited_for_room(&mut self, _time: Duration) {}

    /// The layer's K and V of all tokens of the step are in the pool. Called for each layer in order, once it is done, which
    /// on a GPU may be while later layers are under way.
    fn after_layer(&mut self, _layer: usize, _pool: &PagePool) {}

    /// For a `Local` sequence: rotated queries `[tokens, q_heads, head_dim]` of `batch[sequence]`, before local attention.
    ///
    /// # Errors
    /// [`StepAborted`] gives the step up.
    fn remote_begin(&mut self, _layer: usize, _sequence: usize, _q: &[f32]) -> Result<(), StepAborted> {
        Ok(())
    }

    /// Whether [`StepHooks::queries`] is to be called for `batch[sequence]`. Asked in each layer.
    fn wants_queries(&self, _sequence: usize) -> bool {
        false
    }

    /// Rotated queries `[tokens, q_heads, head_dim]` of `batch[sequence]`, whatever it attends to, before attention.
    ///
    /// # Errors
    /// [`StepAborted`] gives the step up.
    fn queries(&mut self, _layer: usize, _sequence: usize, _q: &[f32]) -> Result<(), StepAborted> {
        Ok(())
    }

    /// Whether [`StepHooks::predicted`] is to be called for `batch[sequence]`. Asked in each layer but the last; each yes
    /// costs one more query projection, about a tenth of a layer.
    fn wants_predicted(&self, _sequence: usize) -> bool {
        false
    }

    /// What the rotated queries of `layer` will about be, `[tokens, q_heads, head_dim]` of `batch[sequence]`: called one layer
    /// ahead, after [`StepHooks::remote_begin`] and before attention of layer `layer - 1`, whose input they are made of. Close
    /// from layer 3 or 4 on (cosine 0.95 for SmolLM2), useless before.
    ///
    /// # Errors
    /// [`StepAborted`] gives the step up.
    fn predicted(&mut self, _layer: usize, _sequence: usize, _q: &[f32]) -> Result<(), StepAborted> {
        Ok(())
    }

    /// After local attention of a `Local` sequence, before [`StepHooks::remote_finish`]: its base-2 log-sum-exp, rows `[tokens,
    /// q_heads]`. Not called where it stays on a GPU.
    fn attended_locally(&mut self, _layer: usize, _sequence: usize, _lse: &[f32]) {}

    /// After local attention: the partial over everything that is not local, rows `[tokens, q_heads]`; merged by the model.
    /// `None` where there is nothing.
    ///
    /// # Errors
    /// [`StepAborted`] gives the step up.
    fn remote_finish(&mut self, _layer: usize, _sequence: usize) -> Result<Option<Partial>, StepAborted> {
        Ok(None)
    }
}

/// No hooks.
impl StepHooks for () {}

/// Logits of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutput {
    /// Elements per row.
    pub vocab: usize,
    /// Per sequence of the batch: rows of logits as asked, end to end.
    pub rows: Vec<Vec<f32>>,
    /// Per sequence of the batch: the token drawn, where one was asked for ([`Logits::Drawn`]).
    pub drawn: Vec<Option<u32>>,
}

impl StepOutput {
    /// Of a batch without tokens.
    pub(crate) fn empty(vocab: usize, sequences: usize) -> Self {
        Self {
            vocab,
            rows: vec![Vec::new(); sequences],
            drawn: vec![None; sequences],
        }
    }
}

/// Weights and scratch for steps on the CPU.
pub(crate) struct CpuModel {
    shape: ModelShape,
    schema: KvSchema,
    /// Of the same model without sparse prefill.
    plain_schema: KvSchema,
    weights: ModelWeights,
    ropes: Ropes,
    threads: Pool,
    sparse: Option<SparsePrefill>,
    scratch: Scratch,
}

/// Buffers of a step, reused; `[tokens, ..]` each.
#[derive(Default)]
struct Scratch {
    /// The residual stream.
    x: Vec<f32>,
    /// What a projection is made of, once normalised; what is added to the residual stream, where that is.
    normed: Vec<f32>,
    quantized: Activations,
    qkv: Vec<f32>,
    attention: AttentionScratch,
    watch: WatchScratch,
    /// Attention's result; in the last layer, its rows that logits are made of.
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    inner: Vec<f32>,
    /// What is added to the residual stream.
    added: Vec<f32>,
    logits: Vec<f32>,
    drawer: Drawer,
}

impl CpuModel {
    /// Reads and packs the weights of `file`.
    ///
    /// # Errors
    /// [`LoadError`] if an option is out of range, or the file changed since it was opened or cannot be read.
    pub(crate) fn load(file: &ModelFile, options: &LoadOptions) -> Result<Self, LoadError> {
        if !(1..=THREADS_MAX).contains(&options.threads) {
            let (found, expected) = (options.threads.to_string(), "from 1 to 1024");
            return Err(LoadError::Option {
                option: "threads",
                found,
                expected,
            });
        }
        let schema = file.schema(options.block_tokens);
        schema.validate().map_err(|error| LoadError::Option {
            option: "block_tokens",
            found: error.found,
            expected: error.expected,
        })?;
        let shape = file.shape().clone();
        let weights = ModelWeights::load(file)?;
        file.tensors().check_unchanged()?;
        tracing::debug!(model = file.name(), threads = options.threads, "loaded weights");
        Ok(Self {
            ropes: Ropes::new(&shape),
            threads: Pool::new(options.threads),
            sparse: None,
            scratch: Scratch::default(),
            shape,
            plain_schema: schema.clone(),
            schema,
            weights,
        })
    }

    /// Makes [`Attention::Sparse`] possible, and names the KV accordingly.
    pub(crate) fn set_sparse_prefill(&mut self, sparse: SparsePrefill) {
        self.schema = sparse.schema(&self.plain_schema);
        self.sparse = Some(sparse);
    }

    pub(crate) fn shape(&self) -> &ModelShape {
        &self.shape
    }

    pub(crate) fn schema(&self) -> &KvSchema {
        &self.schema
    }

    fn softmax_scale(&self) -> f32 {
        self.shape.softmax_scale()
    }

    pub(crate) fn step(
        &mut self,
        batch: &[StepSequence<'_>],
        pool: &mut PagePool,
        hooks: &mut dyn StepHooks,
    ) -> Result<StepOutput, StepError> {
        let sparse_from = self.sparse.as_ref().map(SparsePrefill::from);
        let threads = self.threads.threads();
        let plan = Plan::new(batch, pool, &self.shape, &self.schema, threads, sparse_from)?;
        let vocab = self.shape.vocab;
        if plan.tokens == 0 {
            return Ok(StepOutput::empty(vocab, batch.len()));
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        let done = self.layers(batch, &plan, pool, hooks, &mut scratch);
        if let Err(error) = done {
            self.scratch = scratch;
            return Err(error);
        }
        self.logits(&plan, &mut scratch);
        let Scratch { logits, drawer, .. } = &mut scratch;
        let mut output = StepOutput::empty(vocab, batch.len());
        for (index, (asked, planned)) in batch.iter().zip(&plan.sequences).enumerate() {
            let rows = planned.logits.start * vocab..planned.logits.end * vocab;
            let logits = logits.get(rows).unwrap_or_default();
            match asked.logits {
                Logits::Drawn(draw) => output.drawn[index] = Some(drawer.draw(logits, draw)),
                _ => output.rows[index] = logits.to_vec(),
            }
        }
        self.scratch = scratch;
        Ok(output)
    }

    /// From tokens to the residual stream of the rows that logits are made of.
    fn layers(
        &self,
        batch: &[StepSequence<'_>],
        plan: &Plan,
        pool: &mut PagePool,
        hooks: &mut dyn StepHooks,
        scratch: &mut Scratch,
    ) -> Result<(), StepError> {
        let hidden = self.shape.hidden;
        scratch.x.resize(plan.tokens * hidden, 0.0);
        let tokens = batch.iter().flat_map(|sequence| sequence.tokens);
        let scale = self.shape.embedding_scale();
        for (token, x) in tokens.zip(scratch.x.chunks_exact_mut(hidden)) {
            self.weights.embedding.dequantize_row(*token as usize, x);
            if let Some(scale) = scale {
                x.iter_mut().for_each(|x| *x *= scale);
            }
        }
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let last = index + 1 == self.weights.layers.len();
            self.norm_and_quantize(&layer.attention_norm, scratch);
            layer.qkv.matmul(&scratch.quantized, &mut scratch.qkv, &self.threads);
            let [q, k, v] = [0, 1, 2].map(|matrix| layer.qkv.columns(matrix, plan.tokens));
            for (row, position) in plan.positions() {
                self.rotate_queries(index, position, &mut scratch.qkv[q.row(row)]);
                self.rotate_keys(index, position, &mut scratch.qkv[k.row(row)]);
            }
            hooks.before_layer(index, pool)?;
            self.write_pages(plan, index, &scratch.qkv, k, v, pool);
            self.attend(plan, index, last, q, pool, hooks, scratch)?;
            if last {
                keep_rows(&plan.kept, &mut scratch.x, hidden);
                keep_rows(
                    &plan.kept,
                    &mut scratch.attended,
                    self.shape.q_heads * self.shape.head_dim,
                );
            }
            if !scratch.x.is_empty() {
                self.feed_forward(layer, scratch);
            }
            hooks.after_layer(index, pool);
        }
        Ok(())
    }

    /// Attention's output projection and the feed-forward, each added to the residual stream.
    fn feed_forward(&self, layer: &LayerWeights, scratch: &mut Scratch) {
        let (width, inner) = (self.shape.q_heads * self.shape.head_dim, self.shape.feed_forward);
        scratch.quantized.quantize(&scratch.attended, width, &self.threads);
        layer
            .attention_output
            .matmul(&scratch.quantized, &mut scratch.added, &self.threads);
        let further = layer.further_norms.as_ref();
        self.add(further.map(|norms| &norms.attention_output[..]), scratch);
        self.norm_and_quantize(&layer.feed_forward_norm, scratch);
        layer
            .gate_up
            .matmul(&scratch.quantized, &mut scratch.gate_up, &self.threads);
        let tokens = scratch.x.len() / self.shape.hidden;
        let [gate, up] = [0, 1].map(|matrix| layer.gate_up.columns(matrix, tokens));
        scratch.inner.resize(tokens * inner, 0.0);
        let gate_up = &scratch.gate_up;
        let activate = match self.shape.architecture {
            Architecture::Llama => silu_mul,
            Architecture::Gemma3(_) => gelu_mul,
        };
        for_rows(&self.threads, [(&mut scratch.inner, inner)], &|first, [out]| {
            for (token, out) in (first..).zip(out.chunks_exact_mut(inner)) {
                activate(&gate_up[gate.row(token)], &gate_up[up.row(token)], out);
            }
        });
        scratch.quantized.quantize(&scratch.inner, inner, &self.threads);
        layer.down.matmul(&scratch.quantized, &mut scratch.added, &self.threads);
        self.add(further.map(|norms| &norms.feed_forward_output[..]), scratch);
    }

    fn norm_and_quantize(&self, weight: &[f32], scratch: &mut Scratch) {
        self.norm(&scratch.x, weight, &mut scratch.normed);
        scratch
            .quantized
            .quantize(&scratch.normed, self.shape.hidden, &self.threads);
    }

    fn norm(&self, x: &[f32], weight: &[f32], out: &mut Vec<f32>) {
        let hidden = self.shape.hidden;
        out.resize(x.len(), 0.0);
        for_rows(&self.threads, [(out, hidden)], &|first, [out]| {
            rms_norm(&x[first * hidden..][..out.len()], weight, self.shape.norm_epsilon, out);
        });
    }

    /// Adds to the residual stream, normed by `weight` where the architecture does that.
    fn add(&self, weight: Option<&[f32]>, scratch: &mut Scratch) {
        let hidden = self.shape.hidden;
        let added = match weight {
            Some(weight) => {
                self.norm(&scratch.added, weight, &mut scratch.normed);
                &scratch.normed
            }
            None => &scratch.added,
        };
        for_rows(&self.threads, [(&mut scratch.x, hidden)], &|first, [x]| {
            add_assign(x, &added[first * hidden..][..x.len()]);
        });
    }

    /// Rounds keys and values of the step's tokens to f16, into their pages.
    fn write_pages(&self, plan: &Plan, layer: usize, qkv: &[f32], k: Columns, v: Columns, pool: &mut PagePool) {
        let layout = pool.layout();
        let head_dim = layout.head_dim;
        for (row, slot) in plan.slots.iter().enumerate() {
            let page = pool.page_mut(layer, slot.page);
            let heads = qkv[k.row(row)]
                .chunks_exact(head_dim)
                .zip(qkv[v.row(row)].chunks_exact(head_dim));
            for (head, (key, value)) in heads.enumerate() {
                let at = slot.row * head_dim;
                to_f16(key, &mut page[layout.keys(head)][at..][..head_dim]);
                to_f16(value, &mut page[layout.values(head)][at..][..head_dim]);
            }
        }
    }

    /// Final norm and output matrix over the kept rows.
    fn logits(&self, plan: &Plan, scratch: &mut Scratch) {
        scratch.logits.resize(plan.kept.len() * self.shape.vocab, 0.0);
        if !plan.kept.is_empty() {
            self.norm_and_quantize(&self.weights.output_norm, scratch);
            matmul(
                self.weights.output(),
                &scratch.quantized,
                &mut scratch.logits,
                &self.threads,
            );
        }
    }
}

/// Moves `kept` rows, which rise, to the front and drops the rest.
fn keep_rows(kept: &[usize], rows: &mut Vec<f32>, width: usize) {
    for (to, &from) in kept.iter().enumerate() {
        rows.copy_within(from * width..(from + 1) * width, to * width);
    }
    rows.truncate(kept.len() * width);
}
