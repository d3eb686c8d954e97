//! Candidates of each head, and their exact scores.

use std::ops::Range;

use kvasir_simd::{GROUP, Level, RUN_GROUPS, score_slots};

use super::{SketchScan, scattered};
use crate::sketch::search::{Candidates, Kind};

/// Slots that heads go through side by side: a quarter of a megabyte of keys of 128, of which many heads together read most.
const TILE: u32 = 1024;
/// Slots of a run.
pub(super) const RUN_SLOTS: u32 = (GROUP * RUN_GROUPS) as u32;

/// Calls `take` with heads and where their slots of one tile are in the list: tile after tile, rising.
pub(super) fn each_tile(
    candidates: &Candidates,
    slots: usize,
    next: &mut Vec<usize>,
    mut take: impl FnMut(usize, Range<usize>),
) {
    next.clear();
    next.extend((0..candidates.ends.len()).map(|head| candidates.of(head).start));
    for tile in (0..slots as u32).step_by(TILE as usize) {
        for (head, (next, end)) in next.iter_mut().zip(&candidates.ends).enumerate() {
            let start = *next;
            *next += below(&candidates.slots[start..*end], tile + TILE);
            if start < *next {
                take(head, start..*next);
            }
        }
    }
}

/// How many of the rising `slots` are below `limit`, which is not many.
fn below(slots: &[u32], limit: u32) -> usize {
    let mut end = 16;
    while end < slots.len() && slots[end] < limit {
        end *= 2;
    }
    let from = if end == 16 { 0 } else { end / 2 };
    from + slots[from..end.min(slots.len())].partition_point(|slot| *slot < limit)
}

impl SketchScan<'_> {
    /// Lists each head's candidates: `ask` gives for the number of its keys the count and the mass wanted.
    pub(super) fn find(&mut self, ask: &dyn Fn(usize) -> (usize, f32)) {
        self.union.reset(self.slots());
        let Some(column) = self.column.or(self.own.as_ref()).filter(|column| column.groups() > 0) else {
            self.candidates.clear();
            self.candidates.ends.resize(self.table.heads(), 0);
            return;
        };
        if !(self.parked && self.parked_in == self.scanned()) {
            self.drawn.clear();
            self.table
                .find(column, &self.masks, &mut self.room, ask, &mut self.candidates);
            self.cost.bytes_read += self.table.coded_bytes as u64;
        }
        for slot in &self.candidates.slots {
            self.union.insert(*slot);
        }
    }

    /// Scores the candidates.
    pub(super) fn rescore(&mut self) {
        let d = self.head_dim();
        let mut scores = std::mem::take(&mut self.candidates.scores);
        scores.resize(self.candidates.slots.len(), 0.0);
        let rows = scattered(self.column.or(self.own.as_ref()), &self.keys, d);
        let (q, slots) = (&self.q, &self.candidates.slots);
        each_tile(&self.candidates, self.slots(), &mut self.rows.next, |head, at| {
            // Those behind them are on their way when their turn comes.
            let (own, behind) = (&q[head * d..][..d], &slots[at.start..self.candidates.ends[head]]);
            score_slots(own, rows, behind, self.scale, &mut scores[at]);
        });
        for score in &mut scores {
            *score = if score.is_finite() { *score } else { f32::NEG_INFINITY };
        }
        self.cost.keys_scored += scores.len() as u64;
        self.cost.bytes_read += (self.union.count() * d * 2) as u64;
        self.candidates.scores = scores;
        for head in 0..self.table.heads() {
            if self.table.kinds[head] == Kind::Dead {
                let own = self.candidates.of(head);
                self.candidates.scores[own].fill(f32::NEG_INFINITY);
            }
        }
    }

    /// What a head's candidates leave of its weight by sketch, as a base-2 score: -inf where all are candidates.
    pub(super) fn leave(&self, head: usize) -> f32 {
        let sequence = self.masks.sequence(head, self.table.heads());
        let searched = self.masks.searched.get(sequence).copied().unwrap_or(0);
        if self.candidates.of(head).len() >= searched || self.table.kinds[head] == Kind::Dead {
            return f32::NEG_INFINITY;
        }
        self.by_sketch(head, self.table.total[head])
    }

    /// A weight by sketch as a base-2 score.
    pub(super) fn by_sketch(&self, head: usize, weight: f64) -> f32 {
        weight.log2() as f32 - Level::UNIT + self.table.average[head]
    }
}
