//! Fitting a query head's gains to the masses that real heads have.

use half::f16;
use kvasir_simd::{Pool, scores};

use super::{
    Shape,
    draw::{Gains, Planes, SINK},
};

/// Mass on the sink and on the last tokens, in the mean over real heads.
const SINK_MASS: f64 = 0.24;
const LAST_MASS: f64 = 0.34;
const LAST: usize = 64;
/// N90 over real heads is log-normal: its median, and the logarithm of what one deviation multiplies.
const N90_MEDIAN: f64 = 56.0;
const N90_SPREAD: f64 = 1.61;
/// Decode steps that are fitted on, evenly spaced over the last 256.
const STEPS: usize = 32;
/// Halvings of the content's gain, and turns of the other two in each.
const ROUNDS: usize = 10;
const TURNS: usize = 4;

/// The gains for `head`, whose N90 is its quantile of the law.
pub(super) fn gains(
    shape: &Shape,
    head: usize,
    planes: &Planes,
    keys: &[f16],
    content: &(impl Fn(usize) -> Vec<f32> + Sync),
    pool: &Pool,
) -> Gains {
    let quantile = (head as f64 + 0.5) / shape.heads as f64;
    let wanted = N90_MEDIAN * (N90_SPREAD * deviation(quantile)).exp();
    let mut steps: Vec<Step> = (0..STEPS)
        .map(|at| Step::at(shape.tokens - 256 + at * 256 / STEPS))
        .collect();
    pool.run_chunks(&mut steps, 1, &|_, steps| {
        for step in steps {
            step.score(shape, planes, keys, content);
        }
    });
    let mut gains = Gains {
        content: 1.0,
        mark: 1.0,
        near: 1.0,
    };
    // N90 falls when the content's gain rises; the other gains follow to keep their masses.
    let (mut low, mut high) = (0.05_f32, 400.0_f32);
    for _ in 0..ROUNDS {
        gains.content = (low * high).sqrt();
        let mut counts = vec![0.0; STEPS];
        settle(&mut gains, &steps, pool);
        pool.run_chunks(&mut counts, 1, &|at, counts| counts[0] = steps[at].n90(&gains));
        counts.sort_unstable_by(f64::total_cmp);
        if counts[STEPS / 2] > wanted {
            low = gains.content;
        } else {
            high = gains.content;
        }
    }
    gains
}

/// The products of a decode step's query with all keys before it: parts that gains multiply.
struct Step {
    token: usize,
    content: Vec<f32>,
    mark: Vec<f32>,
    near: Vec<f32>,
}

impl Step {
    fn at(token: usize) -> Self {
        Self {
            token,
            content: Vec::new(),
            mark: Vec::new(),
            near: Vec::new(),
        }
    }

    fn score(&mut self, shape: &Shape, planes: &Planes, keys: &[f16], content: &impl Fn(usize) -> Vec<f32>) {
        let d = shape.head_dim;
        let none = Gains {
            content: 0.0,
            mark: 0.0,
            near: 0.0,
        };
        let content = content(self.token);
        let parts = [
            planes.join(&content, &Gains { content: 1.0, ..none }),
            planes.join(&content, &Gains { mark: 1.0, ..none }),
            planes.join(&content, &Gains { near: 1.0, ..none }),
        ];
        let seen = &keys[..(self.token + 1) * d];
        let mut out = parts.map(|mut part| {
            planes.rotate(&mut part, self.token);
            let mut out = vec![0.0; self.token + 1];
            scores(&part, seen, d, 1.0 / (d as f32).sqrt(), &mut out);
            out
        });
        (self.content, self.mark, self.near) = (
            std::mem::take(&mut out[0]),
            std::mem::take(&mut out[1]),
            std::mem::take(&mut out[2]),
        );
    }

    fn weights(&self, gains: &Gains) -> Vec<f32> {
        let mut weights: Vec<f32> = self
            .content
            .iter()
            .zip(&self.mark)
            .zip(&self.near)
            .map(|((content, mark), near)| gains.content * content + gains.mark * mark + gains.near * near)
            .collect();
        let high = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.iter_mut().for_each(|weight| *weight = (*weight - high).exp2());
        weights
    }

    /// Mass on sink, last tokens, and all.
    fn masses(&self, gains: &Gains) -> [f64; 3] {
        let weights = self.weights(gains);
        let sum = |weights: &[f32]| weights.iter().map(|weight| f64::from(*weight)).sum::<f64>();
        [
            sum(&weights[..SINK]),
            sum(&weights[weights.len() - LAST..]),
            sum(&weights),
        ]
    }

    fn n90(&self, gains: &Gains) -> f64 {
        let mut weights = self.weights(gains);
        count_of_mass(&mut weights, 0.9) as f64
    }
}

/// How many of the greatest weights hold `share` of their sum.
pub(super) fn count_of_mass(weights: &mut Vec<f32>, share: f64) -> usize {
    let all: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
    // What is far below an even share of the remainder cannot be needed.
    let negligible = ((1.0 - share) * 0.01 * all / weights.len().max(1) as f64) as f32;
    weights.retain(|weight| *weight > negligible);
    weights.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut sum = 0.0;
    weights
        .iter()
        .position(|weight| {
            sum += f64::from(*weight);
            sum >= share * all
        })
        .map_or(weights.len(), |at| at + 1)
}

/// Moves the gains of nearness and mark towards the wanted mean masses, by bisection in turn.
fn settle(gains: &mut Gains, steps: &[Step], pool: &Pool) {
    let share = |gains: &Gains, part: usize| {
        // Every second step is enough for means.
        let mut shares = vec![0.0; steps.len() / 2];
        pool.run_chunks(&mut shares, 1, &|at, share| {
            let masses = steps[2 * at].masses(gains);
            share[0] = masses[part] / masses[2];
        });
        shares.iter().sum::<f64>() / shares.len() as f64
    };
    // From below: where mark and nearness already outweigh the rest, turns hardly come nearer.
    (gains.mark, gains.near) = (0.0, 0.0);
    for _ in 0..TURNS {
        for (part, wanted) in [(1, LAST_MASS), (0, SINK_MASS)] {
            let (mut low, mut high) = (-50.0_f32, 300.0_f32);
            for _ in 0..12 {
                let middle = 0.5 * (low + high);
                *if part == 0 { &mut gains.mark } else { &mut gains.near } = middle;
                if share(gains, part) < wanted {
                    low = middle;
                } else {
                    high = middle;
                }
            }
        }
    }
}

/// The standard normal number below which `quantile` lies (Abramowitz and Stegun 26.2.23; an error below 5e-4).
fn deviation(quantile: f64) -> f64 {
    let tail = quantile.min(1.0 - quantile).max(1e-9);
    let t = (-2.0 * tail.ln()).sqrt();
    let above = 2.515_517 + t * (0.802_853 + t * 0.010_328);
    let below = 1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308));
    (t - above / below) * if quantile < 0.5 { -1.0 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_of_quantiles() {
        for (quantile, expected) in [(0.5, 0.0), (0.1, -1.2816), (0.9, 1.2816), (0.975, 1.96)] {
            assert!((deviation(quantile) - expected).abs() < 1e-3, "{quantile}");
        }
    }

    #[test]
    fn counts_of_mass() {
        for (weights, share, expected) in [
            (vec![1.0; 100], 0.9, 90),
            (vec![0.05, 0.92, 0.03], 0.9, 1),
            (vec![0.3, 0.3, 0.3, 0.1], 0.85, 3),
            (vec![], 0.9, 0),
        ] {
            assert_eq!(count_of_mass(&mut weights.clone(), share), expected, "{weights:?}");
        }
    }
}
