//! Attention of a prompt over a list of tiles, and the estimate that Vertical-Slash lists are made from; pair by pair.

use super::{Rows, round_query};
use crate::{
    KvShape, Mask,
    plan::{ROWS, TILE},
};

/// Attention of `q [rows, q_heads, head_dim]`, the last `rows` positions of `kv`, under `tiles`: outputs
/// `[rows, q_heads, head_dim]` and base-2 logs of the sums of weights `[q_heads, rows]`, zeros and `-inf` where nothing is
/// seen. This is also how the sparse modes run without a GPU.
pub fn prefill(shape: KvShape, q: &[f32], q_heads: usize, kv: &Rows, tiles: &Mask, scale: f32) -> (Vec<f64>, Vec<f64>) {
    let d = shape.head_dim;
    let rows = q.len() / d / q_heads;
    let offset = kv.tokens - rows;
    let (mut out, mut out_lse) = (vec![0.0; q.len()], vec![f64::NEG_INFINITY; q_heads * rows]);
    let mut scores = Vec::new();
    for head in 0..q_heads {
        let kv_rows = head / (q_heads / shape.kv_heads) * kv.tokens;
        for row in 0..rows {
            let at = (row * q_heads + head) * d;
            let query = &q[at..at + d];
            scores.clear();
            scores.extend(
                (0..=offset + row)
                    .filter(|&key| tiles.sees(head, offset, row, key))
                    .map(|key| {
                        let key_row = &kv.k[(kv_rows + key) * d..(kv_rows + key + 1) * d];
                        (key, dot(query, key_row) * f64::from(scale) * std::f64::consts::LOG2_E)
                    }),
            );
            let most = scores
                .iter()
                .fold(f64::NEG_INFINITY, |most, &(_, score)| most.max(score));
            if most == f64::NEG_INFINITY {
                continue;
            }
            let sum: f64 = scores.iter().map(|(_, score)| (score - most).exp2()).sum();
            for &(key, score) in &scores {
                let weight = (score - most).exp2() / sum;
                let value = &kv.v[(kv_rows + key) * d..(kv_rows + key + 1) * d];
                for (out, &value) in out[at..at + d].iter_mut().zip(value) {
                    *out += weight * f64::from(value);
                }
            }
            out_lse[head * rows + row] = most + sum.log2();
        }
    }
    (out, out_lse)
}

/// Attention weights of the last `last` of the queries `q [rows, q_heads, head_dim]`, summed by key and by
/// diagonal: both `[q_heads, tokens]`, a diagonal being the distance of key from query (MInference, arXiv 2407.02490,
/// algorithm 2).
pub fn vs_estimate(
    shape: KvShape,
    q: &[f32],
    q_heads: usize,
    kv: &Rows,
    last: usize,
    scale: f32,
) -> (Vec<f64>, Vec<f64>) {
    let d = shape.head_dim;
    let rows = q.len() / d / q_heads;
    let mut columns = vec![0.0; q_heads * kv.tokens];
    let mut diagonals = columns.clone();
    for head in 0..q_heads {
        let kv_rows = head / (q_heads / shape.kv_heads) * kv.tokens;
        for row in rows.saturating_sub(last)..rows {
            let position = kv.tokens - rows + row;
            let query = &q[(row * q_heads + head) * d..(row * q_heads + head + 1) * d];
            let scores: Vec<f64> = (0..=position)
                .map(|key| dot(query, &kv.k[(kv_rows + key) * d..(kv_rows + key + 1) * d]) * f64::from(scale))
                .collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
            for (key, score) in scores.iter().enumerate() {
                let weight = (score - most).exp() / sum;
                columns[head * kv.tokens + key] += weight;
                diagonals[head * kv.tokens + position - key] += weight;
            }
        }
    }
    (columns, diagonals)
}

/// Products of the mean query of each row block of [`ROWS`] of `q [rows, q_heads, head_dim]` with the mean key of each block of
/// [`TILE`] keys, `[q_heads, row blocks, key blocks]`, times `scale`; means are rounded to the keys' type. `-inf` where no row of
/// the block sees any key of the other.
pub fn block_scores(shape: KvShape, q: &[f32], q_heads: usize, kv: &Rows, scale: f32) -> Vec<f64> {
    let d = shape.head_dim;
    let rows = q.len() / d / q_heads;
    let offset = kv.tokens - rows;
    let mean = |rows: &mut dyn Iterator<Item = &[f32]>| -> Vec<f32> {
        let (mut sum, mut count) = (vec![0.0f64; d], 0.0);
        for row in rows {
            count += 1.0;
            sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let mean: Vec<f32> = sum.into_iter().map(|sum| (sum / count) as f32).collect();
        round_query(shape.dtype, &mean).into_iter().map(|x| x as f32).collect()
    };
    let keys: Vec<Vec<f32>> =
        kv.k.chunks_exact(kv.tokens * d)
            .flat_map(|head| head.chunks(TILE * d))
            .map(|block| mean(&mut block.chunks_exact(d)))
            .collect();
    let key_blocks = kv.tokens.div_ceil(TILE);
    let mut out = Vec::new();
    for head in 0..q_heads {
        let keys = &keys[head / (q_heads / shape.kv_heads) * key_blocks..][..key_blocks];
        for first in (0..rows).step_by(ROWS) {
            let last = rows.min(first + ROWS);
            let query = mean(&mut (first..last).map(|row| &q[(row * q_heads + head) * d..][..d]));
            out.extend(keys.iter().enumerate().map(|(block, key)| {
                if block * TILE < offset + last {
                    dot(&query, key) * f64::from(scale)
                } else {
                    f64::NEG_INFINITY
                }
            }));
        }
    }
    out
}

/// Masses of blocks of [`TILE`] keys by sums along antidiagonals, `[q_heads, row blocks, key blocks]`: `stride` keys end to end are a long
/// key, as many queries of a row block in reversed order a long query, and each of these has a softmax of its own over the long
/// keys that end before its last query, or with it (XAttention, arXiv 2503.16428).
pub fn antidiagonal_masses(
    shape: KvShape,
    q: &[f32],
    q_heads: usize,
    kv: &Rows,
    stride: usize,
    scale: f32,
) -> Vec<f64> {
    let d = shape.head_dim;
    let rows = q.len() / d / q_heads;
    let offset = kv.tokens - rows;
    let key_blocks = kv.tokens.div_ceil(TILE);
    let row_blocks = rows.div_ceil(ROWS);
    let mut out = vec![0.0; q_heads * row_blocks * key_blocks];
    for head in 0..q_heads {
        let keys = &kv.k[head / (q_heads / shape.kv_heads) * kv.tokens * d..][..kv.tokens * d];
        for group in 0..rows / stride {
            let last = (group + 1) * stride - 1;
            let scores: Vec<f64> = (0..(offset + last + 1) / stride)
                .map(|long_key| {
                    let pairs = (0..stride).map(|i| {
                        let query = &q[((last - i) * q_heads + head) * d..][..d];
                        dot(query, &keys[(long_key * stride + i) * d..][..d])
                    });
                    pairs.sum::<f64>() * f64::from(scale) / stride as f64
                })
                .collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - most).exp()).sum();
            let masses = &mut out[(head * row_blocks + last / ROWS) * key_blocks..][..key_blocks];
            for (long_key, score) in scores.iter().enumerate() {
                masses[long_key * stride / TILE] += (score - most).exp() / sum;
            }
        }
    }
    out
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}
