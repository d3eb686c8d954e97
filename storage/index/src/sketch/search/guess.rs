//! What a sample of a column's keys says before and after a scan: from which level on a head's candidates begin, and how far the
//! scores of what they leave lie from the average.

use kvasir_simd::{CodedKeys, CodedQueries, GROUP, Level, Line, RUN_GROUPS, coded_levels};

use super::{BUCKET, Kind, Masks, Room, Table};
use crate::sketch::{
    cluster::{SAMPLES, SEGMENT_GROUPS, sampled},
    column::Column,
};

/// One in so many keys is few.
const FEW: usize = 100;
/// Groups looked at of keys that are not clustered.
const SAMPLE: usize = 256;
/// Of clustered ones there are samples of sixteen keys of a segment, of which all are looked at while there are no more than so many.
const SAMPLES_MAX: usize = 1024;
/// Of the best keys of a sample, or of as many as are wanted where that is more, it is known how far below them their centroids lie.
const GAP_OF: f64 = 0.03;
/// Of so many of them the group is not scanned.
const GAP_LOST: f64 = 0.03;

/// Some of a column's keys: samples of its clustered segments, then whole groups.
#[derive(Debug, Default)]
pub(super) struct Sample {
    /// Samples of each clustered segment, and how many such segments there are.
    samples: usize,
    segments: usize,
    /// Of other groups every so many, side by side.
    every: usize,
    codes: Vec<Line>,
    steps: Vec<f32>,
    /// Of samples, then of groups.
    masks: Vec<u16>,
    /// Whose masks these are.
    sequence: Option<usize>,
    /// Of which head.
    head: Option<usize>,
    levels: Vec<u16>,
    gaps: Vec<u16>,
}

/// Where the scores by sketch of the keys that are no candidates lie, in powers of two above those that their means stand for.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::sketch) struct Lean {
    /// Variance of all searched keys; 0 where nothing is known.
    pub(in crate::sketch) variance: f32,
    /// Mean of those below the floor, by weight.
    pub(super) away: f64,
    /// Sum of weights times scores, of what candidates leave.
    pub(in crate::sketch) left: f64,
}

impl Table {
    /// Floors of all heads, gaps of groups below them, and where scores lie.
    pub(super) fn guess(&mut self, column: &Column, masks: &Masks, wanted: &[(usize, f32)], room: &mut Room) {
        let heads = self.heads();
        room.floors.clear();
        room.first.gaps.clear();
        room.first.excess.clear();
        room.sample.take(column, masks);
        room.few = true;
        let learnt = !column.slopes().is_empty();
        self.leans.clear();
        self.centres
            .resize(if learnt { heads * self.runs } else { 0 }, Level(0));
        for (head, &(count, mass)) in wanted.iter().enumerate() {
            let sequence = masks.sequence(head, heads);
            let searched = masks.searched.get(sequence).copied().unwrap_or(0);
            room.few &= count <= searched / FEW;
            let mut gap = (0, 1.0);
            let floor = match self.kinds[head] {
                _ if count == 0 || searched == 0 => Level(u16::MAX),
                Kind::Dead => Level(u16::MAX),
                Kind::Exact => Level::LOWEST,
                Kind::Sketched if count >= searched && mass >= 1.0 => Level::LOWEST,
                Kind::Sketched => {
                    room.sample.look(&self.coded, head, column, masks, sequence);
                    let levels = &room.sample.levels;
                    let share = count as f64 / searched as f64;
                    let floor = best(levels, share, &mut room.counts);
                    if column.clustered_groups() > 0 {
                        let high = best(levels, share.max(GAP_OF), &mut room.counts);
                        gap = room.sample.gap(room.first.levels(head), floor, high);
                    }
                    floor
                }
            };
            room.floors.push(floor);
            room.first.gaps.push(gap.0);
            room.first.excess.push(gap.1);
            if learnt {
                let centres = &mut self.centres[head * self.runs..][..self.runs];
                self.leans.push(match self.kinds[head] {
                    Kind::Sketched if searched > 0 => {
                        room.sample.look(&self.coded, head, column, masks, sequence);
                        room.sample.lean(room.first.levels(head), floor, centres)
                    }
                    _ => Lean::default(),
                });
            }
        }
    }
}

impl Sample {
    /// Takes those of `column`.
    fn take(&mut self, column: &Column, masks: &Masks) {
        self.segments = column.clustered_groups() / SEGMENT_GROUPS;
        self.samples = (SAMPLES_MAX / self.segments.max(1)).clamp(1, SAMPLES);
        self.every = if self.segments > 0 {
            // As many of these keys as of those.
            SEGMENT_GROUPS / self.samples
        } else {
            column.groups().div_ceil(SAMPLE).max(1)
        };
        self.codes.clear();
        self.steps.clear();
        (self.sequence, self.head) = (None, None);
        for group in (column.clustered_groups()..column.groups()).step_by(self.every) {
            let keys = column.coded(group..group + 1, &masks.words[0]);
            self.codes.extend_from_slice(keys.codes);
            self.steps.extend_from_slice(keys.steps);
        }
    }

    /// Levels of a head of `sequence`; 0 of what it does not search.
    fn look(&mut self, queries: &CodedQueries, head: usize, column: &Column, masks: &Masks, sequence: usize) {
        if self.sequence.replace(sequence) != Some(sequence) {
            self.mask(&masks.words[sequence]);
            self.head = None;
        }
        if self.head.replace(head) == Some(head) {
            return;
        }
        self.levels.resize(self.masks.len() * GROUP, 0);
        let (masks, others) = self.masks.split_at(self.samples * self.segments);
        let (levels, rest) = self.levels.split_at_mut(masks.len() * GROUP);
        let each = self.segments.max(1);
        let samples = masks.chunks(each).zip(levels.chunks_mut(each * GROUP));
        for (sample, (masks, levels)) in samples.enumerate() {
            let stride = levels.len();
            coded_levels(queries, head..head + 1, column.sample(sample, masks), levels, stride);
        }
        let keys = CodedKeys {
            codes: &self.codes,
            steps: &self.steps,
            masks: others,
        };
        let stride = rest.len();
        coded_levels(queries, head..head + 1, keys, rest, stride);
    }

    /// Which keys of the sample are searched, given `words` of all groups.
    fn mask(&mut self, words: &[u16]) {
        let (clustered, others) = words.split_at(self.segments * SEGMENT_GROUPS);
        self.masks.clear();
        for sample in 0..self.samples {
            let segments = clustered.chunks_exact(SEGMENT_GROUPS);
            self.masks.extend(segments.map(|words| {
                (0..GROUP).fold(0, |mask, at| {
                    let (group, key) = sampled(sample, at);
                    mask | ((words[group] >> key) & 1) << at
                })
            }));
        }
        self.masks.extend(others.iter().step_by(self.every));
    }

    /// Levels of the keys of clustered segments, each with its group.
    fn clustered(&self) -> impl Iterator<Item = (u16, usize)> {
        let own = &self.levels[..self.samples * self.segments * GROUP];
        own.chunks_exact(GROUP).enumerate().flat_map(|(of, levels)| {
            let (sample, segment) = (of / self.segments, of % self.segments);
            let group = move |at| segment * SEGMENT_GROUPS + sampled(sample, at).0;
            levels.iter().enumerate().map(move |(at, level)| (*level, group(at)))
        })
    }

    /// How far below `floor` the centroids lie, whose levels are `near`, of most keys that are on it or above; keys from `high` to it
    /// are taken for ones that are on it. And what a key of groups still further below weighs on average, over what their centroid does.
    fn gap(&mut self, near: &[u16], floor: Level, high: Level) -> (u16, f32) {
        let mut gaps = std::mem::take(&mut self.gaps);
        gaps.clear();
        let above = self.clustered().filter(|(level, _)| *level >= high.0);
        gaps.extend(above.map(|(level, group)| level.min(floor.0).saturating_sub(near[group])));
        let most = gaps.len().saturating_sub(1 + (gaps.len() as f64 * GAP_LOST) as usize);
        // Where nothing is known all are scanned.
        let gap = if gaps.is_empty() {
            u16::MAX
        } else {
            *gaps.select_nth_unstable(most).1
        };
        self.gaps = gaps;
        let from = floor.0.saturating_sub(gap);
        let (mut exact, mut by_centroid) = (0.0_f64, 0.0_f64);
        let below = self
            .clustered()
            .filter(|(level, group)| *level > 0 && near[*group] < from);
        for (level, group) in below {
            exact += f64::from(Level(level).weight());
            by_centroid += f64::from(Level(near[group]).weight());
        }
        let excess = if by_centroid > 0.0 { exact / by_centroid } else { 1.0 };
        (gap, excess as f32)
    }

    /// How scores lie whose levels were looked at last: `centres` of runs that are not clustered are told what their mean stands for.
    fn lean(&self, near: &[u16], floor: Level, centres: &mut [Level]) -> Lean {
        let (mut sum, mut count) = (0_u64, 0_u32);
        for level in self.levels.iter().filter(|level| **level > 0) {
            sum += u64::from(*level);
            count += 1;
        }
        let mean = Level((sum / u64::from(count.max(1))) as u16);
        centres[near.len() / RUN_GROUPS..].fill(mean);
        let centre = |group: usize| {
            let run = &near[group / RUN_GROUPS * RUN_GROUPS..][..RUN_GROUPS];
            Level((run.iter().map(|level| u32::from(*level)).sum::<u32>() / RUN_GROUPS as u32) as u16)
        };
        let (mut squares, mut weights, mut moments) = (0.0_f64, 0.0_f64, 0.0_f64);
        let mut note = |level: u16, centre: Level| {
            if level > 0 {
                let above = f64::from(Level(level).above_average() - centre.above_average());
                let weight = if level < floor.0 {
                    f64::from(Level(level).weight())
                } else {
                    0.0
                };
                squares += above * above;
                weights += weight;
                moments += weight * above;
            }
        };
        self.clustered().for_each(|(level, group)| note(level, centre(group)));
        let others = &self.levels[self.samples * self.segments * GROUP..];
        others.iter().for_each(|level| note(*level, mean));
        Lean {
            variance: (squares / f64::from(count.max(1))) as f32,
            away: if weights > 0.0 { moments / weights } else { 0.0 },
            left: 0.0,
        }
    }
}

/// Level of about the best `share` of the keys of a sample.
fn best(levels: &[u16], share: f64, counts: &mut Vec<u32>) -> Level {
    counts.clear();
    counts.resize(usize::from(u16::MAX / BUCKET) + 1, 0);
    for level in levels {
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
