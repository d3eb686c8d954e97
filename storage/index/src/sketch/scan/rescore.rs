//! Candidates of each head, their exact scores, and what is left by sketch.

use std::ops::Range;

use half::f16;
use kvasir_simd::{GROUP, Level, Segment, score_rows};

use super::{Block, SketchScan};
use crate::sketch::{format::RUN, search::Kind};

/// Slots that heads go through side by side: a megabyte of keys of 128, of which they read a few in a hundred.
const TILE: u32 = 4096;

/// Slots of all heads, head after head, rising for each, with a number each.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    pub(super) slots: Vec<u32>,
    /// Base-2 scores, -inf for keys that are not finite; or weights.
    pub(super) scores: Vec<f32>,
    /// Where each head's end.
    pub(super) ends: Vec<usize>,
}

impl Candidates {
    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.scores.clear();
        self.ends.clear();
    }

    pub(super) fn of(&self, head: usize) -> Range<usize> {
        let start = if head == 0 { 0 } else { self.ends[head - 1] };
        start..self.ends[head]
    }

    /// Calls `take` with heads, the rows that `part` gives of their slots of one tile, and where those are in the list: tile
    /// after tile, rising.
    pub(super) fn each_tile<'a>(
        &self,
        (blocks, block_of): (&[Block<'a>], &[u32]),
        d: usize,
        part: impl Fn(&Segment<'a>) -> &'a [f16],
        rows: &mut Vec<&'a [f16]>,
        next: &mut Vec<usize>,
        mut take: impl FnMut(usize, &[&'a [f16]], Range<usize>),
    ) {
        next.clear();
        next.extend((0..self.ends.len()).map(|head| self.of(head).start));
        let slots = (block_of.len() * GROUP) as u32;
        for tile in (0..slots).step_by(TILE as usize) {
            for (head, (next, end)) in next.iter_mut().zip(&self.ends).enumerate() {
                rows.clear();
                let (start, own) = (*next, &self.slots[*next..*end]);
                let own = &own[..own.partition_point(|slot| *slot < tile + TILE)];
                rows.extend(own.iter().map(|slot| {
                    let block = &blocks[block_of[*slot as usize / GROUP] as usize];
                    &part(&block.segment)[(slot - block.slot) as usize * d..][..d]
                }));
                *next += rows.len();
                if !rows.is_empty() {
                    take(head, rows, start..*next);
                }
            }
        }
    }
}

/// What one head's candidates leave.
#[derive(Debug, Default)]
pub(super) struct Rest {
    /// Weight by sketch left in each run.
    pub(super) left: Vec<f32>,
    /// Their sum.
    pub(super) total: f64,
    /// Run of each candidate.
    pub(super) runs: Vec<u32>,
    next: Vec<usize>,
}

impl Rest {
    /// Room that [`Candidates::each_tile`] borrows.
    pub(super) fn room(&mut self) -> &mut Vec<usize> {
        &mut self.next
    }
}

impl SketchScan<'_> {
    /// Lists each head's candidates: `ask` gives per head and number of its keys the count and the mass wanted.
    pub(super) fn find(&mut self, ask: impl Fn(usize, usize) -> (usize, f32)) {
        self.candidates.clear();
        self.union.reset(self.table.slots);
        for head in 0..self.table.heads() {
            let (count, mass) = ask(head, self.table.searched[head]);
            self.table.candidates(head, count, mass, &mut self.picked);
            self.picked.iter().for_each(|slot| self.union.insert(*slot));
            self.candidates.slots.extend_from_slice(&self.picked);
            self.candidates.ends.push(self.candidates.slots.len());
        }
    }

    /// Scores the candidates.
    pub(super) fn rescore(&mut self) {
        let d = self.head_dim();
        let mut scores = std::mem::take(&mut self.candidates.scores);
        scores.resize(self.candidates.slots.len(), 0.0);
        let (q, scale) = (&self.q, self.scale);
        self.candidates.each_tile(
            (&self.blocks, &self.block_of),
            d,
            |segment| segment.keys,
            &mut self.rows,
            self.rest.room(),
            |head, rows, at| {
                score_rows(&q[head * d..][..d], rows, d, scale, &mut scores[at]);
            },
        );
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

    /// Finds what a head's candidates leave of its weight by sketch ([`Rest`]) and answers it as a base-2 score: -inf where
    /// all are candidates.
    pub(super) fn leave(&mut self, head: usize) -> f32 {
        /// Below this share of a run's weight its sum is made anew, so that nothing cancels.
        const ANEW: f32 = 0.05;
        let d = self.head_dim();
        let Rest { left, total, runs, .. } = &mut self.rest;
        left.clear();
        left.extend_from_slice(self.table.sums(head));
        runs.clear();
        let own = self.candidates.of(head);
        let (levels, sums) = (self.table.levels(head), self.table.sums(head));
        let slots = &self.candidates.slots[own.clone()];
        for slot in slots {
            let block = &self.blocks[self.block_of[*slot as usize / GROUP] as usize];
            let run = block.run + (slot - block.slot) / RUN as u32;
            left[run as usize] -= Level(levels[*slot as usize]).weight();
            runs.push(run);
        }
        for (run, (left, sum)) in left.iter_mut().zip(sums).enumerate() {
            if *left >= ANEW * sum {
                continue;
            }
            let block = &self.blocks[self.blocks.partition_point(|block| block.run as usize <= run) - 1];
            let start = block.slot + (run as u32 - block.run) * RUN as u32;
            let rows = block.segment.keys.len() / d;
            let end = (start + RUN as u32).min(block.slot + rows.next_multiple_of(GROUP) as u32);
            let mut own = slots[slots.partition_point(|slot| *slot < start)..].iter().peekable();
            let others = (start..end).filter(|slot| own.next_if_eq(&slot).is_none());
            *left = others.map(|slot| Level(levels[slot as usize]).weight()).sum();
        }
        *total = match self.table.kinds[head] {
            Kind::Dead => 0.0,
            _ => sum(left),
        };
        if own.len() == self.table.searched[head] {
            return f32::NEG_INFINITY;
        }
        self.by_sketch(head, self.rest.total)
    }

    /// A weight by sketch as a base-2 score.
    pub(super) fn by_sketch(&self, head: usize, weight: f64) -> f32 {
        weight.log2() as f32 - Level::UNIT + self.table.average[head]
    }
}

/// In f64, four sums side by side.
fn sum(weights: &[f32]) -> f64 {
    let (whole, tail) = weights.as_chunks::<4>();
    let mut sums = [0.0_f64; 4];
    for weights in whole {
        for (sum, weight) in sums.iter_mut().zip(weights) {
            *sum += f64::from(*weight);
        }
    }
    sums.iter().sum::<f64>() + tail.iter().map(|weight| f64::from(*weight)).sum::<f64>()
}
