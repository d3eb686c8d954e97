//! What a basis is made of: sums over queries and keys of one KV head, and the directions that follow from them.

use half::f16;

use super::{
    HeadBasis,
    symmetric::{eigen, product},
};
use crate::IndexError;

/// Directions that queries hardly have get this share of the largest one's weight: enough to stay invertible, too little to
/// matter in what is kept.
const QUERY_FLOOR: f64 = 1e-5;

/// Directions along which keys hardly differ are scaled as if they differed by this share of the widest one, so that what is
/// written down stays in the range of an f16.
const SPREAD_FLOOR: f64 = 1e-3;

/// Sums over the rotated queries (of all query heads of the group) and keys of one KV head. Sums of parts add up, so texts,
/// windows and threads may each have their own and be merged.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    head_dim: usize,
    queries: u64,
    keys: u64,
    /// Sum of `q qT`, `[head_dim, head_dim]`, the lower triangle.
    qq: Vec<f64>,
    /// Sum of `k`.
    k: Vec<f64>,
    /// Sum of `k kT`, the lower triangle.
    kk: Vec<f64>,
}

/// A head's basis and what it keeps.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibrated {
    /// The directions; `streaming` is false.
    pub basis: HeadBasis,
    /// Share of `E[(q . (k - mean))^2]`, over queries and keys as they were added, that lies in the directions kept.
    pub kept: f64,
}

impl Moments {
    /// No rows yet, of `head_dim` elements each.
    pub fn new(head_dim: usize) -> Self {
        Self {
            head_dim,
            queries: 0,
            keys: 0,
            qq: vec![0.0; head_dim * head_dim],
            k: vec![0.0; head_dim],
            kk: vec![0.0; head_dim * head_dim],
        }
    }

    /// Adds rotated queries `q[n, head_dim]`.
    ///
    /// # Panics
    /// If `q` is not whole rows.
    pub fn add_queries(&mut self, q: &[f32]) {
        assert!(
            q.len().is_multiple_of(self.head_dim.max(1)),
            "moments: queries are rows of {}",
            self.head_dim
        );
        let mut row = vec![0.0; self.head_dim];
        for q in q.chunks_exact(self.head_dim.max(1)) {
            row.iter_mut().zip(q).for_each(|(row, q)| *row = f64::from(*q));
            add_outer(&mut self.qq, &row);
            self.queries += 1;
        }
    }

    /// Adds keys `k[n, head_dim]`, rotated as they are stored.
    ///
    /// # Panics
    /// If `k` is not whole rows.
    pub fn add_keys(&mut self, k: &[f16]) {
        assert!(
            k.len().is_multiple_of(self.head_dim.max(1)),
            "moments: keys are rows of {}",
            self.head_dim
        );
        let mut row = vec![0.0; self.head_dim];
        for k in k.chunks_exact(self.head_dim.max(1)) {
            row.iter_mut().zip(k).for_each(|(row, k)| *row = k.to_f64());
            add_outer(&mut self.kk, &row);
            self.k.iter_mut().zip(&row).for_each(|(sum, k)| *sum += k);
            self.keys += 1;
        }
    }

    /// Adds the sums of `other`.
    ///
    /// # Panics
    /// If its rows are of another length.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.head_dim, other.head_dim, "moments: rows of the same length");
        self.queries += other.queries;
        self.keys += other.keys;
        for (sums, more) in [
            (&mut self.qq, &other.qq),
            (&mut self.k, &other.k),
            (&mut self.kk, &other.kk),
        ] {
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
    }

    /// Queries added so far.
    pub fn queries(&self) -> u64 {
        self.queries
    }

    /// Keys added so far.
    pub fn keys(&self) -> u64 {
        self.keys
    }

    /// The `rank` leading directions, all of them if `rank` is above `head_dim`.
    ///
    /// With `A` the square root of `E[q qT]` and `e_i`, `s_i^2` the leading eigenvectors and eigenvalues of `A C A`, where
    /// `C` is the covariance of the keys: row `i` of `keys` is `e_iT A / s_i`, row `i` of `queries` is `s_i e_iT A^-1`. So
    /// each `z` has unit spread, and with all directions `y . z` is `q . (k - mean)`. With fewer, no other choice of as many
    /// directions has a smaller error in the mean square over independent queries and keys.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if `rank` is 0, there are fewer than two rows of either kind, all queries are 0, or a row was
    /// not finite.
    pub fn basis(&self, rank: usize) -> Result<Calibrated, IndexError> {
        let invalid = |argument, problem: &str| IndexError::Invalid {
            argument,
            problem: problem.to_owned(),
        };
        let n = self.head_dim;
        if rank == 0 || n == 0 {
            return Err(invalid("rank", "keep at least one direction of at least one"));
        }
        if self.queries < 2 || self.keys < 2 {
            return Err(invalid(
                "moments",
                "too few queries or keys were added: calibrate on a longer text",
            ));
        }
        let sums = [&self.qq, &self.k, &self.kk];
        if !sums.into_iter().flatten().all(|sum| sum.is_finite()) {
            return Err(invalid(
                "moments",
                "a query or key was not finite: the model's forward overflows on this text",
            ));
        }
        let mean: Vec<f64> = self.k.iter().map(|sum| sum / self.keys as f64).collect();
        let metric = eigen(whole(&self.qq, n, |sum, _, _| sum / self.queries as f64), n);
        let largest = metric.values[0];
        if largest <= 0.0 {
            return Err(invalid("moments", "all queries are 0"));
        }
        let floored = |value: f64| value.max(largest * QUERY_FLOOR);
        let root = metric.map(|value| floored(value).sqrt());
        let inverse_root = metric.map(|value| floored(value).sqrt().recip());
        let covariance = whole(&self.kk, n, |sum, i, j| sum / self.keys as f64 - mean[i] * mean[j]);
        let mut seen = product(&product(&root, &covariance, n), &root, n);
        for i in 0..n {
            for j in 0..i {
                let middle = f64::midpoint(seen[i * n + j], seen[j * n + i]);
                seen[i * n + j] = middle;
                seen[j * n + i] = middle;
            }
        }
        let seen = eigen(seen, n);
        let rank = rank.min(n);
        let widest = seen.values[0].max(0.0).sqrt();
        let floor = if widest > 0.0 { widest * SPREAD_FLOOR } else { 1.0 };
        let mut basis = HeadBasis {
            mean: mean.iter().map(|x| *x as f32).collect(),
            keys: Vec::with_capacity(rank * n),
            queries: Vec::with_capacity(rank * n),
            streaming: false,
        };
        for (value, direction) in seen.values.iter().zip(seen.vectors.chunks_exact(n)).take(rank) {
            let spread = value.max(0.0).sqrt().max(floor);
            let row = |matrix: &[f64], scale: f64| -> Vec<f32> {
                let mut row = vec![0.0; n];
                for (&x, matrix) in direction.iter().zip(matrix.chunks_exact(n)) {
                    row.iter_mut().zip(matrix).for_each(|(row, y)| *row += x * y);
                }
                row.into_iter().map(|x| (x * scale) as f32).collect()
            };
            basis.keys.extend(row(&root, spread.recip()));
            basis.queries.extend(row(&inverse_root, spread));
        }
        let energy = |values: &[f64]| values.iter().map(|value| value.max(0.0)).sum::<f64>();
        let all = energy(&seen.values);
        Ok(Calibrated {
            basis,
            kept: if all > 0.0 {
                energy(&seen.values[..rank]) / all
            } else {
                1.0
            },
        })
    }
}

/// Adds `row rowT` to the lower triangle of `sum`.
fn add_outer(sum: &mut [f64], row: &[f64]) {
    for (i, sum) in sum.chunks_exact_mut(row.len().max(1)).enumerate() {
        let x = row[i];
        sum[..=i].iter_mut().zip(row).for_each(|(sum, y)| *sum += x * y);
    }
}

/// The symmetric matrix whose lower triangle is `f(element, row, column)` of `lower`.
fn whole(lower: &[f64], n: usize, f: impl Fn(f64, usize, usize) -> f64) -> Vec<f64> {
    let mut out = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let value = f(lower[i * n + j], i, j);
            out[i * n + j] = value;
            out[j * n + i] = value;
        }
    }
    out
}
