//! Products of quantised weights and quantised activations.
//!
//! A dot product runs over the blocks of 32 in order. Per block the integer product is exact; then, all in f32,
//! `sum = fma(d_w * d_x, integers, sum)` and, for 4-bit weights, `sum = fma(m_w, d_x * sum_x, sum)`. Every tile shape and
//! instruction set keeps that order, so a token's result does not depend on the batch, the threads or the processor.
//!
//! A task takes a run of row groups and goes over all tokens with each: the group's weights (5 to 27 KB in small models)
//! stay in the first cache while activations stream through it.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;
#[cfg(test)]
mod tests;

use crate::{
    activations::{Activations, Block},
    isa::Isa,
    pool::{Disjoint, Pool},
    weights::{GROUP, GroupView, Weights},
};

/// Tasks per thread: enough to even out a thread that was held up, few enough to cost nothing.
const TASKS_PER_THREAD: usize = 4;
/// Multiplications of a task at least.
const TASK_WORK: usize = 64 * 1024;

/// `out[t, r] = sum_c weights[r, c] * x[t, c]`; a token's row has the same bits whatever other tokens are in the batch.
///
/// # Panics
/// If `x` has other columns than `weights`, or `out` is not `[tokens, rows]`.
pub fn matmul(weights: &Weights, x: &Activations, out: &mut [f32], pool: &Pool) {
    matmul_many(x, &mut [(weights, out)], pool);
}

/// [`matmul`] of several matrices with the same activations in one parallel loop: `out[t, r]` for each pair.
///
/// # Panics
/// As [`matmul`].
pub fn matmul_many(x: &Activations, products: &mut [(&Weights, &mut [f32])], pool: &Pool) {
    matmul_on(Isa::active(), x, products, pool);
}

fn matmul_on(isa: Isa, x: &Activations, products: &mut [(&Weights, &mut [f32])], pool: &Pool) {
    if x.tokens() == 0 {
        assert!(
            products.iter().all(|(_, out)| out.is_empty()),
            "matmul: no tokens, and out is not empty"
        );
        return;
    }
    let mut outs = Vec::with_capacity(products.len());
    let mut tasks = Vec::new();
    for (product, (weights, out)) in products.iter_mut().enumerate() {
        assert_eq!(
            x.cols(),
            weights.cols(),
            "matmul: as many columns in x as in the weights"
        );
        assert_eq!(out.len(), x.tokens() * weights.rows(), "matmul: out is [tokens, rows]");
        let group_work = x.tokens() * x.cols() * GROUP;
        let share = weights
            .groups()
            .div_ceil(pool.threads() * TASKS_PER_THREAD)
            .max(TASK_WORK.div_ceil(group_work));
        let starts = (0..weights.groups()).step_by(share);
        tasks.extend(starts.map(|start| (product, start..(start + share).min(weights.groups()))));
        outs.push((*weights, Disjoint::new(out)));
    }
    pool.run(tasks.len(), &|index| {
        let (product, groups) = &tasks[index];
        let (weights, out) = &outs[*product];
        for group in groups.clone() {
            let rows = GROUP.min(weights.rows() - group * GROUP);
            products_of_group(isa, weights.group(group), x, |token, sums: &[f32; GROUP]| {
                // SAFETY: a group belongs to one task, and so do its columns of `out`; the part lives for this copy only.
                let part = unsafe { out.slice(token * weights.rows() + group * GROUP, rows) };
                part.copy_from_slice(&sums[..rows]);
            });
        }
    });
}

/// Hands out the dot products of a group of rows with each token.
fn products_of_group(isa: Isa, group: GroupView<'_>, x: &Activations, mut emit: impl FnMut(usize, &[f32; GROUP])) {
    let blocks = group.scales.len();
    let mut token = 0;
    while token < x.tokens() {
        let left = x.tokens() - token;
        let mut sums = [[0.0; GROUP]; TOKENS_MAX];
        let tokens = tile_tokens(isa, left);
        tile(isa, group, x.rows(token..token + tokens), blocks, &mut sums[..tokens]);
        for (i, sums) in sums[..tokens].iter().enumerate() {
            emit(token + i, sums);
        }
        token += tokens;
    }
}

/// Tokens of the widest tile.
const TOKENS_MAX: usize = 8;

/// Tokens of the next tile when `left` are to be done.
fn tile_tokens(isa: Isa, left: usize) -> usize {
    match (isa, left) {
        (Isa::Avx512, 8..) => 8,
        (Isa::Avx512 | Isa::Avx2, 4..) => 4,
        (_, 2..) => 2,
        _ => 1,
    }
}

/// `sums[t] = group . x[t]`, x being `[tokens, blocks]`.
fn tile(isa: Isa, group: GroupView<'_>, x: &[Block], blocks: usize, sums: &mut [[f32; GROUP]]) {
    assert!(
        x.len() == sums.len() * blocks && group.is_whole(blocks),
        "tile: shapes agree"
    );
    match isa {
        // SAFETY: an `Isa` that reaches a kernel was detected; the shapes were just asserted.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::tile(group, x, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::tile(group, x, sums) },
        _ => scalar::tile(group, x, sums),
    }
}
