//! Of what a scan kept for a head the best, and what that leaves.

use kvasir_simd::{GROUP, Level, RUN_GROUPS, UNIT};

use super::{Candidates, Kind, Masks, Room, Table, sum};
use crate::sketch::column::Column;

/// Levels by which a floor is lowered at first that was too high: a quarter of a power of two.
const DOWN: u16 = 32;

/// What was kept by a scan and did not stay: the sum of its weights, and of weights times scores above its run's.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Passed {
    pub(super) weight: f64,
    pub(super) moment: f64,
}

impl Table {
    /// Lists a head's candidates; answers for what else was kept.
    pub(super) fn choose(
        &mut self,
        head: usize,
        (count, mass): (usize, f32),
        column: &Column,
        masks: &Masks,
        room: &mut Room,
        out: &mut Candidates,
    ) -> Passed {
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
            return Passed::default();
        }
        let mut down = DOWN;
        while room.floors[head] > Level::LOWEST && room.found[head] * 4 < count.min(searched) * 3 {
            let lower = room.floors[head].0.saturating_sub(down).max(Level::LOWEST.0);
            room.floors[head] = Level(lower);
            down = down.saturating_mul(2);
            self.scan(column, masks, head..head + 1, room);
        }
        let mut highest = room.highest(head);
        if self.kinds[head] == Kind::Sketched && Self::is_at_an_end(highest) {
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
        room.passed.resize(room.passed.len().max(kept.len()), (0, Level(0)));
        let mut others = 0;
        let mut passed = Passed::default();
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
                room.passed[others] = (slot, Level(level));
                others += usize::from(!stays);
            }
        }
        for (slot, level) in &room.passed[..others] {
            let weight = level.weight();
            self.left[head * self.runs + *slot as usize / (GROUP * RUN_GROUPS)] += weight;
            passed.weight += f64::from(weight);
            passed.moment += f64::from(weight) * f64::from(level.above_average() - self.centre(head, *slot));
        }
        out.slots.truncate(end);
        out.levels.truncate(end);
        out.ends.push(end);
        self.total[head] = sum(self.left(head));
        passed
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
