//! Finding the keys that queries attend to: by sketches of 16 bytes a key, and exactly.
//!
//! A [`SketchScan`] reads a few bytes per key that say where it lies as queries see it ([`encode_block`], in a calibrated
//! [`HeadBasis`]), scores the best on their real keys, estimates the rest, and bounds what it missed. The flat scan is the
//! oracle and the way of short contexts. [`Sketch`] and [`Flat`] are the same behind [`KeyIndex`], over keys alone.
//!
//! A [`FlatScan`] takes the query rows of one KV head's group and the keys and values of that head, run after run, scores
//! every key that is not [`Excluded`], and then answers in one of two forms: [`FlatScan::rows`] (the union of each query
//! head's `k` best keys) or [`FlatScan::attend`] (partial attention over the fewest best keys that cover a wanted share of
//! the softmax mass). Because every key is scored, the mass that an answer covers is computed, not estimated. A
//! [`SketchScan`] has the same shape.
//!
//! It knows slices and shapes. It does not know blocks, layers, tiers, leases or deadlines: the owner feeds runs one by one
//! and stops when it likes; the answer is then about what was fed. It keeps nothing between queries but its buffers.
//!
//! ```
//! use half::f16;
//! use kvasir_index::{Excluded, FlatScan, Segment};
//! // Three keys of two elements; the query points along the first axis.
//! let keys: Vec<f16> = [4.0, 0.0, 0.0, 4.0, 3.0, 1.0].map(f16::from_f32).to_vec();
//! let values: Vec<f16> = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0].map(f16::from_f32).to_vec();
//! let mut scan = FlatScan::new(2, 1.0);
//! scan.begin(&[1.0, 0.0]);
//! scan.scan(Segment { keys: &keys, values: &values, position: 0 }, &Excluded::none());
//! assert_eq!(scan.rows(2).positions(), [0, 2]);
//! let everything = scan.attend(1.0, None);
//! assert_eq!((everything.keys[0], everything.mass[0]), (3, 1.0));
//! // The first key holds 72 % of the mass, the third another 26 %.
//! assert_eq!(scan.attend(0.9, None).keys[0], 2);
//! ```
#![forbid(unsafe_code)]

mod basis;
mod bits;
mod cluster;
pub mod evaluate;
mod excluded;
#[cfg(feature = "faiss")]
mod faiss;
pub mod file;
mod flat;
#[cfg(feature = "hnsw")]
mod hnsw;
mod ivf;
mod key_index;
mod quest;
mod roar;
mod search;
mod sketch;
#[cfg(test)]
mod suite;
mod wave;

pub use basis::{Basis, Calibrated, HeadBasis, Moments, OutsideMass, Streaming};
pub use excluded::Excluded;
#[cfg(feature = "faiss")]
pub use faiss::{FaissHnsw, FaissIvf};
pub use file::{Kind, Origin};
pub use flat::{Attended, Flat, FlatScan, Rows};
#[cfg(feature = "hnsw")]
pub use hnsw::Hnsw;
pub use ivf::Ivf;
pub use key_index::{Cost, Hits, IndexError, KeyIndex, KeyRows, Search};
pub use kvasir_simd::Segment;
pub use quest::Quest;
pub use roar::{Metric, Roar, RoarParams, Samples};
pub use sketch::{
    Attend, Column, Parked, Sketch, SketchAttended, SketchFormat, SketchScan, Width, distance, encode_block,
};
pub use wave::{Estimate, Wave, WaveParams};
