//! Buffers of a scan.

use std::ops::Range;

use kvasir_simd::{GROUP, Level, UNIT, room_for};

use super::{TILE, first::First, sample::Sample};

/// What a scan needs and keeps for the next one.
#[derive(Debug, Default)]
pub(in crate::sketch) struct Room {
    pub(super) weights: Vec<f32>,
    pub(super) counts: Vec<u32>,
    /// What was kept of a head and does not stay.
    pub(super) passed: Vec<(u32, Level)>,
    pub(super) sample: Sample,
    pub(super) first: First,
    pub(super) floors: Vec<Level>,
    pub(super) kept: Vec<u32>,
    pub(super) stride: usize,
    pub(super) found: Vec<usize>,
    /// How many of each head's were found before each unit of [`UNIT`] slots: `[units, heads]`
    pub(super) before: Vec<usize>,
    /// Few keys of each head are to be kept.
    pub(super) few: bool,
}

impl Room {
    pub(in crate::sketch) fn weights(&mut self) -> &mut Vec<f32> {
        &mut self.weights
    }

    /// Highest level that was kept of a head, or its floor.
    pub(super) fn highest(&self, head: usize) -> u16 {
        let kept = &self.kept[head * self.stride..][..self.found[head]];
        let levels = kept.iter().map(|kept| (kept >> 16) as u16);
        levels.max().unwrap_or(self.floors[head].0)
    }

    pub(super) fn prepare(&mut self, heads: usize, groups: usize) {
        self.found.clear();
        self.found.resize(heads, 0);
        let units = (groups * GROUP).div_ceil(UNIT);
        self.before.clear();
        self.before.resize(units * heads, 0);
        // Room is per head: with another number of heads the rows lie elsewhere.
        self.stride = self.kept.len() / heads.max(1);
    }

    /// Makes room for what a tile may add to the rows of `heads`.
    pub(super) fn grow(&mut self, groups: usize, heads: Range<usize>) {
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
