//! Drawing contents, keys and queries.

use rand::{Rng as _, rngs::SmallRng};

use super::Shape;

/// A standard normal number (Box and Muller).
pub(super) fn normal(rng: &mut SmallRng) -> f32 {
    let radius = (-2.0_f32 * (1.0 - rng.random::<f32>()).ln()).sqrt();
    radius * (std::f32::consts::TAU * rng.random::<f32>()).cos()
}

fn normals(count: usize, rng: &mut SmallRng) -> Vec<f32> {
    (0..count).map(|_| normal(rng)).collect()
}

/// What tokens are about, before any key: unit variance per element.
pub(super) struct Contents {
    head_dim: usize,
    rows: Vec<f32>,
}

/// Tokens that share a topic on average.
const TOPIC_TOKENS: f64 = 256.0;
const WORDS: usize = 4096;
/// Shares of the variance.
const TOPIC: f32 = 0.35;
const WORD: f32 = 0.40;

impl Contents {
    pub(super) fn draw(shape: &Shape, rng: &mut SmallRng) -> Self {
        let d = shape.head_dim;
        let topics = (shape.tokens / 1024).max(8);
        let topic_rows = normals(topics * d, rng);
        let word_rows = normals(WORDS * d, rng);
        let mut topic = 0;
        let mut rows = Vec::with_capacity(shape.tokens * d);
        for _ in 0..shape.tokens {
            if rng.random_bool(1.0 / TOPIC_TOKENS) {
                topic = rng.random_range(0..topics);
            }
            // Zipf: the logarithm of the rank is uniform.
            let word = ((WORDS as f64).powf(rng.random::<f64>()) as usize).min(WORDS) - 1;
            for at in 0..d {
                rows.push(
                    TOPIC.sqrt() * topic_rows[topic * d + at]
                        + WORD.sqrt() * word_rows[word * d + at]
                        + (1.0 - TOPIC - WORD).sqrt() * normal(rng),
                );
            }
        }
        Self { head_dim: d, rows }
    }

    pub(super) fn of(&self, token: usize) -> &[f32] {
        &self.rows[token * self.head_dim..][..self.head_dim]
    }
}

/// The rotary planes of a KV head (elements `2i` and `2i + 1`) and what keys and queries have in them.
pub(super) struct Planes {
    /// Radians per token.
    turns: Vec<f64>,
    /// Mean key, before rotation.
    key_mean: Vec<f32>,
    /// Spread of keys per element.
    key_spread: Vec<f32>,
    /// Mean query.
    query_mean: Vec<f32>,
    /// How much of a content a query sees, per element.
    sight: Vec<f32>,
    /// The part of keys and queries that favours near tokens.
    near: Vec<f32>,
    /// The element with the mark of the sink.
    mark: usize,
}

/// Gains of a query head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Gains {
    /// Of the mean and the contents.
    pub(super) content: f32,
    /// Of the mark of the sink.
    pub(super) mark: f32,
    /// Of nearness.
    pub(super) near: f32,
}

/// Keys with the mark.
pub(super) const SINK: usize = 4;

impl Planes {
    pub(super) fn new(shape: &Shape, rng: &mut SmallRng) -> Self {
        let d = shape.head_dim;
        let count = d / 2;
        let turns: Vec<f64> = (0..count)
            .map(|plane| shape.theta.powf(-2.0 * plane as f64 / d as f64))
            .collect();
        // Planes that turn by less than this over the whole text keep what they were given.
        let slow = turns
            .iter()
            .filter(|turn| **turn * (shape.tokens as f64) < 3.0)
            .count()
            .clamp(4, count / 3);
        let first_slow = count - slow;
        let mark = d - 1;
        let mut out = Self {
            key_mean: vec![0.0; d],
            key_spread: vec![0.0; d],
            query_mean: vec![0.0; d],
            sight: vec![0.0; d],
            near: vec![0.0; d],
            mark,
            turns,
        };
        // Keys spread most in some planes, fewer and fewer in others: a participation ratio of a third of the elements.
        let mut order: Vec<usize> = (0..first_slow).collect();
        for at in (1..order.len()).rev() {
            order.swap(at, rng.random_range(0..=at));
        }
        for (rank, &plane) in order.iter().enumerate() {
            let spread = (-(rank as f32) / (KEY_DECAY * first_slow as f32)).exp();
            out.key_spread[2 * plane] = spread;
            out.key_spread[2 * plane + 1] = spread;
        }
        let mean = normals(2 * slow, rng);
        let query_mean = normals(2 * slow, rng);
        for at in 2 * first_slow..d {
            out.key_spread[at] = SLOW_SPREAD;
            out.key_mean[at] = mean[at - 2 * first_slow];
            out.query_mean[at] = query_mean[at - 2 * first_slow] * (-((d - at) as f32) / SIGHT_DECAY).exp();
        }
        // The slower a plane, the more of it is seen: quick ones tell nothing of a token far away.
        for (rank, sight) in out.sight.iter_mut().rev().enumerate() {
            *sight = (-(rank as f32) / SIGHT_DECAY).exp();
        }
        out.key_spread[mark] = 0.3 * SLOW_SPREAD;
        (out.key_mean[mark], out.query_mean[mark], out.sight[mark]) = (0.0, 0.0, 0.0);
        // Quick planes make the peak at the nearest tokens, all together keep it from coming back far away.
        for plane in (0..first_slow)
            .rev()
            .step_by(2)
            .filter(|plane| out.turns[*plane] < NEAR_TURN)
        {
            out.near[2 * plane] = 1.0;
            // Little else in them, or the noise of other keys would drown it.
            out.key_spread[2 * plane] *= NEAR_SPREAD;
            out.key_spread[2 * plane + 1] *= NEAR_SPREAD;
        }
        unit(&mut out.near);
        // Lengths: the keys' spread is 1 in all, their mean 0.64 of their length, and a query's mean lies almost square to it.
        let spread = out.key_spread.iter().map(|x| x * x).sum::<f32>().sqrt();
        out.key_spread.iter_mut().for_each(|x| *x /= spread);
        unit(&mut out.key_mean);
        let along: f32 = out.key_mean.iter().zip(&out.query_mean).map(|(k, q)| k * q).sum();
        let key_mean = out.key_mean.clone();
        out.query_mean
            .iter_mut()
            .zip(&key_mean)
            .for_each(|(q, k)| *q -= along * k);
        unit(&mut out.query_mean);
        out.query_mean
            .iter_mut()
            .zip(&key_mean)
            .for_each(|(q, k)| *q = QUERY_MEAN * (*q - OPPOSED * k));
        out.key_mean.iter_mut().for_each(|x| *x *= KEY_MEAN);
        out
    }

    /// Key of a token, before rotation.
    pub(super) fn key(&self, token: usize, content: &[f32]) -> Vec<f32> {
        let mut key: Vec<f32> = (0..content.len())
            .map(|at| self.key_mean[at] + self.key_spread[at] * content[at] + NEAR_KEY * self.near[at])
            .collect();
        if token < SINK {
            key.iter_mut().for_each(|x| *x *= 0.3);
            key[self.mark] += 1.5;
        }
        key
    }

    /// A query head sees some elements better than others.
    pub(super) fn seen_by(&self, rng: &mut SmallRng) -> Vec<f32> {
        self.sight
            .iter()
            .map(|sight| sight * rng.random_range(0.7..1.3))
            .collect()
    }

    /// The mean and what a query makes of the contents it looks for.
    pub(super) fn query<'a>(&self, seen: &[f32], contents: impl IntoIterator<Item = (&'a [f32], f32)>) -> Vec<f32> {
        let mut query = vec![0.0; self.query_mean.len()];
        for (content, weight) in contents {
            for ((query, content), seen) in query.iter_mut().zip(content).zip(seen) {
                *query += weight * seen * content;
            }
        }
        // Of one length, so that a step does not stand out for the tokens that chance gave it.
        unit(&mut query);
        query
            .iter_mut()
            .zip(&self.query_mean)
            .for_each(|(query, mean)| *query = QUERY_CONTENT * *query + mean);
        query
    }

    /// A query before rotation.
    pub(super) fn join(&self, content: &[f32], gains: &Gains) -> Vec<f32> {
        let mut query: Vec<f32> = content
            .iter()
            .zip(&self.near)
            .map(|(content, near)| gains.content * content + gains.near * near)
            .collect();
        query[self.mark] += gains.mark;
        query
    }

    pub(super) fn rotate(&self, row: &mut [f32], position: usize) {
        for (pair, turn) in row.chunks_exact_mut(2).zip(&self.turns) {
            let (sin, cos) = (turn * position as f64).sin_cos();
            let (x, y) = (f64::from(pair[0]), f64::from(pair[1]));
            pair[0] = (x * cos - y * sin) as f32;
            pair[1] = (x * sin + y * cos) as f32;
        }
    }
}

/// Ranks of planes over which the keys' spread falls by e, as a share of the planes.
const KEY_DECAY: f32 = 0.38;
/// Spread of keys in slow planes, where the widest has 1.
const SLOW_SPREAD: f32 = 0.42;
/// Length of the mean key where the spread is 1.
const KEY_MEAN: f32 = 1.06;
/// Radians per token of the quickest plane with a nearness part: the peak is as wide as this allows.
const NEAR_TURN: f64 = 0.15;
/// Length of the nearness part of a key.
const NEAR_KEY: f32 = 0.6;
/// What the spread of keys is multiplied by in those planes.
const NEAR_SPREAD: f32 = 0.25;
/// Elements, counted from the slowest, over which what a query sees falls by e.
const SIGHT_DECAY: f32 = 10.0;
/// Lengths of the mean query and of what it looks for.
const QUERY_MEAN: f32 = 2.9;
const QUERY_CONTENT: f32 = 2.7;
/// Part of the mean query that points away from the mean key.
const OPPOSED: f32 = 0.25;

fn unit(row: &mut [f32]) {
    let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
    if length > 0.0 {
        row.iter_mut().for_each(|x| *x /= length);
    }
}
