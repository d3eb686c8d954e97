//! CPU kernels at speed: chosen at run time for AVX-512, AVX2 or plain scalar code, with equal bits from all three.
//!
//! What the forward of a small Llama and an exact scan over keys need: quantised matrix products ([`Weights`],
//! [`Activations`], [`matmul`]), attention over runs of f16 keys and values that yields partials ([`attend`], [`merge`]),
//! scores and top-k over a store's keys ([`scores`], [`top_k`], [`weighted_values`]), the same over keys coded in nibbles
//! ([`coded_scan`]) and over scattered rows ([`score_rows`], [`weigh_rows`]), and the small element-wise steps between. A [`Pool`] spreads loops over threads.
//!
//! Two promises shape the code. *Equal bits*: every operation has one specified order of floating-point steps, written
//! once over sixteen lanes (`lanes`), so a result does not depend on the processor's vector width, the thread count, or
//! which other rows share the call. *Safe outside*: `unsafe` is confined to the lanes, the int8 tiles and the pool.
//!
//! It deliberately does not know models, pages, blocks or transports: shapes and slices are all it sees.
//!
//! ```
//! use kvasir_simd::{Activations, Pool, Weights, matmul};
//! let pool = Pool::new(1);
//! let weights = Weights::from_f32(&[0.5; 2 * 32], 2, 32).expect("two rows of one block");
//! let mut x = Activations::default();
//! x.quantize(&[1.0; 32], 32, &pool);
//! let mut out = [0.0; 2];
//! matmul(&weights, &x, &mut out, &pool);
//! assert!((out[0] - 16.0).abs() < 0.1);
//! ```
#![expect(
    unsafe_code,
    reason = "vector instructions and the pool: each use names the fact that makes it sound"
)]

mod activations;
mod attend;
mod cast;
mod coded;
mod convert;
mod elementwise;
mod isa;
mod lanes;
mod matmul;
mod near;
mod numeric;
mod partial;
mod pool;
mod rope;
mod rows;
mod sample;
mod scan;
#[cfg(test)]
mod testing;
mod top_k;
mod weights;

pub use activations::Activations;
pub use attend::{Segment, attend};
pub use cast::{cast_f16, read_f16};
pub use coded::{
    CodedKeys, CodedQueries, Found, GROUP, Level, Line, RUN_GROUPS, SLOTS, UNIT, coded_levels, coded_scan,
    coded_scan_listed, room_for,
};
pub use convert::{to_f16, to_f32};
pub use elementwise::{add_assign, gelu_mul, rms_norm, silu_mul};
pub use isa::Isa;
pub use matmul::{matmul, matmul_many};
pub use near::{Near, centres, near};
pub use partial::{Partial, merge};
pub use pool::Pool;
pub use rope::RopeTable;
pub use rows::{SEGMENT, Scattered, project, score_rows, score_slots, weigh_dense, weigh_rows, weigh_slots};
pub use sample::{Spread, gaps, spread, weights_beside};
pub use scan::{exp2_weights, log_sum_exp2, scores, weighted_values};
pub use top_k::top_k;
pub use weights::{ShapeError, Weights};

/// Name of this crate's floating-point results: part of a KV schema, because cached bytes are only interchangeable with
/// recomputed ones while it stays the same. Changes whenever any kernel's bits change.
pub const NUMERICS: &str = "kvasir-cpu/1";
