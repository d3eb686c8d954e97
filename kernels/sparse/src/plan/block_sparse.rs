//! Block-Sparse: the key blocks whose mean fits the mean query of a row block (MInference, arXiv 2407.02490, algorithm 3).

use half::f16;
use kvasir_simd::top_k;

use crate::{HeadChunk, HeadMask, TILE};

pub(super) fn plan(chunk: &HeadChunk<'_>, rows: usize, blocks: usize) -> HeadMask {
    let keys = pool_keys(chunk);
    let (mut scores, mut chosen) = (Vec::new(), Vec::new());
    let pooled = pool_queries(chunk, rows);
    let lists = pooled.chunks_exact(chunk.head_dim()).enumerate().map(|(block, q)| {
        // The softmax keeps the order, so the best scores are the best weights.
        let before = candidates(chunk, rows, block);
        score(chunk, q, &keys[..before * chunk.head_dim()], &mut scores);
        // Those on the diagonal come on top and count among the wanted.
        let diagonal = (chunk.offset() + (block + 1) * rows).div_ceil(TILE) - before;
        top_k(&scores, blocks.saturating_sub(diagonal), &mut chosen);
        chosen.clone()
    });
    HeadMask::block_sparse(rows, chunk.offset(), &lists.collect::<Vec<_>>())
}

/// Key blocks that lie wholly before row block `block`.
pub(super) fn candidates(chunk: &HeadChunk<'_>, rows: usize, block: usize) -> usize {
    (chunk.offset() + block * rows) / TILE
}

/// Base-2 scores of one pooled query over pooled keys.
pub(super) fn score(chunk: &HeadChunk<'_>, q: &[f32], keys: &[f16], out: &mut Vec<f32>) {
    out.resize(keys.len() / chunk.head_dim(), 0.0);
    kvasir_simd::scores(q, keys, chunk.head_dim(), chunk.scale(), out);
}

/// Means of blocks of [`TILE`] keys, `[blocks, head_dim]`, the last one over what there is.
pub(super) fn pool_keys(chunk: &HeadChunk<'_>) -> Vec<f16> {
    let d = chunk.head_dim();
    let mut pooled = Vec::with_capacity(chunk.tokens().div_ceil(TILE) * d);
    let mut sum = vec![0.0_f32; d];
    for block in chunk.keys(chunk.tokens()).chunks(TILE * d) {
        sum.fill(0.0);
        for key in block.chunks_exact(d) {
            for (sum, key) in sum.iter_mut().zip(key) {
                *sum += key.to_f32();
            }
        }
        let count = (block.len() / d) as f32;
        pooled.extend(sum.iter().map(|sum| f16::from_f32(sum / count)));
    }
    pooled
}

/// Means of row blocks of queries, `[blocks, head_dim]`.
pub(super) fn pool_queries(chunk: &HeadChunk<'_>, rows: usize) -> Vec<f32> {
    let d = chunk.head_dim();
    let blocks = chunk.queries(0, chunk.rows()).chunks(rows * d);
    let mut pooled = Vec::with_capacity(blocks.len() * d);
    for block in blocks {
        let first = pooled.len();
        pooled.resize(first + d, 0.0);
        for q in block.chunks_exact(d) {
            for (sum, q) in pooled[first..].iter_mut().zip(q) {
                *sum += q;
            }
        }
        let count = (block.len() / d) as f32;
        pooled[first..].iter_mut().for_each(|sum| *sum /= count);
    }
    pooled
}
