//! Keys along directions, sixteen keys at a time.

use half::f16;

use crate::{
    isa::{Isa, dispatched},
    lanes::{LANES, Lanes},
};

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

dispatched!(pub(super) fn project_on(directions: &[f32], mean: &[f32], keys: &[f16], out: &mut [[f32; LANES]]) = project_in);
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
