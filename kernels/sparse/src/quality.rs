//! What a mask loses against full attention, and what it costs.

use half::f16;

use crate::{HeadChunk, HeadMask, mask::work};

/// A mask beside full attention, over the queries that were looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Quality {
    /// Queries looked at.
    pub queries: usize,
    /// Mean share of a query's softmax mass that the mask keeps.
    pub mass: f64,
    /// The least share of any query.
    pub mass_min: f64,
    /// Difference of the outputs in the 2-norm over all queries, relative to the outputs of full attention: what MInference's
    /// search minimises.
    pub output_error: f64,
    /// Share of the causal pairs of these queries that the mask sees.
    pub density: f64,
    /// Tiles that a kernel works through for all queries of the chunk.
    pub work: usize,
    /// The same for full attention.
    pub work_dense: usize,
}

impl Quality {
    /// Both as one: means weighted by queries, work added.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        let (work, work_dense) = (self.work + other.work, self.work_dense + other.work_dense);
        let queries = self.queries + other.queries;
        if self.queries == 0 || other.queries == 0 {
            let one = if self.queries == 0 { other } else { self };
            return Self {
                work,
                work_dense,
                ..one
            };
        }
        let mean = |a: f64, b: f64| (a * self.queries as f64 + b * other.queries as f64) / queries as f64;
        Self {
            queries,
            mass: mean(self.mass, other.mass),
            mass_min: self.mass_min.min(other.mass_min),
            output_error: mean(self.output_error.powi(2), other.output_error.powi(2)).sqrt(),
            density: mean(self.density, other.density),
            work,
            work_dense,
        }
    }

    /// Work relative to full attention's.
    pub fn work_share(&self) -> f64 {
        self.work as f64 / (self.work_dense.max(1)) as f64
    }
}

/// Judges `masks` of one head, over row blocks of `rows`, by the queries at every `every`-th row of the chunk, the last among
/// them, and of these by those at positions from `from` on. `values` are `[tokens, head_dim]`.
///
/// # Panics
/// If there are not as many values as keys, or `rows` or `every` is 0.
pub fn judge(
    chunk: &HeadChunk<'_>,
    values: &[f16],
    masks: &[HeadMask],
    rows: usize,
    every: usize,
    from: usize,
) -> Vec<Quality> {
    let d = chunk.head_dim();
    assert_eq!(values.len(), chunk.tokens() * d, "judge: as many values as keys");
    assert!(rows > 0 && every > 0, "judge: row blocks and steps of at least one row");
    let values: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
    let (mut scores, mut weights) = (Vec::new(), Vec::new());
    let (mut dense, mut sparse) = (vec![0.0_f32; d], vec![0.0_f32; d]);
    let mut sums = vec![Sum::default(); masks.len()];
    let mut held = vec![None; masks.len()];
    let first = (chunk.rows() - 1) % every;
    let mut norm = 0.0;
    for row in (first..chunk.rows()).step_by(every) {
        let position = chunk.offset() + row;
        if position < from {
            continue;
        }
        chunk.weights(row, &mut scores, &mut weights);
        dense.fill(0.0);
        add(&mut dense, &weights, &values, 0..position + 1);
        norm += dense.iter().map(|&y| f64::from(y).powi(2)).sum::<f64>();
        let block = row / rows;
        for ((mask, sum), held) in masks.iter().zip(&mut sums).zip(&mut held) {
            if held.as_ref().is_none_or(|&(of, _)| of != block) {
                *held = Some((block, mask.held(chunk.offset() + (block + 1) * rows, block)));
            }
            let Some((_, held)) = held else { continue };
            sparse.fill(0.0);
            let mut mass = 0.0;
            for range in &held.ranges {
                mass += add(&mut sparse, &weights, &values, range.start..range.end.min(position + 1));
            }
            for &column in held.columns.iter().take_while(|&&column| column as usize <= position) {
                mass += add(&mut sparse, &weights, &values, column as usize..column as usize + 1);
            }
            sum.add(&dense, &sparse, mass, held.up_to(position), position + 1);
        }
    }
    let work_dense = work(&HeadMask::Dense, rows, chunk.offset(), chunk.rows());
    let qualities = masks.iter().zip(sums).map(|(mask, sum)| Quality {
        queries: sum.queries,
        mass: sum.mass / sum.queries.max(1) as f64,
        mass_min: sum.mass_min,
        output_error: if norm > 0.0 { (sum.error / norm).sqrt() } else { 0.0 },
        density: sum.seen as f64 / sum.pairs.max(1) as f64,
        work: work(mask, rows, chunk.offset(), chunk.rows()),
        work_dense,
    });
    qualities.collect()
}

/// Over queries.
#[derive(Clone, Debug)]
struct Sum {
    queries: usize,
    mass: f64,
    mass_min: f64,
    error: f64,
    seen: usize,
    pairs: usize,
}

impl Default for Sum {
    fn default() -> Self {
        Self {
            queries: 0,
            mass: 0.0,
            mass_min: f64::INFINITY,
            error: 0.0,
            seen: 0,
            pairs: 0,
        }
    }
}

impl Sum {
    fn add(&mut self, dense: &[f32], sparse: &[f32], mass: f64, seen: usize, pairs: usize) {
        self.queries += 1;
        self.mass += mass;
        self.mass_min = self.mass_min.min(mass);
        // What is left is normalised again, as a kernel does; nothing left is an output of 0.
        let scale = if mass > 0.0 { 1.0 / mass } else { 0.0 };
        let differences = dense.iter().zip(sparse);
        self.error += differences
            .map(|(&dense, &sparse)| (f64::from(dense) - f64::from(sparse) * scale).powi(2))
            .sum::<f64>();
        self.seen += seen;
        self.pairs += pairs;
    }
}

/// Adds the values of `keys` times their weights to `out`; answers with the sum of the weights.
fn add(out: &mut [f32], weights: &[f32], values: &[f32], keys: std::ops::Range<usize>) -> f64 {
    if keys.is_empty() {
        return 0.0;
    }
    let d = out.len();
    let rows = values[keys.start * d..keys.end * d].chunks_exact(d);
    let mut mass = 0.0;
    for (&weight, value) in weights[keys].iter().zip(rows) {
        mass += f64::from(weight);
        for (out, value) in out.iter_mut().zip(value) {
            *out += weight * value;
        }
    }
    mass
}

#[cfg(test)]
mod tests;
