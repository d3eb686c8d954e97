//! Scattered rows: scored and weighed where they lie, the next ones on their way meanwhile; and keys projected for coding.

use half::f16;

use crate::{
    isa::{Isa, dispatched},
    lanes::{LANES, Lanes, load_some, load_some_f16, store_some},
};

/// Rows whose bytes are asked for before they are needed.
const AHEAD: usize = 8;
/// Queries that share a converted row.
const HEADS: usize = 4;

/// Base-2 scores `q[g, d] . rows[n][d] * scale * log2(e)` into `out[g, n]`: as [`crate::scores`], for rows anywhere.
///
/// # Panics
/// If `q` is not whole rows of `head_dim`, a row is not one, or `out` is not `[g, n]`.
pub fn score_rows(q: &[f32], rows: &[&[f16]], head_dim: usize, scale: f32, out: &mut [f32]) {
    assert!(
        head_dim > 0 && q.len().is_multiple_of(head_dim),
        "score_rows: q is rows of head_dim {head_dim}"
    );
    assert!(
        rows.iter().all(|row| row.len() == head_dim),
        "score_rows: rows of head_dim {head_dim}"
    );
    assert_eq!(out.len(), q.len() / head_dim * rows.len(), "score_rows: out is [g, n]");
    score_rows_on(Isa::active(), q, rows, head_dim, scale * std::f32::consts::LOG2_E, out);
}

dispatched!(fn score_rows_on(q: &[f32], rows: &[&[f16]], head_dim: usize, factor: f32, out: &mut [f32]) = score_rows_in);
#[inline(always)]
fn score_rows_in<L: Lanes>(l: L, q: &[f32], rows: &[&[f16]], head_dim: usize, factor: f32, out: &mut [f32]) {
    let n = rows.len();
    for (at, &row) in rows.iter().enumerate() {
        if let Some(next) = rows.get(at + AHEAD) {
            prefetch(next);
        }
        let mut head = 0;
        for q in q.chunks(HEADS * head_dim) {
            let out = &mut out[head * n + at..];
            match q.len() / head_dim {
                4 => score::<L, 4>(l, q, row, factor, out, n),
                3 => score::<L, 3>(l, q, row, factor, out, n),
                2 => score::<L, 2>(l, q, row, factor, out, n),
                _ => score::<L, 1>(l, q, row, factor, out, n),
            }
            head += HEADS;
        }
    }
}

#[inline(always)]
fn score<L: Lanes, const G: usize>(l: L, q: &[f32], row: &[f16], factor: f32, out: &mut [f32], stride: usize) {
    let head_dim = row.len();
    let (whole, tail) = row.as_chunks::<LANES>();
    let heads: [&[f32]; G] = std::array::from_fn(|head| &q[head * head_dim..][..head_dim]);
    let vectors: [&[[f32; LANES]]; G] = heads.map(|q| &q.as_chunks().0[..whole.len()]);
    let mut sums = [l.splat(0.0); G];
    for (v, key) in whole.iter().enumerate() {
        let key = l.load_f16(key);
        for (sum, q) in sums.iter_mut().zip(&vectors) {
            *sum = l.fma(l.load(&q[v]), key, *sum);
        }
    }
    if !tail.is_empty() {
        let key = load_some_f16(l, tail);
        for (sum, q) in sums.iter_mut().zip(&heads) {
            *sum = l.fma(load_some(l, &q[whole.len() * LANES..], 0.0), key, *sum);
        }
    }
    for (head, sum) in sums.into_iter().enumerate() {
        out[head * stride] = l.sum(sum) * factor;
    }
}

/// Adds `weights[head, i] * rows[i]` over all rows, in order, to `sums[head, head_dim]`. A row of weight 0 is not touched
/// for that head, whatever is in it.
///
/// # Panics
/// If a row is not `head_dim` long, or weights and sums are not of the same number of heads.
pub fn weigh_rows(weights: &[f32], rows: &[&[f16]], head_dim: usize, sums: &mut [f32]) {
    assert!(head_dim > 0, "weigh_rows: head_dim is at least 1");
    assert!(
        rows.iter().all(|row| row.len() == head_dim),
        "weigh_rows: rows of head_dim {head_dim}"
    );
    assert_eq!(
        weights.len() * head_dim,
        sums.len() * rows.len(),
        "weigh_rows: weights are [heads, n]"
    );
    weigh_rows_on(Isa::active(), weights, rows, head_dim, sums);
}

dispatched!(fn weigh_rows_on(weights: &[f32], rows: &[&[f16]], head_dim: usize, sums: &mut [f32]) = weigh_rows_in);
#[inline(always)]
fn weigh_rows_in<L: Lanes>(l: L, weights: &[f32], rows: &[&[f16]], head_dim: usize, sums: &mut [f32]) {
    let n = rows.len();
    for (at, &row) in rows.iter().enumerate() {
        if let Some(next) = rows.get(at + AHEAD) {
            prefetch(next);
        }
        let (whole, tail) = row.as_chunks::<LANES>();
        for (head, sums) in sums.chunks_exact_mut(head_dim).enumerate() {
            let weight = weights[head * n + at];
            if weight == 0.0 {
                continue;
            }
            let weight = l.splat(weight);
            let (sums, sums_tail) = sums.as_chunks_mut::<LANES>();
            for (value, sum) in whole.iter().zip(sums) {
                l.store(l.fma(weight, l.load_f16(value), l.load(sum)), sum);
            }
            if !tail.is_empty() {
                let sum = l.fma(weight, load_some_f16(l, tail), load_some(l, sums_tail, 0.0));
                store_some(l, sum, sums_tail);
            }
        }
    }
}

/// Asks for a row's bytes; nothing else happens.
#[inline(always)]
fn prefetch(row: &[f16]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.chunks(32) {
        // SAFETY: a prefetch has no effect but on speed, and SSE is in every x86-64 processor.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// `out[r, n] = directions[r, d] . (keys[n, d] - mean[d])`; `n` is at most 16 keys, `out` rows are 16 long and lanes beyond
/// `n` are 0.
///
/// # Panics
/// If shapes do not fit.
pub fn project(directions: &[f32], mean: &[f32], keys: &[f16], out: &mut [[f32; LANES]]) {
    let head_dim = mean.len();
    assert!(
        head_dim > 0 && directions.len() == out.len() * head_dim && keys.len().is_multiple_of(head_dim),
        "project: directions are [rank, head_dim], keys [n, head_dim]"
    );
    assert!(keys.len() <= LANES * head_dim, "project: at most 16 keys");
    project_on(Isa::active(), directions, mean, keys, out);
}

dispatched!(fn project_on(directions: &[f32], mean: &[f32], keys: &[f16], out: &mut [[f32; LANES]]) = project_in);
#[inline(always)]
fn project_in<L: Lanes>(l: L, directions: &[f32], mean: &[f32], keys: &[f16], out: &mut [[f32; LANES]]) {
    /// Dimensions turned at a time: they stay in registers and the nearest cache.
    const DIMS: usize = 64;
    let head_dim = mean.len();
    out.fill([0.0; LANES]);
    let mut turned = [[0.0_f32; LANES]; DIMS];
    for first in (0..head_dim).step_by(DIMS) {
        let dims = DIMS.min(head_dim - first);
        for (key, row) in keys.chunks_exact(head_dim).enumerate() {
            let mut wide = [0.0; DIMS];
            let (whole, tail) = row[first..first + dims].as_chunks::<LANES>();
            let (wide_whole, wide_tail) = wide.as_chunks_mut::<LANES>();
            for (half, wide) in whole.iter().zip(&mut *wide_whole) {
                l.store(l.load_f16(half), wide);
            }
            if !tail.is_empty() {
                l.store(load_some_f16(l, tail), &mut wide_whole[whole.len()]);
            }
            debug_assert!(wide_tail.is_empty());
            for ((turned, wide), mean) in turned.iter_mut().zip(wide).zip(&mean[first..first + dims]) {
                turned[key] = wide - mean;
            }
        }
        for (out, directions) in out.chunks_mut(4).zip(directions.chunks(4 * head_dim)) {
            match out {
                [a, b, c, d] => {
                    let rows: [&[f32]; 4] = std::array::from_fn(|r| &directions[r * head_dim + first..][..dims]);
                    let mut sums = [l.load(a), l.load(b), l.load(c), l.load(d)];
                    for (i, turned) in turned[..dims].iter().enumerate() {
                        let turned = l.load(turned);
                        for (sum, row) in sums.iter_mut().zip(rows) {
                            *sum = l.fma(l.splat(row[i]), turned, *sum);
                        }
                    }
                    for (sum, out) in sums.into_iter().zip([a, b, c, d]) {
                        l.store(sum, out);
                    }
                }
                few => {
                    for (out, row) in few.iter_mut().zip(directions.chunks_exact(head_dim)) {
                        let mut sum = l.load(out);
                        for (d, turned) in row[first..first + dims].iter().zip(&turned) {
                            sum = l.fma(l.splat(*d), l.load(turned), sum);
                        }
                        l.store(sum, out);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kvasir_reference as reference;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{bits, error, halves, values};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn truth_and_equal_bits(
            seed in 0_u64..1000,
            heads in 0_usize..10,
            n in 0_usize..40,
            rank in 0_usize..40,
            head_dim in prop::sample::select(vec![1_usize, 24, 64, 96, 128, 256]),
        ) {
            let (q, keys) = (values(seed, heads * head_dim), halves(seed + 1, n * head_dim));
            let rows: Vec<&[f16]> = keys.chunks_exact(head_dim).collect();
            let weights: Vec<f32> = values(seed + 2, heads * n).iter().map(|w| w.max(0.0)).collect();
            let (directions, mean) = (values(seed + 3, rank * head_dim), values(seed + 4, head_dim));
            let few = &keys[..n.min(LANES) * head_dim];
            let run = |isa| {
                let mut scores = vec![0.0; heads * n];
                score_rows_on(isa, &q, &rows, head_dim, 0.3, &mut scores);
                let mut sums = vec![0.0; heads * head_dim];
                weigh_rows_on(isa, &weights, &rows, head_dim, &mut sums);
                let mut z = vec![[9.0; LANES]; rank];
                project_on(isa, &directions, &mean, few, &mut z);
                (scores, sums, z)
            };
            let (scores, sums, z) = run(Isa::Scalar);
            for isa in Isa::available() {
                let found = run(isa);
                prop_assert_eq!(bits(&found.0), bits(&scores), "{:?}", isa);
                prop_assert_eq!(bits(&found.1), bits(&sums), "{:?}", isa);
                prop_assert_eq!(bits(found.2.as_flattened()), bits(z.as_flattened()), "{:?}", isa);
            }
            let truth: Vec<f64> =
                reference::scores(&q, &keys, head_dim).iter().map(|s| s * f64::from(0.3_f32)).collect();
            prop_assert!(error(&scores, &truth) < 2e-6);
            let weighed: Vec<f64> = (0..heads * head_dim).map(|at| {
                let (head, d) = (at / head_dim, at % head_dim);
                (0..n).map(|i| f64::from(weights[head * n + i]) * rows[i][d].to_f64()).sum()
            }).collect();
            prop_assert!(error(&sums, &weighed) < 2e-6);
            let projected: Vec<f64> = (0..rank * LANES).map(|at| {
                let (r, key) = (at / LANES, at % LANES);
                if key >= n { return 0.0 }
                (0..head_dim).map(|d| f64::from(directions[r * head_dim + d]) * f64::from(rows[key][d].to_f32() - mean[d])).sum()
            }).collect();
            prop_assert!(error(z.as_flattened(), &projected) < 2e-6);
        }
    }

    /// A row of weight 0 cannot spoil a sum.
    #[test]
    fn weight_zero_is_not_multiplied() {
        let mut sums = [1.0];
        weigh_rows(&[0.0, 2.0], &[&[f16::NAN], &[f16::ONE]], 1, &mut sums);
        assert_eq!(sums, [3.0]);
    }
}
