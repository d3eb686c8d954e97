//! FlexPrefill (arXiv 2502.20766): a test per head and prompt whether pooled scores tell where the mass is; where they do, the
//! pooled map's best blocks, else whole column blocks and runs of diagonals; in both as many as hold a share of the mass.
//!
//! Blocks are as wide as our tiles, 64 keys, where the published code has 128.

use kvasir_simd::exp2_weights;

use super::{
    block_sparse::{candidates, pool_keys, pool_queries, score},
    estimate,
    select::{cover, log2},
};
use crate::{HeadChunk, HeadMask, TILE, mask::POSITIONS_MAX};

/// Queries that the test and the estimate look at.
const LAST_QUERIES: usize = 128;

pub(super) fn plan(chunk: &HeadChunk<'_>, rows: usize, gamma: f32, tau: f32, budget_min: usize) -> HeadMask {
    let sums = estimate(chunk, LAST_QUERIES);
    let pooled_keys = pool_keys(chunk);
    // With tau 0 nothing is below it: the published code's default, which leaves the test out.
    if tau > 0.0 && distance(chunk, &pooled_keys, &sums.columns) < f64::from(tau) {
        return query_aware(chunk, rows, &pooled_keys, gamma, budget_min);
    }
    vertical_slash(rows, &sums.columns, &sums.diagonals, gamma, budget_min)
}

/// Square root of the Jensen-Shannon divergence between where the pooled estimate puts the mass of the last queries and where
/// it is, by block of keys; base 2, so in `[0, 1]`.
fn distance(chunk: &HeadChunk<'_>, pooled_keys: &[half::f16], columns: &[f32]) -> f64 {
    let last = LAST_QUERIES.min(chunk.rows());
    let d = chunk.head_dim();
    let mut q = vec![0.0; d];
    for row in chunk.queries(chunk.rows() - last, last).chunks_exact(d) {
        q.iter_mut().zip(row).for_each(|(sum, q)| *sum += q / last as f32);
    }
    let mut scores = Vec::new();
    score(chunk, &q, pooled_keys, &mut scores);
    let mut estimated = vec![0.0; scores.len()];
    exp2_weights(&scores, &mut estimated);
    let found: Vec<f32> = columns.chunks(TILE).map(|block| block.iter().sum()).collect();
    let [estimated_sum, found_sum] =
        [&estimated, &found].map(|mass| mass.iter().map(|&mass| f64::from(mass)).sum::<f64>());
    let mut divergence = 0.0;
    for (&estimated, &found) in estimated.iter().zip(&found) {
        let (p, q) = (f64::from(estimated) / estimated_sum, f64::from(found) / found_sum);
        let middle = (p + q) / 2.0;
        for share in [p, q].into_iter().filter(|&share| share > f64::MIN_POSITIVE) {
            divergence += share / 2.0 * log2(share / middle);
        }
    }
    divergence.max(0.0).sqrt()
}

/// The best blocks of the pooled map over all row blocks together, down to a share `gamma` of it.
fn query_aware(
    chunk: &HeadChunk<'_>,
    rows: usize,
    pooled_keys: &[half::f16],
    gamma: f32,
    budget_min: usize,
) -> HeadMask {
    let d = chunk.head_dim();
    let (mut scores, mut map, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    let pooled = pool_queries(chunk, rows);
    for (block, q) in pooled.chunks_exact(d).enumerate() {
        // What lies on the diagonal is seen anyway, but takes its share of the row's mass.
        let seen = (chunk.offset() + (block + 1) * rows)
            .div_ceil(TILE)
            .min(pooled_keys.len() / d);
        score(chunk, q, &pooled_keys[..seen * d], &mut scores);
        let first = map.len();
        starts.push(first);
        map.resize(first + seen, 0.0);
        exp2_weights(&scores, &mut map[first..]);
        let sum: f32 = map[first..].iter().sum();
        map[first..].iter_mut().for_each(|weight| *weight /= sum);
    }
    let mut chosen = Vec::new();
    cover(&map, gamma, &mut chosen);
    let mut lists = vec![Vec::new(); starts.len()];
    for index in chosen {
        let block = starts.partition_point(|&start| start <= index as usize) - 1;
        lists[block].push(index - starts[block] as u32);
    }
    // A row whose mass is spread loses to others whose is not: the floor is for it.
    for (block, list) in lists.iter_mut().enumerate() {
        let before = candidates(chunk, rows, block);
        let nearest = (before.saturating_sub(budget_min.div_ceil(TILE))..before).rev();
        for number in nearest.map(|number| number as u32) {
            if list.len() * TILE >= budget_min {
                break;
            }
            if !list.contains(&number) {
                list.push(number);
            }
        }
    }
    HeadMask::block_sparse(rows, chunk.offset(), &lists)
}

/// As many column blocks, and runs of [`TILE`] diagonals, as the columns and the diagonals with a share `gamma` of the mass
/// would fill; the first of each always.
fn vertical_slash(rows: usize, columns: &[f32], diagonals: &[f32], gamma: f32, budget_min: usize) -> HeadMask {
    let chosen = |mass: &[f32]| {
        let (mut picked, mut pooled) = (
            Vec::new(),
            mass.chunks(TILE).map(|mass| mass.iter().sum()).collect::<Vec<f32>>(),
        );
        cover(mass, gamma, &mut picked);
        let count = (picked.len() / TILE + 1).max(budget_min.div_ceil(TILE));
        pooled[0] = f32::INFINITY;
        kvasir_simd::top_k(&pooled, count, &mut picked);
        let width = TILE as u32;
        let last = (mass.len() as u32).min(POSITIONS_MAX);
        let whole = picked
            .iter()
            .flat_map(|&block| block * width..((block + 1) * width).min(last));
        whole.collect::<Vec<u32>>()
    };
    HeadMask::vertical_slash(rows, &chosen(columns), &chosen(diagonals))
}
