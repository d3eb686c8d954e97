//! A forward of Llama models, on the CPU or a GPU, and of Gemma 3, on the CPU, over a paged KV pool; tokenizer, chat template,
//! sampling.
//!
//! Everything comes from one GGUF file: shape and rope from its metadata, the tokenizer from its vocabulary, the chat
//! template from its template, and the identity of the KV that the forward makes ([`ModelFile::schema`]). The forward
//! writes keys and values into pages whose layout is a layer block's payload, so that offload and onboard are copies, and
//! it is batch-invariant: a token's KV and logits have the same bits in any batch, any chunking, on any thread count.
//!
//! It deliberately does not know requests, schedules, stores or transports: who owns a page, what is offloaded and where
//! remote partials come from is the business of the worker, which takes part through [`StepHooks`].
//!
//! Meet first [`ModelFile`] (what a file says, without its weights), [`PagePool`] (the KV memory), and [`Model::step`].
//!
//! ```no_run
//! use kvasir_model::{
//!     Attention, LoadOptions, Logits, Model, ModelFile, PageId, PagePool, Sampler, Sampling, StepSequence,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let file = ModelFile::open("SmolLM2-135M-Instruct.Q4_1.gguf".as_ref())?;
//! let mut model = Model::load(&file, &LoadOptions { threads: 2, block_tokens: 64 })?;
//! let mut pool = PagePool::new(model.schema().layout(), model.shape().layers, 16)?;
//!
//! let tokens = file.tokenizer().encode("The capital of France is", true)?;
//! let prompt = StepSequence {
//!     tokens: &tokens,
//!     position: 0,
//!     pages: &[Some(PageId(0))],
//!     attention: Attention::Full,
//!     logits: Logits::Last,
//! };
//! let output = model.step(&[prompt], &mut pool, &mut ())?;
//! let next = Sampler::new(Sampling::greedy()).sample(&output.rows[0]);
//! assert_eq!(file.tokenizer().decoder().push(next), " Paris");
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod bases;
mod capture;
mod error;
mod file;
mod forward;
mod gguf;
mod gpu;
mod made_up;
mod model;
mod pool;
mod sampler;
mod sparse;
mod template;
mod tokenizer;
mod weights;

pub use bases::built_in_basis;
pub use capture::{CaptureError, CaptureOptions, CaptureSink, CapturedLayer, capture};
pub use error::LoadError;
pub use file::{Architecture, ModelFile, ModelShape, Sliding};
pub use forward::{Attention, LoadOptions, Logits, StepAborted, StepError, StepHooks, StepOutput, StepSequence};
pub use gpu::{GpuDevice, GpuOptions};
pub use made_up::MadeUp;
pub use model::{Device, Model};
pub use pool::{PageId, PagePool, PoolError};
pub use sampler::{Draw, InvalidSampling, Sampler, Sampling};
pub use sparse::{SparsePrefill, TileRows};
pub use template::{ChatMessage, ChatTemplate, TemplateError};
pub use tokenizer::{TextDecoder, TokenizeError, Tokenizer};
