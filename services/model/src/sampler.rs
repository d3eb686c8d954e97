//! Drawing the next token from logits.

use rand::{Rng, SeedableRng, rngs::StdRng};

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Share of the probability that the likeliest tokens drawn from must hold, in (0, 1]; 1 draws from all.
    pub top_p: f32,
    /// Equal seeds over equal logits draw equal tokens.
    pub seed: u64,
}

/// A sampling parameter out of range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field} is {found}: it must be {expected}")]
pub struct InvalidSampling {
    /// Name of the parameter.
    pub field: &'static str,
    /// What it is.
    pub found: f32,
    /// What it must be.
    pub expected: &'static str,
}

impl Sampling {
    /// Highest temperature; as OpenAI's.
    pub const TEMPERATURE_MAX: f32 = 2.0;

    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
        }
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`InvalidSampling`] with the first parameter out of range.
    pub fn validate(&self) -> Result<(), InvalidSampling> {
        if !(0.0..=Self::TEMPERATURE_MAX).contains(&self.temperature) {
            return Err(InvalidSampling {
                field: "temperature",
                found: self.temperature,
                expected: "from 0 to 2",
            });
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(InvalidSampling {
                field: "top_p",
                found: self.top_p,
                expected: "above 0 and at most 1",
            });
        }
        Ok(())
    }
}

/// One drawing of a token: what chance says is part of it, so that who draws needs no state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Not above 0: the most likely token (ties by the lower id); otherwise logits are divided by it.
    pub temperature: f32,
    /// As in [`Sampling`].
    pub top_p: f32,
    /// In `[0, 1)`.
    pub uniform: f64,
}

impl Draw {
    /// The most likely token.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        uniform: 0.0,
    };
}

/// Draws tokens; greedy at temperature 0 (ties by the lower id), seeded otherwise.
pub struct Sampler {
    sampling: Sampling,
    rng: StdRng,
    drawer: Drawer,
}

/// What draws from logits on the host.
#[derive(Default)]
pub(crate) struct Drawer {
    /// `(weight, id)` of tokens that may be drawn; reused.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence. Parameters that [`Sampling::validate`] refuses draw greedily
    /// (temperature) or from all tokens (top-p).
    pub fn new(sampling: Sampling) -> Self {
        let rng = StdRng::seed_from_u64(sampling.seed);
        Self {
            sampling,
            rng,
            drawer: Drawer::default(),
        }
    }

    /// How the next token is drawn: one number of chance per token, whatever is drawn from.
    pub fn next_draw(&mut self) -> Draw {
        let Sampling { temperature, top_p, .. } = self.sampling;
        if !(temperature > 0.0 && temperature.is_finite()) {
            return Draw::GREEDY;
        }
        Draw {
            temperature,
            top_p: if top_p > 0.0 && top_p < 1.0 { top_p } else { 1.0 },
            uniform: self.rng.random(),
        }
    }

    /// The next token of `logits[vocab]`. NaN is never drawn, unless there is nothing else: then token 0 is.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let draw = self.next_draw();
        self.draw(logits, draw)
    }

    /// A token of `logits[vocab]` by a drawing that was made before.
    pub fn draw(&mut self, logits: &[f32], draw: Draw) -> u32 {
        self.drawer.draw(logits, draw)
    }
}

impl Drawer {
    /// As [`Sampler::draw`].
    pub(crate) fn draw(&mut self, logits: &[f32], draw: Draw) -> u32 {
        let best = greedy(logits);
        let high = logits.get(best as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let Draw {
            temperature,
            top_p,
            uniform,
        } = draw;
        if !(temperature > 0.0 && temperature.is_finite() && high.is_finite()) {
            return best;
        }
        let weight = |logit: f32| ((logit - high) / temperature).exp();
        self.candidates.clear();
        let weighted = logits.iter().enumerate().map(|(id, logit)| (weight(*logit), id as u32));
        self.candidates.extend(weighted.filter(|(weight, _)| *weight > 0.0));
        if top_p > 0.0 && top_p < 1.0 {
            self.keep_nucleus(f64::from(top_p));
        }
        let total: f64 = self.candidates.iter().map(|(weight, _)| f64::from(*weight)).sum();
        let mut rest = uniform * total;
        for (weight, id) in &self.candidates {
            rest -= f64::from(*weight);
            if rest < 0.0 {
                return *id;
            }
        }
        // Rounding may leave a last sliver.
        self.candidates.last().map_or(0, |(_, id)| *id)
    }

    /// Keeps the fewest, likeliest candidates that hold `top_p` of the weight (Holtzman et al. 2020), at least one.
    fn keep_nucleus(&mut self, top_p: f64) {
        let total: f64 = self.candidates.iter().map(|(weight, _)| f64::from(*weight)).sum();
        // All tokens below the floor together hold less than what may be left out, so only the others need sorting.
        let floor = (1.0 - top_p) * total / self.candidates.len() as f64;
        self.candidates.retain(|(weight, _)| f64::from(*weight) >= floor);
        self.candidates
            .sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut held = 0.0;
        let nucleus = self.candidates.iter().position(|(weight, _)| {
            held += f64::from(*weight);
            held >= top_p * total
        });
        if let Some(last) = nucleus {
            self.candidates.truncate(last + 1);
        }
    }
}

/// The lowest id of the largest logit; 0 if all are NaN.
fn greedy(logits: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, None);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.0 || (best.1.is_none() && !logit.is_nan()) {
            best = (logit, Some(id as u32));
        }
    }
    best.1.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_lowest_of_the_largest() {
        const INF: f32 = f32::INFINITY;
        const NAN: f32 = f32::NAN;
        let table: [(&[f32], u32); 8] = [
            (&[1.0, 3.0, 2.0], 1),
            (&[3.0, 1.0, 3.0], 0),
            (&[NAN, -5.0, NAN, -4.0], 3),
            (&[NAN, NAN], 0),
            (&[NAN, -INF, -INF], 1),
            (&[0.0, INF, INF], 1),
            (&[-0.0, 0.0], 0),
            (&[], 0),
        ];
        for (logits, expected) in table {
            assert_eq!(Sampler::new(Sampling::greedy()).sample(logits), expected, "{logits:?}");
            // A temperature cannot rescue what has no finite maximum.
            let hot = Sampler::new(Sampling {
                temperature: 1.0,
                top_p: 0.9,
                seed: 1,
            })
            .sample(logits);
            assert!(logits.is_empty() || !logits[hot as usize].is_nan() || logits.iter().all(|l| l.is_nan()));
        }
    }

    #[test]
    fn equal_seeds_draw_equal_tokens() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 / 25.0).collect();
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling {
                temperature: 0.8,
                top_p: 0.95,
                seed,
            });
            (0..50).map(|_| sampler.sample(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn the_nucleus_is_the_fewest_tokens_that_hold_top_p() {
        // Probabilities 0.5, 0.25, 0.125, 0.125 in ids 2, 0, 1, 3.
        let logits = [0.25_f32, 0.125, 0.5, 0.125].map(f32::ln);
        let table: [(f32, &[u32]); 6] = [
            (0.01, &[2]),
            (0.499, &[2]),
            (0.51, &[2, 0]),
            (0.76, &[2, 0, 1]),
            (0.9, &[2, 0, 1, 3]),
            (1.0, &[2, 0, 1, 3]),
        ];
        for (top_p, expected) in table {
            let mut sampler = Sampler::new(Sampling {
                temperature: 1.0,
                top_p,
                seed: 3,
            });
            let mut counts = [0_u32; 4];
            for _ in 0..4000 {
                counts[sampler.sample(&logits) as usize] += 1;
            }
            let total: f32 = expected.iter().map(|id| logits[*id as usize].exp()).sum();
            for id in 0..4_u32 {
                let share = if expected.contains(&id) {
                    logits[id as usize].exp() / total
                } else {
                    0.0
                };
                let found = counts[id as usize] as f32 / 4000.0;
                // Four standard deviations of a binomial with 4,000 draws.
                let tolerance = 4.0 * (share * (1.0 - share) / 4000.0).sqrt();
                assert!(
                    (found - share).abs() <= tolerance,
                    "top_p {top_p}, id {id}: {found} for {share}"
                );
            }
        }
    }

    /// A GPU draws by a definition of its own (`kvasir_cuda::reference::sample`), whose weights are whole numbers. With the same
    /// chance it draws the same token, unless that chance lies within rounding of the border between two.
    #[test]
    fn a_gpu_draws_the_same_tokens() {
        let mut rng = StdRng::seed_from_u64(11);
        let mut apart = 0;
        for seed in 0..600 {
            let spread = [0.5, 3.0, 12.0][seed as usize % 3];
            let logits: Vec<f32> = (0..3000)
                .map(|_| spread * (0..4).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>())
                .collect();
            let sampling = Sampling {
                temperature: [0.0, 0.6, 1.0, 2.0][rng.random_range(0..4)],
                top_p: [0.2, 0.9, 0.99, 1.0][rng.random_range(0..4)],
                seed,
            };
            let row = kvasir_cuda::SampleRow {
                temperature: sampling.temperature,
                top_p: sampling.top_p,
                uniform: StdRng::seed_from_u64(seed).random(),
            };
            let there = kvasir_cuda::reference::sample(&logits, &row).token;
            apart += usize::from(Sampler::new(sampling).sample(&logits) != there);
        }
        assert!(apart <= 1, "{apart} of 600 tokens differ");
    }

    #[test]
    fn out_of_range_is_named() {
        let table = [
            (0.0, 1.0, None),
            (2.0, 0.1, None),
            (-0.1, 1.0, Some("temperature")),
            (2.1, 1.0, Some("temperature")),
            (f32::NAN, 1.0, Some("temperature")),
            (1.0, 0.0, Some("top_p")),
            (1.0, 1.1, Some("top_p")),
            (1.0, f32::NAN, Some("top_p")),
        ];
        for (temperature, top_p, expected) in table {
            let sampling = Sampling {
                temperature,
                top_p,
                seed: 0,
            };
            assert_eq!(
                sampling.validate().err().map(|error| error.field),
                expected,
                "{sampling:?}"
            );
            // Drawing must not panic either.
            Sampler::new(sampling).sample(&[0.0, 1.0]);
        }
    }
}
