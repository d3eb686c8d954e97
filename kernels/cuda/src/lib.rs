//! CUDA kernels of our own, and safe launchers for them: decode attention at memory speed, merge, pack, scores, top-k.
//!
//! Nothing of CUDA is needed to build or to link this crate. The kernels' sources (`cuda/*.cu`) are part of the library;
//! [`Gpu::open`] looks for a driver and for NVRTC, compiles each [`Family`] for the GPU that is there the first time it
//! is used, and keeps the machine code on disk. Without a GPU, [`Kernels::build`] still compiles everything, which is how
//! a machine that has only NVRTC checks that the kernels are sound and spill nothing.
//!
//! Types to meet first: [`Gpu`] (a device and one stream on it), [`Buffer`] (its memory), [`KvView`] (where keys and
//! values lie: a block, pages, records), [`Decode`] (attention of one token over several views). Every kernel has a CPU
//! reference of the same semantics in [`mod@reference`], and every launcher checks shapes and lengths and answers with an
//! error, never a panic.
//!
//! It deliberately does not know models, requests, stores or hashes: shapes, slices and strides are all it sees.
//!
//! ```
//! use kvasir_cuda::{Gpu, Options};
//! match Gpu::open(0, &Options::default()) {
//!     Ok(gpu) => assert!(gpu.multiprocessors() > 0),
//!     // On a machine without a GPU the error says what is missing.
//!     Err(error) => assert!(!error.to_string().is_empty()),
//! }
//! ```
#![expect(
    unsafe_code,
    reason = "the driver and NVRTC are foreign code: each use names the fact that makes it sound"
)]

mod block_sparse;
mod buffer;
mod decode;
mod error;
mod flex_prefill;
mod gpu;
mod image;
mod layout;
mod linear;
mod nvrtc;
mod pack;
pub mod plan;
mod planner;
mod prefill;
pub mod reference;
mod resources;
mod rows;
mod sample;
mod scores;
mod source;
mod step;
mod tensor_map;
mod tiles;
mod transfer;
mod vertical_slash;
mod view;
mod x_attention;

pub use block_sparse::BlockSparse;
pub use buffer::{Buffer, PinnedBuffer, Plain};
pub use decode::{Decode, DecodeRows, MAX_VIEWS, Partials, RowsOut, merge};
pub use error::{BuildError, GpuError, OpenError};
pub use flex_prefill::{FlexChosen, FlexPrefill};
pub use gpu::{Gpu, Graph, Options, Stopwatch};
pub use image::Kernels;
pub use kvasir_sparse::{HeadMask, Mask};
pub use layout::{Dtype, KvShape, Layout};
pub use linear::{Matrix, Rows, Sums, linear};
pub use nvrtc::Compiler;
pub use pack::copy_rows;
pub use planner::{HeadPlan, Planner, SparseRows};
pub use prefill::{Prefill, PrefillSequence, Products, SEQUENCES};
pub use resources::Resources;
pub use rows::{Pairs, Rope, embed, noise, rms_norm, round, silu_mul};
pub use sample::{SampleRow, SampleRows, Sampled, VOCAB_MAX};
pub use scores::{key_scores, top_k};
pub use source::{Family, Variant};
pub use step::{StepLimits, StepRow, StepRows};
pub use tiles::DeviceTiles;
pub use transfer::{Inbound, Landed, Outbound, Sent};
pub use vertical_slash::VerticalSlash;
pub use view::{KvView, KvViewMut, PageTable, Query};
pub use x_attention::XAttention;
