//! Levels of every key for every query head, and the choice of candidates from them.
//!
//! A *slot* is a key's place in the order of scanning, blocks rounded up to groups of sixteen; slots beyond a block's keys,
//! masked and excluded ones have level 0. A *run* is what shares one mean of values: four groups of one block, or fewer.

use std::ops::Range;

use kvasir_simd::{CodedKeys, CodedQueries, GROUP, Level, Levels, at_least, coded_scores};

use super::format::{RANK, RUN, SketchFormat, View, Width};
use crate::HeadBasis;

/// Groups per run.
const RUN_GROUPS: usize = RUN / GROUP;
/// Levels looked at to guess where the wanted number of candidates begins.
const SAMPLE: usize = 4096;
/// Levels per bucket of the guess: an eighth of a power of two.
const BUCKET: u16 = 16;

/// What a query head is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Sketched,
    /// Its scores spread too far for levels: every key is a candidate.
    Exact,
    /// Not finite: nothing is found.
    Dead,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    coded: CodedQueries,
    /// Base-2 score of the average key, per head.
    pub(super) average: Vec<f32>,
    pub(super) kinds: Vec<Kind>,
    /// Keys searched, per head.
    pub(super) searched: Vec<usize>,
    pub(super) slots: usize,
    pub(super) runs: usize,
    /// `[heads][slots_room]` and `[heads][runs_room]`.
    levels: Vec<u16>,
    slots_room: usize,
    sums: Vec<f32>,
    runs_room: usize,
    weights: Vec<f32>,
    counts: Vec<u32>,
}

impl Table {
    pub(super) fn begin(&mut self, format: SketchFormat, q: &[f32], basis: &HeadBasis, scale: f32) {
        let d = format.head_dim;
        let factor = scale * std::f32::consts::LOG2_E;
        self.coded.begin(format.nibbles());
        self.average.clear();
        self.kinds.clear();
        for q in q.chunks_exact(d) {
            let dot = |row: &[f32]| row.iter().zip(q).map(|(a, b)| a * b).sum::<f32>() * factor;
            self.weights.clear();
            self.weights.extend(basis.queries.chunks_exact(d).take(RANK).map(dot));
            if format.width == Width::Eight {
                self.weights.extend_from_within(..);
                self.weights[RANK..].iter_mut().for_each(|weight| *weight /= 16.0);
            }
            self.coded.push(&self.weights);
            let average = dot(&basis.mean);
            self.kinds.push(match () {
                () if !q.iter().all(|q| q.is_finite()) => Kind::Dead,
                () if !average.is_finite() || !self.weights.iter().all(|w| w.is_finite()) => Kind::Exact,
                () => Kind::Sketched,
            });
            self.average.push(if average.is_finite() { average } else { 0.0 });
        }
        self.searched.clear();
        self.searched.resize(self.kinds.len(), 0);
        (self.slots, self.runs) = (0, 0);
        // Room is per head: with another number of heads the rows lie elsewhere.
        self.slots_room = self.levels.len() / self.heads().max(1);
        self.runs_room = self.sums.len() / self.heads().max(1);
    }

    pub(super) fn heads(&self) -> usize {
        self.kinds.len()
    }

    /// Scores a block for `heads`; a bit of `mask` per key says whether it is searched. All heads of a block are added before
    /// [`Table::end_block`].
    pub(super) fn add(&mut self, view: &View<'_>, heads: Range<usize>, mask: &[u16]) {
        let groups = mask.len();
        let (slots, runs) = (groups * GROUP, groups.div_ceil(RUN_GROUPS));
        grow(
            &mut self.levels,
            &mut self.slots_room,
            self.kinds.len(),
            self.slots,
            slots,
        );
        grow(&mut self.sums, &mut self.runs_room, self.kinds.len(), self.runs, runs);
        let all = mask.iter().all(|word| *word == u16::MAX);
        let keys = CodedKeys {
            codes: view.codes,
            step: view.step,
            mask: (!all).then_some(mask),
        };
        let searched: usize = mask.iter().map(|word| word.count_ones() as usize).sum();
        for head in heads.clone() {
            self.searched[head] += searched;
            if self.kinds[head] == Kind::Sketched && !self.coded.fits(head, view.step) {
                self.kinds[head] = Kind::Exact;
            }
        }
        let mut out = Levels {
            levels: &mut self.levels[heads.start * self.slots_room + self.slots..],
            stride: self.slots_room,
            sums: &mut self.sums[heads.start * self.runs_room + self.runs..],
            sums_stride: self.runs_room,
            run: RUN_GROUPS,
        };
        coded_scores(&self.coded, heads, keys, &mut out);
    }

    pub(super) fn end_block(&mut self, groups: usize) {
        self.slots += groups * GROUP;
        self.runs += groups.div_ceil(RUN_GROUPS);
    }

    pub(super) fn levels(&self, head: usize) -> &[u16] {
        &self.levels[head * self.slots_room..][..self.slots]
    }

    /// Sums of weights per run.
    pub(super) fn sums(&self, head: usize) -> &[f32] {
        &self.sums[head * self.runs_room..][..self.runs]
    }

    /// Puts the best at most `count` slots by sketch into `out`, rising; fewer where about half as many hold `target_mass` of
    /// the mass by sketch. Ties go to the lower slot.
    pub(super) fn candidates(&mut self, head: usize, count: usize, target_mass: f32, out: &mut Vec<u32>) {
        out.clear();
        let searched = self.searched[head];
        if self.kinds[head] == Kind::Dead || count == 0 || searched == 0 {
            return;
        }
        let levels = &self.levels[head * self.slots_room..][..self.slots];
        if self.kinds[head] == Kind::Exact || (count >= searched && target_mass >= 1.0) {
            at_least(levels, 1, 0, out);
            return;
        }
        let mut lowest = guess(levels, count.min(searched), searched, &mut self.counts);
        let mut down = 2 * BUCKET;
        loop {
            out.clear();
            at_least(levels, lowest, 0, out);
            if lowest <= 1 || out.len() * 4 >= count.min(searched) * 3 {
                break;
            }
            lowest = lowest.saturating_sub(down).max(1);
            down = down.saturating_mul(2);
        }
        let mut wanted = count;
        if target_mass >= 1.0 && out.len() <= wanted {
            return;
        }
        let highest = out.iter().map(|slot| levels[*slot as usize]).max().unwrap_or(lowest);
        let counts = &mut self.counts;
        counts.clear();
        counts.resize(usize::from(highest - lowest) + 1, 0);
        out.iter()
            .for_each(|slot| counts[usize::from(levels[*slot as usize] - lowest)] += 1);
        if target_mass < 1.0 {
            let sums = &self.sums[head * self.runs_room..][..self.runs];
            let total: f64 = sums.iter().map(|sum| f64::from(*sum)).sum();
            wanted = wanted.min(enough(counts, lowest, total * f64::from(target_mass)));
        }
        if out.len() > wanted {
            let mut ties = wanted;
            let above = counts.iter().rev().take_while(|count| {
                let whole = **count as usize <= ties;
                ties -= if whole { **count as usize } else { 0 };
                whole
            });
            let edge = highest - above.count() as u16;
            // Written whether kept or not: which are is not for a processor to guess.
            let mut kept = 0;
            for at in 0..out.len() {
                let slot = out[at];
                let level = levels[slot as usize];
                let tie = level == edge && ties > 0;
                ties -= usize::from(tie);
                out[kept] = slot;
                kept += usize::from((level > edge) | tie);
            }
            out.truncate(kept);
        }
    }
}

/// Makes room for `more` elements behind the first `used` of each of `rows` rows.
fn grow<T: Copy + Default>(table: &mut Vec<T>, room: &mut usize, rows: usize, used: usize, more: usize) {
    if used + more <= *room {
        return;
    }
    // A little more than a power of two: rows then do not fall on the same lines of the cache.
    let wider = (used + more).next_power_of_two().max(1024) + 2 * GROUP;
    let mut moved = vec![T::default(); wider * rows];
    for row in 0..rows {
        moved[row * wider..][..used].copy_from_slice(&table[row * *room..][..used]);
    }
    (*table, *room) = (moved, wider);
}

/// The level of about the `count`-th best of `searched` keys, from a sample of whole groups.
fn guess(levels: &[u16], count: usize, searched: usize, counts: &mut Vec<u32>) -> u16 {
    if count >= searched {
        return 1;
    }
    let groups = levels.as_chunks::<GROUP>().0;
    let every = (levels.len() / SAMPLE).max(1);
    counts.clear();
    counts.resize(usize::from(u16::MAX / BUCKET) + 1, 0);
    for level in groups.iter().step_by(every).flatten() {
        counts[usize::from(level / BUCKET)] += 1;
    }
    // Nothing that is searched has a level of the first bucket.
    counts[0] = 0;
    let sampled: u32 = counts.iter().sum();
    // A few more than wanted: too many cost less than another pass.
    let mut left = (sampled as usize * count).div_ceil(searched) * 9 / 8;
    let below = counts.iter().rposition(|&count| {
        let enough = left <= count as usize;
        left = left.saturating_sub(count as usize);
        enough
    });
    below.map_or(1, |bucket| bucket as u16 * BUCKET).max(1)
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
