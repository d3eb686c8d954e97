//! Attention and rows over sketched blocks.
//!
//! One query group, or several of sequences that share the context: heads are just more query rows, and each block's sketch
//! is read once for all of them. Each head scores its own candidates only; heads go through the context side by side, so that
//! a key or value that several of them want comes from memory once.
//!
//! What is estimated and what is exact: a head's candidates have exact scores; the other keys have a weight by sketch. An
//! answer's chosen keys are exact, its tail is weights times mean values of their run.

mod attend;
mod certificate;
mod choose;
mod rescore;

use half::f16;
use kvasir_simd::{GROUP, Level, Segment, log_sum_exp2};

pub use self::attend::{Attend, SketchAttended};
use super::{
    format::{SketchFormat, View, invalid},
    search::{Kind, Table},
};
use crate::{Cost, Excluded, HeadBasis, IndexError, Rows, bits::Bits};

/// The scan of one KV head over sketches. Buffers are reused from query to query.
#[derive(Default)]
pub struct SketchScan<'a> {
    format: Option<SketchFormat>,
    scale: f32,
    q: Vec<f32>,
    table: Table,
    blocks: Vec<Block<'a>>,
    /// Block of each group of slots.
    block_of: Vec<u32>,
    /// Queries were replaced since the sketches were scanned: weights by sketch are those of a prediction.
    predicted: bool,
    cost: Cost,
    candidates: rescore::Candidates,
    rest: rescore::Rest,
    rows: Vec<&'a [f16]>,
    union: Bits,
    picked: Vec<u32>,
    tail: attend::Tail<'a>,
    sampler: certificate::Sampler<'a>,
}

#[derive(Clone, Copy)]
struct Block<'a> {
    segment: Segment<'a>,
    means: &'a [f16],
    slot: u32,
    run: u32,
}

impl<'a> SketchScan<'a> {
    /// A scan over sketches of `format`; `scale` is multiplied into `q . k`, usually `1/sqrt(head_dim)`.
    pub fn new(format: SketchFormat, scale: f32) -> Self {
        Self {
            format: Some(format),
            scale,
            ..Self::default()
        }
    }

    fn head_dim(&self) -> usize {
        self.format.map_or(1, |format| format.head_dim)
    }

    /// Starts anew with the query rows `q[heads, head_dim]`: those of one group, or of several sequences one after another.
    /// A query that is not finite finds nothing.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if `q` is not whole rows or `basis` is not one for this format.
    pub fn begin(&mut self, q: &[f32], basis: &HeadBasis) -> Result<(), IndexError> {
        let format = self.format.unwrap_or(SketchFormat::new(1));
        format.check(basis)?;
        if !q.len().is_multiple_of(format.head_dim) {
            return Err(invalid(
                "q",
                format!("wants rows of {}, not {} elements", format.head_dim, q.len()),
            ));
        }
        self.q.clear();
        self.q.extend_from_slice(q);
        self.table.begin(format, q, basis, self.scale);
        self.blocks.clear();
        self.block_of.clear();
        self.predicted = false;
        self.cost = Cost::default();
        self.candidates.clear();
        Ok(())
    }

    /// Scores the keys of `segment`, whose sketch is `sketch`, that are not excluded, for all heads. Segments come by rising
    /// position and do not overlap.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] if `sketch` is not the sketch of a block of this shape.
    ///
    /// # Panics
    /// If keys and values are not the same number of whole rows, or positions do not fit 32 bits.
    pub fn scan(&mut self, segment: Segment<'a>, sketch: &'a [u8], excluded: &Excluded) -> Result<(), IndexError> {
        self.scan_each(segment, sketch, std::slice::from_ref(excluded))
    }

    /// As [`SketchScan::scan`] for several sequences: `excluded[i]` is what sequence `i` leaves out, and the heads are divided
    /// evenly among them.
    ///
    /// # Errors
    /// As [`SketchScan::scan`].
    ///
    /// # Panics
    /// As [`SketchScan::scan`], and if heads cannot be divided evenly.
    pub fn scan_each(
        &mut self,
        segment: Segment<'a>,
        sketch: &'a [u8],
        excluded: &[Excluded],
    ) -> Result<(), IndexError> {
        let d = self.head_dim();
        assert!(
            segment.keys.len() == segment.values.len() && segment.keys.len().is_multiple_of(d),
            "scan: as many values as keys, rows of head_dim {d}"
        );
        let heads = self.table.heads();
        assert!(
            !excluded.is_empty() && heads.is_multiple_of(excluded.len()),
            "scan: heads are divided evenly among the sequences"
        );
        let n = segment.keys.len() / d;
        let range = u32::try_from(segment.position)
            .ok()
            .zip(u32::try_from(segment.position + n).ok());
        let Some((start, end)) = range else {
            panic!("scan: positions have 32 bits")
        };
        let view = View::new(self.format.unwrap_or(SketchFormat::new(d)), sketch)?;
        if view.keys != n {
            return Err(IndexError::Unusable(format!(
                "sketch of {} keys for a block of {n}",
                view.keys
            )));
        }
        let groups = n.div_ceil(GROUP);
        let each = heads / excluded.len();
        let mut searched = false;
        for (sequence, excluded) in excluded.iter().enumerate() {
            let mut mask = [0_u16; 16];
            for part in excluded.searched(start..end) {
                set(&mut mask, (part.start - start) as usize, (part.end - start) as usize);
            }
            for (group, word) in mask[..groups].iter_mut().enumerate() {
                *word &= view.mask(group);
            }
            let mask = &mask[..groups];
            searched |= mask.iter().any(|word| *word != 0);
            self.table.add(&view, sequence * each..(sequence + 1) * each, mask);
        }
        // Where nobody looks nothing is kept: the next block writes over it.
        if searched {
            self.block_of
                .resize(self.block_of.len() + groups, self.blocks.len() as u32);
            self.blocks.push(Block {
                segment,
                means: view.means,
                slot: self.table.slots as u32,
                run: self.table.runs as u32,
            });
            self.table.end_block(groups);
            self.cost.bytes_read += (view.codes.len()) as u64;
        }
        Ok(())
    }

    /// Keys searched so far, the most of any head.
    pub fn keys_scanned(&self) -> usize {
        self.table.searched.iter().copied().max().unwrap_or(0)
    }

    /// Replaces the queries by the real ones after a scan with predicted ones: candidates are those of the prediction, scores
    /// are exact, and the tail is estimated from sampled keys, whose ratio to the prediction is right on average however wrong
    /// the prediction is. Parking is keeping this scan until the real queries arrive; the bound on the missed mass says whether
    /// to scan again.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if `q` has not the shape of the prediction.
    pub fn resume(&mut self, q: &[f32]) -> Result<(), IndexError> {
        if q.len() != self.q.len() {
            return Err(invalid(
                "q",
                format!("{} elements, the predicted queries have {}", q.len(), self.q.len()),
            ));
        }
        self.q.copy_from_slice(q);
        self.predicted = true;
        for (head, q) in q.chunks_exact(self.head_dim()).enumerate() {
            if !q.iter().all(|q| q.is_finite()) {
                self.table.kinds[head] = Kind::Dead;
            }
        }
        self.candidates.clear();
        Ok(())
    }

    /// Token positions of the at most `count` best keys per head by sketch alone, the union rising: what a prediction parks.
    pub fn candidates(&mut self, count: usize) -> Vec<u32> {
        self.find(|_, _| (count, 1.0));
        let mut positions = Vec::new();
        for slot in self.union.iter() {
            let place = self.place(slot);
            positions.push(self.blocks[place.0].segment.position as u32 + place.1);
        }
        positions
    }

    /// The union of the `k` best keys of each query head among re-scored candidates: at most the share `effort` of the keys
    /// per head. `effort` 1 is exact.
    pub fn rows(&mut self, k: usize, effort: f32) -> Rows {
        self.find(|_, searched| (share_of(effort, searched), 1.0));
        self.rescore();
        self.union.reset(self.table.slots);
        for head in 0..self.table.heads() {
            let own = self.candidates.of(head);
            let (slots, scores) = (&self.candidates.slots[own.clone()], &self.candidates.scores[own]);
            kvasir_simd::top_k(scores, k, &mut self.picked);
            let finite = self
                .picked
                .iter()
                .map(|at| *at as usize)
                .filter(|&at| scores[at] > f32::NEG_INFINITY);
            finite.for_each(|at| self.union.insert(slots[at]));
        }
        let mut rows = Rows::default();
        for slot in self.union.iter() {
            let place = self.place(slot);
            rows.positions
                .push(self.blocks[place.0].segment.position as u32 + place.1);
            rows.places.push((place.0 as u32, place.1));
        }
        rows.mass = (0..self.table.heads()).map(|head| self.mass_of_union(head)).collect();
        rows
    }

    /// Share of a head's mass that the slots of the union hold: by exact scores of its candidates, by sketch of others.
    fn mass_of_union(&mut self, head: usize) -> f32 {
        let own = self.candidates.of(head);
        let (slots, scores) = (&self.candidates.slots[own.clone()], &self.candidates.scores[own]);
        let inside: Vec<f32> = slots
            .iter()
            .zip(scores)
            .filter(|(slot, _)| self.union.contains(**slot))
            .map(|(_, score)| *score)
            .collect();
        let found = log_sum_exp2(scores);
        let levels = self.table.levels(head);
        let mut own = slots;
        let mut others = 0.0_f64;
        for slot in self.union.iter() {
            own = &own[own.partition_point(|own| *own < slot)..];
            if own.first() != Some(&slot) {
                others += f64::from(Level(levels[slot as usize]).weight());
            }
        }
        let chosen = log_add(log_sum_exp2(&inside), self.by_sketch(head, others));
        let rest = self.leave(head);
        crate::flat::share(chosen, log_add(found, rest))
    }

    /// Calls `take` with the key and the value of each position of `rows`, which this scan gave.
    ///
    /// # Panics
    /// If `rows` is of another scan.
    pub fn each_row(&self, rows: &Rows, mut take: impl FnMut(&'a [f16], &'a [f16])) {
        let d = self.head_dim();
        for &(at, row) in &rows.places {
            let segment = self.blocks[at as usize].segment;
            let span = row as usize * d..(row as usize + 1) * d;
            take(&segment.keys[span.clone()], &segment.values[span]);
        }
    }

    /// Work done since the last [`SketchScan::begin`].
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// Block and row in it of a slot.
    fn place(&self, slot: u32) -> (usize, u32) {
        let block = self.block_of[slot as usize / GROUP] as usize;
        (block, slot - self.blocks[block].slot)
    }
}

/// The keys that a share of `effort` is of `searched`, at least 1.
fn share_of(effort: f32, searched: usize) -> usize {
    let effort = if effort.is_nan() { 0.0 } else { effort.clamp(0.0, 1.0) };
    ((f64::from(effort) * searched as f64).ceil() as usize).clamp(1, searched.max(1))
}

fn log_add(a: f32, b: f32) -> f32 {
    log_sum_exp2(&[a, b])
}

/// Sets the bits `from..to`.
fn set(mask: &mut [u16; 16], from: usize, to: usize) {
    for (group, word) in mask.iter_mut().enumerate() {
        let (low, high) = (from.max(group * GROUP), to.min((group + 1) * GROUP));
        if low < high {
            *word |= (((1_u32 << (high - low)) - 1) << (low % GROUP)) as u16;
        }
    }
}

impl std::fmt::Debug for SketchScan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SketchScan")
            .field("format", &self.format)
            .field("heads", &self.table.heads())
            .field("blocks", &self.blocks.len())
            .finish_non_exhaustive()
    }
}
