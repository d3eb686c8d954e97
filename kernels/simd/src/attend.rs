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
    lanes::{LANES, Lanes, exp2, load_some_f16},
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
    attend_to(
        Isa::active(),
        Call {
            q,
            visible,
            head_dim,
            factor: scale * std::f32::consts::LOG2_E,
            segments,
        },
        out,
    );
}

fn attend_to(isa: Isa, call: Call<'_>, out: &mut Partial) {
    // Taken and put back: no borrow is held while the kernel runs.
    let mut scratch = SCRATCH.take();
    attend_on(isa, call, &mut out.o, &mut out.lse, &mut scratch);
    SCRATCH.set(scratch);
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What is asked.
#[derive(Clone, Copy)]
struct Call<'a> {
    q: &'a [f32],
    visible: &'a [usize],
    head_dim: usize,
    /// Scale times log2(e).
    factor: f32,
    segments: &'a [Segment<'a>],
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

dispatched!(fn attend_on(call: Call<'_>, o: &mut [f32], lse: &mut [f32], scratch: &mut Scratch) = attend_in);
#[inline(always)]
fn attend_in<L: Lanes>(l: L, call: Call<'_>, o: &mut [f32], lse: &mut [f32], scratch: &mut Scratch) {
    let Call {
        q,
        visible,
        head_dim,
        factor,
        segments,
    } = call;
    let rows = visible.chunks(ROWS).zip(lse.chunks_mut(ROWS));
    let wide = q.chunks(ROWS * head_dim).zip(o.chunks_mut(ROWS * head_dim));
    for ((visible, lse), (q, o)) in rows.zip(wide) {
        scratch.start(q, visible.len(), head_dim, factor);
        for segment in segments {
            let keys = segment
                .keys
                .chunks(TILE * head_dim)
                .zip(segment.values.chunks(TILE * head_dim));
            for (tile, (keys, values)) in keys.enumerate() {
                let position = segment.position.saturating_add(tile * TILE);
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

    /// Keys transposed and values padded, both in f32. Keys beyond the given keep what was there: their scores are
    /// masked.
    #[inline(always)]
    fn convert<L: Lanes>(&mut self, l: L, keys: &[f16], values: &[f16], head_dim: usize) {
        let rows = self.values.chunks_exact_mut(head_dim.div_ceil(LANES));
        for (value, row) in values.chunks_exact(head_dim).zip(rows) {
            let (whole, tail) = value.as_chunks();
            for (value, out) in whole.iter().zip(&mut *row) {
                l.store(l.load_f16(value), out);
            }
            if !tail.is_empty() {
                l.store(load_some_f16(l, tail), &mut row[whole.len()]);
            }
        }
        let flat = self.keys.as_flattened_mut();
        let keys_by_eight = keys.chunks_exact(8 * head_dim);
        let left = keys_by_eight.remainder();
        let first_left = keys.len() / head_dim / 8 * 8;
        for (eight, keys) in keys_by_eight.enumerate() {
            let mut dims = flat.chunks_exact_mut(8 * TILE);
            for (d, out) in (0..head_dim / 8 * 8).step_by(8).zip(&mut dims) {
                transpose(l, keys, head_dim, d, out, eight);
            }
            for d in head_dim / 8 * 8..head_dim {
                for row in 0..8 {
                    flat[d * TILE + eight * 8 + row] = keys[row * head_dim + d].to_f32();
                }
            }
        }
        for (row, key) in left.chunks_exact(head_dim).enumerate() {
            for (d, key) in key.iter().enumerate() {
                flat[d * TILE + first_left + row] = key.to_f32();
            }
        }
    }

    /// Adds a converted tile to every row, a strip of rows at a time.
    #[inline(always)]
    fn add_tile<L: Lanes>(&mut self, l: L, head_dim: usize) {
        let rows = self.counts.len();
        let mut row = 0;
        while row + 4 <= rows {
            self.add_tile_to::<L, 4>(l, head_dim, row);
            row += 4;
        }
        match rows - row {
            3 => self.add_tile_to::<L, 3>(l, head_dim, row),
            2 => self.add_tile_to::<L, 2>(l, head_dim, row),
            1 => self.add_tile_to::<L, 1>(l, head_dim, row),
            _ => {}
        }
    }

    #[inline(always)]
    fn add_tile_to<L: Lanes, const R: usize>(&mut self, l: L, head_dim: usize, first: usize) {
        let vectors = head_dim.div_ceil(LANES);
        let counts: [usize; R] = std::array::from_fn(|r| self.counts[first + r]);
        let most = counts.iter().fold(0, |a, &b| a.max(b));
        if most == 0 {
            return;
        }
        let weights = &mut self.weights[first * TILE_VECTORS..][..R * TILE_VECTORS];
        weights.fill([0.0; LANES]);
        let q = std::array::from_fn(|r| &self.q[(first + r) * head_dim..][..head_dim]);
        product::<L, R>(l, q, &self.keys, weights, most.div_ceil(LANES));
        let sums = &mut self.sums[first * vectors..][..R * vectors];
        for (r, &count) in counts.iter().enumerate() {
            if count == 0 {
                continue;
            }
            let weights = &mut weights[r * TILE_VECTORS..][..TILE_VECTORS];
            let scale = softmax_tile(l, weights, count, &mut self.softmax[first + r]);
            if scale != 1.0 {
                for sum in &mut sums[r * vectors..][..vectors] {
                    l.store(l.mul(l.load(sum), l.splat(scale)), sum);
                }
            }
        }
        // Keys that all rows see, then what single rows see beyond: a masked value is never multiplied, not even by 0.
        let weights = weights.as_flattened();
        let joint = counts.iter().fold(TILE, |a, &b| a.min(b));
        let shared = std::array::from_fn(|r| &weights[r * TILE..][..joint]);
        product::<L, R>(l, shared, &self.values, sums, vectors);
        for (r, &count) in counts.iter().enumerate() {
            if count > joint {
                let own = [&weights[r * TILE..][joint..count]];
                let sums = &mut sums[r * vectors..][..vectors];
                product::<L, 1>(l, own, &self.values[joint * vectors..], sums, vectors);
            }
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

/// Eight dimensions from `d` on of eight keys, to `out[8, 64]` at keys `8 * eight`.
#[inline(always)]
fn transpose<L: Lanes>(l: L, keys: &[f16], head_dim: usize, d: usize, out: &mut [f32], eight: usize) {
    let rows: [Option<&[f16; 8]>; 8] = std::array::from_fn(|row| keys[row * head_dim + d..].first_chunk());
    let mut lines = out
        .chunks_exact_mut(TILE)
        .map(|line| line[8 * eight..].first_chunk_mut());
    let lines: [Option<&mut [f32; 8]>; 8] = std::array::from_fn(|_| lines.next().flatten());
    if let ([Some(a), Some(b), Some(c), Some(d), Some(e), Some(f), Some(g), Some(h)], lines) = (rows, lines)
        && let [Some(i), Some(j), Some(k), Some(m), Some(n), Some(o), Some(p), Some(q)] = lines
    {
        l.transpose([a, b, c, d, e, f, g, h], [i, j, k, m, n, o, p, q]);
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

/// `sums[r, c] += a[r][k] * b[k, c]` for the first `columns` vectors of R rows, sequential over k.
#[inline(always)]
fn product<L: Lanes, const R: usize>(
    l: L,
    a: [&[f32]; R],
    b: &[[f32; LANES]],
    sums: &mut [[f32; LANES]],
    columns: usize,
) {
    // Rows of `b` and of `sums` are equally wide.
    let width = sums.len() / R;
    let mut column = 0;
    // As many sums as fit the registers: enough to hide the latency of a multiplication, and to load each `b` seldom.
    if L::WIDE || R == 1 {
        while column + 4 <= columns {
            strip::<L, R, 4>(l, a, b, sums, width, column);
            column += 4;
        }
    } else if R == 2 {
        while column + 2 <= columns {
            strip::<L, R, 2>(l, a, b, sums, width, column);
            column += 2;
        }
    }
    while column < columns {
        strip::<L, R, 1>(l, a, b, sums, width, column);
        column += 1;
    }
}

/// [`product`] of `C` vectors from `column` on, the sums in registers.
#[inline(always)]
fn strip<L: Lanes, const R: usize, const C: usize>(
    l: L,
    a: [&[f32]; R],
    b: &[[f32; LANES]],
    sums: &mut [[f32; LANES]],
    width: usize,
    column: usize,
) {
    let len = a[0].len();
    let a = a.map(|row| &row[..len]);
    let mut totals = [[l.splat(0.0); C]; R];
    for (r, totals) in totals.iter_mut().enumerate() {
        for (c, total) in totals.iter_mut().enumerate() {
            *total = l.load(&sums[r * width + column + c]);
        }
    }
    for (k, row) in b.chunks_exact(width).take(len).enumerate() {
        let row = &row[column..column + C];
        for (r, totals) in totals.iter_mut().enumerate() {
            let factor = l.splat(a[r][k]);
            for (total, b) in totals.iter_mut().zip(row) {
                *total = l.fma(factor, l.load(b), *total);
            }
        }
    }
    for (r, totals) in totals.iter().enumerate() {
        for (c, total) in totals.iter().enumerate() {
            l.store(*total, &mut sums[r * width + column + c]);
        }
    }
}

#[cfg(test)]
mod tests;
