//! A Llama-family forward on the CPU over a paged KV pool; tokenizer, chat template, sampling.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "seam")]

use std::{ops::Range, path::Path, sync::Arc};

use half::f16;
use kvasir_block::{KvSchema, LayerBlockLayout};
use kvasir_simd::Partial;

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LoadError(pub String);

/// A GGUF file whose metadata is read and checked: shape, identity, tokenizer, template. No weights: cheap to open.
pub struct ModelFile;
impl ModelFile {
    pub fn open(_path: &Path) -> Result<Self, LoadError> { unimplemented!() }
    pub fn path(&self) -> &Path { unimplemented!() }
    /// Public name, for `/v1/models` (for example `smollm2-135m-instruct`).
    pub fn name(&self) -> &str { unimplemented!() }
    pub fn shape(&self) -> &ModelShape { unimplemented!() }
    /// Complete identity of KV blocks made by this model with this code and `block_tokens`.
    pub fn schema(&self, _block_tokens: u16) -> KvSchema { unimplemented!() }
    pub fn tokenizer(&self) -> &Arc<Tokenizer> { unimplemented!() }
    pub fn template(&self) -> Option<&ChatTemplate> { unimplemented!() }
}

#[derive(Clone, Debug, PartialEq)]
pub struct ModelShape {
    pub layers: usize,
    pub hidden: usize,
    pub feed_forward: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub context_tokens_max: usize,
    pub rope_theta: f32,
    pub rope_dims: usize,
    pub norm_epsilon: f32,
}

pub struct Tokenizer;
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TokenizeError(pub String);
impl Tokenizer {
    /// Token ids of `text`; special tokens in the text are recognised when `special` is true.
    pub fn encode(&self, _text: &str, _special: bool) -> Result<Vec<u32>, TokenizeError> { unimplemented!() }
    pub fn vocab(&self) -> usize { unimplemented!() }
    /// Ids that end a generation (eos, end of turn).
    pub fn stops(&self) -> &[u32] { unimplemented!() }
    pub fn decoder(self: &Arc<Self>) -> TextDecoder { unimplemented!() }
}
/// Text of a growing list of ids: gives out only whole code points, skips special tokens.
pub struct TextDecoder;
impl TextDecoder {
    pub fn push(&mut self, _id: u32) -> String { unimplemented!() }
    /// What is left, with replacement characters for broken code points.
    pub fn finish(&mut self) -> String { unimplemented!() }
}

pub struct ChatTemplate;
pub struct ChatMessage { pub role: String, pub content: String }
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(pub String);
impl ChatTemplate {
    pub fn render(&self, _messages: &[ChatMessage], _add_generation_prompt: bool) -> Result<String, TemplateError> { unimplemented!() }
}

/// A page: room for one token block in every layer of a [`PagePool`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct PoolError(pub String);

/// KV memory of a worker. A page of a layer has exactly the bytes of a layer block's payload. It knows no owners:
/// who holds which page is the worker's business.
pub struct PagePool;
impl PagePool {
    pub fn new(_layout: LayerBlockLayout, _layers: usize, _pages: usize) -> Result<Self, PoolError> { unimplemented!() }
    pub fn pages(&self) -> usize { unimplemented!() }
    pub fn layout(&self) -> LayerBlockLayout { unimplemented!() }
    /// All elements of a page in one layer, in the payload's layout.
    pub fn page(&self, _layer: usize, _page: PageId) -> &[f16] { unimplemented!() }
    pub fn page_mut(&mut self, _layer: usize, _page: PageId) -> &mut [f16] { unimplemented!() }
    /// The same as little-endian bytes: a layer block's payload.
    pub fn page_bytes(&self, _layer: usize, _page: PageId) -> Vec<u8> { unimplemented!() }
    /// Fills a page of a layer from a payload.
    pub fn fill(&mut self, _layer: usize, _page: PageId, _payload: &[u8]) -> Result<(), PoolError> { unimplemented!() }
}

pub struct LoadOptions { pub threads: usize, pub block_tokens: u16 }

/// Weights and scratch for steps. One thread steps at a time.
pub struct Model;
impl Model {
    pub fn load(_file: &ModelFile, _options: &LoadOptions) -> Result<Self, LoadError> { unimplemented!() }
    pub fn shape(&self) -> &ModelShape { unimplemented!() }
    pub fn schema(&self) -> &KvSchema { unimplemented!() }
    pub fn softmax_scale(&self) -> f32 { unimplemented!() }
    /// Computes one step for a batch; writes K and V of its tokens into their pages, and returns logits as asked.
    pub fn step(&mut self, _batch: &[StepSequence<'_>], _pool: &mut PagePool, _hooks: &mut dyn StepHooks) -> Result<StepOutput, StepError> { unimplemented!() }
}

/// Which positions a sequence's queries attend to in the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attention {
    /// All before and including themselves.
    Full,
    /// Only these rising, disjoint ranges (and never behind themselves); the rest comes from [`StepHooks::remote_finish`].
    Local(Vec<Range<usize>>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits { None, Last, All }

pub struct StepSequence<'a> {
    pub tokens: &'a [u32],
    /// Position of the first token.
    pub position: usize,
    /// Page of each block from position 0; `None` where a block is not resident (only under `Local`).
    pub pages: &'a [Option<PageId>],
    pub attention: Attention,
    pub logits: Logits,
}

/// The step was given up by a hook; nothing that was computed may be used.
#[derive(Debug, thiserror::Error)]
#[error("the step was aborted: {0}")]
pub struct StepAborted(pub String);

#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error(transparent)]
    Aborted(#[from] StepAborted),
    #[error("{0}")]
    Invalid(String),
}

/// What a worker does between the layers of a step. Called on the stepping thread.
pub trait StepHooks {
    /// Before a layer reads the pool: may wait for pages of this layer and fill them.
    fn before_layer(&mut self, _layer: usize, _pool: &mut PagePool) -> Result<(), StepAborted> { Ok(()) }
    /// The layer's K and V of all tokens of the step are in the pool.
    fn after_layer(&mut self, _layer: usize, _pool: &PagePool) {}
    /// For a `Local` sequence: rotated queries `[tokens, q_heads, head_dim]` of `batch[sequence]`, before local attention.
    fn remote_begin(&mut self, _layer: usize, _sequence: usize, _q: &[f32]) -> Result<(), StepAborted> { Ok(()) }
    /// After local attention: the partial over everything that is not local, rows `[tokens, q_heads]`; merged by the model.
    fn remote_finish(&mut self, _layer: usize, _sequence: usize) -> Result<Option<Partial>, StepAborted> { Ok(None) }
}
/// No hooks.
impl StepHooks for () {}

/// Logits of a step.
pub struct StepOutput { pub vocab: usize, /** Per sequence of the batch: rows of logits as asked. */ pub rows: Vec<Vec<f32>> }

#[derive(Clone, Debug, PartialEq)]
pub struct Sampling { pub temperature: f32, pub top_p: f32, pub seed: u64 }
/// Draws tokens; greedy at temperature 0 (ties by the lower id), seeded otherwise.
pub struct Sampler;
impl Sampler {
    pub fn new(_sampling: Sampling) -> Self { unimplemented!() }
    pub fn sample(&mut self, _logits: &[f32]) -> u32 { unimplemented!() }
}
