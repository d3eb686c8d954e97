//! XAttention (arXiv 2503.16428): what a tile matters is told by the sums of scores along its antidiagonals, `stride` apart.
//!
//! `stride` consecutive keys laid end to end are one long key, and as many queries in reversed order one long query: their
//! product is the sum along an antidiagonal, so that a map of `1 / stride` of the height and width costs `1 / stride` of the
//! scores. Each row block takes the fewest tiles with a share of its mass.

use kvasir_simd::{exp2_weights, scores};

use super::{block_sparse::candidates, select::cover};
use crate::{HeadChunk, HeadMask, TILE};

pub(super) fn plan(chunk: &HeadChunk<'_>, rows: usize, stride: usize, threshold: f32) -> HeadMask {
    let d = chunk.head_dim();
    let long = stride * d;
    let scale = chunk.scale() / stride as f32;
    let (mut q, mut row_scores, mut weights, mut chosen) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let lists = (0..chunk.rows().div_ceil(rows)).map(|block| {
        let first = block * rows;
        let count = rows.min(chunk.rows() - first);
        let before = candidates(chunk, rows, block);
        if count < stride {
            // Too few queries for an antidiagonal, at the end of a prompt: see everything.
            return (0..before as u32).collect();
        }
        let mut mass = vec![0.0_f32; (chunk.offset() + first + count).div_ceil(TILE)];
        for group in 0..count / stride {
            q.clear();
            let queries = chunk.queries(first + group * stride, stride);
            queries.rchunks_exact(d).for_each(|row| q.extend_from_slice(row));
            // Long keys that end before the group's last query, or with it.
            let seen = (chunk.offset() + first + (group + 1) * stride) / stride;
            row_scores.resize(seen, 0.0);
            weights.resize(seen, 0.0);
            scores(
                &q,
                &chunk.keys(seen * stride)[..seen * long],
                long,
                scale,
                &mut row_scores,
            );
            exp2_weights(&row_scores, &mut weights);
            let sum: f32 = weights.iter().sum();
            for (long_key, weight) in weights.iter().enumerate() {
                mass[long_key * stride / TILE] += weight / sum;
            }
        }
        // The first tile and the diagonal are kept whatever they have; the others make up what is missing. Putting them
        // first counts what they have.
        let kept: f32 = mass
            .iter()
            .enumerate()
            .filter(|&(tile, _)| tile == 0 || tile >= before)
            .map(|(_, mass)| mass)
            .sum();
        let total: f32 = mass.iter().sum();
        let others: f32 = total - kept;
        let wanted = threshold * total - kept;
        mass.truncate(before);
        if let Some(sink) = mass.first_mut() {
            *sink = 0.0;
        }
        if wanted <= 0.0 || others <= 0.0 {
            return Vec::new();
        }
        cover(&mass, (wanted / others).min(1.0), &mut chosen);
        chosen.clone()
    });
    let lists: Vec<Vec<u32>> = lists.collect();
    HeadMask::block_sparse(rows, chunk.offset(), &lists)
}
