//! CPU references of the kernels, plain and in f64: what a launch must give, within its stated tolerance.
//!
//! Rows live in host memory as [`Rows`]; a [`Placement`] writes them into the kernels' layouts and reads them back, so that
//! a check compares with exactly what the device was given.

mod e4m3;
mod forward;
mod prefill;
mod sample;

use half::{bf16, f16};

pub use self::e4m3::{dequantize, e4m3_from_f32, e4m3_to_f32, quantize};
pub use self::forward::{linear, noise, rms_norm, rope, silu_mul};
pub use self::prefill::{antidiagonal_masses, block_scores, prefill, vs_estimate};
pub use self::sample::sample;
use crate::{Dtype, KvShape, Layout};

/// Keys and values of `tokens` tokens, both `[kv_heads, tokens, head_dim]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// Keys.
    pub k: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
    /// Tokens.
    pub tokens: usize,
}

/// Attention of `q [q_heads, head_dim]` over the first `lengths[part][kv_head]` rows of each part: outputs
/// `[q_heads, head_dim]` and base-2 logs of the sums of weights, zeros and `-inf` where nothing is seen.
pub fn attend(shape: KvShape, q: &[f32], scale: f32, parts: &[&Rows], lengths: &[Vec<usize>]) -> (Vec<f64>, Vec<f64>) {
    let d = shape.head_dim;
    let per_kv = q.len() / d / shape.kv_heads;
    let (mut out, mut out_lse) = (Vec::new(), Vec::new());
    for (head, q) in q.chunks_exact(d).enumerate() {
        let kv_head = head / per_kv;
        let q = round_query(shape.dtype, q);
        let mut scores = Vec::new();
        let mut values: Vec<&[f32]> = Vec::new();
        for (rows, lengths) in parts.iter().zip(lengths) {
            for token in 0..lengths[kv_head].min(rows.tokens) {
                let at = (kv_head * rows.tokens + token) * d;
                let dot: f64 = q.iter().zip(&rows.k[at..at + d]).map(|(&q, &k)| q * f64::from(k)).sum();
                scores.push(dot * f64::from(scale) * std::f64::consts::LOG2_E);
                values.push(&rows.v[at..at + d]);
            }
        }
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - most).exp2()).sum();
        let mut o = vec![0.0; d];
        for (score, value) in scores.iter().zip(values) {
            let weight = (score - most).exp2() / sum;
            o.iter_mut().zip(value).for_each(|(o, &v)| *o += weight * f64::from(v));
        }
        out.extend(o);
        out_lse.push(if scores.is_empty() {
            f64::NEG_INFINITY
        } else {
            most + sum.log2()
        });
    }
    (out, out_lse)
}

/// Joins partials `(o [heads, head_dim], lse [heads])` over disjoint sets of keys.
pub fn merge(sets: &[(Vec<f32>, Vec<f32>)], heads: usize, head_dim: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut out_lse) = (vec![0.0; heads * head_dim], Vec::new());
    for head in 0..heads {
        let lse: Vec<f64> = sets.iter().map(|(_, lse)| f64::from(lse[head])).collect();
        let most = lse.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if most == f64::NEG_INFINITY {
            out_lse.push(most);
            continue;
        }
        let whole = most + lse.iter().map(|lse| (lse - most).exp2()).sum::<f64>().log2();
        for ((o, _), lse) in sets.iter().zip(lse).filter(|(_, lse)| *lse > f64::NEG_INFINITY) {
            for d in head * head_dim..(head + 1) * head_dim {
                out[d] += (lse - whole).exp2() * f64::from(o[d]);
            }
        }
        out_lse.push(whole);
    }
    (out, out_lse)
}

/// Scores `scale * q . k`, `[q_heads, tokens]`, `-inf` from `lengths[kv_head]` on.
pub fn key_scores(shape: KvShape, q: &[f32], scale: f32, rows: &Rows, lengths: &[usize]) -> Vec<f64> {
    let d = shape.head_dim;
    let per_kv = q.len() / d / shape.kv_heads;
    let mut out = Vec::new();
    for (head, q) in q.chunks_exact(d).enumerate() {
        let (kv_head, q) = (head / per_kv, round_query(shape.dtype, q));
        for token in 0..rows.tokens {
            let at = (kv_head * rows.tokens + token) * d;
            let dot: f64 = q.iter().zip(&rows.k[at..at + d]).map(|(&q, &k)| q * f64::from(k)).sum();
            out.push(if token < lengths[kv_head] {
                dot * f64::from(scale)
            } else {
                f64::NEG_INFINITY
            });
        }
    }
    out
}

/// Indices of the `k` largest of one row, ties by lower index, in rising order of index.
pub fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let key = |&i: &u32| {
        if scores[i as usize] == 0.0 {
            0.0
        } else {
            scores[i as usize]
        }
    };
    order.sort_by(|a, b| key(b).total_cmp(&key(a))); // stable: equals stay in order of index
    order.truncate(k);
    order.sort_unstable();
    order
}

/// Where rows lie in host memory: a layout, repeated page after page if there are page numbers.
#[derive(Clone, Debug)]
pub struct Placement {
    /// What the rows are.
    pub shape: KvShape,
    /// Where they lie inside a page.
    pub layout: Layout,
    /// Tokens of a page, and the page numbers; without them there is one page for all tokens.
    pub pages: Option<(usize, Vec<u32>)>,
}

/// Byte offsets of one token's rows for one head.
#[derive(Clone, Copy)]
struct RowPlace {
    /// Key and its scale, value and its scale.
    rows: [(usize, usize); 2],
}

impl Placement {
    fn row(&self, head: usize, token: usize) -> RowPlace {
        let layout = &self.layout;
        let (page, inside) = match &self.pages {
            Some((tokens, numbers)) => (numbers[token / tokens] as usize, token % tokens),
            None => (0, token),
        };
        let page = page * layout.bytes;
        let row = page + head * layout.head_stride + inside * layout.token_stride;
        let scale = page + head * layout.scale_head_stride + inside * layout.scale_token_stride;
        RowPlace {
            rows: [
                (layout.k + row, layout.k_scale + scale),
                (layout.v + row, layout.v_scale + scale),
            ],
        }
    }

    /// Writes rows, rounded or quantised; bytes between them stay as they are.
    pub fn write(&self, rows: &Rows, to: &mut [u8]) {
        let d = self.shape.head_dim;
        for head in 0..self.shape.kv_heads {
            for token in 0..rows.tokens {
                let at = (head * rows.tokens + token) * d;
                for (row, place) in [&rows.k, &rows.v].into_iter().zip(self.row(head, token).rows) {
                    self.write_row(&row[at..at + d], place, to);
                }
            }
        }
    }

    /// Reads `tokens` tokens back, with the values that the kernels see.
    pub fn read(&self, tokens: usize, from: &[u8]) -> Rows {
        let mut out = Rows {
            k: Vec::new(),
            v: Vec::new(),
            tokens,
        };
        for head in 0..self.shape.kv_heads {
            for token in 0..tokens {
                let [k, v] = self.row(head, token).rows;
                out.k.extend(self.read_row(k, from));
                out.v.extend(self.read_row(v, from));
            }
        }
        out
    }

    /// Copies each head's first `lengths[head]` rows to another placement: as they are where the element types agree.
    pub fn copy(&self, from: &[u8], other: &Self, to: &mut [u8], lengths: &[usize]) {
        let row_bytes = self.shape.head_dim * self.shape.dtype.bytes();
        for (head, &length) in lengths.iter().enumerate() {
            for token in 0..length {
                let places = self.row(head, token).rows.into_iter().zip(other.row(head, token).rows);
                for (source, target) in places {
                    if self.shape.dtype != other.shape.dtype {
                        other.write_row(&self.read_row(source, from), target, to);
                        continue;
                    }
                    to[target.0..target.0 + row_bytes].copy_from_slice(&from[source.0..source.0 + row_bytes]);
                    if self.shape.dtype == Dtype::E4m3 {
                        to[target.1..target.1 + 4].copy_from_slice(&from[source.1..source.1 + 4]);
                    }
                }
            }
        }
    }

    fn write_row(&self, row: &[f32], (place, scale): (usize, usize), to: &mut [u8]) {
        let bytes: Vec<u8> = match self.shape.dtype {
            Dtype::Bf16 => row.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            Dtype::F16 => row.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Dtype::E4m3 => {
                let (codes, factor) = quantize(row);
                to[scale..scale + 4].copy_from_slice(&factor.to_le_bytes());
                codes
            }
        };
        to[place..place + bytes.len()].copy_from_slice(&bytes);
    }

    fn read_row(&self, (place, scale): (usize, usize), from: &[u8]) -> Vec<f32> {
        let bytes = &from[place..place + self.shape.head_dim * self.shape.dtype.bytes()];
        let pairs = bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        match self.shape.dtype {
            Dtype::Bf16 => pairs.map(|pair| bf16::from_le_bytes(pair).to_f32()).collect(),
            Dtype::F16 => pairs.map(|pair| f16::from_le_bytes(pair).to_f32()).collect(),
            Dtype::E4m3 => {
                let factor = [from[scale], from[scale + 1], from[scale + 2], from[scale + 3]];
                dequantize(bytes, f32::from_le_bytes(factor))
            }
        }
    }
}

/// The query as the kernels compute with it.
fn round_query(dtype: Dtype, q: &[f32]) -> Vec<f64> {
    q.iter()
        .map(|&x| match dtype {
            Dtype::Bf16 => bf16::from_f32(x).to_f64(),
            Dtype::F16 | Dtype::E4m3 => f16::from_f32(x).to_f64(),
        })
        .collect()
}

#[cfg(test)]
mod tests;
