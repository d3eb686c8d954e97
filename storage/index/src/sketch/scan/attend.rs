//! Partial attention: chosen keys exactly, the tail by its sketches.

use kvasir_simd::{Level, exp2_weights, weigh_dense, weigh_slots};

use super::{
    SketchScan,
    certificate::Missed,
    choose::Choice,
    log_add,
    rescore::{RUN_SLOTS, each_tile},
    scattered, share_of,
};
use crate::sketch::{column::Column, search::Candidates};

/// How [`SketchScan::attend`] decides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attend {
    /// Attend exactly to the fewest keys that hold this share of the estimated mass, what was said to lie
    /// [beside](SketchScan::beside) counted as held.
    pub target_mass: f32,
    /// At most so many keys per head.
    pub k_max: Option<usize>,
    /// Re-score at most this share of the keys per head, (0, 1]; 1 is exact.
    pub effort: f32,
    /// Estimate what was not chosen; otherwise it is left out of `o` and `lse`.
    pub tail: bool,
    /// Bound the mass that was missed by sampling. Costs the reading of 128 keys per head.
    pub certificate: bool,
    /// With a certificate: double keys and effort until the bound is at most this, at last scoring every key.
    pub missed_mass_max: Option<f32>,
}

impl Default for Attend {
    fn default() -> Self {
        Self {
            target_mass: 0.99,
            k_max: None,
            effort: 0.05,
            tail: true,
            certificate: true,
            missed_mass_max: None,
        }
    }
}

/// Partial attention over sketched keys; one element, or row, per query head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SketchAttended {
    /// Outputs, `[heads, head_dim]`; 0 where nothing was found.
    pub o: Vec<f32>,
    /// Base-2 log-sum-exp of what `o` stands for: the chosen keys, with a tail all keys; -inf where there are none.
    pub lse: Vec<f32>,
    /// Share of the mass, as estimated, that the chosen keys hold; 1 where there is none.
    pub mass: Vec<f32>,
    /// Upper bound of the share that they do not hold, at three standard errors; empty without a certificate.
    pub missed_max: Vec<f32>,
    /// Keys attended to exactly.
    pub keys: Vec<usize>,
    /// Value rows read; one that several heads attend to counts once.
    pub value_rows: usize,
    /// Keys read and scored exactly; one that is a candidate of several heads counts once.
    pub keys_scored: usize,
    /// Bytes of codes, keys, values and means read since the scan began.
    pub bytes_read: u64,
    /// A head would have needed more keys than it was allowed for its target.
    pub cut_short: bool,
    /// Share of everything that a head attends to, here and [beside](SketchScan::beside), that the chosen keys and that cover.
    pub covered: Vec<f32>,
    /// Rounds of doubling that the bound asked for.
    pub escalations: u32,
}

/// Keys of a run that one chosen one stands for when its others' value is estimated, where the column knows no slopes: found on
/// real text, where 0 gives 1.4 times the error.
const LIKE_CHOSEN: f32 = 8.0;
/// The same of what slopes leave of the difference: 0, 4 and 8 err by up to a tenth more.
const LIKE_CHOSEN_BESIDE_SLOPES: f32 = 2.0;

/// Buffers of an answer.
#[derive(Default)]
pub(super) struct Tail {
    choice: Choice,
    /// `2^(score - highest)` of one head's candidates.
    weights: Vec<f32>,
    /// Chosen keys of all heads with their weights.
    chosen: Candidates,
    /// Weights of the means, `[heads, runs]`.
    runs: Vec<f32>,
    /// Keys chosen per run, then what each of them stands for.
    taken: Vec<f32>,
    /// Per head, how far the scores of what is estimated lie above their runs', over their variance.
    leans: Vec<f32>,
}

/// Buffers of walks over rows.
#[derive(Default)]
pub(super) struct Rows {
    pub(super) next: Vec<usize>,
}

impl SketchScan<'_> {
    /// Attends as `how` says; see [`Attend`].
    pub fn attend(&mut self, how: Attend) -> SketchAttended {
        let mut out = SketchAttended::default();
        self.attend_into(how, &mut out);
        out
    }

    /// As [`SketchScan::attend`], into buffers that are there.
    pub fn attend_into(&mut self, how: Attend, out: &mut SketchAttended) {
        let mut now = how;
        out.escalations = 0;
        loop {
            self.attend_once(now, out);
            let missed = out.missed_max.iter().copied().fold(0.0, f32::max);
            match how.missed_mass_max {
                Some(limit) if how.certificate && missed > limit && now.effort < 1.0 => {
                    // More than was parked is wanted.
                    self.parked = false;
                    now.effort = if now.effort < 0.25 { now.effort * 2.0 } else { 1.0 };
                    // The bound is about chosen keys: at last the target is what the caller can miss.
                    now.target_mass = now.target_mass.max(1.0 - limit / 2.0);
                    now.k_max = now.k_max.filter(|_| now.effort < 1.0).map(|k| k.saturating_mul(2));
                    out.escalations += 1;
                }
                _ => break,
            }
        }
    }

    /// Finds the candidates that `how` asks for.
    pub(super) fn find_for(&mut self, how: Attend) {
        self.find(&|searched| {
            let count = share_of(how.effort, searched);
            let limited = how.k_max.map_or(count, |k| count.min(k.saturating_mul(2)));
            if how.effort >= 1.0 {
                (count, 1.0)
            } else {
                (limited, how.target_mass)
            }
        });
    }

    fn attend_once(&mut self, how: Attend, out: &mut SketchAttended) {
        let (d, heads) = (self.head_dim(), self.table.heads());
        self.find_for(how);
        out.keys_scored = self.union.count();
        self.rescore();
        reset(&mut out.lse, heads);
        reset(&mut out.mass, heads);
        reset(&mut out.keys, heads);
        reset(&mut out.o, heads * d);
        out.missed_max.clear();
        out.cut_short = false;
        reset(&mut out.covered, heads);
        let means = how.tail && self.format.is_some_and(|format| format.values);
        let mut tail = std::mem::take(&mut self.tail);
        tail.chosen.clear();
        let runs = self.column().map_or(0, Column::runs);
        reset(&mut tail.runs, if means { heads * runs } else { 0 });
        reset(&mut tail.leans, heads);
        self.union.reset(self.slots());
        for head in 0..heads {
            self.choose(head, how, &mut tail, out);
        }
        out.value_rows = self.union.count();
        let rows = scattered(self.column.or(self.own.as_ref()), &self.values, d);
        let chosen = &tail.chosen;
        each_tile(chosen, self.slots(), &mut self.rows.next, |head, at| {
            let sums = &mut out.o[head * d..][..d];
            let own = &chosen.slots[at.start..chosen.ends[head]];
            weigh_slots(&chosen.scores[at], rows, own, sums);
        });
        self.cost.bytes_read += (out.value_rows * d * 2) as u64;
        if means && let Some(column) = self.column() {
            weigh_dense(&tail.runs, column.means(), d, &mut out.o);
            let mut bytes = column.means().len() * 2;
            if tail.leans.iter().any(|lean| *lean != 0.0) {
                for (head, (lean, o)) in tail.leans.iter().zip(out.o.chunks_exact_mut(d)).enumerate() {
                    column.slopes().lean(self.table.along(head), *lean, o);
                }
                bytes += column.slopes().bytes();
            }
            self.cost.bytes_read += bytes as u64;
        }
        self.tail = tail;
        out.bytes_read = self.cost.bytes_read;
    }

    /// Chooses one head's keys, and leaves their weights and those of its means.
    fn choose(&mut self, head: usize, how: Attend, tail: &mut Tail, out: &mut SketchAttended) {
        let own = self.candidates.of(head);
        let Tail { choice, weights, .. } = tail;
        weights.resize(own.len(), 0.0);
        let (high, found) = exp2_weights(&self.candidates.scores[own.clone()], weights);
        let mut rest = self.leave(head);
        let missed = if (how.certificate || self.predicted) && rest > f32::NEG_INFINITY {
            let missed = self.missed(head, how.certificate);
            rest = if self.predicted { missed.mean } else { missed.likely };
            Some(missed)
        } else {
            None
        };
        let scores = &self.candidates.scores[own.clone()];
        let all = log_add(found, rest);
        let beside = self.beside.get(head).copied().unwrap_or(f32::NEG_INFINITY);
        let wanted = if how.target_mass < 1.0 && high > f32::NEG_INFINITY {
            let (all, beside) = (
                f64::from(all - high).exp2(),
                f64::from(beside - high).min(1000.0).exp2(),
            );
            all - (1.0 - f64::from(how.target_mass)) * (all + beside)
        } else {
            f64::INFINITY
        };
        let cut = choice.fewest(scores, weights, wanted, how.k_max.unwrap_or(usize::MAX));
        let chosen_lse = if choice.all {
            found
        } else {
            choice.mass.log2() as f32 + high
        };
        let lse = if how.tail { all } else { chosen_lse };
        out.lse[head] = lse;
        out.keys[head] = choice.picked.len();
        out.mass[head] = crate::flat::share(chosen_lse, all);
        // Of everything that the head attends to, here and elsewhere.
        let covered = crate::flat::share(log_add(chosen_lse, beside), log_add(all, beside));
        out.cut_short |= cut || covered < how.target_mass.min(0.9999);
        out.covered[head] = covered;
        if how.certificate {
            out.missed_max.push(bound(chosen_lse, found, missed));
        }
        if lse > f32::NEG_INFINITY {
            let factor = (high - lse).exp2();
            let slots = &self.candidates.slots[own];
            let picked = tail.choice.picked.iter().map(|at| *at as usize);
            tail.chosen.slots.extend(picked.clone().map(|at| slots[at]));
            tail.chosen
                .scores
                .extend(picked.clone().map(|at| tail.weights[at] * factor));
            picked.clone().for_each(|at| self.union.insert(slots[at]));
            // What remains are the weights of those that were not chosen.
            picked.for_each(|at| tail.weights[at] = 0.0);
            if !tail.runs.is_empty() {
                self.weigh_tail(head, lse, rest, factor, tail);
            }
        }
        tail.chosen.ends.push(tail.chosen.slots.len());
    }

    /// Weights of the means of a head's runs: of keys that were not scored by sketch, of those that were and not chosen exactly.
    fn weigh_tail(&self, head: usize, lse: f32, rest: f32, factor: f32, tail: &mut Tail) {
        let Some(column) = self.column() else { return };
        let (runs, left, total) = (column.runs(), self.table.left(head), self.table.total[head]);
        let weights = &mut tail.runs[head * runs..][..runs];
        // What is left is scaled to what the rest was found to be.
        let scale = if total > 0.0 && rest > f32::NEG_INFINITY {
            (f64::from(rest - lse).exp2() / total) as f32
        } else {
            0.0
        };
        for (weight, left) in weights.iter_mut().zip(left) {
            *weight = left * scale;
        }
        let slots = &self.candidates.slots[self.candidates.of(head)];
        for (slot, weight) in slots.iter().zip(&tail.weights) {
            weights[(slot / RUN_SLOTS) as usize] += weight * factor;
        }
        // Values of keys that a query attends to are alike: the others of a run are thought of as its mean and its chosen ones.
        let lean = self.table.leans.get(head).filter(|lean| lean.variance > 0.0);
        let like = if lean.is_some() {
            LIKE_CHOSEN_BESIDE_SLOPES
        } else {
            LIKE_CHOSEN
        };
        reset(&mut tail.taken, runs);
        let start = tail.chosen.ends.last().copied().unwrap_or(0);
        let chosen = &tail.chosen.slots[start..];
        for slot in chosen {
            tail.taken[(slot / RUN_SLOTS) as usize] += 1.0;
        }
        for ((weight, taken), keys) in weights.iter_mut().zip(&mut tail.taken).zip(column.run_keys()) {
            // What no f32 sum would notice is nothing.
            let whole = if *weight < 1e-9 { 0.0 } else { *weight };
            let each = like * whole / (keys + like * *taken).max(1.0);
            *weight = whole - each * *taken;
            *taken = each;
        }
        for (slot, weight) in chosen.iter().zip(&mut tail.chosen.scores[start..]) {
            *weight += tail.taken[(slot / RUN_SLOTS) as usize];
        }
        // And they differ from their run's mean by how far their scores do from its, but for what chosen ones stood for already.
        if let Some(lean) = lean {
            let levels = &self.candidates.levels[self.candidates.of(head)];
            let above = |level: &Level, slot: u32| f64::from(level.above_average() - self.table.centre(head, slot));
            let scored = levels.iter().zip(slots).zip(&tail.weights);
            let scored: f64 = scored
                .map(|((level, slot), weight)| f64::from(*weight) * above(level, *slot))
                .sum();
            let picked = tail.choice.picked.iter().zip(chosen);
            let stood_for: f64 = picked
                .map(|(at, slot)| {
                    f64::from(tail.taken[(slot / RUN_SLOTS) as usize]) * above(&levels[*at as usize], *slot)
                })
                .sum();
            let sum = lean.left * f64::from(scale) + scored * f64::from(factor) - stood_for;
            tail.leans[head] = (sum / f64::from(lean.variance)) as f32;
        }
    }
}

/// Share of the mass that is not chosen, at most: what was scored and not chosen, and the bound of what was not scored.
fn bound(chosen: f32, found: f32, missed: Option<Missed>) -> f32 {
    let high = found.max(missed.map_or(f32::NEG_INFINITY, |missed| missed.most));
    if high == f32::NEG_INFINITY {
        return 0.0;
    }
    let (chosen, found) = ((chosen - high).exp2(), (found - high).exp2());
    let rest = missed.map_or(0.0, |missed| (missed.most - high).exp2());
    ((found - chosen).max(0.0) + rest) / (found + rest)
}

pub(super) fn reset<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    buffer.clear();
    buffer.resize(len, T::default());
}
