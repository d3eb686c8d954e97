//! How much mass lies among the keys that were not scored, from a sample of them.
//!
//! 128 keys are drawn that are not its candidates: nine in ten in proportion to their weight by sketch, one to each equal share of it,
//! the others evenly. Each one's exact weight over its probability estimates the whole; the mean is right on average, and the
//! mean and three standard errors are a bound that holds nearly always. Drawing within shares makes the true error smaller
//! than the stated one. The draw is seeded from the query and the number of keys: an answer is a function of its inputs.

use half::f16;
use kvasir_simd::{Level, score_rows};

use super::{super::format::RUN, SketchScan};

const BY_WEIGHT: usize = 115;
const EVENLY: usize = 13;
const DRAWS: usize = BY_WEIGHT + EVENLY;

/// Base-2 logarithms of the mass of the keys that were not scored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Missed {
    /// Estimated.
    pub(super) mean: f32,
    /// With three standard errors.
    pub(super) most: f32,
}

#[derive(Default)]
pub(super) struct Sampler<'a> {
    drawn: Vec<u32>,
    rows: Vec<&'a [f16]>,
    scores: Vec<f32>,
}

impl SketchScan<'_> {
    /// Samples for one head; `self.leave(head)` was just called and is not empty.
    pub(super) fn missed(&mut self, head: usize) -> Missed {
        let mut sampler = std::mem::take(&mut self.sampler);
        let missed = self.sample(head, &mut sampler);
        self.sampler = sampler;
        missed
    }
}

impl<'a> SketchScan<'a> {
    fn sample(&mut self, head: usize, sampler: &mut Sampler<'a>) -> Missed {
        let d = self.head_dim();
        let levels = self.table.levels(head);
        let q = &self.q[head * d..][..d];
        let mut random = Random::new(q, levels.len());
        let slots = &self.candidates.slots[self.candidates.of(head)];
        let total = self.rest.total;
        let others = self.table.searched[head] - slots.len();
        sampler.drawn.clear();
        self.draw_by_weight(head, slots, total, sampler, &mut random);
        for _ in 0..EVENLY {
            // A slot that cannot be drawn is drawn again; where nearly all are scored some draws come to nothing, which the
            // estimate counts as keys without mass outside.
            for _ in 0..64 {
                let slot = (random.next() * self.table.slots as f64) as u32;
                if levels[slot as usize] > 0 && slots.binary_search(&slot).is_err() {
                    sampler.drawn.push(slot);
                    break;
                }
            }
        }
        sampler.rows.clear();
        for slot in &sampler.drawn {
            let at = self.blocks.partition_point(|block| block.slot <= *slot) - 1;
            let row = (slot - self.blocks[at].slot) as usize * d;
            sampler.rows.push(&self.blocks[at].segment.keys[row..row + d]);
        }
        sampler.scores.clear();
        sampler.scores.resize(sampler.rows.len(), 0.0);
        score_rows(q, &sampler.rows, d, self.scale, &mut sampler.scores);
        self.cost.keys_scored += sampler.rows.len() as u64;
        self.cost.bytes_read += (sampler.rows.len() * d * 2) as u64;
        let finite = |score: f32| if score.is_finite() { score } else { f32::NEG_INFINITY };
        let high = sampler
            .scores
            .iter()
            .fold(f32::NEG_INFINITY, |high, score| high.max(finite(*score)));
        if high == f32::NEG_INFINITY {
            return Missed { mean: high, most: high };
        }
        let (mut sum, mut squares) = (0.0_f64, 0.0_f64);
        for (slot, score) in sampler.drawn.iter().zip(&sampler.scores) {
            let weight = f64::from(Level(levels[*slot as usize]).weight());
            let chance = (BY_WEIGHT as f64 * weight / total.max(f64::MIN_POSITIVE)
                + EVENLY as f64 / others.max(1) as f64)
                / DRAWS as f64;
            let x = f64::from(finite(*score) - high).exp2() / chance;
            sum += x;
            squares += x * x;
        }
        let mean = sum / DRAWS as f64;
        let variance = (squares / DRAWS as f64 - mean * mean).max(0.0);
        let most = mean + 3.0 * (variance / DRAWS as f64).sqrt();
        Missed {
            mean: mean.log2() as f32 + high,
            most: most.log2() as f32 + high,
        }
    }

    /// One draw from each equal share of the weight.
    fn draw_by_weight(&self, head: usize, slots: &[u32], total: f64, sampler: &mut Sampler<'a>, random: &mut Random) {
        let levels = self.table.levels(head);
        let mut targets = (0..BY_WEIGHT).map(|share| (share as f64 + random.next()) / BY_WEIGHT as f64 * total);
        let Some(mut target) = targets.next() else { return };
        let (mut before, mut block) = (0.0_f64, 0);
        for (run, weight) in self.rest.left.iter().enumerate() {
            let weight = f64::from(*weight);
            if before + weight <= target {
                before += weight;
                continue;
            }
            while self.blocks.get(block + 1).is_some_and(|next| next.run as usize <= run) {
                block += 1;
            }
            let from = self.blocks[block].slot + (run as u32 - self.blocks[block].run) * RUN as u32;
            let end = self
                .blocks
                .get(block + 1)
                .map_or(self.table.slots as u32, |next| next.slot);
            let mut scored = &slots[slots.partition_point(|slot| *slot < from)..];
            let mut sum = before;
            for slot in from..(from + RUN as u32).min(end) {
                if scored.first() == Some(&slot) {
                    scored = &scored[1..];
                    continue;
                }
                sum += f64::from(Level(levels[slot as usize]).weight());
                while levels[slot as usize] > 0 && target < sum {
                    sampler.drawn.push(slot);
                    match targets.next() {
                        Some(next) => target = next,
                        None => return,
                    }
                }
            }
            before += weight;
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014), seeded from what is asked.
struct Random(u64);

impl Random {
    fn new(q: &[f32], keys: usize) -> Self {
        let mix = |seed: u64, q: &f32| (seed ^ u64::from(q.to_bits())).wrapping_mul(0x100_0000_01b3);
        Self(q.iter().fold(keys as u64 ^ 0xcbf2_9ce4_8422_2325, mix))
    }

    /// In [0, 1).
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 11) as f64 / (1_u64 << 53) as f64
    }
}
