//! Attention and rows over sketched blocks.
//!
//! One query group, or several of sequences that share the context: heads are just more query rows, each block's sketch is
//! read once for all of them, and a candidate's key is read once and scored for every head.
//!
//! What is estimated and what is exact: keys of the *union* of all heads' candidates have exact scores for every head; the
//! others have a weight by sketch. An answer's chosen keys are exact, its tail is weights times mean values of their run.

mod attend;
mod certificate;

use half::f16;
use kvasir_simd::{GROUP, Segment, log_sum_exp2, score_rows};

pub use self::attend::{Attend, SketchAttended};
use super::{
    format::{SketchFormat, View, invalid},
    search::{Kind, Table},
};
use crate::{Cost, Excluded, HeadBasis, IndexError, Rows, bits::Bits, flat::Selection};

/// The scan of one KV head over sketches. Buffers are reused from query to query.
#[derive(Default)]
pub struct SketchScan<'a> {
    format: Option<SketchFormat>,
    scale: f32,
    q: Vec<f32>,
    table: Table,
    blocks: Vec<Block<'a>>,
    /// Queries were replaced since the sketches were scanned: weights by sketch are those of a prediction.
    predicted: bool,
    cost: Cost,
    /// Slots of the union of candidates, rising, their rows, and exact scores `[heads][union]`.
    slots: Vec<u32>,
    keys: Vec<&'a [f16]>,
    values: Vec<&'a [f16]>,
    exact: Vec<f32>,
    union: Bits,
    picked: Vec<u32>,
    selection: Selection,
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
        self.predicted = false;
        self.cost = Cost::default();
        self.clear_union();
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
        self.clear_union();
        Ok(())
    }

    /// Token positions of the at most `count` best keys per head by sketch alone, the union rising: what a prediction parks.
    pub fn candidates(&mut self, count: usize) -> Vec<u32> {
        self.gather(|_, _| (count, 1.0));
        let mut at = 0;
        let blocks = &self.blocks;
        let position = |slot: &u32| {
            while blocks.get(at + 1).is_some_and(|next| next.slot <= *slot) {
                at += 1;
            }
            (blocks[at].segment.position) as u32 + slot - blocks[at].slot
        };
        self.slots.iter().map(position).collect()
    }

    /// The union of the `k` best keys of each query head among re-scored candidates: at most the share `effort` of the keys
    /// per head. `effort` 1 is exact.
    pub fn rows(&mut self, k: usize, effort: f32) -> Rows {
        self.gather(|_, searched| (share_of(effort, searched), 1.0));
        let n = self.slots.len();
        self.picked.clear();
        let mut union = Bits::default();
        union.reset(n);
        let mut rows = Rows::default();
        for exact in self.exact.chunks_exact(n.max(1)) {
            kvasir_simd::top_k(exact, k, &mut self.picked);
            let finite = self.picked.iter().filter(|&&at| exact[at as usize] > f32::NEG_INFINITY);
            finite.for_each(|&at| union.insert(at));
        }
        let chosen: Vec<u32> = union.iter().collect();
        let mut scores = Vec::new();
        for head in 0..self.table.heads() {
            let exact = &self.exact[head * n..][..n];
            scores.clear();
            scores.extend(chosen.iter().map(|at| exact[*at as usize]));
            let all = log_add(log_sum_exp2(exact), self.rest(head).1);
            rows.mass.push(crate::flat::share(log_sum_exp2(&scores), all));
        }
        let mut at = 0;
        for index in chosen {
            let slot = self.slots[index as usize];
            while self.blocks.get(at + 1).is_some_and(|next| next.slot <= slot) {
                at += 1;
            }
            let row = slot - self.blocks[at].slot;
            rows.positions.push(self.blocks[at].segment.position as u32 + row);
            rows.places.push((at as u32, row));
        }
        rows
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

    fn clear_union(&mut self) {
        self.slots.clear();
        self.keys.clear();
        self.values.clear();
        self.exact.clear();
    }

    /// Makes the union of candidates and scores it: `ask` gives per head and number of its keys the count and the mass wanted.
    fn gather(&mut self, ask: impl Fn(usize, usize) -> (usize, f32)) {
        self.clear_union();
        let heads = self.table.heads();
        self.union.reset(self.table.slots);
        for head in 0..heads {
            let (count, mass) = ask(head, self.table.searched[head]);
            self.table.candidates(head, count, mass, &mut self.picked);
            self.picked.iter().for_each(|slot| self.union.insert(*slot));
        }
        self.slots.extend(self.union.iter());
        let d = self.head_dim();
        let mut at = 0;
        for slot in &self.slots {
            while self.blocks.get(at + 1).is_some_and(|next| next.slot <= *slot) {
                at += 1;
            }
            let row = (slot - self.blocks[at].slot) as usize * d..(slot - self.blocks[at].slot + 1) as usize * d;
            self.keys.push(&self.blocks[at].segment.keys[row.clone()]);
            self.values.push(&self.blocks[at].segment.values[row]);
        }
        let n = self.slots.len();
        self.exact.resize(heads * n, 0.0);
        score_rows(&self.q, &self.keys, d, self.scale, &mut self.exact);
        for head in 0..heads {
            let (levels, dead) = (self.table.levels(head), self.table.kinds[head] == Kind::Dead);
            for (score, slot) in self.exact[head * n..][..n].iter_mut().zip(&self.slots) {
                // Level 0: another head's candidate, which this head does not search.
                if dead || !score.is_finite() || levels[*slot as usize] == 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
        self.cost.keys_scored += (n * heads) as u64;
        self.cost.bytes_read += (n * d * 2) as u64;
    }

    /// Weight by sketch of the keys outside the union and its base-2 logarithm as a score; 0 and -inf where all are in it.
    fn rest(&self, head: usize) -> (f64, f32) {
        let levels = self.table.levels(head);
        let inside = self.slots.iter().filter(|slot| levels[**slot as usize] > 0);
        let (mut weight, mut count) = (0.0_f64, 0);
        for slot in inside {
            weight += f64::from(kvasir_simd::Level(levels[*slot as usize]).weight());
            count += 1;
        }
        let rest = (self.table.total(head) - weight).max(0.0);
        if count == self.table.searched[head] || rest == 0.0 {
            return (0.0, f32::NEG_INFINITY);
        }
        (
            rest,
            rest.log2() as f32 - kvasir_simd::Level::UNIT + self.table.average[head],
        )
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
