//! Attention of query rows over runs of keys and values, as partials.
//!
//! Online softmax in base 2 (Milakov & Gimelshein 2018; the tiling of Dao et al. 2022). A segment is cut into tiles of
//! 64 keys from its start. Per tile and row: dot products sequential over head_dim; the tile's maximum; exp2 of the
//! differences; their sum in sixteen lanes; then values added sequentially over keys. A row touches keys below its
//! `visible` only, so what lies beyond (unwritten pages, NaN) cannot reach it.

use std::cell::RefCell;

use half::f16;

use crate::{
    isa::{Isa, dispatched},
    lanes::{LANES, Lanes, exp2},
    numeric,
    partial::Partial,
};

/// Keys per tile.
const TILE: usize = 64;
/// Vectors per tile.
const TILE_VECTORS: usize = TILE / LANES;
/// Query rows that share a converted tile.
const ROWS: usize = 64;

/// A run of keys and values of one KV head, `[len, head_dim]` each.
#[derive(Clone, Copy)]
pub struct Segment<'a> {
    /// Rotated keys.
    pub keys: &'a [f16],
    /// Values.
    pub values: &'a [f16],
    /// Token position of the first row.
    pub position: usize,
}

/// Attention of query rows `q[n, head_dim]` over `segments` in order; query `i` sees rows at positions < `visible[i]`.
/// A row's bits depend on its own query, `visible` and the segments only, never on the other rows of the call.
///
/// Scores are `q . k * scale * log2(e)`. Any `head_dim` works; multiples of 16 waste nothing.
///
/// # Panics
/// If `q` is not `[visible.len(), head_dim]`, or a segment's keys and values are not whole rows of equal number.
pub fn attend(q: &[f32], visible: &[usize], head_dim: usize, scale: f32, segments: &[Segment<'_>], out: &mut Partial) {
    assert!(head_dim > 0, "attend: head_dim is 0");
    assert_eq!(q.len(), visible.len() * head_dim, "attend: q is [n, head_dim]");
    for segment in segments {
        assert_eq!(
            segment.keys.len(),
            segment.values.len(),
            "attend: as many values as keys"
        );
        assert!(
            segment.keys.len().is_multiple_of(head_dim),
            "attend: keys are rows of head_dim {head_dim}"
        );
    }
    out.o.resize(q.len(), 0.0);
    out.lse.resize(visible.len(), 0.0);
    SCRATCH.with_borrow_mut(|scratch| {
        attend_on(
            Isa::active(),
            q,
            visible,
            head_dim,
            scale,
            segments,
            &mut out.o,
            &mut out.lse,
            scratch,
        );
    });
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Buffers of a call, reused by the thread.
#[derive(Default)]
struct Scratch {
    /// Scaled queries `[rows, head_dim]`.
    q: Vec<f32>,
    /// Keys of a tile, `[head_dim, 64]`.
    keys: Vec<[f32; LANES]>,
    /// Values of a tile, `[64, head_dim rounded up to lanes]`.
    values: Vec<[f32; LANES]>,
    /// Scores, then weights, `[rows, 64]`.
    weights: Vec<[f32; LANES]>,
    /// Weighted sums of values, `[rows, head_dim rounded up]`.
    sums: Vec<[f32; LANES]>,
    /// Per row the highest score and the sum of weights.
    softmax: Vec<(f32, f32)>,
    /// Keys each row sees in the tile.
    counts: Vec<usize>,
}

dispatched!(
    fn attend_on(
        q: &[f32], visible: &[usize], head_dim: usize, scale: f32, segments: &[Segment<'_>],
        o: &mut [f32], lse: &mut [f32], scratch: &mut Scratch,
    ) = attend_in
);
#[inline(always)]
fn attend_in<L: Lanes>(
    l: L,
    q: &[f32],
    visible: &[usize],
    head_dim: usize,
    scale: f32,
    segments: &[Segment<'_>],
    o: &mut [f32],
    lse: &mut [f32],
    scratch: &mut Scratch,
) {
    let rows = visible.chunks(ROWS).zip(lse.chunks_mut(ROWS));
    let wide = q.chunks(ROWS * head_dim).zip(o.chunks_mut(ROWS * head_dim));
    for ((visible, lse), (q, o)) in rows.zip(wide) {
        scratch.start(q, visible.len(), head_dim, scale * std::f32::consts::LOG2_E);
        for segment in segments {
            let keys = segment
                .keys
                .chunks(TILE * head_dim)
                .zip(segment.values.chunks(TILE * head_dim));
            for (tile, (keys, values)) in keys.enumerate() {
                let position = segment.position + tile * TILE;
                let len = keys.len() / head_dim;
                scratch.counts.clear();
                scratch
                    .counts
                    .extend(visible.iter().map(|&end| end.saturating_sub(position).min(len)));
                let most = scratch.counts.iter().copied().max().unwrap_or(0);
                if most > 0 {
                    scratch.convert(l, &keys[..most * head_dim], &values[..most * head_dim], head_dim);
                    scratch.add_tile(l, head_dim);
                }
            }
        }
        scratch.finish(head_dim, o, lse);
    }
}

impl Scratch {
    fn start(&mut self, q: &[f32], rows: usize, head_dim: usize, factor: f32) {
        let vectors = head_dim.div_ceil(LANES);
        self.q.clear();
        self.q.extend(q.iter().map(|q| q * factor));
        self.keys.resize(head_dim * TILE_VECTORS, [0.0; LANES]);
        self.values.resize(TILE * vectors, [0.0; LANES]);
        self.weights.resize(rows * TILE_VECTORS, [0.0; LANES]);
        self.sums.clear();
        self.sums.resize(rows * vectors, [0.0; LANES]);
        self.softmax.clear();
        self.softmax.resize(rows, (f32::NEG_INFINITY, 0.0));
    }

    /// Keys transposed and values padded, both in f32; keys beyond the given are 0.
    #[inline(always)]
    fn convert<L: Lanes>(&mut self, _l: L, keys: &[f16], values: &[f16], head_dim: usize) {
        self.keys.fill([0.0; LANES]);
        let vectors = head_dim.div_ceil(LANES);
        for (row, (key, value)) in keys
            .chunks_exact(head_dim)
            .zip(values.chunks_exact(head_dim))
            .enumerate()
        {
            for (d, (k, v)) in key.iter().zip(value).enumerate() {
                self.keys[d * TILE_VECTORS + row / LANES][row % LANES] = k.to_f32();
                self.values[row * vectors + d / LANES][d % LANES] = v.to_f32();
            }
        }
    }

    #[inline(always)]
    fn add_tile<L: Lanes>(&mut self, l: L, head_dim: usize) {
        let vectors = head_dim.div_ceil(LANES);
        for row in 0..self.counts.len() {
            let count = self.counts[row];
            if count == 0 {
                continue;
            }
            let weights = &mut self.weights[row * TILE_VECTORS..][..TILE_VECTORS];
            weights.fill([0.0; LANES]);
            product(l, &self.q[row * head_dim..][..head_dim], &self.keys, weights);
            let scale = softmax_tile(l, weights, count, &mut self.softmax[row]);
            let sums = &mut self.sums[row * vectors..][..vectors];
            if scale != 1.0 {
                for sum in &mut *sums {
                    l.store(l.mul(l.load(sum), l.splat(scale)), sum);
                }
            }
            product(
                l,
                &self.weights.as_flattened()[row * TILE..][..count],
                &self.values,
                sums,
            );
        }
    }

    fn finish(&self, head_dim: usize, o: &mut [f32], lse: &mut [f32]) {
        let sums = self.sums.chunks_exact(head_dim.div_ceil(LANES));
        for (((o, lse), sums), &(high, sum)) in o.chunks_exact_mut(head_dim).zip(lse).zip(sums).zip(&self.softmax) {
            if sum > 0.0 {
                for (o, value) in o.iter_mut().zip(sums.as_flattened()) {
                    *o = value / sum;
                }
                *lse = high + numeric::log2(sum);
            } else {
                o.fill(0.0);
                *lse = f32::NEG_INFINITY;
            }
        }
    }
}

/// Turns the scores of a tile's first `count` keys into weights relative to the new maximum; returns the factor by which
/// what was summed before must shrink.
#[inline(always)]
fn softmax_tile<L: Lanes>(l: L, scores: &mut [[f32; LANES]], count: usize, state: &mut (f32, f32)) -> f32 {
    let mut high = l.splat(state.0);
    for (v, scores) in scores.iter_mut().enumerate() {
        let masked = l.first(l.load(scores), count.saturating_sub(v * LANES), f32::NEG_INFINITY);
        l.store(masked, scores);
        high = l.max(masked, high);
    }
    let high = l.highest(high);
    let mut sum = l.splat(0.0);
    for scores in scores.iter_mut() {
        let weight = exp2(l, l.sub(l.load(scores), l.splat(high)));
        l.store(weight, scores);
        sum = l.add(sum, weight);
    }
    let scale = if high > state.0 {
        numeric::exp2(state.0 - high)
    } else {
        1.0
    };
    *state = (high, state.1.mul_add(scale, l.sum(sum)));
    scale
}

/// `sums[c] += a[k] * b[k, c]`, sequential over k.
#[inline(always)]
fn product<L: Lanes>(l: L, a: &[f32], b: &[[f32; LANES]], sums: &mut [[f32; LANES]]) {
    let columns = sums.len();
    for (&a, b) in a.iter().zip(b.chunks_exact(columns)) {
        for (sum, b) in sums.iter_mut().zip(b) {
            l.store(l.fma(l.splat(a), l.load(b), l.load(sum)), sum);
        }
    }
}
