//! Weighted sums of rows anywhere.

use half::f16;

use super::{AHEAD, HEADS, NEAR, SLOTS_AHEAD, Scattered, prefetch};
use crate::{
    isa::{Isa, dispatched},
    lanes::{LANES, Lanes, load_some, load_some_f16, store_some},
};

/// Adds `weights[i]` times the row of `slots[i]` over all weights, in order, to `sums[head_dim]`. Rows of a few slots behind them
/// are asked for, for the next call.
///
/// # Panics
/// If `sums` is not one row, there are more weights than slots, or a slot has no row.
pub fn weigh_slots(weights: &[f32], rows: Scattered<'_>, slots: &[u32], sums: &mut [f32]) {
    assert_eq!(sums.len(), rows.head_dim, "weigh_slots: sums are one row");
    assert!(weights.len() <= slots.len(), "weigh_slots: a slot per weight");
    weigh_slots_on(Isa::active(), weights, rows, slots, sums);
}

dispatched!(pub(super) fn weigh_slots_on(weights: &[f32], rows: Scattered<'_>, slots: &[u32], sums: &mut [f32]) = weigh_slots_in);
#[inline(always)]
fn weigh_slots_in<L: Lanes>(l: L, weights: &[f32], rows: Scattered<'_>, slots: &[u32], sums: &mut [f32]) {
    let (whole, tail) = sums.as_chunks_mut::<LANES>();
    let mut first = 0;
    // As many sums as there are registers for.
    for sums in whole.chunks_mut(if L::WIDE { 8 } else { 4 }) {
        match sums.len() {
            8 => weigh_each::<L, 8>(l, weights, rows, slots, first, sums),
            4 => weigh_each::<L, 4>(l, weights, rows, slots, first, sums),
            _ => {
                for (at, sums) in sums.chunks_mut(1).enumerate() {
                    weigh_each::<L, 1>(l, weights, rows, slots, first + at * LANES, sums);
                }
            }
        }
        first += sums.len() * LANES;
    }
    if !tail.is_empty() {
        let mut sum = load_some(l, tail, 0.0);
        for (slot, weight) in slots.iter().zip(weights) {
            sum = l.fma(l.splat(*weight), load_some_f16(l, &rows.row(*slot)[first..]), sum);
        }
        store_some(l, sum, tail);
    }
}

/// Adds `V` vectors of each row from element `first` on to sums that stay in registers.
#[inline(always)]
fn weigh_each<L: Lanes, const V: usize>(
    l: L,
    weights: &[f32],
    rows: Scattered<'_>,
    slots: &[u32],
    first: usize,
    sums: &mut [[f32; LANES]],
) {
    let mut kept: [L::F; V] = std::array::from_fn(|v| l.load(&sums[v]));
    for (at, (slot, weight)) in slots.iter().zip(weights).enumerate() {
        if let Some(next) = slots.get(at + SLOTS_AHEAD) {
            prefetch(&rows.row(*next)[first..first + V * LANES]);
        }
        let weight = l.splat(*weight);
        let row = &rows.row(*slot)[first..].as_chunks::<LANES>().0[..V];
        for (sum, value) in kept.iter_mut().zip(row) {
            *sum = l.fma(weight, l.load_f16(value), *sum);
        }
    }
    for (sum, out) in kept.into_iter().zip(sums) {
        l.store(sum, out);
    }
}

/// Adds `weights[head, i] * rows[i]` over all rows that lie one behind another, in order, to `sums[head, head_dim]`: as
/// [`weigh_rows`] for rows that are finite, each read once for four heads.
///
/// # Panics
/// If `rows` are not whole rows, or weights and sums are not of the same number of heads.
pub fn weigh_dense(weights: &[f32], rows: &[f16], head_dim: usize, sums: &mut [f32]) {
    assert!(
        head_dim > 0 && rows.len().is_multiple_of(head_dim),
        "weigh_dense: rows of head_dim {head_dim}"
    );
    assert_eq!(
        weights.len() * head_dim,
        sums.len() * (rows.len() / head_dim),
        "weigh_dense: weights are [heads, n]"
    );
    weigh_dense_on(Isa::active(), weights, rows, head_dim, sums);
}

dispatched!(pub(super) fn weigh_dense_on(weights: &[f32], rows: &[f16], head_dim: usize, sums: &mut [f32]) = weigh_dense_in);
#[inline(always)]
fn weigh_dense_in<L: Lanes>(l: L, weights: &[f32], rows: &[f16], head_dim: usize, sums: &mut [f32]) {
    /// Rows that stay in the nearest cache while all heads and vectors take them.
    const ROWS: usize = 64;
    let n = rows.len() / head_dim;
    for (part, rows) in rows.chunks(ROWS * head_dim).enumerate() {
        for (strip, sums) in sums.chunks_mut(HEADS * head_dim).enumerate() {
            let weights = &weights[strip * HEADS * n + part * ROWS..];
            match sums.len() / head_dim {
                4 => weigh_strip::<L, 4>(l, weights, n, rows, head_dim, sums),
                3 => weigh_strip::<L, 3>(l, weights, n, rows, head_dim, sums),
                2 => weigh_strip::<L, 2>(l, weights, n, rows, head_dim, sums),
                _ => weigh_strip::<L, 1>(l, weights, n, rows, head_dim, sums),
            }
        }
    }
}

/// For `G` heads whose weights are `stride` apart.
#[inline(always)]
fn weigh_strip<L: Lanes, const G: usize>(
    l: L,
    weights: &[f32],
    stride: usize,
    rows: &[f16],
    head_dim: usize,
    sums: &mut [f32],
) {
    let mut first = 0;
    while first + LANES <= head_dim {
        let mut kept: [L::F; G] = std::array::from_fn(|head| {
            let at = head * head_dim + first;
            l.load(&sums[at..].as_chunks().0[0])
        });
        let mut next: [L::F; G] = [l.splat(0.0); G];
        let two = first + 2 * LANES <= head_dim;
        if two {
            next = std::array::from_fn(|head| l.load(&sums[head * head_dim + first..].as_chunks().0[1]));
        }
        for (at, row) in rows.chunks_exact(head_dim).enumerate() {
            let row = row[first..].as_chunks::<LANES>().0;
            let (a, b) = (
                l.load_f16(&row[0]),
                if two { l.load_f16(&row[1]) } else { l.splat(0.0) },
            );
            for (head, (kept, next)) in kept.iter_mut().zip(&mut next).enumerate() {
                let weight = l.splat(weights[head * stride + at]);
                *kept = l.fma(weight, a, *kept);
                *next = l.fma(weight, b, *next);
            }
        }
        for (head, (kept, next)) in kept.into_iter().zip(next).enumerate() {
            let out = sums[head * head_dim + first..].as_chunks_mut().0;
            l.store(kept, &mut out[0]);
            if two {
                l.store(next, &mut out[1]);
            }
        }
        first += if two { 2 } else { 1 } * LANES;
    }
    if first < head_dim {
        for (head, sums) in sums.chunks_exact_mut(head_dim).enumerate() {
            let tail = &mut sums[first..];
            let mut sum = load_some(l, tail, 0.0);
            for (at, row) in rows.chunks_exact(head_dim).enumerate() {
                sum = l.fma(
                    l.splat(weights[head * stride + at]),
                    load_some_f16(l, &row[first..]),
                    sum,
                );
            }
            store_some(l, sum, tail);
        }
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

dispatched!(pub(super) fn weigh_rows_on(weights: &[f32], rows: &[&[f16]], head_dim: usize, sums: &mut [f32]) = weigh_rows_in);
#[inline(always)]
fn weigh_rows_in<L: Lanes>(l: L, weights: &[f32], rows: &[&[f16]], head_dim: usize, sums: &mut [f32]) {
    let n = rows.len();
    for (at, rows) in rows.chunks(NEAR).enumerate() {
        for (head, sums) in sums.chunks_exact_mut(head_dim).enumerate() {
            let weights = &weights[head * n + at * NEAR..][..rows.len()];
            let (whole, tail) = sums.as_chunks_mut::<LANES>();
            let mut first = 0;
            for sums in whole.chunks_mut(4) {
                match sums.len() {
                    4 => weigh::<L, 4>(l, weights, rows, first, sums),
                    3 => weigh::<L, 3>(l, weights, rows, first, sums),
                    2 => weigh::<L, 2>(l, weights, rows, first, sums),
                    _ => weigh::<L, 1>(l, weights, rows, first, sums),
                }
                first += sums.len() * LANES;
            }
            if !tail.is_empty() {
                let mut sum = load_some(l, tail, 0.0);
                for (row, &weight) in rows.iter().zip(weights).filter(|(_, weight)| **weight != 0.0) {
                    sum = l.fma(l.splat(weight), load_some_f16(l, &row[first..]), sum);
                }
                store_some(l, sum, tail);
            }
        }
    }
}

/// Adds the `V` vectors of each row from element `first` on to sums that stay in registers.
#[inline(always)]
fn weigh<L: Lanes, const V: usize>(l: L, weights: &[f32], rows: &[&[f16]], first: usize, sums: &mut [[f32; LANES]]) {
    let mut kept: [L::F; V] = std::array::from_fn(|v| l.load(&sums[v]));
    for (at, (row, &weight)) in rows.iter().zip(weights).enumerate() {
        if let Some(next) = rows.get(at + AHEAD) {
            prefetch(&next[first..first + V * LANES]);
        }
        if weight == 0.0 {
            continue;
        }
        let weight = l.splat(weight);
        let row = &row[first..first + V * LANES].as_chunks::<LANES>().0[..V];
        for (sum, value) in kept.iter_mut().zip(row) {
            *sum = l.fma(weight, l.load_f16(value), *sum);
        }
    }
    for (sum, out) in kept.into_iter().zip(sums) {
        l.store(sum, out);
    }
}
