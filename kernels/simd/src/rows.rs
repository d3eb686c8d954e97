//! Scattered rows: scored and weighed where they lie, the next ones on their way meanwhile; and keys projected for coding.

use half::f16;

use crate::{
    isa::{Isa, dispatched},
    lanes::{LANES, Lanes, load_some, load_some_f16, store_some},
};

/// Rows whose bytes are asked for before they are needed.
const AHEAD: usize = 8;
/// As [`AHEAD`], where rows lie far apart.
const SLOTS_AHEAD: usize = 16;
/// Rows that stay in the nearest cache while every head takes them.
const NEAR: usize = 64;
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

/// Rows of equally long blocks that lie anywhere. Row `slot` is row `slot % each` of block `slot / each`, where `each` is the
/// slots of a block, whole groups of sixteen; blocks may have fewer rows than slots.
#[derive(Clone, Copy, Debug)]
pub struct Scattered<'a> {
    blocks: &'a [&'a [f16]],
    head_dim: usize,
    groups: u32,
    /// What a number of a group is multiplied with for its block, in 34 bits below the point.
    inverse: u64,
}

impl<'a> Scattered<'a> {
    /// Rows of `head_dim` in `blocks` of `groups` times sixteen slots.
    ///
    /// # Panics
    /// If `head_dim` is 0, or `groups` is not 1 to 16.
    pub fn new(blocks: &'a [&'a [f16]], head_dim: usize, groups: usize) -> Self {
        assert!(
            head_dim > 0 && (1..=16).contains(&groups),
            "scattered: rows of at least 1 in blocks of 1 to 16 groups"
        );
        Self {
            blocks,
            head_dim,
            groups: groups as u32,
            // Rounded up: exact for fewer than 2^30 groups, since the excess times 16 stays below one.
            inverse: (1_u64 << 34).div_ceil(groups as u64),
        }
    }

    /// Block of a slot, and the row in it.
    #[inline(always)]
    pub fn place(&self, slot: u32) -> (usize, usize) {
        let block = (u64::from(slot / 16) * self.inverse) >> 34;
        (block as usize, (slot - block as u32 * self.groups * 16) as usize)
    }

    /// The row of a slot.
    ///
    /// # Panics
    /// If there is none.
    #[inline(always)]
    pub fn row(&self, slot: u32) -> &'a [f16] {
        let (block, row) = self.place(slot);
        &self.blocks[block][row * self.head_dim..][..self.head_dim]
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

dispatched!(fn score_slots_on(q: &[f32], rows: Scattered<'_>, slots: &[u32], factor: f32, out: &mut [f32]) = score_slots_in);
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

dispatched!(fn weigh_slots_on(weights: &[f32], rows: Scattered<'_>, slots: &[u32], sums: &mut [f32]) = weigh_slots_in);
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

dispatched!(fn weigh_dense_on(weights: &[f32], rows: &[f16], head_dim: usize, sums: &mut [f32]) = weigh_dense_in);
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

dispatched!(fn weigh_rows_on(weights: &[f32], rows: &[&[f16]], head_dim: usize, sums: &mut [f32]) = weigh_rows_in);
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
    /// Dimensions turned at a time: they stay in the nearest cache.
    const DIMS: usize = 64;
    let (head_dim, n) = (mean.len(), keys.len() / mean.len());
    out.fill([0.0; LANES]);
    let mut turned = [[0.0_f32; LANES]; DIMS];
    for first in (0..head_dim).step_by(DIMS) {
        let dims = DIMS.min(head_dim - first);
        turn(l, keys, head_dim, first, &mut turned[..dims.next_multiple_of(8)]);
        for (turned, mean) in turned.iter_mut().zip(&mean[first..first + dims]) {
            l.store(l.sub(l.load(turned), l.splat(*mean)), turned);
        }
        for (out, directions) in out.chunks_mut(4).zip(directions.chunks(4 * head_dim)) {
            let row = |r: usize| &directions[r * head_dim + first..][..dims];
            match out {
                [a, b, c, d] => {
                    let mut sums = [l.load(a), l.load(b), l.load(c), l.load(d)];
                    let rows = row(0).iter().zip(row(1)).zip(row(2)).zip(row(3));
                    for (turned, (((a, b), c), d)) in turned.iter().zip(rows) {
                        let turned = l.load(turned);
                        for (sum, weight) in sums.iter_mut().zip([a, b, c, d]) {
                            *sum = l.fma(l.splat(*weight), turned, *sum);
                        }
                    }
                    for (sum, out) in sums.into_iter().zip([a, b, c, d]) {
                        l.store(l.first(sum, n, 0.0), out);
                    }
                }
                few => {
                    for (r, out) in few.iter_mut().enumerate() {
                        let mut sum = l.load(out);
                        for (weight, turned) in row(r).iter().zip(&turned) {
                            sum = l.fma(l.splat(*weight), l.load(turned), sum);
                        }
                        l.store(l.first(sum, n, 0.0), out);
                    }
                }
            }
        }
    }
}

/// `turned[i][key] = keys[key][first + i]`, 0 beyond the keys and beyond `head_dim`.
#[inline(always)]
fn turn<L: Lanes>(l: L, keys: &[f16], head_dim: usize, first: usize, turned: &mut [[f32; LANES]]) {
    let none = [f16::ZERO; 8];
    for (at, turned) in turned.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let from = first + at * 8;
        for half in 0..2 {
            let mut ends = [none; 8];
            let rows: [&[f16; 8]; 8] = {
                let mut rows = [&none; 8];
                for ((key, row), end) in rows.iter_mut().enumerate().zip(&mut ends) {
                    let Some(whole) = keys.get((half * 8 + key) * head_dim..).filter(|keys| !keys.is_empty()) else {
                        break;
                    };
                    *row = match whole[from..head_dim].first_chunk() {
                        Some(row) => row,
                        None => {
                            end[..head_dim - from].copy_from_slice(&whole[from..head_dim]);
                            end
                        }
                    };
                }
                rows
            };
            let out = turned.each_mut().map(|row| &mut row.as_chunks_mut::<8>().0[half]);
            l.transpose(rows, out);
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
                let mut dense = vec![0.0; heads * head_dim];
                weigh_dense_on(isa, &weights, &keys, head_dim, &mut dense);
                prop_assert_eq!(bits(&dense), bits(&sums), "{:?} dense", isa);
                // Blocks of 32 slots, of which the last may be short; every row, then backwards.
                let blocks: Vec<&[f16]> = keys.chunks(32 * head_dim).collect();
                let scattered = Scattered::new(&blocks, head_dim, 2);
                for head in 0..heads {
                    for slots in [(0..n as u32).collect::<Vec<_>>(), (0..n as u32).rev().collect()] {
                        let mut found = vec![0.0; n];
                        let q = &q[head * head_dim..][..head_dim];
                        score_slots_on(isa, q, scattered, &slots, 0.3, &mut found);
                        let some = n / 2;
                        score_slots_on(isa, q, scattered, &slots, 0.3, &mut found[..some]);
                        score_slots_on(isa, q, scattered, &slots[some..], 0.3, &mut found[some..]);
                        let expected: Vec<f32> = slots.iter().map(|slot| scores[head * n + *slot as usize]).collect();
                        prop_assert_eq!(bits(&found), bits(&expected), "{:?} slots", isa);
                    }
                    let slots: Vec<u32> = (0..n as u32).collect();
                    let mut found = vec![0.0; head_dim];
                    weigh_slots_on(isa, &weights[head * n..][..n], scattered, &slots, &mut found);
                    prop_assert_eq!(bits(&found), bits(&sums[head * head_dim..][..head_dim]), "{:?} slots", isa);
                }
                Ok((scores, sums, z))
            };
            let (scores, sums, z) = run(Isa::Scalar)?;
            for isa in Isa::available() {
                let found = run(isa)?;
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

    #[test]
    fn slots_have_places() {
        let row = [f16::ONE; 2];
        let blocks = vec![&row[..]; 1];
        for groups in 1..=16 {
            let rows = Scattered::new(&blocks, 1, groups);
            for slot in (0..3000).chain([16 * 65_536 - 1, 16 * 65_536, u32::MAX / 2, u32::MAX]) {
                let each = groups as u32 * 16;
                assert_eq!(
                    rows.place(slot),
                    ((slot / each) as usize, (slot % each) as usize),
                    "{slot} {groups}"
                );
            }
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
