//! A store's exact scan over keys: scores, their sum, and the values they weigh.

use half::f16;

use crate::{
    isa::{Isa, dispatched},
    lanes::{LANES, Lanes, exp2, load_some, load_some_f16, store_some},
    numeric::log2,
};

/// Base-2 scores `q[g, d] . keys[n, d] * scale * log2(e)` into `out[g, n]`.
///
/// # Panics
/// If `q` or `keys` are not whole rows of `head_dim`, or `out` is not `[g, n]`.
pub fn scores(q: &[f32], keys: &[f16], head_dim: usize, scale: f32, out: &mut [f32]) {
    assert!(
        head_dim > 0 && q.len().is_multiple_of(head_dim),
        "scores: q is rows of head_dim {head_dim}"
    );
    assert!(
        keys.len().is_multiple_of(head_dim),
        "scores: keys are rows of head_dim {head_dim}"
    );
    assert_eq!(
        out.len(),
        q.len() / head_dim * (keys.len() / head_dim),
        "scores: out is [g, n]"
    );
    scores_on(Isa::active(), q, keys, head_dim, scale * std::f32::consts::LOG2_E, out);
}

/// Queries that share a converted key.
const HEADS: usize = 4;
/// Rows scored for one strip of queries before the next: small enough to stay in the first cache.
const KEYS: usize = 64;

dispatched!(fn scores_on(q: &[f32], keys: &[f16], head_dim: usize, factor: f32, out: &mut [f32]) = scores_in);
#[inline(always)]
fn scores_in<L: Lanes>(l: L, q: &[f32], keys: &[f16], head_dim: usize, factor: f32, out: &mut [f32]) {
    let n = keys.len() / head_dim;
    for (run, keys) in keys.chunks(KEYS * head_dim).enumerate() {
        let mut heads = q.chunks_exact(HEADS * head_dim);
        for (strip, q) in heads.by_ref().enumerate() {
            scores_of::<L, HEADS>(
                l,
                q,
                keys,
                head_dim,
                factor,
                &mut out[strip * HEADS * n + run * KEYS..],
                n,
            );
        }
        let left = heads.remainder();
        if !left.is_empty() {
            let out = &mut out[(q.len() - left.len()) / head_dim * n + run * KEYS..];
            match left.len() / head_dim {
                1 => scores_of::<L, 1>(l, left, keys, head_dim, factor, out, n),
                2 => scores_of::<L, 2>(l, left, keys, head_dim, factor, out, n),
                _ => scores_of::<L, 3>(l, left, keys, head_dim, factor, out, n),
            }
        }
    }
}

/// Scores of `G` queries into `out[head * stride + row]`: sixteen sums per pair, then the fixed tree.
#[inline(always)]
fn scores_of<L: Lanes, const G: usize>(
    l: L,
    q: &[f32],
    keys: &[f16],
    head_dim: usize,
    factor: f32,
    out: &mut [f32],
    stride: usize,
) {
    let heads: [&[f32]; G] = std::array::from_fn(|head| &q[head * head_dim..][..head_dim]);
    let vectors = head_dim / LANES;
    let whole: [&[[f32; LANES]]; G] = heads.map(|q| &q.as_chunks().0[..vectors]);
    for (row, key) in keys.chunks_exact(head_dim).enumerate() {
        let (chunks, tail) = key.as_chunks();
        let mut sums = [l.splat(0.0); G];
        for (v, key) in chunks[..vectors].iter().enumerate() {
            let key = l.load_f16(key);
            for (sum, q) in sums.iter_mut().zip(&whole) {
                *sum = l.fma(l.load(&q[v]), key, *sum);
            }
        }
        if !tail.is_empty() {
            let key = load_some_f16(l, tail);
            for (sum, q) in sums.iter_mut().zip(&heads) {
                *sum = l.fma(load_some(l, &q[vectors * LANES..], 0.0), key, *sum);
            }
        }
        for (head, sum) in sums.into_iter().enumerate() {
            out[head * stride + row] = l.sum(sum) * factor;
        }
    }
}

/// log2 of the sum of exp2 of base-2 scores; -inf for none.
pub fn log_sum_exp2(scores: &[f32]) -> f32 {
    log_sum_exp2_on(Isa::active(), scores)
}

/// Scores summed in f32 before the sum moves on to f64.
const SUM_CHUNK: usize = 4096;

dispatched!(fn log_sum_exp2_on(scores: &[f32]) -> f32 = log_sum_exp2_in);
#[inline(always)]
fn log_sum_exp2_in<L: Lanes>(l: L, scores: &[f32]) -> f32 {
    let mut high = l.splat(f32::NEG_INFINITY);
    let (whole, tail) = scores.as_chunks();
    for chunk in whole {
        high = l.max(l.load(chunk), high);
    }
    high = l.max(load_some(l, tail, f32::NEG_INFINITY), high);
    let high = l.highest(high);
    if high == f32::NEG_INFINITY {
        return high;
    }
    let shift = l.splat(high);
    let mut total = 0.0_f64;
    for chunk in scores.chunks(SUM_CHUNK) {
        let mut sum = l.splat(0.0);
        let (whole, tail) = chunk.as_chunks();
        for x in whole {
            sum = l.add(sum, exp2(l, l.sub(l.load(x), shift)));
        }
        sum = l.add(sum, exp2(l, l.sub(load_some(l, tail, f32::NEG_INFINITY), shift)));
        total += f64::from(l.sum(sum));
    }
    high + log2(total as f32)
}

/// `out[i] = exp2(scores[i] - highest)`, and of all scores the highest and [`log_sum_exp2`]; weights of 0 and -inf if none is
/// above -inf.
///
/// # Panics
/// If `out` is not as long as `scores`.
pub fn exp2_weights(scores: &[f32], out: &mut [f32]) -> (f32, f32) {
    assert_eq!(scores.len(), out.len(), "exp2_weights: a weight per score");
    exp2_weights_on(Isa::active(), scores, out)
}

dispatched!(fn exp2_weights_on(scores: &[f32], out: &mut [f32]) -> (f32, f32) = exp2_weights_in);
#[inline(always)]
fn exp2_weights_in<L: Lanes>(l: L, scores: &[f32], out: &mut [f32]) -> (f32, f32) {
    const NONE: f32 = f32::NEG_INFINITY;
    let (whole, tail) = scores.as_chunks();
    let mut high = load_some(l, tail, NONE);
    for scores in whole {
        high = l.max(l.load(scores), high);
    }
    let high = l.highest(high);
    if high == NONE {
        out.fill(0.0);
        return (NONE, NONE);
    }
    let shift = l.splat(high);
    let mut total = 0.0_f64;
    for (scores, out) in scores.chunks(SUM_CHUNK).zip(out.chunks_mut(SUM_CHUNK)) {
        let mut sum = l.splat(0.0);
        let ((scores, tail), (out, out_tail)) = (scores.as_chunks(), out.as_chunks_mut());
        for (scores, out) in scores.iter().zip(out) {
            let weights = exp2(l, l.sub(l.load(scores), shift));
            l.store(weights, out);
            sum = l.add(sum, weights);
        }
        let weights = exp2(l, l.sub(load_some(l, tail, NONE), shift));
        store_some(l, weights, out_tail);
        total += f64::from(l.sum(l.add(sum, weights)));
    }
    (high, high + log2(total as f32))
}

/// `o[d] = sum_i exp2(scores[i] - lse) * values[i, d]` over the rows `i` in `chosen`, in their order.
///
/// # Panics
/// If `out` is not `[head_dim]`, or a chosen row is beyond `scores` or `values`.
pub fn weighted_values(scores: &[f32], chosen: &[u32], lse: f32, values: &[f16], head_dim: usize, out: &mut [f32]) {
    assert_eq!(out.len(), head_dim, "weighted_values: out is [head_dim]");
    out.fill(0.0);
    weighted_values_on(Isa::active(), scores, chosen, lse, values, head_dim, out);
}

dispatched!(
    fn weighted_values_on(
        scores: &[f32], chosen: &[u32], lse: f32, values: &[f16], head_dim: usize, out: &mut [f32],
    ) = weighted_values_in
);
#[inline(always)]
fn weighted_values_in<L: Lanes>(
    l: L,
    scores: &[f32],
    chosen: &[u32],
    lse: f32,
    values: &[f16],
    head_dim: usize,
    out: &mut [f32],
) {
    for rows in chosen.chunks(LANES) {
        let mut picked = [f32::NEG_INFINITY; LANES];
        for (picked, &row) in picked.iter_mut().zip(rows) {
            *picked = scores[row as usize];
        }
        let mut weights = [0.0; LANES];
        l.store(exp2(l, l.sub(l.load(&picked), l.splat(lse))), &mut weights);
        for (&row, weight) in rows.iter().zip(weights) {
            let value = &values[row as usize * head_dim..][..head_dim];
            let weight = l.splat(weight);
            let (value, value_tail) = value.as_chunks();
            let (out, out_tail) = out.as_chunks_mut();
            for (value, out) in value.iter().zip(out) {
                l.store(l.fma(weight, l.load_f16(value), l.load(out)), out);
            }
            if !value_tail.is_empty() {
                let sum = l.fma(weight, load_some_f16(l, value_tail), load_some(l, out_tail, 0.0));
                store_some(l, sum, out_tail);
            }
        }
    }
}

#[cfg(test)]
mod tests;
