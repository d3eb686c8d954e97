//! What a sample of a column's keys says before and after a scan: from which level on a head's candidates begin, and how far the
//! scores of what they leave lie from the average.

use kvasir_simd::{CodedKeys, CodedQueries, GROUP, Level, Line, RUN_GROUPS, coded_levels};

use super::{BUCKET, Kind, Masks, Room, Table};
use crate::sketch::column::Column;

/// Groups looked at: as many of a short column, of a longer one as many as below, or one in so many.
const SAMPLE: usize = 256;
const SAMPLE_MAX: usize = 1024;
const SAMPLE_EVERY: usize = 64;
/// Of the best keys of a sample, or of as many as are wanted where that is more, gaps to their centroids are known.
const GAP_OF: f64 = 0.03;
/// How many of them find their group scanned.
const GAP_SHARE: f64 = 0.98;
/// One in so many keys is few.
const FEW: usize = 100;

/// Every so many groups of a column, side by side.
#[derive(Debug, Default)]
pub(super) struct Sample {
    every: usize,
    codes: Vec<Line>,
    steps: Vec<f32>,
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
        room.near.gaps.clear();
        room.near.excess.clear();
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
                    let levels = room.sample.levels(&self.coded, head, masks, sequence);
                    let share = count as f64 / searched as f64;
                    let floor = sampled(levels, share, &mut room.counts);
                    if column.clustered_groups() > 0 {
                        let high = sampled(levels, share.max(GAP_OF), &mut room.counts);
                        gap = room.sample.gap(room.near.levels(head), floor, high);
                    }
                    floor
                }
            };
            room.floors.push(floor);
            room.near.gaps.push(gap.0);
            room.near.excess.push(gap.1);
            if learnt {
                let centres = &mut self.centres[head * self.runs..][..self.runs];
                self.leans.push(match self.kinds[head] {
                    Kind::Sketched if searched > 0 => {
                        room.sample.levels(&self.coded, head, masks, sequence);
                        room.sample.lean(room.near.levels(head), floor, centres)
                    }
                    _ => Lean::default(),
                });
            }
        }
    }
}

impl Sample {
    /// Takes the groups of `column`.
    fn take(&mut self, column: &Column, masks: &Masks) {
        let groups = (column.groups() / SAMPLE_EVERY).clamp(SAMPLE, SAMPLE_MAX);
        self.every = column.groups().div_ceil(groups).max(1);
        self.codes.clear();
        self.steps.clear();
        (self.sequence, self.head) = (None, None);
        for group in (0..column.groups()).step_by(self.every) {
            let keys = column.coded(group..group + 1, &masks.words[0]);
            self.codes.extend_from_slice(keys.codes);
            self.steps.extend_from_slice(keys.steps);
        }
    }

    /// Levels of a head of `sequence`; 0 of what it does not search.
    fn levels(&mut self, queries: &CodedQueries, head: usize, masks: &Masks, sequence: usize) -> &[u16] {
        if self.sequence.replace(sequence) != Some(sequence) {
            let words = masks.words[sequence].iter().step_by(self.every);
            self.masks.clear();
            self.masks.extend(words);
        }
        if self.head.replace(head) == Some(head) {
            return &self.levels;
        }
        self.levels.resize(self.masks.len() * GROUP, 0);
        let keys = CodedKeys {
            codes: &self.codes,
            steps: &self.steps,
            masks: &self.masks,
        };
        let stride = self.levels.len();
        coded_levels(queries, head..head + 1, keys, &mut self.levels, stride);
        &self.levels
    }

    /// Of the keys from `high` on, how far most lie above their group's centroid, whose levels are `near`; and what a key of groups
    /// further below `floor` weighs on average, over what their centroid does.
    fn gap(&mut self, near: &[u16], floor: Level, high: Level) -> (u16, f32) {
        let groups = || self.levels.chunks(GROUP).zip(near.iter().step_by(self.every));
        self.gaps.clear();
        for (levels, near) in groups() {
            let above = levels.iter().filter(|level| **level >= high.0);
            self.gaps.extend(above.map(|level| level.saturating_sub(*near)));
        }
        if self.gaps.is_empty() {
            // Nothing is known: all are scanned.
            return (u16::MAX, 1.0);
        }
        let most = ((self.gaps.len() - 1) as f64 * GAP_SHARE).ceil() as usize;
        let gap = *self.gaps.select_nth_unstable(most).1;
        let from = floor.0.saturating_sub(gap);
        let (mut exact, mut near_by) = (0.0_f64, 0.0_f64);
        for (levels, near) in groups().filter(|(_, near)| **near < from) {
            let searched = levels.iter().filter(|level| **level > 0);
            exact += searched
                .clone()
                .map(|level| f64::from(Level(*level).weight()))
                .sum::<f64>();
            near_by += f64::from(Level(*near).weight()) * searched.count() as f64;
        }
        let excess = if near_by > 0.0 { exact / near_by } else { 1.0 };
        (gap, excess as f32)
    }

    /// How scores lie whose levels were asked for last: `centres` are told what the mean of each run stands for.
    fn lean(&self, near: &[u16], floor: Level, centres: &mut [Level]) -> Lean {
        let mut sum = 0_u64;
        let mut count = 0_u32;
        for level in self.levels.iter().filter(|level| **level > 0) {
            sum += u64::from(*level);
            count += 1;
        }
        let mean = Level((sum / u64::from(count.max(1))) as u16);
        let runs = near.chunks_exact(RUN_GROUPS);
        let clustered = runs.len();
        for (centre, near) in centres.iter_mut().zip(runs) {
            let sum: u32 = near.iter().map(|level| u32::from(*level)).sum();
            *centre = Level((sum / RUN_GROUPS as u32) as u16);
        }
        centres[clustered..].fill(mean);
        let (mut squares, mut weights, mut moments) = (0.0_f64, 0.0_f64, 0.0_f64);
        for (at, levels) in self.levels.chunks(GROUP).enumerate() {
            let centre = centres[at * self.every / RUN_GROUPS].above_average();
            let (mut square, mut weight, mut moment) = (0.0_f32, 0.0_f32, 0.0_f32);
            for level in levels {
                let searched = *level >= Level::LOWEST.0;
                let above = if searched {
                    Level(*level).above_average() - centre
                } else {
                    0.0
                };
                square += above * above;
                let below = if *level < floor.0 { Level(*level).weight() } else { 0.0 };
                weight += below;
                moment += below * above;
            }
            squares += f64::from(square);
            weights += f64::from(weight);
            moments += f64::from(moment);
        }
        Lean {
            variance: (squares / f64::from(count.max(1))) as f32,
            away: if weights > 0.0 { moments / weights } else { 0.0 },
            left: 0.0,
        }
    }
}

/// Level of about the best `share` of the keys of a sample.
fn sampled(levels: &[u16], share: f64, counts: &mut Vec<u32>) -> Level {
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
