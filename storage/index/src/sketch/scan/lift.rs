//! SoftmaxLift: attention over a drawn sample of keys that is right on average, whatever sketches err by.
//!
//! Keys are drawn by priority (Duffield, Lund and Thorup 2007): each has the size that its sketch says and a number `u` in (0, 1),
//! and the `k` with the highest size over `u` are attended to. Those whose size is below the next priority `t` stand for others
//! like them: their exact weight is multiplied by `t` over their size. Sums of weights and of weighted values are then unbiased,
//! and `o` is their ratio. `u` is drawn from the query, the slot and a seed: an answer is a function of what is asked.

use kvasir_simd::{GROUP, Level, RUN_GROUPS, exp2_weights, score_slots, weigh_slots};

use super::{
    SketchScan,
    attend::{SketchAttended, reset},
    certificate::{Random, mix},
    rescore::RUN_SLOTS,
    scattered,
};
use crate::sketch::{column::Column, search::Kind};

/// Buffers of a draw.
#[derive(Default)]
pub(super) struct Lift {
    drawn: Vec<Drawn>,
    slots: Vec<u32>,
    scores: Vec<f32>,
    lifted: Vec<f32>,
    weights: Vec<f32>,
}

#[derive(Clone, Copy)]
struct Drawn {
    /// Base-2 logarithm of size over `u`.
    priority: f32,
    size: f32,
    slot: u32,
}

impl SketchScan<'_> {
    /// Attends to `k` keys of each head, drawn with `seed`. `mass` is the share of what is estimated in all that the drawn keys hold
    /// themselves; there is no bound.
    pub fn attend_lifted(&mut self, k: usize, seed: u64, out: &mut SketchAttended) {
        let (d, heads) = (self.head_dim(), self.table.heads());
        *out = SketchAttended {
            o: std::mem::take(&mut out.o),
            ..SketchAttended::default()
        };
        reset(&mut out.o, heads * d);
        self.union.reset(self.slots());
        let mut lift = std::mem::take(&mut self.lift);
        for head in 0..heads {
            let next = self.draw_by_priority(head, k, seed, &mut lift);
            lift.slots.clear();
            lift.slots.extend(lift.drawn.iter().map(|drawn| drawn.slot));
            lift.slots.iter().for_each(|slot| self.union.insert(*slot));
            lift.scores.resize(lift.slots.len(), 0.0);
            let q = &self.q[head * d..][..d];
            let rows = scattered(self.column.or(self.own.as_ref()), &self.keys, d);
            score_slots(q, rows, &lift.slots, self.scale, &mut lift.scores);
            for score in &mut lift.scores {
                *score = if score.is_finite() { *score } else { f32::NEG_INFINITY };
            }
            lift.lifted.clear();
            let stands_for = |drawn: &Drawn| (next - drawn.size).max(0.0);
            let lifted = lift.scores.iter().zip(&lift.drawn);
            lift.lifted
                .extend(lifted.map(|(score, drawn)| score + stands_for(drawn)));
            lift.weights.resize(lift.lifted.len(), 0.0);
            let (high, lse) = exp2_weights(&lift.lifted, &mut lift.weights);
            if lse > f32::NEG_INFINITY {
                let factor = (high - lse).exp2();
                lift.weights.iter_mut().for_each(|weight| *weight *= factor);
                let rows = scattered(self.column.or(self.own.as_ref()), &self.values, d);
                weigh_slots(&lift.weights, rows, &lift.slots, &mut out.o[head * d..][..d]);
            }
            out.lse.push(lse);
            out.mass
                .push(crate::flat::share(kvasir_simd::log_sum_exp2(&lift.scores), lse));
            out.keys.push(lift.slots.len());
        }
        self.lift = lift;
        out.value_rows = self.union.count();
        out.keys_scored = out.value_rows;
        self.cost.keys_scored += out.keys.iter().map(|keys| *keys as u64).sum::<u64>();
        let codes = self.column().map_or(0, Column::coded_bytes);
        self.cost.bytes_read += (codes + out.value_rows * d * 4) as u64;
        out.bytes_read = self.cost.bytes_read;
    }

    /// The `k` keys of highest priority, rising; answers the priority of the next, -inf where there is none.
    fn draw_by_priority(&self, head: usize, k: usize, seed: u64, lift: &mut Lift) -> f32 {
        lift.drawn.clear();
        if self.table.kinds[head] == Kind::Dead || self.masks.words.is_empty() || k == 0 {
            return f32::NEG_INFINITY;
        }
        let seed = seed ^ Random::new(&self.q[head * self.head_dim()..][..self.head_dim()], 0).seed();
        let groups = self.slots() / GROUP;
        let room = k.saturating_add(1).saturating_mul(4);
        let mut least = f32::NEG_INFINITY;
        let mut levels = [0; GROUP * RUN_GROUPS];
        for first in (0..groups).step_by(RUN_GROUPS) {
            let own = first..(first + RUN_GROUPS).min(groups);
            self.levels(head, own.clone(), &mut levels);
            let from = (first / RUN_GROUPS) as u32 * RUN_SLOTS;
            for (slot, level) in (from..).zip(&levels[..own.len() * GROUP]) {
                let level = Level(*level);
                let random = mix(seed.wrapping_add(u64::from(slot).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
                let size = level.above_average();
                // A logarithm is only taken where it can matter: it is at most one more than the leading zeros.
                if level < Level::LOWEST || size + (random.leading_zeros() + 1) as f32 <= least {
                    continue;
                }
                let u = ((random >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
                let priority = size - u.log2() as f32;
                if priority > least {
                    lift.drawn.push(Drawn { priority, size, slot });
                }
            }
            if lift.drawn.len() > room {
                least = cut(&mut lift.drawn, k.saturating_add(1));
            }
        }
        if lift.drawn.len() <= k {
            return f32::NEG_INFINITY;
        }
        let next = cut(&mut lift.drawn, k.saturating_add(1));
        lift.drawn.retain(|drawn| drawn.priority > next);
        lift.drawn.sort_unstable_by_key(|drawn| drawn.slot);
        next
    }
}

/// Leaves the `count` of highest priority, or all; answers the least that is left.
fn cut(drawn: &mut Vec<Drawn>, count: usize) -> f32 {
    if drawn.len() > count {
        drawn.select_nth_unstable_by(count - 1, |a, b| b.priority.total_cmp(&a.priority));
        drawn.truncate(count);
    }
    let priorities = drawn.iter().map(|drawn| drawn.priority);
    priorities.fold(f32::INFINITY, f32::min)
}
