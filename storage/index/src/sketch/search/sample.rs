//! A sample of a column's keys, and what it says of a head: from which level on its best keys lie, how far below them their
//! centroids, and how the scores of the others.

use kvasir_simd::{CodedKeys, CodedQueries, GROUP, Level, Line, RUN_GROUPS, coded_levels};

use super::{BUCKET, Lean, Masks, SHORT};
use crate::sketch::{
    cluster::{SAMPLES, SEGMENT_GROUPS, sampled},
    column::Column,
};

/// Groups looked at, of samples and others.
const SAMPLE: usize = 256;
/// Of so many of a head's best keys the group is not scanned.
const LOST: f64 = 0.03;

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
    levels: Vec<u16>,
    /// Keys of the head last looked at, by level.
    counts: Vec<u32>,
    gaps: Vec<u16>,
}

impl Sample {
    /// Takes those of `column`.
    pub(super) fn take(&mut self, column: &Column, masks: &Masks) {
        let (clustered, groups) = (column.clustered_groups(), column.groups());
        // Samples of few segments would be few keys.
        let samples = if clustered > SHORT {
            clustered / SEGMENT_GROUPS * SAMPLES
        } else {
            0
        };
        let apart = if samples > 0 {
            samples.div_ceil(SAMPLE)
        } else {
            groups.div_ceil(SAMPLE).max(1)
        };
        self.samples.clear();
        self.codes.clear();
        self.steps.clear();
        (self.sequence, self.head) = (None, None);
        for at in (0..samples).step_by(apart) {
            // Of segments by turns another one.
            let (segment, own) = (at / SAMPLES, (at + at / SAMPLES) % SAMPLES);
            let (codes, step) = column.sample(segment, own);
            self.codes.extend_from_slice(codes);
            self.steps.push(step);
            self.samples.push((segment as u32, own as u32));
        }
        // As many of these keys as of those.
        self.every = if samples > 0 {
            apart * SEGMENT_GROUPS / SAMPLES
        } else {
            apart
        };
        self.from = if samples > 0 { clustered } else { 0 };
        for group in (self.from..groups).step_by(self.every) {
            let keys = column.coded(group..group + 1, &masks.words[0]);
            self.codes.extend_from_slice(keys.codes);
            self.steps.extend_from_slice(keys.steps);
        }
    }

    /// Finds the levels of a head of `sequence`; 0 of what it does not search.
    pub(super) fn look(
        &mut self,
        queries: &CodedQueries,
        head: usize,
        column: &Column,
        masks: &Masks,
        sequence: usize,
    ) {
        if self.sequence.replace(sequence) != Some(sequence) {
            self.mask(&masks.words[sequence]);
            self.head = None;
        }
        if self.head.replace(head) == Some(head) {
            return;
        }
        self.levels.resize(self.masks.len() * GROUP, 0);
        let keys = CodedKeys {
            codes: &self.codes,
            steps: &self.steps,
            masks: &self.masks,
        };
        let stride = self.levels.len();
        coded_levels(queries, head..head + 1, keys, &mut self.levels, stride);
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

    /// Of clustered segments, the levels of sixteen keys and those of their groups in `near`; and the level of the centroid of the run of
    /// each.
    fn clustered<'a>(&'a self, near: &'a [u16]) -> impl Iterator<Item = ([u16; GROUP], [u16; GROUP], [Level; GROUP])> {
        let samples = self.levels.as_chunks::<GROUP>().0.iter().zip(&self.samples);
        samples.map(|(levels, &(segment, sample))| {
            let near = &near[segment as usize * SEGMENT_GROUPS..][..SEGMENT_GROUPS];
            // A sample has a key of every run, in their order.
            let runs: [[u16; RUN_GROUPS]; GROUP] = near.as_chunks().0.first_chunk().copied().unwrap_or_default();
            let groups = runs.map(|run| run[sample as usize]);
            (*levels, groups, runs.map(centre))
        })
    }

    /// Counts keys by level.
    fn count(&mut self) {
        self.counts.clear();
        self.counts.resize(usize::from(u16::MAX / BUCKET) + 1, 0);
        for level in &self.levels {
            self.counts[usize::from(level / BUCKET)] += 1;
        }
        // Nothing that is searched has a level of the first bucket.
        self.counts[0] = 0;
    }

    /// Level of about the best `share` of the counted keys.
    fn best(&self, share: f64) -> Level {
        let sampled: u32 = self.counts.iter().sum();
        // A few more than wanted: too many cost less than another scan.
        let mut left = (f64::from(sampled) * share * 1.125).ceil() as usize;
        let below = self.counts.iter().rposition(|&count| {
            let enough = left <= count as usize;
            left = left.saturating_sub(count as usize);
            enough
        });
        below.map_or(Level::LOWEST, |bucket| {
            Level((bucket as u16 * BUCKET).max(Level::LOWEST.0))
        })
    }

    /// Levels of about the best keys of the head that was looked at last, by share of all; the second of a larger share.
    pub(super) fn floors(&self, shares: [f64; 2]) -> [Level; 2] {
        shares.map(|share| self.best(share))
    }

    /// How far below `floor` the centroids lie, whose levels are `near`, of most keys that are on it or above; keys from `high` to it
    /// are taken for ones that are on it. And what a key of groups still further below weighs on average, over what their centroid does.
    pub(super) fn gap(&mut self, near: &[u16], [floor, high]: [Level; 2]) -> (u16, f32) {
        let mut gaps = std::mem::take(&mut self.gaps);
        gaps.clear();
        for (levels, groups, _) in self.clustered(near) {
            for (level, group) in levels.into_iter().zip(groups).filter(|(level, _)| *level >= high.0) {
                gaps.push(level.min(floor.0).saturating_sub(group));
            }
        }
        let most = gaps.len().saturating_sub(1 + (gaps.len() as f64 * LOST) as usize);
        // Where nothing is known all are scanned.
        let gap = if gaps.is_empty() {
            u16::MAX
        } else {
            *gaps.select_nth_unstable(most).1
        };
        self.gaps = gaps;
        let from = floor.0.saturating_sub(gap);
        let (mut exact, mut by_centroid) = (0.0_f64, 0.0_f64);
        for (levels, groups, _) in self.clustered(near) {
            let (mut own, mut by_group) = (0.0_f32, 0.0_f32);
            for (level, group) in levels.into_iter().zip(groups) {
                let counts = (level > 0) & (group < from);
                own += if counts { Level(level).weight() } else { 0.0 };
                by_group += if counts { Level(group).weight() } else { 0.0 };
            }
            exact += f64::from(own);
            by_centroid += f64::from(by_group);
        }
        let excess = if by_centroid > 0.0 { exact / by_centroid } else { 1.0 };
        (gap, excess as f32)
    }

    /// How the scores of the head that was looked at last lie. `centres` of runs that are not clustered are told what their mean stands
    /// for.
    pub(super) fn lean(&self, near: &[u16], floor: Level, centres: &mut [Level]) -> Lean {
        let others = &self.levels.as_chunks::<GROUP>().0[self.samples.len()..];
        let sum_of = |levels: &[u16]| levels.iter().map(|level| u32::from(*level)).sum::<u32>();
        let count: u64 = self.counts.iter().map(|count| u64::from(*count)).sum();
        let sum: u64 = self.levels.chunks(GROUP).map(|levels| u64::from(sum_of(levels))).sum();
        let mean = Level(sum.checked_div(count).unwrap_or_default() as u16);
        centres[near.len() / RUN_GROUPS..].fill(mean);
        let (mut squares, mut weights, mut moments) = (0.0_f64, 0.0_f64, 0.0_f64);
        let others = others.iter().enumerate().map(|(at, levels)| {
            let run = (self.from + at * self.every) / RUN_GROUPS;
            let centre = near.as_chunks().0.get(run).map_or(mean, |run| centre(*run));
            (*levels, [centre; GROUP])
        });
        let clustered = self.clustered(near).map(|(levels, _, centres)| (levels, centres));
        for (levels, centres) in clustered.chain(others) {
            let (mut square, mut weight, mut moment) = (0.0_f32, 0.0_f32, 0.0_f32);
            for (level, centre) in levels.into_iter().zip(centres) {
                let above = Level(level).above_average() - centre.above_average();
                let above = if level > 0 { above } else { 0.0 };
                let below = if level < floor.0 { Level(level).weight() } else { 0.0 };
                square += above * above;
                weight += below;
                moment += below * above;
            }
            squares += f64::from(square);
            weights += f64::from(weight);
            moments += f64::from(moment);
        }
        Lean {
            variance: (squares / count.max(1) as f64) as f32,
            away: if weights > 0.0 { moments / weights } else { 0.0 },
            left: 0.0,
        }
    }
}

/// Level of the centroid of a run whose groups' have these.
fn centre([a, b, c, d]: [u16; RUN_GROUPS]) -> Level {
    Level(((u32::from(a) + u32::from(b) + u32::from(c) + u32::from(d)) / RUN_GROUPS as u32) as u16)
}
