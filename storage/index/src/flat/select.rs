//! The fewest best keys that hold a wanted share of the softmax mass, without sorting the scores.
//!
//! A histogram of the distances from the best score (an eighth of a power of two per bucket) bounds the mass of each bucket
//! from both sides, so that most keys are in or out by their bucket alone. The few buckets between the bounds go through a
//! quickselect by mass: halve, sum the better half, keep looking on the side where the target is reached.

use kvasir_simd::{log_sum_exp2, top_k};

use crate::bits::Bits;

/// Buckets per power of two.
const BUCKETS_PER_OCTAVE: f32 = 8.0;
/// 32 powers of two below the best key and everything beyond: 2^-32 of a softmax is below what f32 can tell.
const BUCKETS: usize = 32 * BUCKETS_PER_OCTAVE as usize;
/// Relative rounding that a bound made of f32 scores may have.
const SLACK: f64 = 1e-5;

#[derive(Clone, Copy, Debug)]
struct Candidate {
    index: u32,
    score: f32,
    /// Share of the mass.
    mass: f64,
}

/// Buffers for choosing, reused from query head to query head.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    candidates: Vec<Candidate>,
    sure: Vec<f32>,
    chosen: Bits,
}

impl Selection {
    /// Puts into `out`, rising, the indices of the fewest best scores that hold `target_mass` of the mass `lse`, or the
    /// `k_max` best if it takes more than that (then true). Scores of -inf are never chosen.
    pub(crate) fn fewest(
        &mut self,
        scores: &[f32],
        lse: f32,
        target_mass: f32,
        k_max: Option<usize>,
        out: &mut Vec<u32>,
    ) -> bool {
        out.clear();
        if lse == f32::NEG_INFINITY {
            return false;
        }
        if target_mass < 1.0 {
            self.by_mass(scores, lse, f64::from(target_mass));
            out.extend(self.chosen.iter());
        } else {
            out.extend((0..scores.len() as u32).filter(|&index| scores[index as usize] > f32::NEG_INFINITY));
        }
        match k_max {
            Some(k_max) if k_max < out.len() => {
                top_k(scores, k_max, out);
                true
            }
            _ => false,
        }
    }

    fn by_mass(&mut self, scores: &[f32], lse: f32, target: f64) {
        let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        // -inf lands in the last bucket, with a mass of zero.
        let bucket = |score: f32| ((best - score) * BUCKETS_PER_OCTAVE).min((BUCKETS - 1) as f32) as usize;
        let mut counts = [0_u32; BUCKETS];
        for &score in scores {
            counts[bucket(score)] += 1;
        }
        let (sure, last) = bounds(&counts, f64::from(best) - f64::from(lse), target);

        self.chosen.reset(scores.len());
        self.sure.clear();
        self.candidates.clear();
        for (index, &score) in scores.iter().enumerate() {
            let (bucket, index) = (bucket(score), index as u32);
            if bucket < sure {
                self.chosen.insert(index);
                self.sure.push(score);
            } else if bucket <= last && score > f32::NEG_INFINITY {
                let mass = f64::from((score - lse).exp2());
                self.candidates.push(Candidate { index, score, mass });
            }
        }
        let sure_mass = f64::from(log_sum_exp2(&self.sure) - lse).exp2();
        let count = reach(&mut self.candidates, target - sure_mass);
        for candidate in &self.candidates[..count] {
            self.chosen.insert(candidate.index);
        }
    }
}

/// Buckets below the first are wanted whole; beyond the second none is. `best` is the base-2 mass of the best score.
fn bounds(counts: &[u32; BUCKETS], best: f64, target: f64) -> (usize, usize) {
    let (mut at_least, mut at_most) = (0.0, 0.0);
    let mut sure = 0;
    for (bucket, &count) in counts.iter().enumerate() {
        let edge = |bucket: usize| (best - bucket as f64 / f64::from(BUCKETS_PER_OCTAVE)).exp2();
        at_most += f64::from(count) * edge(bucket) * (1.0 + SLACK);
        if at_most < target {
            sure = bucket + 1;
        }
        // The last bucket has no lower edge: it never proves anything, and it is the last anyway.
        at_least += f64::from(count) * edge(bucket + 1) * (1.0 - SLACK);
        if at_least >= target && bucket + 1 < BUCKETS {
            return (sure, bucket);
        }
    }
    (sure.min(BUCKETS - 1), BUCKETS - 1)
}

/// Moves the fewest best candidates whose mass reaches `target` to the front and answers how many they are: all of them if
/// they do not reach it. Ties go to the lower index.
fn reach(candidates: &mut [Candidate], mut target: f64) -> usize {
    /// Below this, sorting is quicker than halving.
    const SORTED: usize = 32;
    let better = |a: &Candidate, b: &Candidate| b.score.total_cmp(&a.score).then(a.index.cmp(&b.index));
    let (mut low, mut high) = (0, candidates.len());
    while high - low > SORTED {
        let half = (high - low) / 2;
        candidates[low..high].select_nth_unstable_by(half, better);
        let mass: f64 = candidates[low..low + half].iter().map(|candidate| candidate.mass).sum();
        if mass >= target {
            high = low + half;
        } else {
            target -= mass;
            low += half;
        }
    }
    candidates[low..high].sort_unstable_by(better);
    while low < high && target > 0.0 {
        target -= candidates[low].mass;
        low += 1;
    }
    low
}
