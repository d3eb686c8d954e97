//! How much mass lies among the keys that were not scored, from a sample of them.
//!
//! 128 keys are drawn that are not its candidates: nine in ten in proportion to their weight by sketch, one to each equal share of it,
//! the others evenly. Each one's exact weight over its probability estimates the whole; the mean is right on average, and the
//! mean and three standard errors are a bound that holds nearly always where sketches are good. Drawing within shares makes the true
//! error smaller than the stated one. The draw is seeded from the query and the number of keys: an answer is a function of its inputs.
//!
//! Of groups that a scan did not read, and of the others in their run, a key's weight by sketch is a share of what is left of the run:
//! keys are drawn by what they count for.
//!
//! Where sketches err by several powers of two, most of the mass is in few keys whose sketch is far too low: a sample mostly
//! misses them, and its variance with them. Errors of sketches are sums of many small ones, so exact over sketched weight is
//! about log-normal: the upper limit of the mean of such a distribution (Cox's, in Zhou and Gao 1997) knows of keys that were
//! not drawn. The bound is the higher of both, and such heads draw four times as many.

use half::f16;
use kvasir_simd::{GROUP, Level, RUN_GROUPS, score_rows};

use super::{SketchScan, rescore::RUN_SLOTS};

const BY_WEIGHT: usize = 115;
const EVENLY: usize = 13;
/// Drawn by weight where sketches err much.
const BY_WEIGHT_WIDE: usize = 499;
/// Variance of the natural logarithm of exact over sketched weight from which on they do: 1.8 powers of two, squared.
const WIDE: f64 = 1.5;
/// Standard errors above the mean of a sample.
const SURE: f64 = 3.0;
/// The same of the mean of a log-normal distribution, which that of errors is only about.
const SURE_OF_ERRORS: f64 = 4.0;

/// Base-2 logarithms of the mass of the keys that were not scored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Missed {
    /// Estimated from the sample alone: right on average however wrong sketches are.
    pub(super) mean: f32,
    /// By sketch, times what sketches err by in the mean, if their errors are log-normal: surer than the sample where they are.
    pub(super) likely: f32,
    /// With three standard errors.
    pub(super) most: f32,
}

#[derive(Default)]
pub(super) struct Sampler<'a> {
    drawn: Drawn,
    rows: Vec<&'a [f16]>,
    scores: Vec<f32>,
}

/// Keys that were drawn for one head. Which ones is a matter of the weights by sketch alone: with a prediction it is done ahead.
#[derive(Clone, Debug, Default)]
pub(super) struct Drawn {
    /// Slots with what they count for by sketch, those by weight first.
    slots: Vec<(u32, f32)>,
    /// How many were to be drawn by weight.
    asked: usize,
    /// How many were.
    by_weight: usize,
}

impl Drawn {
    /// Bytes of one that is drawn ahead, at most.
    pub(super) const BYTES_MAX: usize = (BY_WEIGHT + EVENLY) * size_of::<(u32, f32)>();

    /// Which ones.
    pub(super) fn slots(&self) -> impl Iterator<Item = u32> {
        self.slots.iter().map(|(slot, _)| *slot)
    }

    pub(super) fn bytes(&self) -> usize {
        self.slots.len() * size_of::<(u32, f32)>()
    }
}

impl SketchScan<'_> {
    /// Draws for every head what a sample will want.
    pub(super) fn draw_ahead(&mut self) -> Vec<Drawn> {
        let mut sampler = std::mem::take(&mut self.sampler);
        let draw = |head| {
            sampler.drawn.slots = Vec::new();
            if self.leave(head) > f32::NEG_INFINITY {
                let mut random = self.random(head);
                self.draw(head, BY_WEIGHT, &mut sampler.drawn, &mut random);
            }
            std::mem::take(&mut sampler.drawn)
        };
        let drawn = (0..self.table.heads()).map(draw).collect();
        self.sampler = sampler;
        drawn
    }

    /// Samples for one head of which `self.leave(head)` is not empty.
    ///
    /// `sure` where the bound matters and not the mean alone.
    pub(super) fn missed(&mut self, head: usize, sure: bool) -> Missed {
        let mut sampler = std::mem::take(&mut self.sampler);
        let missed = self.sample(head, sure, &mut sampler);
        self.sampler = sampler;
        missed
    }
}

impl<'a> SketchScan<'a> {
    fn sample(&mut self, head: usize, sure: bool, sampler: &mut Sampler<'a>) -> Missed {
        let mut random = self.random(head);
        match self.drawn.get_mut(head).map(std::mem::take) {
            Some(drawn) if drawn.asked > 0 => sampler.drawn = drawn,
            _ => self.draw(head, BY_WEIGHT, &mut sampler.drawn, &mut random),
        }
        self.score(head, sampler);
        if !sure {
            return self.estimate(head, sampler);
        }
        let mut errors = self.errors(head, sampler);
        if errors.variance > WIDE {
            self.draw(head, BY_WEIGHT_WIDE, &mut sampler.drawn, &mut random);
            self.score(head, sampler);
            errors = self.errors(head, sampler);
        }
        let by_sketch = self.by_sketch(head, self.table.total[head]);
        let mut missed = self.estimate(head, sampler);
        if let Some(mean) = errors.mean_ratio() {
            // No more than the sample allows: errors that are not log-normal could say anything.
            missed.likely = (by_sketch + (mean / std::f64::consts::LN_2).min(1e30) as f32).min(missed.most);
        }
        if let Some(most) = errors.mean_at_most() {
            // Finite: what is more than all else is all.
            let most = (most / std::f64::consts::LN_2).min(1e30);
            missed.most = missed.most.max(by_sketch + most as f32);
        }
        missed
    }

    /// Seeded from the query that the sketches were scanned with.
    fn random(&self, head: usize) -> Random {
        let q = if self.predicted { &self.forecast } else { &self.q };
        Random::new(&q[head * self.head_dim()..][..self.head_dim()], self.slots())
    }

    /// What sketches err by, of the keys that were drawn by weight.
    fn errors(&self, head: usize, sampler: &Sampler<'a>) -> Errors {
        let Drawn { slots, by_weight, .. } = &sampler.drawn;
        let own = slots.iter().zip(&sampler.scores).take(*by_weight);
        let errors = own.filter(|(_, score)| score.is_finite()).map(|((_, weight), score)| {
            let by_sketch = self.by_sketch(head, f64::from(*weight));
            f64::from(score - by_sketch) * std::f64::consts::LN_2
        });
        Errors::of(errors)
    }

    fn draw(&self, head: usize, by_weight: usize, drawn: &mut Drawn, random: &mut Random) {
        let all = self.slots();
        let slots = &self.candidates.slots[self.candidates.of(head)];
        let total = self.table.total[head];
        drawn.slots.clear();
        self.draw_by_weight(head, slots, (total, by_weight), &mut drawn.slots, random);
        (drawn.asked, drawn.by_weight) = (by_weight, drawn.slots.len());
        let mut run = Run::default();
        for _ in 0..EVENLY {
            // A slot that cannot be drawn is drawn again; where nearly all are scored some draws come to nothing, which the
            // estimate counts as keys without mass outside.
            for _ in 0..64 {
                let slot = (random.next() * all as f64) as u32;
                if slots.binary_search(&slot).is_ok() {
                    continue;
                }
                self.run(head, (slot / RUN_SLOTS) as usize, slots, &mut run);
                let at = (slot % RUN_SLOTS) as usize;
                if run.levels[at] > 0 {
                    drawn.slots.push((slot, run.weight(at)));
                    break;
                }
            }
        }
    }

    /// Scores what was drawn.
    fn score(&mut self, head: usize, sampler: &mut Sampler<'a>) {
        let d = self.head_dim();
        sampler.rows.clear();
        for (slot, _) in &sampler.drawn.slots {
            let (block, row) = self.place(*slot);
            sampler.rows.push(&self.keys[block][row * d..(row + 1) * d]);
        }
        sampler.scores.clear();
        sampler.scores.resize(sampler.rows.len(), 0.0);
        let q = &self.q[head * d..][..d];
        score_rows(q, &sampler.rows, d, self.scale, &mut sampler.scores);
        self.cost.keys_scored += sampler.rows.len() as u64;
        self.cost.bytes_read += (sampler.rows.len() * d * 2) as u64;
    }

    /// From what was drawn.
    fn estimate(&self, head: usize, sampler: &Sampler<'a>) -> Missed {
        let total = self.table.total[head];
        let searched = self.masks.searched[self.masks.sequence(head, self.table.heads())];
        let others = searched - self.candidates.of(head).len();
        // Those that came to nothing are counted.
        let draws = (sampler.drawn.asked + EVENLY) as f64;
        let finite = |score: f32| if score.is_finite() { score } else { f32::NEG_INFINITY };
        let high = sampler
            .scores
            .iter()
            .fold(f32::NEG_INFINITY, |high, score| high.max(finite(*score)));
        if high == f32::NEG_INFINITY {
            return Missed {
                mean: high,
                likely: high,
                most: high,
            };
        }
        let (mut sum, mut squares) = (0.0_f64, 0.0_f64);
        for ((_, weight), score) in sampler.drawn.slots.iter().zip(&sampler.scores) {
            let weight = f64::from(*weight);
            let chance = (sampler.drawn.asked as f64 * weight / total.max(f64::MIN_POSITIVE)
                + EVENLY as f64 / others.max(1) as f64)
                / draws;
            let x = f64::from(finite(*score) - high).exp2() / chance;
            sum += x;
            squares += x * x;
        }
        let mean = sum / draws;
        let variance = (squares / draws - mean * mean).max(0.0);
        let most = mean + SURE * (variance / draws).sqrt();
        let mean = mean.log2() as f32 + high;
        Missed {
            mean,
            likely: mean,
            most: most.log2() as f32 + high,
        }
    }

    /// One draw from each equal share of the weight.
    fn draw_by_weight(
        &self,
        head: usize,
        slots: &[u32],
        (total, count): (f64, usize),
        drawn: &mut Vec<(u32, f32)>,
        random: &mut Random,
    ) {
        let mut targets = (0..count).map(|share| (share as f64 + random.next()) / count as f64 * total);
        let Some(mut target) = targets.next() else { return };
        let mut own = Run::default();
        let mut before = 0.0_f64;
        for (run, weight) in self.table.left(head).iter().enumerate() {
            let weight = f64::from(*weight);
            if before + weight <= target {
                before += weight;
                continue;
            }
            self.run(head, run, slots, &mut own);
            let mut sum = before;
            for (at, slot) in (run as u32 * RUN_SLOTS..).enumerate().take(own.levels.len()) {
                let weight = own.weight(at);
                sum += f64::from(weight);
                while weight > 0.0 && target < sum {
                    drawn.push((slot, weight));
                    match targets.next() {
                        Some(next) => target = next,
                        None => return,
                    }
                }
            }
            before += weight;
        }
    }

    /// What is left of a run, of which `slots` are scored.
    fn run(&self, head: usize, run: usize, slots: &[u32], out: &mut Run) {
        let first = run * RUN_GROUPS;
        let own = first..(first + RUN_GROUPS).min(self.slots() / GROUP);
        out.levels.fill(0);
        self.levels(head, own, &mut out.levels);
        let from = run as u32 * RUN_SLOTS;
        let scored = &slots[slots.partition_point(|slot| *slot < from)..];
        for slot in scored.iter().take_while(|slot| **slot - from < RUN_SLOTS) {
            out.levels[(slot - from) as usize] = 0;
        }
        let weights = out.levels.iter().map(|level| f64::from(Level(*level).weight()));
        let sum: f64 = weights.sum();
        let left = self.table.left(head)[run];
        out.share = if sum > 0.0 { (f64::from(left) / sum) as f32 } else { 0.0 };
    }
}

/// Keys of a run that were not scored.
struct Run {
    /// 0 of those that were, and of those that are not searched.
    levels: [u16; RUN_SLOTS as usize],
    /// What each counts for, of its own weight.
    share: f32,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            levels: [0; RUN_SLOTS as usize],
            share: 0.0,
        }
    }
}

impl Run {
    fn weight(&self, at: usize) -> f32 {
        Level(self.levels[at]).weight() * self.share
    }
}

/// Natural logarithms of exact over sketched weights.
#[derive(Clone, Copy, Default)]
struct Errors {
    count: f64,
    mean: f64,
    variance: f64,
}

impl Errors {
    fn of(errors: impl Iterator<Item = f64> + Clone) -> Self {
        let count = errors.clone().count() as f64;
        if count < 2.0 {
            return Self::default();
        }
        let mean = errors.clone().sum::<f64>() / count;
        let squares: f64 = errors.map(|error| (error - mean).powi(2)).sum();
        Self {
            count,
            mean,
            variance: squares / (count - 1.0),
        }
    }

    /// Logarithm of the mean of the ratio; none where there are too few.
    fn mean_ratio(self) -> Option<f64> {
        (self.count >= 16.0).then_some(self.mean + self.variance / 2.0)
    }

    /// Logarithm of what the mean of the ratio hardly exceeds.
    fn mean_at_most(self) -> Option<f64> {
        let Self { count, variance, .. } = self;
        let error = (variance / count + variance * variance / (2.0 * (count - 1.0))).sqrt();
        self.mean_ratio().map(|mean| mean + SURE_OF_ERRORS * error)
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014), seeded from what is asked.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(q: &[f32], keys: usize) -> Self {
        let mix = |seed: u64, q: &f32| (seed ^ u64::from(q.to_bits())).wrapping_mul(0x100_0000_01b3);
        Self(q.iter().fold(keys as u64 ^ 0xcbf2_9ce4_8422_2325, mix))
    }

    pub(super) fn seed(self) -> u64 {
        self.0
    }

    /// In [0, 1).
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// SplitMix64's finisher.
pub(super) fn mix(mut z: u64) -> u64 {
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
