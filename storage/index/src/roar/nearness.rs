//! How near two keys are, where edges are drawn: by the product of centred keys, or by their distance *as queries see it*.
//!
//! Queries look along few directions (a participation ratio of 4 to 10 of 64 to 256), and what keys differ in besides is noise to
//! them. With `M = E[q qT]` over the sampled queries, the distance is that of `M^(1/2) (k - mean)`, in the leading directions of the
//! keys. [`Moments`] finds them; it is the metric that sketches are made in, learnt here from the index's own samples. On made-up
//! recordings edges drawn so find more (.953 instead of .911 of the best 100 of 128K keys by scoring 3 %); on heads of a real
//! model at 8K keys one gains and others lose, since far keys, which are often the best, are nobody's near ones. tests/recall has
//! the figures; [`Metric`] chooses.

use half::f16;
use kvasir_simd::{Pool, scores, to_f16, to_f32};

use super::Metric;
use crate::{KeyRows, Moments, cluster::mean_row, search::is_finite};

/// Directions kept; with all of 128 no more is found, with 32 a little less.
const RANK: usize = 64;
/// Keys per task.
const TASK_KEYS: usize = 1024;
/// Greatest element of a row.
const HIGHEST: f32 = 65_504.0;

/// Keys as queries see them. Rows that are not numbers are zeros.
pub(super) struct Nearness {
    /// Elements per row.
    rank: usize,
    rows: Vec<f16>,
    /// Half the squared length of each row; zeros where products count.
    halves: Vec<f32>,
    finite: Vec<bool>,
}

/// A key whose nearness to others is asked for.
#[derive(Default)]
pub(super) struct Point {
    row: Vec<f32>,
    half: f32,
}

impl Nearness {
    /// `samples` are finite rows of `head_dim`. Where they are too few or all zero to see anything, keys are as near as they are.
    pub(super) fn of(keys: KeyRows<'_>, samples: &[f32], metric: Metric, pool: &Pool) -> Self {
        let d = keys.head_dim();
        let finite: Vec<bool> = (0..keys.len()).map(|at| is_finite(keys.row(at))).collect();
        let numbers = || (0..keys.len()).filter(|at| finite[*at]).map(|at| keys.row(at));
        let seen = (metric == Metric::Seen).then(|| {
            let mut moments = Moments::new(d);
            moments.add_queries(samples);
            numbers().for_each(|row| moments.add_keys(row));
            directions(&moments, samples, d)
        });
        let Directions { rank, mean, rows: map } = seen.flatten().unwrap_or_else(|| Directions {
            rank: d,
            mean: mean_row(numbers(), d).iter().map(|x| x.to_f32()).collect(),
            rows: None,
        });
        let mut rows = vec![f16::ZERO; keys.len() * rank];
        pool.run_chunks(&mut rows, TASK_KEYS * rank, &|task, rows| {
            let (mut row, mut seen) = (vec![0.0; d], vec![0.0; rank]);
            for (at, out) in rows.chunks_exact_mut(rank).enumerate() {
                let key = task * TASK_KEYS + at;
                if !finite[key] {
                    continue;
                }
                to_f32(keys.row(key), &mut row);
                row.iter_mut().zip(&mean).for_each(|(x, mean)| *x -= mean);
                match &map {
                    None => seen.copy_from_slice(&row),
                    Some(map) => {
                        for (seen, direction) in seen.iter_mut().zip(map.chunks_exact(d)) {
                            *seen = direction.iter().zip(&row).map(|(a, b)| a * b).sum();
                        }
                    }
                }
                // Clamped: a far key of a narrow direction may be beyond a half.
                seen.iter_mut().for_each(|x| *x = x.clamp(-HIGHEST, HIGHEST));
                to_f16(&seen, out);
            }
        });
        // A product is a distance without the lengths.
        let half = if metric == Metric::Keys { 0.0 } else { 0.5 };
        let halves = rows
            .chunks_exact(rank)
            .map(|row| half * row.iter().map(|x| x.to_f32().powi(2)).sum::<f32>());
        Self {
            rank,
            halves: halves.collect(),
            rows,
            finite,
        }
    }

    /// How many keys there are.
    pub(super) fn keys(&self) -> usize {
        self.finite.len()
    }

    /// The key is made of numbers: others are never linked.
    pub(super) fn is_finite(&self, key: u32) -> bool {
        self.finite[key as usize]
    }

    /// Nearness of other keys will be asked for `key`.
    pub(super) fn from(&self, key: u32, from: &mut Point) {
        from.row.resize(self.rank, 0.0);
        to_f32(&self.rows[key as usize * self.rank..][..self.rank], &mut from.row);
        from.half = self.halves[key as usize];
    }

    /// Half the negative squared distance to a key, or the product with it.
    pub(super) fn near(&self, from: &Point, key: u32) -> f32 {
        let mut product = [0.0];
        let row = &self.rows[key as usize * self.rank..][..self.rank];
        // Scores are base 2: the factor takes that out.
        scores(&from.row, row, self.rank, std::f32::consts::LN_2, &mut product);
        product[0] - from.half - self.halves[key as usize]
    }
}

/// What keys less their mean are multiplied by.
struct Directions {
    rank: usize,
    mean: Vec<f32>,
    /// `[rank, head_dim]`; `None` leaves keys as they are.
    rows: Option<Vec<f32>>,
}

fn directions(moments: &Moments, samples: &[f32], d: usize) -> Option<Directions> {
    let basis = moments.basis(RANK.min(d)).ok()?.basis;
    let rank = basis.keys.len() / d;
    // Along each direction of a basis keys have unit spread; how much of that queries see is the length of their side.
    let mut seen = vec![0.0_f64; rank];
    for q in samples.chunks_exact(d) {
        for (seen, direction) in seen.iter_mut().zip(basis.queries.chunks_exact(d)) {
            let y: f32 = direction.iter().zip(q).map(|(a, b)| a * b).sum();
            *seen += f64::from(y * y);
        }
    }
    let most = seen.iter().copied().fold(0.0, f64::max);
    if !(most > 0.0 && most.is_finite()) {
        return None;
    }
    let mut rows = basis.keys;
    for (row, seen) in rows.chunks_exact_mut(d).zip(&seen) {
        let weight = (seen / most).sqrt() as f32;
        row.iter_mut().for_each(|x| *x *= weight);
    }
    Some(Directions {
        rank,
        mean: basis.mean,
        rows: Some(rows),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Vec<f16> {
        // Sixteen keys at all corners of four elements, off the origin.
        let rows = (0..16_u32).flat_map(|at| (0..4).map(move |bit| 3.0 + 2.0 * (at >> bit & 1) as f32));
        rows.map(f16::from_f32).collect()
    }

    fn nearest(nearness: &Nearness, key: u32) -> Vec<u32> {
        let mut from = Point::default();
        nearness.from(key, &mut from);
        let mut others: Vec<u32> = (0..nearness.keys() as u32).filter(|other| *other != key).collect();
        others.sort_by(|a, b| {
            nearness
                .near(&from, *b)
                .total_cmp(&nearness.near(&from, *a))
                .then(a.cmp(b))
        });
        others
    }

    #[test]
    fn keys_are_as_near_as_queries_see_them() {
        let keys = keys();
        let blocks = [&keys[..]];
        let rows = KeyRows::new(&blocks, 16, 4);
        let pool = Pool::new(1);
        // Queries that differ in the third element alone: of a corner's 15 neighbours the 7 with the same one come first.
        let samples: Vec<f32> = (0..8).flat_map(|at| [0.0, 0.0, at as f32 - 3.5, 0.0]).collect();
        let nearness = Nearness::of(rows, &samples, Metric::Seen, &pool);
        for key in 0..16_u32 {
            let same = |other: &u32| other >> 2 & 1 == key >> 2 & 1;
            assert!(nearest(&nearness, key)[..7].iter().all(same), "key {key}");
            assert!(!nearest(&nearness, key)[7..].iter().any(same), "key {key}");
        }
        // Queries that see nothing: the keys' own distance, a corner's four neighbours first.
        let nearness = Nearness::of(rows, &[0.0; 8], Metric::Seen, &pool);
        for key in 0..16_u32 {
            assert!(
                nearest(&nearness, key)[..4]
                    .iter()
                    .all(|other| (other ^ key).count_ones() == 1)
            );
        }
        let mut from = Point::default();
        nearness.from(0, &mut from);
        assert!(
            (nearness.near(&from, 15) + 0.5 * 16.0).abs() < 1e-3,
            "half the squared distance, 4 times 2 squared"
        );
    }

    #[test]
    fn as_published_near_is_the_product_of_centred_keys() {
        let keys = keys();
        let blocks = [&keys[..]];
        let nearness = Nearness::of(KeyRows::new(&blocks, 16, 4), &[1.0; 8], Metric::Keys, &Pool::new(1));
        let mut from = Point::default();
        for (key, other, expected) in [(0, 0, 4.0), (0, 15, -4.0), (0, 1, 2.0), (3, 5, 0.0)] {
            nearness.from(key, &mut from);
            assert!((nearness.near(&from, other) - expected).abs() < 1e-3, "{key} {other}");
        }
    }

    #[test]
    fn what_is_no_number_is_passed_by() {
        let mut keys = keys();
        keys[5] = f16::NAN;
        let blocks = [&keys[..]];
        let samples: Vec<f32> = (0..32).map(|at| ((at * 7) % 5) as f32).collect();
        let nearness = Nearness::of(KeyRows::new(&blocks, 16, 4), &samples, Metric::Seen, &Pool::new(1));
        assert!(!nearness.is_finite(1) && nearness.is_finite(0));
        let mut from = Point::default();
        nearness.from(0, &mut from);
        assert!((0..16).all(|key| nearness.near(&from, key).is_finite()));
    }
}
