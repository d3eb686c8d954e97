//! Sparse prefill: which keys the queries of a prompt attend to, head by head.
//!
//! [`Pattern`] says how a head's mask is made: dense, A-shape, Vertical-Slash and Block-Sparse as in MInference (arXiv
//! 2407.02490), FlexPrefill's and XAttention's selections. [`Pattern::plan`] makes the [`HeadMask`] from a prompt's own queries
//! and keys, [`HeadPatterns`] is a model's file of patterns, [`search`] finds one, and [`judge`] compares masks with full
//! attention. What a mask means is defined once, in `mask.rs`.
//!
//! It deliberately computes no attention: a forward does, on the CPU over [`HeadMask::held`], on a GPU over tiles. It does
//! not know models, pages or blocks.
//!
//! ```
//! use half::f16;
//! use kvasir_sparse::{HeadChunk, Mask, Pattern};
//! let (q, keys) = (vec![0.5; 128 * 16], vec![f16::ONE; 512 * 16]);
//! let chunk = HeadChunk::new(&q, &keys, 16, 0.25)?;
//! let head = Pattern::AShape { initial: 4, local: 64 }.plan(&chunk, 64);
//! let mask = Mask::new(64, vec![head]).expect("planners make sound masks");
//! // The last query, at position 511, sees the sink and what is near, and not the middle.
//! assert!(mask.sees(0, 384, 127, 0) && mask.sees(0, 384, 127, 448) && !mask.sees(0, 384, 127, 200));
//! # Ok::<(), kvasir_sparse::BadChunk>(())
//! ```
#![forbid(unsafe_code)]

mod chunk;
mod file;
mod mask;
mod pattern;
mod plan;
mod quality;
pub mod search;

pub use chunk::{BadChunk, HeadChunk};
pub use file::{BadPatterns, DENSE_UP_TO, FILE_BYTES_MAX, FoundBy, HeadPatterns, PLANNERS};
pub use mask::{BadMask, HeadMask, Held, Mask, TILE};
pub use pattern::{BadPattern, Pattern};
pub use plan::{Sums, estimate};
pub use quality::{Quality, judge};
