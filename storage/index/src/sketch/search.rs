//! Which keys are candidates of a query head by their sketches, and what the others weigh.
//!
//! A *slot* is a key's place in the order of scanning, blocks rounded up to groups of sixteen. A *run* is four groups: what shares
//! one mean of values and one sum of weights. Levels are not kept: a sample of keys says from which level on a head's candidates
//! begin, then one scan keeps those and sums up the rest.

use std::ops::Range;

use kvasir_simd::{
    CodedKeys, CodedQueries, Found, GROUP, Level, Line, RUN_GROUPS, UNIT, coded_levels, coded_scan, room_for,
};

use super::{
    column::Column,
    format::{RANK, SketchFormat, Width},
};
use crate::HeadBasis;

/// Groups looked at to guess where the wanted number of candidates begins.
const SAMPLE: usize = 256;
/// Groups of one call: their codes stay in the second cache while all heads scan them.
const TILE: usize = 256;
/// Levels per bucket of the guess: an eighth of a power of two.
const BUCKET: u16 = 16;
/// A best key at or below this level is 36 powers of two below the calibration's average key: too near the scale's end for
/// the others to be told apart.
const DEEP: u16 = 31 * 128;

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
    /// Per head and run, weights by sketch of what are no candidates.
    left: Vec<f32>,
    runs: usize,
    /// Sum of `left`, per head.
    pub(super) total: Vec<f64>,
    /// Weight of what is attended to elsewhere and counts as covered, per head; empty where nothing is.
    pub(super) beside: Vec<f64>,
}

/// Buffers of a scan.
#[derive(Debug, Default)]
pub(super) struct Room {
    weights: Vec<f32>,
    counts: Vec<u32>,
    sample: Sample,
    floors: Vec<Level>,
    kept: Vec<u32>,
    stride: usize,
    found: Vec<usize>,
    /// How many of each head's were found before each unit of [`UNIT`] slots: `[units, heads]`
    before: Vec<usize>,
}

/// Every so many groups of a column, side by side.
#[derive(Debug, Default)]
struct Sample {
    codes: Vec<Line>,
    steps: Vec<f32>,
    masks: Vec<u16>,
    levels: Vec<u16>,
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
        let d = format.head_dim;
        let factor = scale * std::f32::consts::LOG2_E;
        self.coded.begin(format.nibbles());
        self.average.clear();
        self.kinds.clear();
        self.beside.clear();
        for q in q.chunks_exact(d) {
            let dot = |row: &[f32]| dot(row, q) * factor;
            weights.clear();
            weights.extend(basis.queries.chunks_exact(d).take(RANK).map(dot));
            if format.width == Width::Eight {
                weights.extend_from_within(..);
                weights[RANK..].iter_mut().for_each(|weight| *weight /= 16.0);
            }
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

    /// Weights by sketch that a head's candidates leave, per run.
    pub(super) fn left(&self, head: usize) -> &[f32] {
        &self.left[head * self.runs..][..self.runs]
    }

    /// Bytes that grow with keys.
    pub(super) fn bytes(&self) -> usize {
        self.left.len() * 4
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
            if self.kinds[head] == Kind::Sketched && !self.coded.fits(head, column.step_max()) {
                self.kinds[head] = Kind::Exact;
            }
        }
        let wanted: Vec<(usize, f32)> = (0..heads)
            .map(|head| ask(masks.searched.get(masks.sequence(head, heads)).copied().unwrap_or(0)))
            .collect();
        self.guess(column, masks, &wanted, room);
        self.scan(column, masks, 0..heads, room);
        for (head, wanted) in wanted.into_iter().enumerate() {
            self.choose(head, wanted, column, masks, room, out);
        }
    }

    /// Floors of all heads.
    fn guess(&self, column: &Column, masks: &Masks, wanted: &[(usize, f32)], room: &mut Room) {
        let heads = self.heads();
        let every = column.groups().div_ceil(SAMPLE).max(1);
        room.floors.clear();
        room.sample.codes.clear();
        room.sample.steps.clear();
        for group in (0..column.groups()).step_by(every) {
            let keys = column.coded(group..group + 1, &masks.words[0]);
            room.sample.codes.extend_from_slice(keys.codes);
            room.sample.steps.extend_from_slice(keys.steps);
        }
        let mut taken = None;
        for (head, &(count, mass)) in wanted.iter().enumerate() {
            let sequence = masks.sequence(head, heads);
            let searched = masks.searched.get(sequence).copied().unwrap_or(0);
            room.floors.push(match self.kinds[head] {
                _ if count == 0 || searched == 0 => Level(u16::MAX),
                Kind::Dead => Level(u16::MAX),
                Kind::Exact => Level::LOWEST,
                Kind::Sketched if count >= searched && mass >= 1.0 => Level::LOWEST,
                Kind::Sketched => {
                    if taken.replace(sequence) != Some(sequence) {
                        let words = masks.words[sequence].iter().step_by(every);
                        room.sample.masks.clear();
                        room.sample.masks.extend(words);
                    }
                    self.sampled(head, count as f64 / searched as f64, &mut room.sample, &mut room.counts)
                }
            });
        }
    }

    /// Level of about the best `share` of a head's keys.
    fn sampled(&self, head: usize, share: f64, sample: &mut Sample, counts: &mut Vec<u32>) -> Level {
        let Sample {
            codes,
            steps,
            masks,
            levels,
        } = sample;
        let keys = CodedKeys { codes, steps, masks };
        levels.resize(keys.masks.len() * GROUP, 0);
        let stride = levels.len();
        coded_levels(&self.coded, head..head + 1, keys, levels, stride);
        counts.clear();
        counts.resize(usize::from(u16::MAX / BUCKET) + 1, 0);
        for level in &*levels {
            counts[usize::from(level / BUCKET)] += 1;
        }
        // Nothing that is searched has a level of the first bucket.
        counts[0] = 0;
        let sampled: u32 = counts.iter().sum();
        // A few more than wanted: too many cost less than another scan.
        let mut left = (f64::from(sampled) * share * 1.125).ceil() as usize;
        let below = counts.iter().rposition(|&count| {
            let enough = left <= count as usize;
            left = left.saturating_sub(count as usize);
            enough
        });
        below.map_or(Level::LOWEST, |bucket| {
            Level((bucket as u16 * BUCKET).max(Level::LOWEST.0))
        })
    }

    /// Scans all keys for `heads`, from their floors on.
    fn scan(&mut self, column: &Column, masks: &Masks, heads: Range<usize>, room: &mut Room) {
        let groups = column.groups();
        room.found[heads.clone()].fill(0);
        for first in (0..groups).step_by(TILE) {
            let tile = first..(first + TILE).min(groups);
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
                let mut found = Found {
                    floors: &room.floors[at..end],
                    kept: &mut room.kept[at * room.stride..],
                    stride: room.stride,
                    counts: &mut room.found[at..end],
                    sums: &mut self.left[at * self.runs + first / RUN_GROUPS..],
                    sums_stride: self.runs,
                };
                let keys = column.coded(tile.clone(), &masks.words[sequence]);
                coded_scan(&self.coded, at..end, keys, first * GROUP, &mut found);
                at = end;
            }
        }
    }

    /// Of what was kept for a head the best, and what that leaves.
    fn choose(
        &mut self,
        head: usize,
        (count, mass): (usize, f32),
        column: &Column,
        masks: &Masks,
        room: &mut Room,
        out: &mut Candidates,
    ) {
        let searched = masks
            .searched
            .get(masks.sequence(head, self.heads()))
            .copied()
            .unwrap_or(0);
        if self.kinds[head] == Kind::Dead || count == 0 || searched == 0 {
            if self.kinds[head] == Kind::Dead {
                self.left[head * self.runs..][..self.runs].fill(0.0);
            }
            self.total[head] = sum(self.left(head));
            out.ends.push(out.slots.len());
            return;
        }
        let mut down = 2 * BUCKET;
        while room.floors[head] > Level::LOWEST && room.found[head] * 4 < count.min(searched) * 3 {
            let lower = room.floors[head].0.saturating_sub(down).max(Level::LOWEST.0);
            room.floors[head] = Level(lower);
            down = down.saturating_mul(2);
            self.scan(column, masks, head..head + 1, room);
        }
        let mut highest = room.highest(head);
        if self.kinds[head] == Kind::Sketched && (highest >= Level::HIGHEST.0 || highest <= DEEP) {
            self.kinds[head] = Kind::Exact;
            room.floors[head] = Level::LOWEST;
            self.scan(column, masks, head..head + 1, room);
            highest = room.highest(head);
        }
        let floor = room.floors[head].0;
        let kept = &room.kept[head * room.stride..][..room.found[head]];
        let mut edge = floor;
        let mut ties = usize::MAX;
        let mut wanted = if self.kinds[head] == Kind::Exact {
            usize::MAX
        } else {
            count
        };
        if kept.len() > wanted || mass < 1.0 {
            let counts = &mut room.counts;
            counts.clear();
            counts.resize(usize::from(highest - floor) + 1, 0);
            kept.iter()
                .for_each(|kept| counts[usize::from((kept >> 16) as u16 - floor)] += 1);
            if mass < 1.0 && self.kinds[head] != Kind::Exact {
                let found: f64 = weight_of(counts, floor);
                let total = sum(&self.left[head * self.runs..][..self.runs]) + found;
                let beside = self.beside.get(head).copied().unwrap_or(0.0);
                let missed = (1.0 - f64::from(mass)) * (total + beside);
                wanted = wanted.min(enough(counts, floor, total - missed));
            }
            if kept.len() > wanted {
                ties = wanted;
                let above = counts.iter().rev().take_while(|count| {
                    let whole = **count as usize <= ties;
                    ties -= if whole { **count as usize } else { 0 };
                    whole
                });
                edge = highest - above.count() as u16;
            }
        }
        // Written whether they stay or not: which do is not for a processor to guess.
        let start = out.slots.len();
        out.slots.resize(start + kept.len(), 0);
        out.levels.resize(start + kept.len(), Level(0));
        let left = &mut self.left[head * self.runs..][..self.runs];
        let (heads, mut end) = (room.found.len(), start);
        let starts = room.before.iter().skip(head).step_by(heads).copied();
        let ends = starts.clone().skip(1).chain([kept.len()]);
        for (unit, (from, to)) in starts.zip(ends).enumerate() {
            for kept in &kept[from..to] {
                let (level, slot) = ((kept >> 16) as u16, (unit * UNIT) as u32 + (kept & 0xffff));
                let tie = (level == edge) & (ties > 0);
                ties -= usize::from(tie);
                let stays = (level > edge) | tie;
                (out.slots[end], out.levels[end]) = (slot, Level(level));
                end += usize::from(stays);
                if !stays {
                    left[slot as usize / (GROUP * RUN_GROUPS)] += Level(level).weight();
                }
            }
        }
        out.slots.truncate(end);
        out.levels.truncate(end);
        out.ends.push(end);
        self.total[head] = sum(left);
    }
}

impl Room {
    pub(super) fn weights(&mut self) -> &mut Vec<f32> {
        &mut self.weights
    }

    /// Highest level that was kept of a head, or its floor.
    fn highest(&self, head: usize) -> u16 {
        let kept = &self.kept[head * self.stride..][..self.found[head]];
        let levels = kept.iter().map(|kept| (kept >> 16) as u16);
        levels.max().unwrap_or(self.floors[head].0)
    }

    fn prepare(&mut self, heads: usize, groups: usize) {
        self.found.clear();
        self.found.resize(heads, 0);
        let units = (groups * GROUP).div_ceil(UNIT);
        self.before.clear();
        self.before.resize(units * heads, 0);
        // Room is per head: with another number of heads the rows lie elsewhere.
        self.stride = self.kept.len() / heads.max(1);
    }

    /// Makes room for what a tile may add to the rows of `heads`.
    fn grow(&mut self, groups: usize, heads: Range<usize>) {
        let most = self.found[heads].iter().copied().max().unwrap_or(0);
        let wanted = most + room_for(groups);
        if wanted <= self.stride {
            return;
        }
        // A little more than a power of two: rows then do not fall on the same lines of the cache.
        let wider = wanted.next_power_of_two().max(2 * room_for(TILE)) + 2 * GROUP;
        let mut moved = vec![0; wider * self.found.len()];
        for (head, found) in self.found.iter().enumerate() {
            moved[head * wider..][..*found].copy_from_slice(&self.kept[head * self.stride..][..*found]);
        }
        (self.kept, self.stride) = (moved, wider);
    }
}

/// Weight of all that is counted: `counts[i]` keys have level `lowest + i`.
fn weight_of(counts: &[u32], lowest: u16) -> f64 {
    let weights = counts.iter().zip(lowest..).filter(|(count, _)| **count > 0);
    weights
        .map(|(count, level)| f64::from(*count) * f64::from(Level(level).weight()))
        .sum()
}

/// How many candidates to re-score for a mass by sketch of `wanted`: twice as many as hold it, since sketches misjudge ranks.
/// `counts[i]` candidates have level `lowest + i`.
fn enough(counts: &[u32], lowest: u16, wanted: f64) -> usize {
    /// Twice the fewest keys that hold the mass, and never fewer than these.
    const LEAST: usize = 32;
    let (mut sum, mut keys) = (0.0, 0);
    for (above, count) in counts.iter().enumerate().rev().filter(|(_, count)| **count > 0) {
        sum += f64::from(*count) * f64::from(Level(lowest + above as u16).weight());
        keys += *count as usize;
        if sum >= wanted {
            return (2 * keys).max(LEAST);
        }
    }
    usize::MAX
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
