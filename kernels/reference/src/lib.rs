//! What the kernels must compute, written to be obviously right: plain loops in f64 over slices.
//!
//! Tests compare `kvasir-simd` and the storage engine's retrieval with these. Nothing here is fast, nothing allocates
//! with care, and nothing else may depend on its speed. It knows no pages, blocks or instruction sets.
//!
//! Meet first: [`attend`] (attention over an explicit set of keys), [`quantized_matmul`], [`top_k`].
//!
//! ```
//! use half::f16;
//! let (key, value) = ([f16::ONE, f16::ZERO], [f16::from_f32(3.0), f16::ONE]);
//! let (o, lse) = kvasir_reference::attend(&[0.0, 0.0], &[(&key, &value), (&key, &value)], 1.0);
//! assert_eq!((o, lse), (vec![3.0, 1.0], 1.0)); // two equal keys: the mean value, and log2(2)
//! ```
#![forbid(unsafe_code)]

mod attention;
mod layers;
mod quantized;

pub use attention::{attend, merge, scores, top_k};
pub use layers::{gelu_mul, rms_norm, rope, silu_mul};
pub use quantized::{dequantize_q4_1, dequantize_q8_0, quantize_activations, quantized_matmul};
