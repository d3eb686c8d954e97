//! Which keys are candidates of a query head by their sketches, and what the others weigh.
//!
//! A *slot* is a key's place in the order of scanning, blocks rounded up to groups of sixteen. A *run* is four groups: what shares
//! one mean of values and one sum of weights. Levels are not kept: a sample of keys says from which level on a head's candidates
//! begin, then one scan keeps those and sums up the rest.

mod choose;
mod first;
mod guess;
mod room;
mod sample;

use std::ops::Range;

use kvasir_simd::{CodedQueries, Found, GROUP, Level, RUN_GROUPS, UNIT, coded_levels, coded_scan};

pub(super) use self::{guess::Lean, room::Room};
use super::{
    column::Column,
    format::{RANK, SketchFormat},
};
use crate::HeadBasis;

/// Groups of one call: their codes stay in the second cache while all heads scan them.
const TILE: usize = 256;
/// Of so many clustered groups or fewer all are scanned: they are few, and known better then.
const SHORT: usize = 1024;
/// The same where few of them are scanned.
const LISTED_TILE: usize = 1024;
/// Levels per bucket of the guess: a 32nd of a power of two.
const BUCKET: u16 = 4;

/// What a query head is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Sketched,
    /// Its scores spread too far for levels, or lie at an end of their scale: every key is a candidate.
    Exact,
    /// Not finite: nothing is found.
    Dead,
}

/// Slots of all heads, head after head, rising for each, with their levels and a number each.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    pub(super) slots: Vec<u32>,
    pub(super) levels: Vec<Level>,
    /// Base-2 scores, -inf for keys that are not finite; or weights.
    pub(super) scores: Vec<f32>,
    /// Where each head's end.
    pub(super) ends: Vec<usize>,
}

impl Candidates {
    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.levels.clear();
        self.scores.clear();
        self.ends.clear();
    }

    pub(super) fn of(&self, head: usize) -> Range<usize> {
        let start = if head == 0 { 0 } else { self.ends[head - 1] };
        start..self.ends[head]
    }
}

/// Queries, and what a scan with them found.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    coded: CodedQueries,
    /// Base-2 score of the average key, per head.
    pub(super) average: Vec<f32>,
    pub(super) kinds: Vec<Kind>,
    /// Base-2 score per unit of each direction, `[heads, directions]`.
    along: Vec<f32>,
    /// Per head and run, weights by sketch of what are no candidates.
    left: Vec<f32>,
    runs: usize,
    /// Sum of `left`, per head.
    pub(super) total: Vec<f64>,
    /// Per head; empty of a column that has learnt no slopes.
    pub(super) leans: Vec<Lean>,
    /// Per head and run, the level of the average of what its mean stands for: of the run where it is of alike keys, otherwise of
    /// all. Empty as `leans` is.
    centres: Vec<Level>,
    /// Bytes of codes that the last scan read.
    pub(super) coded_bytes: usize,
    /// Weight of what is attended to elsewhere and counts as covered, per head; empty where nothing is.
    pub(super) beside: Vec<f64>,
}

/// Which keys each sequence searches.
#[derive(Debug, Default)]
pub(super) struct Masks {
    /// A word per group of the column.
    pub(super) words: Vec<Vec<u16>>,
    pub(super) searched: Vec<usize>,
}

impl Masks {
    pub(super) fn clear(&mut self) {
        self.words.clear();
        self.searched.clear();
    }

    /// Sequence of a head.
    pub(super) fn sequence(&self, head: usize, heads: usize) -> usize {
        head * self.words.len() / heads.max(1)
    }
}

impl Table {
    pub(super) fn begin(
        &mut self,
        format: SketchFormat,
        q: &[f32],
        basis: &HeadBasis,
        scale: f32,
        weights: &mut Vec<f32>,
    ) {
        let (d, directions) = (format.head_dim, format.directions());
        let factor = scale * std::f32::consts::LOG2_E;
        self.coded.begin(format.nibbles());
        self.average.clear();
        self.kinds.clear();
        self.along.clear();
        self.beside.clear();
        for q in q.chunks_exact(d) {
            let dot = |row: &[f32]| dot(row, q) * factor;
            let first = self.along.len();
            self.along
                .extend(basis.queries.chunks_exact(d).take(directions).map(dot));
            format.weigh_digits(&self.along[first..], weights);
            self.coded.push(weights);
            let average = dot(&basis.mean);
            self.kinds.push(match () {
                () if !q.iter().all(|q| q.is_finite()) => Kind::Dead,
                () if !average.is_finite() || !weights.iter().all(|w| w.is_finite()) => Kind::Exact,
                () => Kind::Sketched,
            });
            self.average.push(if average.is_finite() { average } else { 0.0 });
        }
    }

    pub(super) fn heads(&self) -> usize {
        self.kinds.len()
    }

    /// Base-2 score per unit of each direction.
    pub(super) fn along(&self, head: usize) -> &[f32] {
        let directions = self.along.len() / self.heads().max(1);
        &self.along[head * directions..][..directions]
    }

    /// Weights by sketch that a head's candidates leave, per run.
    pub(super) fn left(&self, head: usize) -> &[f32] {
        &self.left[head * self.runs..][..self.runs]
    }

    /// Score above the average key's of what the mean of a slot's run stands for.
    pub(super) fn centre(&self, head: usize, slot: u32) -> f32 {
        let run = slot as usize / (GROUP * RUN_GROUPS);
        self.centres
            .get(head * self.runs + run)
            .map_or(0.0, |level| level.above_average())
    }

    /// The queries for the leading lines of keys.
    pub(super) fn leading(&self, format: SketchFormat, lines: usize) -> CodedQueries {
        let (mut queries, mut digits) = (CodedQueries::default(), Vec::new());
        queries.begin(8 * lines);
        for head in 0..self.heads() {
            format.weigh_digits(self.along(head), &mut digits);
            queries.push(&format.leading_digits(&digits, lines));
        }
        queries
    }

    /// Whether levels of a column's keys are right for a head.
    pub(super) fn fits(&self, head: usize, column: &Column) -> bool {
        self.coded.fits(head, column.step_max())
    }

    /// Whether a head whose best key has this level cannot tell keys apart, since they lie at an end of the scale.
    pub(super) fn is_at_an_end(best: u16) -> bool {
        /// At or below it a best key is 36 powers of two below the calibration's average key: too near the scale's end for the
        /// others to be told apart.
        const DEEP: u16 = 31 * 128;
        best >= Level::HIGHEST.0 || best <= DEEP
    }

    /// Bytes of a head beside those of its runs, at most.
    pub(super) const BYTES_OF_HEAD: usize = RANK * 4 + size_of::<Lean>();

    /// Bytes that grow with keys.
    pub(super) fn bytes(&self) -> usize {
        (self.left.len() + self.along.len()) * 4 + self.centres.len() * 2 + self.leans.len() * size_of::<Lean>()
    }

    /// Levels of some groups for one head.
    pub(super) fn levels(
        &self,
        column: &Column,
        masks: &[u16],
        groups: Range<usize>,
        head: usize,
        levels: &mut [u16; RUN_GROUPS * GROUP],
    ) {
        let keys = column.coded(groups, masks);
        coded_levels(&self.coded, head..head + 1, keys, levels, RUN_GROUPS * GROUP);
    }

    /// Finds each head's candidates: the best at most `count` by sketch, fewer where about half as many hold `mass` of the mass
    /// by sketch; `ask` answers both for a head and the number of its keys. Ties go to the lower slot.
    pub(super) fn find(
        &mut self,
        column: &Column,
        masks: &Masks,
        room: &mut Room,
        ask: &dyn Fn(usize) -> (usize, f32),
        out: &mut Candidates,
    ) {
        let heads = self.heads();
        out.clear();
        self.runs = column.runs();
        // Written whole by each scan.
        self.left.resize(heads * self.runs, 0.0);
        self.total.clear();
        self.total.resize(heads, 0.0);
        room.prepare(heads, column.groups());
        for head in 0..heads {
            if self.kinds[head] == Kind::Sketched && !self.fits(head, column) {
                self.kinds[head] = Kind::Exact;
            }
        }
        let wanted: Vec<(usize, f32)> = (0..heads)
            .map(|head| ask(masks.searched.get(masks.sequence(head, heads)).copied().unwrap_or(0)))
            .collect();
        self.coded_bytes = 0;
        self.score_centroids(column, room);
        self.guess(column, masks, &wanted, room);
        self.scan(column, masks, 0..heads, room);
        for (head, wanted) in wanted.into_iter().enumerate() {
            let passed = self.choose(head, wanted, column, masks, room, out);
            if let Some(lean) = self.leans.get_mut(head) {
                let scanned = (self.total[head] - passed.weight).max(0.0);
                lean.left = scanned * lean.away + passed.moment;
            }
        }
    }

    /// Scans for `heads`, from their floors on: of clustered segments what may reach them, and all other keys.
    fn scan(&mut self, column: &Column, masks: &Masks, heads: Range<usize>, room: &mut Room) {
        let (groups, clustered) = (column.groups(), column.clustered_groups());
        room.found[heads.clone()].fill(0);
        for head in heads.clone().filter(|_| clustered > 0) {
            self.list(head, &masks.words[masks.sequence(head, self.heads())], room);
        }
        let mut first = 0;
        while first < groups {
            // Tiles end where units do.
            let (each, end) = if first < clustered {
                (LISTED_TILE, clustered)
            } else {
                (TILE, groups)
            };
            let tile = first..((first / each + 1) * each).min(end);
            if (first * GROUP).is_multiple_of(UNIT) {
                let all = room.found.len();
                let at = first * GROUP / UNIT * all;
                room.before[at..at + all][heads.clone()].copy_from_slice(&room.found[heads.clone()]);
            }
            room.grow(tile.len(), heads.clone());
            let mut at = heads.start;
            while at < heads.end {
                let sequence = masks.sequence(at, self.heads());
                let mut end = at + 1;
                while end < heads.end && masks.sequence(end, self.heads()) == sequence {
                    end += 1;
                }
                if first < clustered {
                    self.scan_listed(column, &masks.words[sequence], at..end, tile.clone(), room);
                } else {
                    self.scan_all(column, &masks.words[sequence], at..end, tile.clone(), room);
                }
                at = end;
            }
            if first >= clustered {
                self.coded_bytes += tile.len() * column.format().group_bytes();
            }
            first = tile.end;
        }
    }

    /// All groups of a tile.
    fn scan_all(&mut self, column: &Column, words: &[u16], heads: Range<usize>, tile: Range<usize>, room: &mut Room) {
        let mut found = Found {
            floors: &room.floors[heads.clone()],
            kept: &mut room.kept[heads.start * room.stride..],
            stride: room.stride,
            counts: &mut room.found[heads.clone()],
            sums: &mut self.left[heads.start * self.runs + tile.start / RUN_GROUPS..],
            sums_stride: self.runs,
            few: room.few,
        };
        let keys = column.coded(tile.clone(), words);
        coded_scan(&self.coded, heads, keys, tile.start * GROUP, &mut found);
    }
}

/// In f64, eight sums side by side.
pub(super) fn sum(weights: &[f32]) -> f64 {
    let (whole, tail) = weights.as_chunks::<8>();
    let mut sums = [0.0_f64; 8];
    for weights in whole {
        for (sum, weight) in sums.iter_mut().zip(weights) {
            *sum += f64::from(*weight);
        }
    }
    sums.iter().sum::<f64>() + tail.iter().map(|weight| f64::from(*weight)).sum::<f64>()
}

/// Eight sums side by side.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0_f32; 8];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum::<f32>()
}
