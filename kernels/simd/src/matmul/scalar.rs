//! The tile in plain code: what the others must equal.

use super::{Block, GROUP, GroupView};
use crate::weights::{BLOCK, Format};

pub(super) fn tile(group: GroupView<'_>, x: &[Block], sums: &mut [[f32; GROUP]]) {
    let blocks = group.scales.len();
    for (x, sums) in x.chunks_exact(blocks).zip(sums) {
        for (block, x) in x.iter().enumerate() {
            for (row, sum) in sums.iter_mut().enumerate() {
                let integers = dot(group, block, row, &x.q);
                let d = group.scales[block][row].to_f32() * x.d;
                match group.format {
                    Format::Affine4 => {
                        *sum = d.mul_add(integers as f32, *sum);
                        *sum = group.minima[block][row].to_f32().mul_add(x.sum, *sum);
                    }
                    Format::Offset8 => *sum = d.mul_add((integers - x.offset) as f32, *sum),
                }
            }
        }
    }
}

/// Unsigned weights of a row's block times `q`.
fn dot(group: GroupView<'_>, block: usize, row: usize, q: &[i8; BLOCK]) -> i32 {
    let lines = group.format.lines();
    let mut sum = 0;
    for (line, bytes) in group.lines[block * lines..][..lines].iter().enumerate() {
        for (i, &w) in bytes.0[row * 4..][..4].iter().enumerate() {
            let at = line * 4 + i;
            sum += match group.format {
                Format::Affine4 => {
                    i32::from(w & 15) * i32::from(q[at]) + i32::from(w >> 4) * i32::from(q[at + BLOCK / 2])
                }
                Format::Offset8 => i32::from(w) * i32::from(q[at]),
            };
        }
    }
    sum
}
