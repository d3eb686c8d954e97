//! Scores of rows anywhere.

use half::f16;

use super::{AHEAD, HEADS, NEAR, SLOTS_AHEAD, Scattered, prefetch};
use crate::{
    isa::{Isa, dispatched},
    lanes::{LANES, Lanes, load_some, load_some_f16},
};

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

dispatched!(pub(super) fn score_rows_on(q: &[f32], rows: &[&[f16]], head_dim: usize, factor: f32, out: &mut [f32]) = score_rows_in);
#[inline(always)]
fn score_rows_in<L: Lanes>(l: L, q: &[f32], rows: &[&[f16]], head_dim: usize, factor: f32, out: &mut [f32]) {
    let n = rows.len();
    for first in (0..n).step_by(NEAR) {
        let rows = &rows[first..n.min(first + NEAR)];
        for (strip, q) in q.chunks(HEADS * head_dim).enumerate() {
            let out = &mut out[strip * HEADS * n + first..];
            match q.len() / head_dim {
                4 => score_each::<L, 4>(l, q, rows, factor, out, n),
                3 => score_each::<L, 3>(l, q, rows, factor, out, n),
                2 => score_each::<L, 2>(l, q, rows, factor, out, n),
                _ => score_each::<L, 1>(l, q, rows, factor, out, n),
            }
        }
    }
}

#[inline(always)]
fn score_each<L: Lanes, const G: usize>(l: L, q: &[f32], rows: &[&[f16]], factor: f32, out: &mut [f32], stride: usize) {
    for (at, row) in rows.iter().enumerate() {
        if let Some(next) = rows.get(at + AHEAD) {
            prefetch(next);
        }
        score::<L, G>(l, q, row, factor, &mut out[at..], stride);
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

/// As [`score_rows`], for one query and the rows of the first slots, as many as `out` has room for; those of a few slots behind
/// them are asked for, for the next call.
///
/// # Panics
/// If `q` is not one row, `out` is longer than `slots`, or a slot has no row.
pub fn score_slots(q: &[f32], rows: Scattered<'_>, slots: &[u32], scale: f32, out: &mut [f32]) {
    assert_eq!(q.len(), rows.head_dim, "score_slots: q is one row");
    assert!(out.len() <= slots.len(), "score_slots: a slot per score");
    score_slots_on(Isa::active(), q, rows, slots, scale * std::f32::consts::LOG2_E, out);
}

dispatched!(pub(super) fn score_slots_on(q: &[f32], rows: Scattered<'_>, slots: &[u32], factor: f32, out: &mut [f32]) = score_slots_in);
#[inline(always)]
fn score_slots_in<L: Lanes>(l: L, q: &[f32], rows: Scattered<'_>, slots: &[u32], factor: f32, out: &mut [f32]) {
    match (rows.head_dim, L::WIDE) {
        (128, true) => score_whole::<L, 8>(l, q, rows, slots, factor, out),
        (64, _) => score_whole::<L, 4>(l, q, rows, slots, factor, out),
        _ => {
            for (at, (slot, out)) in slots.iter().zip(out).enumerate() {
                if let Some(next) = slots.get(at + SLOTS_AHEAD) {
                    prefetch(rows.row(*next));
                }
                score::<L, 1>(l, q, rows.row(*slot), factor, std::slice::from_mut(out), 1);
            }
        }
    }
}

/// Rows of `V` vectors, against a query in registers.
#[inline(always)]
fn score_whole<L: Lanes, const V: usize>(
    l: L,
    q: &[f32],
    rows: Scattered<'_>,
    slots: &[u32],
    factor: f32,
    out: &mut [f32],
) {
    let vectors = &q.as_chunks::<LANES>().0[..V];
    let q: [L::F; V] = std::array::from_fn(|v| l.load(&vectors[v]));
    for (at, (slot, out)) in slots.iter().zip(out).enumerate() {
        if let Some(next) = slots.get(at + SLOTS_AHEAD) {
            prefetch(rows.row(*next));
        }
        let key = &rows.row(*slot).as_chunks::<LANES>().0[..V];
        let mut sum = l.splat(0.0);
        for (q, key) in q.iter().zip(key) {
            sum = l.fma(*q, l.load_f16(key), sum);
        }
        *out = l.sum(sum) * factor;
    }
}
