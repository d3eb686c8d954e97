//! A sample of a column's keys, and what it says of a head: from which level on its best keys lie, how far below them their
//! centroids, and how the scores of the others.

use kvasir_simd::{
    CodedKeys, CodedQueries, GROUP, Level, Line, RUN_GROUPS, Spread, centres as run_centres, coded_levels, gaps,
    spread, weights_beside,
};

use super::{BUCKET, Lean, Masks, SHORT};
use crate::sketch::{
    cluster::{SAMPLES, SEGMENT_GROUPS, sampled},
    column::Column,
};

/// Groups looked at, of samples and others: as many, or of a long column one in so many and at most four times as many.
const SAMPLE: usize = 256;
const SAMPLE_OF: usize = 64;
/// Of so many of a head's best keys the group is not scanned.
const LOST: f64 = 0.02;

/// Some of a column's keys: samples of its clustered segments, then whole groups.
#[derive(Debug, Default)]
pub(super) struct Sample {
    /// Samples of clustered segments: the segment, and which of its samples.
    samples: Vec<(u32, u32)>,
    /// Of other groups, from one on, every so many.
    from: usize,
    every: usize,
    /// Of samples, then of groups, side by side.
    codes: Vec<Line>,
    steps: Vec<f32>,
    masks: Vec<u16>,
    /// Whose masks these are.
    sequence: Option<usize>,
    /// Of which head.
    head: Option<usize>,
    levels: Vec<[u16; GROUP]>,
    /// Searched keys of the head last looked at, and by level.
    searched: usize,
    lowest: u16,
    counts: Vec<u32>,
    /// Levels of what stands for each key: of a sample's keys their groups' centroids, of all keys their runs'.
    groups: Vec<[u16; GROUP]>,
    centres: Vec<[u16; GROUP]>,
    gaps: Vec<u16>,
}

/// What is known of the centroids of a head's keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gap {
    /// How far below its floor a centroid may lie whose group is scanned.
    pub(super) below: u16,
    /// What a key of other groups weighs on average, over what their centroid does.
    pub(super) excess: f32,
    /// Share of the groups that is scanned.
    pub(super) share: f64,
}

impl Default for Gap {
    /// All are scanned.
    fn default() -> Self {
        Self {
            below: u16::MAX,
            excess: 1.0,
            share: 1.0,
        }
    }
}

impl Sample {
    /// Takes those of `column`.
    pub(super) fn take(&mut self, column: &Column, masks: &Masks) {
        let (clustered, groups) = (column.clustered_groups(), column.groups());
        self.samples.clear();
        self.codes.clear();
        self.steps.clear();
        (self.sequence, self.head) = (None, None);
        let samples = clustered / SEGMENT_GROUPS * SAMPLES;
        // All of a short column's: of few segments few would be few keys.
        let limit = if clustered > SHORT {
            (groups / SAMPLE_OF).clamp(SAMPLE, 4 * SAMPLE)
        } else {
            samples
        };
        let apart = samples.div_ceil(limit.max(1)).max(1);
        for at in (0..samples).step_by(apart) {
            // One after another of those that a segment has, and of each segment others than of the one before.
            let (segment, turn) = (at / SAMPLES, at % SAMPLES / apart);
            let own = (turn + segment) % SAMPLES;
            let (codes, step) = column.sample(segment, own);
            self.codes.extend_from_slice(codes);
            self.steps.push(step);
            self.samples.push((segment as u32, own as u32));
        }
        // As many of the keys of other groups.
        self.every = if samples > 0 {
            apart * SEGMENT_GROUPS / SAMPLES
        } else {
            groups.div_ceil(SAMPLE).max(1)
        };
        self.from = clustered;
        for group in (self.from..groups).step_by(self.every) {
            let keys = column.coded(group..group + 1, &masks.words[0]);
            self.codes.extend_from_slice(keys.codes);
            self.steps.extend_from_slice(keys.steps);
        }
    }

    /// Finds the levels of a head of `sequence`; 0 of what it does not search.
    pub(super) fn look(&mut self, queries: &CodedQueries, head: usize, masks: &Masks, sequence: usize) {
        if self.sequence.replace(sequence) != Some(sequence) {
            self.mask(&masks.words[sequence]);
            self.head = None;
        }
        if self.head.replace(head) == Some(head) {
            return;
        }
        self.levels.resize(self.masks.len(), [0; GROUP]);
        let keys = CodedKeys {
            codes: &self.codes,
            steps: &self.steps,
            masks: &self.masks,
        };
        let levels = self.levels.as_flattened_mut();
        let stride = levels.len();
        coded_levels(queries, head..head + 1, keys, levels, stride);
        self.count();
    }

    /// Which keys of the sample are searched, given `words` of all groups.
    fn mask(&mut self, words: &[u16]) {
        let (own, others) = words.split_at(self.from);
        self.masks.clear();
        self.masks.extend(self.samples.iter().map(|&(segment, sample)| {
            let words = &own[segment as usize * SEGMENT_GROUPS..][..SEGMENT_GROUPS];
            (0..GROUP).fold(0, |mask, at| {
                let (group, key) = sampled(sample as usize, at);
                mask | ((words[group] >> key) & 1) << at
            })
        }));
        self.masks.extend(others.iter().step_by(self.every));
    }

    /// Counts keys by level.
    fn count(&mut self) {
        let levels = self.levels.as_flattened();
        // Of keys that are not searched 0, which is below all others.
        let (lowest, highest) = levels.iter().fold((u16::MAX, 0), |(low, high), level| {
            (low.min(level.wrapping_sub(1)), high.max(*level))
        });
        self.lowest = lowest.saturating_add(1).min(highest);
        self.counts.clear();
        self.counts.resize(usize::from((highest - self.lowest) / BUCKET) + 1, 0);
        let mut others = 0;
        for level in levels {
            let above = level.saturating_sub(self.lowest);
            others += u32::from(*level == 0);
            self.counts[usize::from(above / BUCKET)] += 1;
        }
        self.counts[0] -= others;
        self.searched = levels.len() - others as usize;
    }

    /// Level of about the best `share` of the counted keys.
    fn best(&self, share: f64) -> Level {
        // A few more than wanted: too many cost less than another scan.
        let mut left = (self.searched as f64 * share * 1.125).ceil() as usize;
        let below = self.counts.iter().rposition(|&count| {
            let enough = left <= count as usize;
            left = left.saturating_sub(count as usize);
            enough
        });
        below.map_or(Level::LOWEST, |bucket| {
            Level((self.lowest + bucket as u16 * BUCKET).max(Level::LOWEST.0))
        })
    }

    /// Levels of about the best keys of the head that was looked at last, by share of all; the second of a larger share.
    pub(super) fn floors(&self, shares: [f64; 2]) -> [Level; 2] {
        shares.map(|share| self.best(share))
    }

    /// How far below `floor` the centroids lie, whose levels are `near`, of most keys that are on it or above; keys from `high` to it
    /// are taken for ones that are on it.
    pub(super) fn gap(&mut self, near: &[u16], [floor, high]: [Level; 2]) -> Gap {
        let groups = self.samples.iter().map(|&(segment, sample)| {
            let own = &near[segment as usize * SEGMENT_GROUPS..][..SEGMENT_GROUPS];
            std::array::from_fn(|at| own[sampled(sample as usize, at).0])
        });
        self.groups.clear();
        self.groups.extend(groups);
        let levels = &self.levels[..self.samples.len()];
        let found = &mut self.gaps;
        found.clear();
        gaps(levels, &self.groups, high, floor, found);
        let most = found.len().saturating_sub(1 + (found.len() as f64 * LOST) as usize);
        if found.is_empty() {
            // Nothing is known: all are scanned.
            return Gap::default();
        }
        let below = *found.select_nth_unstable(most).1;
        let from = floor.0.saturating_sub(below);
        let (exact, by_centroid) = weights_beside(levels, &self.groups, from);
        let excess = if by_centroid > 0.0 { exact / by_centroid } else { 1.0 };
        let listed = |groups: &[u16; GROUP]| groups.iter().map(|level| u32::from(*level >= from)).sum::<u32>();
        let count: u32 = self.groups.iter().map(listed).sum();
        Gap {
            below,
            excess: excess as f32,
            share: f64::from(count) / (self.groups.len() * GROUP) as f64,
        }
    }

    /// How the scores of the head that was looked at last lie. `centres` are told what the mean of each run stands for: where `near` has
    /// its groups' centroids their own, of other runs that of all.
    pub(super) fn lean(&mut self, near: &[u16], floor: Level, centres: &mut [Level]) -> Lean {
        let sum_of = |levels: &[u16; GROUP]| u64::from(levels.iter().map(|level| u32::from(*level)).sum::<u32>());
        let sum: u64 = self.levels.iter().map(sum_of).sum();
        let mean = Level(sum.checked_div(self.searched as u64).unwrap_or_default() as u16);
        let (clustered, others) = centres.split_at_mut(near.len() / RUN_GROUPS);
        run_centres(near, clustered);
        others.fill(mean);
        // A sample has a key of every run of its segment, in their order.
        let own = self.samples.iter().map(|&(segment, _)| {
            let runs = &clustered[segment as usize * GROUP..][..GROUP];
            std::array::from_fn(|at| runs[at].0)
        });
        self.centres.clear();
        self.centres.extend(own);
        self.centres.resize(self.levels.len(), [mean.0; GROUP]);
        let Spread {
            squares,
            weights,
            moments,
        } = spread(&self.levels, &self.centres, floor);
        Lean {
            variance: (squares / self.searched.max(1) as f64) as f32,
            away: if weights > 0.0 { moments / weights } else { 0.0 },
            left: 0.0,
        }
    }
}
