//! Partial attention: chosen keys exactly, the tail by its sketches.

use half::f16;
use kvasir_simd::{Level, log_sum_exp2, weigh_rows};

use super::{SketchScan, certificate::Missed, log_add, share_of};

/// How [`SketchScan::attend`] decides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attend {
    /// Attend exactly to the fewest keys that hold this share of the estimated mass.
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
    /// Keys whose exact score was computed, per head alike: the union of the candidates.
    pub keys_scored: usize,
    /// Bytes of codes, keys, values and means read since the scan began.
    pub bytes_read: u64,
    /// A head would have needed more keys than it was allowed for its target.
    pub cut_short: bool,
    /// Rounds of doubling that the bound asked for.
    pub escalations: u32,
}

/// Buffers of the tail.
#[derive(Default)]
pub(super) struct Tail<'a> {
    /// `[heads, union]` and `[heads, runs]`.
    chosen: Vec<f32>,
    pub(super) runs: Vec<f32>,
    rows: Vec<&'a [f16]>,
}

impl<'a> SketchScan<'a> {
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

    fn attend_once(&mut self, how: Attend, out: &mut SketchAttended) {
        let (d, heads) = (self.head_dim(), self.table.heads());
        self.gather(|_, searched| {
            let count = share_of(how.effort, searched);
            let limited = how.k_max.map_or(count, |k| count.min(k.saturating_mul(2)));
            if how.effort >= 1.0 {
                (count, 1.0)
            } else {
                (limited, how.target_mass)
            }
        });
        let n = self.slots.len();
        reset(&mut out.lse, heads);
        reset(&mut out.mass, heads);
        reset(&mut out.keys, heads);
        reset(&mut out.o, heads * d);
        out.missed_max.clear();
        out.cut_short = false;
        reset(&mut self.tail.chosen, heads * n);
        reset(&mut self.tail.runs, heads * self.table.runs);
        self.union.reset(n);
        for head in 0..heads {
            let exact = &self.exact[head * n..][..n];
            let found = log_sum_exp2(exact);
            let (_, mut rest) = self.rest(head);
            let missed = if (how.certificate || self.predicted) && rest > f32::NEG_INFINITY {
                let missed = self.missed(head);
                if self.predicted {
                    rest = missed.mean;
                }
                Some(missed)
            } else {
                None
            };
            let exact = &self.exact[head * n..][..n];
            let all = log_add(found, rest);
            self.picked.clear();
            let cut = self
                .selection
                .fewest(exact, all, how.target_mass, how.k_max, &mut self.picked);
            let chosen = &mut self.tail.chosen[head * n..][..n];
            chosen.fill(f32::NEG_INFINITY);
            for &at in &self.picked {
                chosen[at as usize] = exact[at as usize];
                self.union.insert(at);
            }
            let chosen_lse = if self.picked.len() == n {
                found
            } else {
                log_sum_exp2(chosen)
            };
            let lse = if how.tail { all } else { chosen_lse };
            out.lse[head] = lse;
            out.keys[head] = self.picked.len();
            out.mass[head] = crate::flat::share(chosen_lse, all);
            out.cut_short |= cut || out.mass[head] < how.target_mass.min(0.9999);
            if how.certificate {
                out.missed_max.push(bound(chosen_lse, found, missed));
            }
            if lse > f32::NEG_INFINITY {
                self.weigh_tail(head, lse, rest, how.tail);
            } else {
                self.tail.chosen[head * n..][..n].fill(0.0);
            }
        }
        out.value_rows = self.union.count();
        weigh_rows(&self.tail.chosen, &self.values, d, &mut out.o);
        self.cost.bytes_read += (out.value_rows * d * 2) as u64;
        if how.tail && self.format.is_some_and(|format| format.values) {
            self.tail.rows.clear();
            for block in &self.blocks {
                self.tail.rows.extend(block.means.chunks_exact(d));
            }
            self.cost.bytes_read += (self.tail.rows.len() * d * 2) as u64;
            weigh_rows(&self.tail.runs, &self.tail.rows, d, &mut out.o);
        }
        out.keys_scored = n;
        out.bytes_read = self.cost.bytes_read;
    }

    /// Turns the chosen scores of a head into weights, and leaves the weight of each run's other keys.
    fn weigh_tail(&mut self, head: usize, lse: f32, rest: f32, tail: bool) {
        let (n, runs) = (self.slots.len(), self.table.runs);
        let exact = &self.exact[head * n..][..n];
        let chosen = &mut self.tail.chosen[head * n..][..n];
        if tail {
            let levels = self.table.levels(head);
            let weights = &mut self.tail.runs[head * runs..][..runs];
            weights.copy_from_slice(self.table.sums(head));
            let mut blocks = self.blocks.iter().peekable();
            let (mut slot_from, mut run_from) = (0, 0);
            let mut scored = Vec::new();
            for (at, slot) in self.slots.iter().enumerate() {
                while let Some(block) = blocks.next_if(|block| block.slot <= *slot) {
                    (slot_from, run_from) = (block.slot, block.run);
                }
                let run = (run_from + (slot - slot_from) / super::super::format::RUN as u32) as usize;
                weights[run] -= Level(levels[*slot as usize]).weight();
                if chosen[at] == f32::NEG_INFINITY && exact[at] > f32::NEG_INFINITY {
                    scored.push((run, (exact[at] - lse).exp2()));
                }
            }
            // What is left of the sums is scaled to what the rest was found to be.
            let left: f64 = weights.iter().map(|weight| f64::from(weight.max(0.0))).sum();
            let scale = if left > 0.0 && rest > f32::NEG_INFINITY {
                f64::from((rest - lse).exp2()) / left
            } else {
                0.0
            };
            for weight in &mut *weights {
                let share = (f64::from(weight.max(0.0)) * scale) as f32;
                // What no f32 sum would notice is not read.
                *weight = if share < 1e-9 { 0.0 } else { share };
            }
            for (run, weight) in scored {
                weights[run] += weight;
            }
        }
        for score in chosen {
            *score = (*score - lse).exp2();
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

fn reset<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    buffer.clear();
    buffer.resize(len, T::default());
}
