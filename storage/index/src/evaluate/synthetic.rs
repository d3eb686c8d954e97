//! Recordings made up, for lengths that no small model reaches: keys and queries with the statistics of attention.
//!
//! The recipe, per KV head: a token's content is a topic (runs of tokens share one), a word (from a vocabulary with Zipf's law)
//! and noise. A key is a mean plus its content, each pair of elements (a rotary plane) with a spread of its own; a query is a mean
//! of its own plus what a low-rank map makes of the contents of a few earlier tokens it looks for, some held for hundreds of
//! steps and some for one. Both are rotated by their positions *after* that, so slow planes drift and fast ones forget. Means
//! lie in slow planes, a part that favours near tokens in quicker ones, and the first keys carry a mark that queries ask
//! for (the sink).
//!
//! Per query head three gains are then fitted: that of the content to the law of N90, the keys that hold 0.9 of the mass;
//! that of the mark to the mass on the sink; that of nearness to the mass on the last 64 tokens.
//!
//! What comes out is measured, not believed: [`Statistics::of`], and [`Statistics::gate`] refuses what is unlike attention.

mod draw;
mod fit;
mod statistics;

use half::f16;
use kvasir_simd::Pool;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use self::draw::{Contents, Planes, normal};
pub use self::statistics::{Refused, Statistics};
use super::{Recording, Setting};
use crate::IndexError;

/// What is to be made up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Tokens, decode steps included: 2,048 to 2^21.
    pub tokens: usize,
    /// Elements per key: even, 32 to 256.
    pub head_dim: usize,
    /// Query heads of the group, 1 to 16.
    pub heads: usize,
    /// Base of the rotary embedding. Models for long contexts have greater ones: [`Shape::theta_for`].
    pub theta: f64,
    /// What chance begins with.
    pub seed: u64,
}

impl Shape {
    /// The base that a model of such a window has: SmolLM2 at 8K, Llama 3 at 128K, and Llama 3 as it was extended to 1M.
    pub fn theta_for(tokens: usize) -> f64 {
        match tokens {
            0..=16_384 => 1e5,
            16_385..=262_144 => 5e5,
            _ => 3.58e9,
        }
    }

    fn check(&self) -> Result<(), IndexError> {
        let invalid = |argument, problem: &str| {
            Err(IndexError::Invalid {
                argument,
                problem: problem.to_owned(),
            })
        };
        if !(2048..=1 << 21).contains(&self.tokens) {
            return invalid("tokens", "is 2,048 to 2,097,152");
        }
        if !(32..=256).contains(&self.head_dim) || !self.head_dim.is_multiple_of(2) {
            return invalid("head_dim", "is even, 32 to 256");
        }
        if !(1..=16).contains(&self.heads) {
            return invalid("heads", "is 1 to 16");
        }
        if !(self.theta.is_finite() && self.theta > 1.0) {
            return invalid("theta", "is finite and above 1");
        }
        Ok(())
    }
}

/// A made-up recording.
#[derive(Clone, Debug)]
pub struct Synthetic {
    shape: Shape,
    q: Vec<f16>,
    keys: Vec<f16>,
    values: Vec<f16>,
}

/// Tokens that a query looks for: for how many steps they stay the same, and their weights. Lengths have no common factor, so that they
/// change at different times.
const HELD: [(usize, f32); 7] = [
    (509, 0.58),
    (641, 0.58),
    (769, 0.58),
    (23, 0.16),
    (29, 0.16),
    (1, 0.38),
    (1, 0.38),
];
/// The first of them are the same for all query heads of a group.
const SHARED: usize = 2;
/// Length of keys.
const KEY_LENGTH: f32 = 8.0;

impl Synthetic {
    /// Makes a recording up: minutes for a million tokens, seconds for thousands.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] naming what is wrong with the shape.
    pub fn generate(shape: Shape, pool: &Pool) -> Result<Self, IndexError> {
        shape.check()?;
        let Shape {
            tokens,
            head_dim,
            heads,
            ..
        } = shape;
        let mut rng = SmallRng::seed_from_u64(shape.seed);
        let planes = Planes::new(&shape, &mut rng);
        let contents = Contents::draw(&shape, &mut rng);
        let mut keys = vec![f16::ZERO; tokens * head_dim];
        pool.run_chunks(&mut keys, head_dim, &|token, out| {
            let mut key = planes.key(token, contents.of(token));
            planes.rotate(&mut key, token);
            for (out, x) in out.iter_mut().zip(&key) {
                *out = f16::from_f32(x * KEY_LENGTH);
            }
        });
        let values = values(&shape, &contents, &mut rng);
        let mut q = vec![f16::ZERO; heads * tokens * head_dim];
        for (head, q) in q.chunks_exact_mut(tokens * head_dim).enumerate() {
            let looked_for = looked_for(&shape, head, &mut rng);
            let seen = planes.seen_by(&mut rng);
            let content =
                |token: usize| planes.query(&seen, looked_for(token).map(|(at, weight)| (contents.of(at), weight)));
            let gains = fit::gains(&shape, head, &planes, &keys, &content, pool);
            pool.run_chunks(q, head_dim, &|token, out| {
                let mut query = planes.join(&content(token), &gains);
                planes.rotate(&mut query, token);
                for (out, x) in out.iter_mut().zip(&query) {
                    *out = f16::from_f32(*x);
                }
            });
        }
        Ok(Self { shape, q, keys, values })
    }

    /// The first of `tries` seeds, from that of `shape` on, whose recording passes the gate, with its statistics. Some do not:
    /// what a handful of heads looks for is a matter of luck.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] naming what is wrong with the shape or too short for the setting, or the statistic that the last
    /// recording was refused for.
    pub fn accepted(
        shape: Shape,
        setting: &Setting,
        tries: u64,
        pool: &Pool,
    ) -> Result<(Self, Statistics), IndexError> {
        let mut problem = "0 seeds were to be tried".to_owned();
        for at in 0..tries {
            let shape = Shape {
                seed: shape.seed.wrapping_add(at),
                ..shape
            };
            let made = Self::generate(shape, pool)?;
            let statistics = made.statistics(setting, pool)?;
            match statistics.gate() {
                Ok(()) => return Ok((made, statistics)),
                Err(refused) => problem = format!("{tries} recordings were refused, the last because its {refused}"),
            }
        }
        Err(IndexError::Invalid {
            argument: "seed",
            problem,
        })
    }

    /// What it was made as.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// As a recording like any other.
    pub fn recording(&self) -> Recording<'_> {
        Recording {
            q: &self.q,
            keys: &self.keys,
            values: &self.values,
            heads: self.shape.heads,
            head_dim: self.shape.head_dim,
        }
    }

    /// Measures it.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if it is too short for the setting.
    pub fn statistics(&self, setting: &Setting, pool: &Pool) -> Result<Statistics, IndexError> {
        Statistics::of(&self.recording(), setting, pool)
    }
}

/// The earlier tokens that a query of `head` looks for at a token, with weights.
fn looked_for(
    shape: &Shape,
    head: usize,
    rng: &mut SmallRng,
) -> impl Fn(usize) -> [(usize, f32); HELD.len()] + Sync + use<> {
    let seeds: [u64; HELD.len()] = std::array::from_fn(|_| rng.random());
    let shared = shape.seed;
    move |token| {
        std::array::from_fn(|nth| {
            let (held, weight) = HELD[nth];
            let seed = if nth < SHARED {
                shared ^ nth as u64
            } else {
                seeds[nth] ^ head as u64
            };
            // A function of the step alone, so that tokens can be drawn in any order.
            let step = token / held;
            let mut rng = SmallRng::seed_from_u64(seed ^ (step as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
            (rng.random_range(0..(step * held).max(1)), weight)
        })
    }
}

/// Values: a part that tokens of one topic and word share, and noise.
fn values(shape: &Shape, contents: &Contents, rng: &mut SmallRng) -> Vec<f16> {
    let map: Vec<f32> = (0..shape.head_dim).map(|_| 0.5 + rng.random::<f32>()).collect();
    let turn = rng.random_range(0..shape.head_dim);
    let mut out = Vec::with_capacity(shape.tokens * shape.head_dim);
    for token in 0..shape.tokens {
        let content = contents.of(token);
        out.extend((0..shape.head_dim).map(|at| {
            let shared = content[(at + turn) % shape.head_dim] * map[at];
            f16::from_f32(shared + 0.5 * normal(rng))
        }));
    }
    out
}

#[cfg(test)]
mod tests;
