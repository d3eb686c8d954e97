//! CPU kernels at speed: chosen at run time for AVX-512, AVX2 or plain scalar code, with equal bits from all three.
#![allow(missing_docs, reason = "seam")]

use half::f16;

/// A fixed set of threads for parallel loops; the calling thread takes part. Results never depend on scheduling.
pub struct Pool;
impl Pool {
    pub fn new(_threads: usize) -> Self { unimplemented!() }
    pub fn threads(&self) -> usize { unimplemented!() }
    /// Runs `task(0..tasks)`, each index once, and returns when all are done.
    pub fn run(&self, _tasks: usize, _task: &(dyn Fn(usize) + Sync)) { unimplemented!() }
}

#[derive(Debug)]
pub struct ShapeError;

/// A weight matrix `[rows, cols]`, quantised in blocks of 32 along cols, packed for the kernels.
pub struct Weights;
impl Weights {
    pub fn from_q4_1(_raw: &[u8], _rows: usize, _cols: usize) -> Result<Self, ShapeError> { unimplemented!() }
    pub fn from_q8_0(_raw: &[u8], _rows: usize, _cols: usize) -> Result<Self, ShapeError> { unimplemented!() }
    /// Quantised to Q8_0 blocks.
    pub fn from_f32(_values: &[f32], _rows: usize, _cols: usize) -> Result<Self, ShapeError> { unimplemented!() }
    pub fn rows(&self) -> usize { unimplemented!() }
    pub fn cols(&self) -> usize { unimplemented!() }
    pub fn bytes(&self) -> usize { unimplemented!() }
    /// Row `row` as f32 (embedding lookup).
    pub fn dequantize_row(&self, _row: usize, _out: &mut [f32]) { unimplemented!() }
}

/// Activation rows `[tokens, cols]` quantised to int8 blocks of 32; the buffer is reused.
#[derive(Default)]
pub struct Activations;
impl Activations {
    pub fn quantize(&mut self, _x: &[f32], _cols: usize, _pool: &Pool) { unimplemented!() }
    pub fn tokens(&self) -> usize { unimplemented!() }
}

/// `out[t, r] = sum_c weights[r, c] * x[t, c]`; a token's row has the same bits whatever other tokens are in the batch.
pub fn matmul(_weights: &Weights, _x: &Activations, _out: &mut [f32], _pool: &Pool) { unimplemented!() }

/// A run of keys and values of one KV head, `[len, head_dim]` each.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    pub keys: &'a [f16],
    pub values: &'a [f16],
    /// Token position of the first row.
    pub position: usize,
}

/// Partial attention of `n` query rows: `o[n, head_dim]` normalised, `lse[n]` base 2 (-inf where nothing was seen).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Partial {
    pub o: Vec<f32>,
    pub lse: Vec<f32>,
}

/// Attention of query rows `q[n, head_dim]` over `segments` in order; query `i` sees rows at positions < `visible[i]`.
/// A row's bits depend on its own query, `visible` and the segments only, never on the other rows of the call.
pub fn attend(_q: &[f32], _visible: &[usize], _head_dim: usize, _scale: f32, _segments: &[Segment<'_>], _out: &mut Partial) { unimplemented!() }
/// Joins `other` into `into` by log-sum-exp.
pub fn merge(_into: &mut Partial, _other: &Partial, _head_dim: usize) { unimplemented!() }

/// Base-2 scores `q[g, d] . keys[n, d] * scale * log2(e)` into `out[g, n]`.
pub fn scores(_q: &[f32], _keys: &[f16], _head_dim: usize, _scale: f32, _out: &mut [f32]) { unimplemented!() }
/// `(max, log2 of the sum of exp2)` of base-2 scores.
pub fn log_sum_exp2(_scores: &[f32]) -> f32 { unimplemented!() }
/// Indices of the `k` largest scores, ties by lower index, in rising order of index.
pub fn top_k(_scores: &[f32], _k: usize, _out: &mut Vec<u32>) { unimplemented!() }
/// `o[d] = sum_i exp2(scores[i] - lse) * values[i, d]` over `chosen` rows.
pub fn weighted_values(_scores: &[f32], _chosen: &[u32], _lse: f32, _values: &[f16], _head_dim: usize, _out: &mut [f32]) { unimplemented!() }

pub fn rms_norm(_x: &[f32], _weight: &[f32], _epsilon: f32, _out: &mut [f32]) { unimplemented!() }
pub fn silu_mul(_gate: &[f32], _up: &[f32], _out: &mut [f32]) { unimplemented!() }
pub fn add_assign(_x: &mut [f32], _y: &[f32]) { unimplemented!() }
pub fn to_f16(_x: &[f32], _out: &mut [f16]) { unimplemented!() }
pub fn to_f32(_x: &[f16], _out: &mut [f32]) { unimplemented!() }

/// Cosines and sines per position and pair.
pub struct RopeTable;
impl RopeTable {
    pub fn new(_positions: usize, _dims: usize, _theta: f32) -> Self { unimplemented!() }
    /// Rotates pairs (2i, 2i+1) of the first `dims` elements of each row `[rows, head_dim]`, all at `position`.
    pub fn rotate_interleaved(&self, _x: &mut [f32], _head_dim: usize, _position: usize) { unimplemented!() }
    /// Rotates pairs (i, i + dims/2).
    pub fn rotate_halves(&self, _x: &mut [f32], _head_dim: usize, _position: usize) { unimplemented!() }
}
