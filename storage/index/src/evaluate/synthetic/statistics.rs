//! What attention looks like in numbers, and a gate that refuses what does not.

use half::f16;
use kvasir_simd::{Pool, scores, top_k};

use super::{
    super::{Recording, Setting, Summary},
    fit::count_of_mass,
};
use crate::IndexError;

/// Statistics of a recording, over all its query heads. In brackets what was measured on real models, which the bounds of
/// [`Statistics::gate`] enclose: SmolLM2-135M at 8K, then where it differs Gemma-3-270M (global layers) at 32K.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Statistics {
    /// Length of the mean key over the mean length of keys (0.64, 0.78).
    pub key_mean: f64,
    /// Mean cosine of two keys (0.41, 0.61).
    pub cos_keys: f64,
    /// Mean cosine of a query and a key (-0.12, 0.02).
    pub cos_query_key: f64,
    /// The same with the mean key taken off (0, 0).
    pub cos_query_centred_key: f64,
    /// Mean cosine of two queries of a head (0.45, 0.28).
    pub cos_queries: f64,
    /// Participation ratio of the keys' covariance over head_dim (19/64, 29/256).
    pub spread_of_keys: f64,
    /// Participation ratio of E[q qT] per head: directions that queries use (4.6, 7.4).
    pub directions_of_queries: f64,
    /// Mean Mahalanobis distance from the keys of queries, at the keys' mean length, over that of keys (2.3, 7.3).
    pub mahalanobis: f64,
    /// Mean mass on the sink (0.24).
    pub sink: f64,
    /// Mean mass on the last 64 tokens (0.34).
    pub last: f64,
    /// Keys that hold 0.9 of the mass, over decode queries (p10/p50/p90 7/56/436; Gemma 154/1,367/3,722).
    pub n90: Summary,
    /// Mean share of the searched mass that the best 100 keys hold (0.71).
    pub top_100: f64,
    /// Mean overlap of the best 100 keys of one step and the next (0.58).
    pub overlap_1: f64,
    /// The same, 64 steps apart (0.34).
    pub overlap_64: f64,
}

/// A recording is unlike attention.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("{statistic} is {value:.4}, attention has {low} to {high}")]
pub struct Refused {
    /// Which statistic.
    pub statistic: &'static str,
    /// What was measured.
    pub value: f64,
    /// Least allowed.
    pub low: f64,
    /// Most allowed.
    pub high: f64,
}

/// Most rows that means and covariances are taken over.
const ROWS: usize = 8192;
/// Best keys of which shares and overlaps are measured.
const BEST: usize = 100;
/// Steps apart for the later overlap.
const LAG: usize = 64;

impl Statistics {
    /// Measures a recording.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if shapes do not fit, or the setting leaves fewer than 1,000 keys or 65 decode steps.
    pub fn of(recording: &Recording<'_>, setting: &Setting, pool: &Pool) -> Result<Self, IndexError> {
        recording.check(setting)?;
        let prefill = setting.prefill(recording);
        if prefill < 1000 + setting.sink + setting.window || setting.decode <= LAG {
            return Err(IndexError::Invalid {
                argument: "setting",
                problem: "leaves too few keys or decode steps to measure: 1,000 and 65 are the least".to_owned(),
            });
        }
        let mut out = Self::default();
        out.measure_keys_and_queries(recording, setting);
        out.measure_masses(recording, setting, pool);
        Ok(out)
    }

    /// Accepts what lies between what was measured on real models, with some room.
    ///
    /// # Errors
    /// [`Refused`] naming the first statistic that lies outside.
    pub fn gate(&self) -> Result<(), Refused> {
        for (statistic, value, low, high) in [
            ("length of the mean key", self.key_mean, 0.50, 0.85),
            ("cosine of two keys", self.cos_keys, 0.25, 0.70),
            ("cosine of query and key", self.cos_query_key, -0.30, 0.15),
            (
                "cosine of query and centred key",
                self.cos_query_centred_key,
                -0.08,
                0.08,
            ),
            ("cosine of two queries", self.cos_queries, 0.20, 0.60),
            ("spread of keys over head_dim", self.spread_of_keys, 0.09, 0.45),
            ("directions of queries", self.directions_of_queries, 2.5, 12.0),
            ("Mahalanobis ratio of queries to keys", self.mahalanobis, 1.7, 9.0),
            ("mass on the sink", self.sink, 0.14, 0.34),
            ("mass on the last tokens", self.last, 0.22, 0.46),
            ("N90 p10", self.n90.p10, 2.0, 200.0),
            ("N90 p50", self.n90.p50, 25.0, 2000.0),
            ("N90 p90", self.n90.p90, 150.0, 6000.0),
            ("share of the best 100", self.top_100, 0.55, 0.87),
            ("overlap of successive steps", self.overlap_1, 0.45, 0.75),
            ("overlap 64 steps apart", self.overlap_64, 0.22, 0.50),
        ] {
            if !(low..=high).contains(&value) {
                return Err(Refused {
                    statistic,
                    value,
                    low,
                    high,
                });
            }
        }
        Ok(())
    }

    fn measure_keys_and_queries(&mut self, recording: &Recording<'_>, setting: &Setting) {
        let d = recording.head_dim;
        let prefill = setting.prefill(recording);
        let searched = setting.sink..prefill - setting.window;
        let keys = Rows::every(searched.len().div_ceil(ROWS), searched, |token| {
            &recording.keys[token * d..(token + 1) * d]
        });
        let mean = keys.mean();
        let covariance = keys.moment(&mean);
        let centred = keys.less(&mean);
        let lengths = keys.lengths();
        let mean_length = lengths.iter().sum::<f64>() / lengths.len() as f64;
        self.key_mean = length(&mean) / mean_length;
        let key_direction = keys.direction();
        self.cos_keys = dot(&key_direction, &key_direction);
        self.spread_of_keys = participation(&covariance, d) / d as f64;
        let factor = Cholesky::of(&covariance, d);
        let key_distance = factor.mean_distance(&centred);
        for head in 0..recording.heads {
            let queries = Rows::every(prefill.div_ceil(ROWS / 2), 64..prefill, |token| {
                recording.query(head, token)
            });
            let direction = queries.direction();
            let share = 1.0 / recording.heads as f64;
            self.cos_query_key += share * dot(&direction, &key_direction);
            self.cos_query_centred_key += share * dot(&direction, &centred.direction());
            self.cos_queries += share * dot(&direction, &direction);
            self.directions_of_queries += share * participation(&queries.moment(&vec![0.0; d]), d);
            let alike = queries.of_length(mean_length).less(&mean);
            self.mahalanobis += share * factor.mean_distance(&alike) / key_distance;
        }
    }

    fn measure_masses(&mut self, recording: &Recording<'_>, setting: &Setting, pool: &Pool) {
        let prefill = setting.prefill(recording);
        let d = recording.head_dim;
        let searched = setting.sink..prefill - setting.window;
        let heads = recording.heads;
        let mut steps: Vec<StepMass> = (0..setting.decode * heads).map(|_| StepMass::default()).collect();
        pool.run_chunks(&mut steps, heads, &|step, out| {
            let token = prefill + step;
            let mut all = vec![0.0; heads * (token + 1)];
            let seen = &recording.keys[..(token + 1) * d];
            scores(&recording.group(token), seen, d, recording.scale(), &mut all);
            for (out, scores) in out.iter_mut().zip(all.chunks_exact(token + 1)) {
                *out = StepMass::of(scores, setting, searched.clone());
            }
        });
        let count = steps.len() as f64;
        let mean = |value: fn(&StepMass) -> f64| steps.iter().map(value).sum::<f64>() / count;
        self.sink = mean(|step| step.sink);
        self.last = mean(|step| step.last);
        self.top_100 = mean(|step| step.best_share);
        self.n90 = Summary::of(&mut steps.iter().map(|step| step.n90).collect::<Vec<_>>());
        let overlap = |lag: usize| {
            let pairs = steps.iter().zip(&steps[lag * heads..]);
            let overlaps: Vec<f64> = pairs
                .map(|(a, b)| {
                    a.best.iter().filter(|key| b.best.binary_search(key).is_ok()).count() as f64 / BEST as f64
                })
                .collect();
            overlaps.iter().sum::<f64>() / overlaps.len() as f64
        };
        (self.overlap_1, self.overlap_64) = (overlap(1), overlap(LAG));
    }
}

/// Masses of one query.
#[derive(Clone, Debug, Default)]
struct StepMass {
    sink: f64,
    last: f64,
    n90: f64,
    best_share: f64,
    /// Rising.
    best: Vec<u32>,
}

impl StepMass {
    fn of(scores: &[f32], setting: &Setting, searched: std::ops::Range<usize>) -> Self {
        let high = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut weights: Vec<f32> = scores.iter().map(|score| (score - high).exp2()).collect();
        let sum = |weights: &[f32]| weights.iter().map(|weight| f64::from(*weight)).sum::<f64>();
        let all = sum(&weights);
        let rest = sum(&weights[searched.clone()]);
        let mut best = Vec::new();
        top_k(&weights[searched.clone()], BEST, &mut best);
        let best_mass: f64 = best
            .iter()
            .map(|at| f64::from(weights[searched.start + *at as usize]))
            .sum();
        Self {
            sink: sum(&weights[..setting.sink]) / all,
            last: sum(&weights[weights.len() - setting.window..]) / all,
            best_share: if rest > 0.0 { best_mass / rest } else { 1.0 },
            best,
            n90: count_of_mass(&mut weights, 0.9) as f64,
        }
    }
}

/// Some rows in f64.
struct Rows {
    d: usize,
    data: Vec<f64>,
}

impl Rows {
    fn every<'a>(stride: usize, tokens: std::ops::Range<usize>, row: impl Fn(usize) -> &'a [f16]) -> Self {
        let d = row(tokens.start).len();
        let rows = tokens.step_by(stride.max(1)).flat_map(row);
        Self {
            d,
            data: rows.map(|x| x.to_f64()).collect(),
        }
    }

    fn iter(&self) -> impl Iterator<Item = &[f64]> {
        self.data.chunks_exact(self.d)
    }

    fn count(&self) -> f64 {
        (self.data.len() / self.d) as f64
    }

    fn mean(&self) -> Vec<f64> {
        let mut mean = vec![0.0; self.d];
        for row in self.iter() {
            mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += x / self.count());
        }
        mean
    }

    fn lengths(&self) -> Vec<f64> {
        self.iter().map(length).collect()
    }

    /// Mean of the rows at unit length: its square is the mean cosine of two rows.
    fn direction(&self) -> Vec<f64> {
        self.of_length(1.0).mean()
    }

    fn of_length(&self, wanted: f64) -> Self {
        let scaled = self.iter().flat_map(|row| {
            let gain = wanted / length(row).max(1e-30);
            row.iter().map(move |x| x * gain)
        });
        Self {
            d: self.d,
            data: scaled.collect(),
        }
    }

    fn less(&self, mean: &[f64]) -> Self {
        let less = self
            .iter()
            .flat_map(|row| row.iter().zip(mean).map(|(x, mean)| x - mean));
        Self {
            d: self.d,
            data: less.collect(),
        }
    }

    /// Mean of `(row - centre) (row - centre)T`, `[d, d]`.
    fn moment(&self, centre: &[f64]) -> Vec<f64> {
        let mut moment = vec![0.0; self.d * self.d];
        for row in self.less(centre).iter() {
            for (out, x) in moment.chunks_exact_mut(self.d).zip(row) {
                out.iter_mut().zip(row).for_each(|(out, y)| *out += x * y);
            }
        }
        moment.iter_mut().for_each(|x| *x /= self.count());
        moment
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn length(row: &[f64]) -> f64 {
    dot(row, row).sqrt()
}

/// `(sum of eigenvalues)^2 / sum of their squares`: how many directions a symmetric matrix has.
fn participation(matrix: &[f64], d: usize) -> f64 {
    let trace: f64 = (0..d).map(|at| matrix[at * d + at]).sum();
    trace * trace / dot(matrix, matrix).max(1e-300)
}

/// The lower factor of a covariance, with a thousandth of the mean variance added so that there is one.
struct Cholesky {
    d: usize,
    lower: Vec<f64>,
}

impl Cholesky {
    fn of(covariance: &[f64], d: usize) -> Self {
        let trace: f64 = (0..d).map(|at| covariance[at * d + at]).sum();
        let ridge = (1e-3 * trace / d as f64).max(1e-30);
        let mut lower = vec![0.0; d * d];
        for row in 0..d {
            for column in 0..=row {
                let (a, b) = (
                    &lower[row * d..row * d + column],
                    &lower[column * d..column * d + column],
                );
                let rest = covariance[row * d + column] - dot(a, b) + if row == column { ridge } else { 0.0 };
                lower[row * d + column] = if row == column {
                    rest.max(1e-300).sqrt()
                } else {
                    rest / lower[column * d + column]
                };
            }
        }
        Self { d, lower }
    }

    /// Mean Mahalanobis distance of centred rows.
    fn mean_distance(&self, centred: &Rows) -> f64 {
        let distances = centred.iter().map(|row| {
            let mut solved: Vec<f64> = Vec::with_capacity(self.d);
            for (at, x) in row.iter().enumerate() {
                let lower = &self.lower[at * self.d..];
                let next = (x - dot(&lower[..at], &solved)) / lower[at];
                solved.push(next);
            }
            length(&solved)
        });
        distances.sum::<f64>() / centred.count()
    }
}
