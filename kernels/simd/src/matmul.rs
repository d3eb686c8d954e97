//! Products of quantised weights and quantised activations.
//!
//! A dot product runs over the blocks of 32 in order. Per block the integer product is exact; then, all in f32,
//! `sum = fma(d_w * d_x, integers, sum)` and, for 4-bit weights, `sum = fma(m_w, d_x * sum_x, sum)`. Every tile shape and
//! instruction set keeps that order.

use crate::{
    activations::Activations,
    pool::Pool,
    weights::{BLOCK, Format, GROUP, Weights},
};

/// `out[t, r] = sum_c weights[r, c] * x[t, c]`; a token's row has the same bits whatever other tokens are in the batch.
///
/// # Panics
/// If `x` has other columns than `weights`, or `out` is not `[tokens, rows]`.
pub fn matmul(weights: &Weights, x: &Activations, out: &mut [f32], _pool: &Pool) {
    assert!(
        x.tokens() == 0 || x.cols() == weights.cols(),
        "matmul: x has {} columns, weights {}",
        x.cols(),
        weights.cols()
    );
    assert_eq!(out.len(), x.tokens() * weights.rows(), "matmul: out is [tokens, rows]");
    for token in 0..x.tokens() {
        for group in 0..weights.groups() {
            let sums = group_dots(weights, group, x, token);
            let rows = GROUP.min(weights.rows() - group * GROUP);
            out[token * weights.rows() + group * GROUP..][..rows].copy_from_slice(&sums[..rows]);
        }
    }
}

fn group_dots(weights: &Weights, group: usize, x: &Activations, token: usize) -> [f32; GROUP] {
    let (quants, scales) = x.row(token);
    let d = weights.group_scales(group);
    let mut sums = [0.0_f32; GROUP];
    for (block, (q, scale)) in quants.iter().zip(scales).enumerate() {
        let lines = weights.lines(group, block);
        for (lane, sum) in sums.iter_mut().enumerate() {
            let mut integers = 0_i32;
            for (line, bytes) in lines.iter().enumerate() {
                for i in 0..4 {
                    let w = i32::from(bytes.0[lane * 4 + i]);
                    integers += match weights.format() {
                        Format::Affine4 => {
                            (w & 15) * i32::from(q[line * 4 + i]) + (w >> 4) * i32::from(q[BLOCK / 2 + line * 4 + i])
                        }
                        Format::Offset8 => w * i32::from(q[line * 4 + i]),
                    };
                }
            }
            let d = d[block][lane].to_f32() * scale.d;
            match weights.format() {
                Format::Affine4 => {
                    *sum = d.mul_add(integers as f32, *sum);
                    *sum = weights.group_minima(group)[block][lane]
                        .to_f32()
                        .mul_add(scale.sum, *sum);
                }
                Format::Offset8 => *sum = d.mul_add((integers - scale.offset) as f32, *sum),
            }
        }
    }
    sums
}
