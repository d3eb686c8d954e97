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
mod lift;
mod parked;
mod rescore;

use half::f16;
use kvasir_simd::{GROUP, Level, RUN_GROUPS, Scattered, Segment, log_sum_exp2};

pub use self::{
    attend::{Attend, SketchAttended},
    parked::{Parked, distance},
};
use super::{
    column::Column,
    format::{SketchFormat, View, invalid},
    search::{Candidates, Masks, Room, Table},
};
use crate::{Cost, Excluded, HeadBasis, IndexError, Rows, bits::Bits};

/// The scan of one KV head over sketches. Buffers are reused from query to query.
///
/// Blocks are named first ([`SketchScan::scan`], or a [`Column`] at once); they are read when an answer is asked for, since how
/// many candidates it wants says what is kept of a scan.
#[derive(Default)]
pub struct SketchScan<'a> {
    format: Option<SketchFormat>,
    scale: f32,
    q: Vec<f32>,
    /// Once queries were replaced, those that the sketches were scanned with.
    forecast: Vec<f32>,
    table: Table,
    /// Whose sketches are read: those of a column that is there, or of one that blocks are copied to.
    column: Option<&'a Column>,
    own: Option<Column>,
    keys: Vec<&'a [f16]>,
    values: Vec<&'a [f16]>,
    /// Of each block's first key.
    positions: Vec<u32>,
    masks: Masks,
    /// Queries were replaced since the sketches were scanned: weights by sketch are those of a prediction.
    predicted: bool,
    /// Candidates were found before and stay.
    parked: bool,
    /// What they were found in.
    parked_in: Slots,
    /// What was drawn with them for a sample, by head.
    drawn: Vec<certificate::Drawn>,
    cost: Cost,
    candidates: Candidates,
    /// Base-2 log-sum-exp of what is attended to elsewhere, per head; empty where nothing is.
    beside: Vec<f32>,
    room: Room,
    rows: attend::Rows,
    union: Bits,
    picked: Vec<u32>,
    tail: attend::Tail,
    sampler: certificate::Sampler<'a>,
    lift: lift::Lift,
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

    /// Without blocks.
    fn clear(&mut self) {
        let format = self.format.unwrap_or(SketchFormat::new(1));
        self.column = None;
        self.own.get_or_insert_with(|| Column::new(format)).clear(format);
        self.keys.clear();
        self.values.clear();
        self.positions.clear();
        self.masks.clear();
        self.parked = false;
        self.drawn.clear();
        self.beside.clear();
        self.predicted = false;
        self.cost = Cost::default();
        self.candidates.clear();
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
        self.table.begin(format, q, basis, self.scale, self.room.weights());
        self.clear();
        Ok(())
    }

    /// Says what each head attends to elsewhere, as a base-2 log-sum-exp: [`Attend::target_mass`] is then a share of both
    /// together, so a head that finds most of its mass elsewhere is content with few keys. About is good enough: it decides how
    /// many keys are looked at and no weight.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if it is not one number for each head, or NaN.
    pub fn beside(&mut self, lse: &[f32]) -> Result<(), IndexError> {
        if lse.len() != self.table.heads() || lse.iter().any(|lse| lse.is_nan()) {
            let problem = format!("wants {} numbers, not {}", self.table.heads(), lse.len());
            return Err(invalid("beside", problem));
        }
        self.beside.clear();
        self.beside.extend_from_slice(lse);
        let weight = |(head, lse): (usize, &f32)| {
            // Of the same unit as weights by sketch, and finite.
            f64::from(lse + Level::UNIT - self.table.average[head])
                .min(1000.0)
                .exp2()
        };
        self.table.beside = lse.iter().enumerate().map(weight).collect();
        Ok(())
    }

    /// Adds the keys of `segment`, whose sketch is `sketch`, that are not excluded, for all heads. Segments come by rising
    /// position, do not overlap, and all but the last have the same number of keys.
    ///
    /// # Errors
    /// [`IndexError::Unusable`] if `sketch` is not the sketch of a block of this shape, [`IndexError::Invalid`] if it cannot
    /// follow the ones before.
    ///
    /// # Panics
    /// If keys and values are not the same number of whole rows, or positions do not fit 32 bits.
    pub fn scan(&mut self, segment: Segment<'a>, sketch: &[u8], excluded: &Excluded) -> Result<(), IndexError> {
        self.scan_each(segment, sketch, std::slice::from_ref(excluded))
    }

    /// As [`SketchScan::scan`] for several sequences: `excluded[i]` is what sequence `i` leaves out, and the heads are divided
    /// evenly among them. Each segment has the same number of sequences.
    ///
    /// # Errors
    /// As [`SketchScan::scan`].
    ///
    /// # Panics
    /// As [`SketchScan::scan`], and if heads cannot be divided evenly.
    pub fn scan_each(&mut self, segment: Segment<'a>, sketch: &[u8], excluded: &[Excluded]) -> Result<(), IndexError> {
        let (start, end) = self.check(&segment, excluded);
        // Where nobody looks nothing is kept.
        if excluded
            .iter()
            .all(|excluded| excluded.searched(start..end).next().is_none())
        {
            return Ok(());
        }
        let format = self.format.unwrap_or(SketchFormat::new(self.head_dim()));
        let own = self.own.get_or_insert_with(|| Column::new(format));
        let keys = View::new(format, sketch)?.keys;
        if keys != (end - start) as usize {
            return Err(IndexError::Unusable(format!(
                "sketch of {keys} keys for a block of {}",
                end - start
            )));
        }
        own.push(sketch)?;
        let block = own.blocks() - 1;
        self.masks.words.resize_with(excluded.len(), Vec::new);
        self.masks.searched.resize(excluded.len(), 0);
        let sequences = self.masks.words.iter_mut().zip(&mut self.masks.searched);
        for ((words, searched), excluded) in sequences.zip(excluded) {
            *searched += own.searched(block, excluded, |_| Some(start), words);
        }
        self.keys.push(segment.keys);
        self.values.push(segment.values);
        self.positions.push(start);
        Ok(())
    }

    /// Adds all blocks of a column, of which `segments` are the keys and values: `None` where they are not there, and then not
    /// searched. Nothing was added before.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if `segments` are not the blocks of `column`.
    ///
    /// # Panics
    /// As [`SketchScan::scan_each`].
    pub fn scan_column(
        &mut self,
        column: &'a Column,
        segments: impl IntoIterator<Item = Option<Segment<'a>>>,
        excluded: &[Excluded],
    ) -> Result<(), IndexError> {
        let d = self.head_dim();
        let each = column.block_keys();
        let mut end = 0;
        for segment in segments {
            let segment = segment.unwrap_or(Segment {
                keys: &[],
                values: &[],
                position: end,
            });
            let (start, _) = self.check(&segment, excluded);
            end = start as usize + each;
            self.keys.push(segment.keys);
            self.values.push(segment.values);
            self.positions.push(start);
        }
        let whole = |at: usize, keys: &&[f16]| at + 1 == column.blocks() || keys.len() == each * d || keys.is_empty();
        let fits = Some(column.format()) == self.format
            && self.keys.len() == column.blocks()
            && self.keys.iter().enumerate().all(|(at, keys)| whole(at, keys))
            && self
                .keys
                .last()
                .is_none_or(|keys| keys.is_empty() || keys.len() == column.last_keys() * d);
        if !fits {
            return Err(invalid(
                "segments",
                format!("the blocks of a column of {} blocks of {each} keys", column.blocks()),
            ));
        }
        for excluded in excluded {
            let mut words = Vec::with_capacity(column.groups());
            let there = |block: usize| (!self.keys[block].is_empty()).then(|| self.positions[block]);
            let searched = column.searched(0, excluded, there, &mut words);
            self.masks.words.push(words);
            self.masks.searched.push(searched);
        }
        self.column = Some(column);
        Ok(())
    }

    /// Positions of a segment that can be added.
    fn check(&self, segment: &Segment<'_>, excluded: &[Excluded]) -> (u32, u32) {
        let d = self.head_dim();
        assert!(
            segment.keys.len() == segment.values.len() && segment.keys.len().is_multiple_of(d),
            "scan: as many values as keys, rows of head_dim {d}"
        );
        assert!(
            !excluded.is_empty() && self.table.heads().is_multiple_of(excluded.len()),
            "scan: heads are divided evenly among the sequences"
        );
        let n = segment.keys.len() / d;
        let range = u32::try_from(segment.position)
            .ok()
            .zip(u32::try_from(segment.position + n).ok());
        let Some(range) = range else {
            panic!("scan: positions have 32 bits")
        };
        range
    }

    /// Keys that are searched, the most of any head.
    pub fn keys_scanned(&self) -> usize {
        self.masks.searched.iter().copied().max().unwrap_or(0)
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
        if !self.predicted {
            self.forecast.clone_from(&self.q);
        }
        self.q.copy_from_slice(q);
        self.predicted = true;
        self.spoil_dead();
        self.candidates.clear();
        Ok(())
    }

    /// How many different keys are among the at most `count` best of each head by sketch alone.
    pub fn find_best(&mut self, count: usize) -> usize {
        self.find(&|_| (count, 1.0));
        self.union.count()
    }

    /// Token positions of the at most `count` best keys per head by sketch alone, the union rising: what a prediction parks.
    pub fn candidates(&mut self, count: usize) -> Vec<u32> {
        self.find(&|_| (count, 1.0));
        let mut positions: Vec<u32> = self.union.iter().map(|slot| self.position(slot)).collect();
        positions.sort_unstable();
        positions
    }

    /// The union of the `k` best keys of each query head among re-scored candidates: at most the share `effort` of the keys
    /// per head. `effort` 1 is exact.
    pub fn rows(&mut self, k: usize, effort: f32) -> Rows {
        self.find(&|searched| (share_of(effort, searched), 1.0));
        self.rescore();
        self.union.reset(self.slots());
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
        rows.places.extend(self.union.iter().map(|slot| {
            let (block, row) = self.place(slot);
            (block as u32, row as u32)
        }));
        rows.places.sort_unstable();
        let position = |&(block, row): &(u32, u32)| self.positions[block as usize] + row;
        rows.positions.extend(rows.places.iter().map(position));
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
        let mut own = slots;
        let mut others = 0.0_f64;
        let (mut levels, mut group) = ([0; GROUP * RUN_GROUPS], usize::MAX);
        for slot in self.union.iter() {
            own = &own[own.partition_point(|own| *own < slot)..];
            if own.first() != Some(&slot) {
                let at = slot as usize / GROUP;
                if at != group {
                    group = at;
                    self.levels(head, at..at + 1, &mut levels);
                }
                others += f64::from(Level(levels[slot as usize % GROUP]).weight());
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
            let span = row as usize * d..(row as usize + 1) * d;
            take(&self.keys[at as usize][span.clone()], &self.values[at as usize][span]);
        }
    }

    /// Work done since the last [`SketchScan::begin`].
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// The sketches that are read.
    fn column(&self) -> Option<&Column> {
        self.column.or(self.own.as_ref())
    }

    fn slots(&self) -> usize {
        self.column().map_or(0, |column| column.groups() * GROUP)
    }

    /// What slots are those of.
    fn scanned(&self) -> Slots {
        Slots {
            all: self.slots(),
            clustered: self.column().map_or(0, |column| column.order().len()),
        }
    }

    /// Block and row in it of a slot.
    fn place(&self, slot: u32) -> (usize, usize) {
        scattered(self.column(), &[], 1).place(slot)
    }

    fn position(&self, slot: u32) -> u32 {
        let (block, row) = self.place(slot);
        self.positions[block] + row as u32
    }

    /// Levels of at most a run of groups for one head; of what it does not search 0.
    fn levels(&self, head: usize, groups: std::ops::Range<usize>, levels: &mut [u16; GROUP * RUN_GROUPS]) {
        let words = &self.masks.words[self.masks.sequence(head, self.table.heads())];
        if let Some(column) = self.column() {
            self.table.levels(column, words, groups, head, levels);
        }
    }
}

/// Rows of a column's blocks by slot.
fn scattered<'a>(column: Option<&'a Column>, blocks: &'a [&'a [f16]], head_dim: usize) -> Scattered<'a> {
    let (groups, order) = column.map_or((1, &[][..]), |column| (column.block_groups(), column.order()));
    Scattered::new(blocks, head_dim, groups).ordered(order)
}

/// How many slots there are, and how many of them are in clustered segments: with other numbers they are other keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slots {
    all: usize,
    clustered: usize,
}

/// The keys that a share of `effort` is of `searched`, at least 1.
fn share_of(effort: f32, searched: usize) -> usize {
    let effort = if effort.is_nan() { 0.0 } else { effort.clamp(0.0, 1.0) };
    ((f64::from(effort) * searched as f64).ceil() as usize).clamp(1, searched.max(1))
}

fn log_add(a: f32, b: f32) -> f32 {
    log_sum_exp2(&[a, b])
}

impl std::fmt::Debug for SketchScan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SketchScan")
            .field("format", &self.format)
            .field("heads", &self.table.heads())
            .field("blocks", &self.keys.len())
            .finish_non_exhaustive()
    }
}
