//! What a sample of a column's keys says before and after a scan: from which level on a head's candidates begin, and how far the
//! scores of what they leave lie from the average.

use kvasir_simd::{CodedKeys, CodedQueries, GROUP, Level, Line, coded_levels};

use super::{BUCKET, Kind, Masks, Room, Table, choose::Passed};
use crate::sketch::column::Column;

/// Groups looked at.
const SAMPLE: usize = 256;

/// Every so many groups of a column, side by side.
#[derive(Debug, Default)]
pub(super) struct Sample {
    every: usize,
    codes: Vec<Line>,
    steps: Vec<f32>,
    masks: Vec<u16>,
    /// Whose masks these are.
    sequence: Option<usize>,
    levels: Vec<u16>,
}

/// Where the scores by sketch of the keys that are no candidates lie, in powers of two above the calibration's average key.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::sketch) struct Lean {
    /// Mean score of all searched keys.
    pub(in crate::sketch) mean: f32,
    /// Its variance; 0 where nothing is known.
    pub(in crate::sketch) variance: f32,
    /// Sum of weights times scores above the mean, of what candidates leave.
    pub(in crate::sketch) left: f64,
}

impl Table {
    /// Floors of all heads.
    pub(super) fn guess(&self, column: &Column, masks: &Masks, wanted: &[(usize, f32)], room: &mut Room) {
        let heads = self.heads();
        room.floors.clear();
        room.sample.take(column, masks);
        for (head, &(count, mass)) in wanted.iter().enumerate() {
            let sequence = masks.sequence(head, heads);
            let searched = masks.searched.get(sequence).copied().unwrap_or(0);
            room.floors.push(match self.kinds[head] {
                _ if count == 0 || searched == 0 => Level(u16::MAX),
                Kind::Dead => Level(u16::MAX),
                Kind::Exact => Level::LOWEST,
                Kind::Sketched if count >= searched && mass >= 1.0 => Level::LOWEST,
                Kind::Sketched => {
                    let levels = room.sample.levels(&self.coded, head, masks, sequence);
                    sampled(levels, count as f64 / searched as f64, &mut room.counts)
                }
            });
        }
    }

    /// How the scores of what a head's candidates leave lie; `passed` of them were kept by the scan.
    pub(super) fn lean(&self, head: usize, passed: Passed, masks: &Masks, room: &mut Room) -> Lean {
        let sequence = masks.sequence(head, self.heads());
        if self.kinds[head] != Kind::Sketched || sequence >= masks.words.len() {
            return Lean::default();
        }
        let floor = room.floors[head];
        let levels = room.sample.levels(&self.coded, head, masks, sequence);
        let (mut count, mut sum, mut squares) = (0_u32, 0.0_f64, 0.0_f64);
        let (mut weights, mut moments) = (0.0_f64, 0.0_f64);
        for levels in levels.chunks(GROUP) {
            let (mut own, mut weight, mut moment) = ([0.0_f32; 2], 0.0_f32, 0.0_f32);
            for level in levels {
                let searched = *level >= Level::LOWEST.0;
                let above = if searched { Level(*level).above_average() } else { 0.0 };
                count += u32::from(searched);
                own[0] += above;
                own[1] += above * above;
                let below = if *level < floor.0 { Level(*level).weight() } else { 0.0 };
                weight += below;
                moment += below * above;
            }
            sum += f64::from(own[0]);
            squares += f64::from(own[1]);
            weights += f64::from(weight);
            moments += f64::from(moment);
        }
        let mean = sum / f64::from(count.max(1));
        let variance = squares / f64::from(count.max(1)) - mean * mean;
        let scanned = (self.total[head] - passed.weight).max(0.0);
        let away = if weights > 0.0 { moments / weights - mean } else { 0.0 };
        Lean {
            mean: mean as f32,
            variance: variance.max(0.0) as f32,
            left: scanned * away + passed.moment - passed.weight * mean,
        }
    }
}

impl Sample {
    /// Takes the groups of `column`.
    fn take(&mut self, column: &Column, masks: &Masks) {
        self.every = column.groups().div_ceil(SAMPLE).max(1);
        self.codes.clear();
        self.steps.clear();
        self.sequence = None;
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
