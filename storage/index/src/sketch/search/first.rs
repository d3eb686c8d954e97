//! The first level: of clustered segments only those groups are scanned whose centroid is near enough to a head's floor. What the
//! others weigh is what their centroid does, times what a sample of such groups weighs beside theirs.

use std::ops::Range;

use kvasir_simd::{Found, GROUP, Level, RUN_GROUPS, coded_levels, coded_scan_listed};

use super::{Room, Table};
use crate::sketch::column::Column;

/// Heads that are scanned together.
const STRIP: usize = 4;

/// What is known of the groups of clustered segments.
#[derive(Debug, Default)]
pub(super) struct Near {
    /// Levels of their centroids, `[heads][groups]`.
    levels: Vec<u16>,
    groups: usize,
    /// Per head, how far below its floor the centroid of a group is at least that has a key above it.
    pub(super) gaps: Vec<u16>,
    /// Per head, what a key of other groups weighs on average, over what their centroid does.
    pub(super) excess: Vec<f32>,
    /// Groups of a tile that are scanned, and those that any head wants.
    list: Vec<u32>,
    wanted: Vec<bool>,
    /// Of listed groups, `[heads][listed]`.
    sums: Vec<f32>,
}

impl Near {
    /// Of the centroids of all groups for one head.
    pub(super) fn levels(&self, head: usize) -> &[u16] {
        &self.levels[head * self.groups..][..self.groups]
    }

    /// Level from which on a centroid's group is scanned for a head.
    fn from(&self, head: usize, floor: Level) -> u16 {
        floor.0.saturating_sub(self.gaps[head])
    }
}

impl Table {
    /// Finds what the centroids of all clustered groups are to each head.
    pub(super) fn near(&mut self, column: &Column, room: &mut Room) {
        let (heads, groups) = (self.heads(), column.clustered_groups());
        let near = &mut room.near;
        near.groups = groups;
        near.levels.resize(heads * groups, 0);
        let keys = column.centroids();
        coded_levels(&self.coded, 0..heads, keys, &mut near.levels, groups);
        self.coded_bytes += keys.codes.len() * 64;
    }

    /// The groups of a tile of clustered segments that matter to some of `heads`, which are of one sequence.
    pub(super) fn scan_near(
        &mut self,
        column: &Column,
        words: &[u16],
        heads: Range<usize>,
        tile: Range<usize>,
        room: &mut Room,
    ) {
        let own = tile.start / RUN_GROUPS..tile.end / RUN_GROUPS;
        room.near.wanted.clear();
        room.near.wanted.resize(tile.len(), false);
        for from in heads.clone().step_by(STRIP) {
            let strip = from..heads.end.min(from + STRIP);
            self.list(words, strip.clone(), tile.clone(), room);
            let Room { near, .. } = room;
            let listed = near.list.len();
            near.sums.resize(strip.len() * listed, 0.0);
            let mut found = Found {
                floors: &room.floors[strip.clone()],
                kept: &mut room.kept[strip.start * room.stride..],
                stride: room.stride,
                counts: &mut room.found[strip.clone()],
                sums: &mut near.sums,
                sums_stride: listed,
                few: room.few,
            };
            let keys = column.coded(tile.clone(), words);
            coded_scan_listed(
                &self.coded,
                strip.clone(),
                keys,
                tile.start * GROUP,
                &near.list,
                &mut found,
            );
            for (head, sums) in strip.clone().zip(near.sums.chunks_exact(listed.max(1))) {
                let left = &mut self.left[head * self.runs..][own.clone()];
                for (group, sum) in near.list.iter().zip(sums) {
                    left[*group as usize / RUN_GROUPS] += sum;
                }
            }
        }
        let wanted = room.near.wanted.iter().filter(|wanted| **wanted).count();
        self.coded_bytes += wanted * column.format().group_bytes();
    }

    /// Lists the groups of a tile that are scanned for a strip of heads, and notes what the others weigh.
    fn list(&mut self, words: &[u16], strip: Range<usize>, tile: Range<usize>, room: &mut Room) {
        let near = &mut room.near;
        near.list.clear();
        let from: [u16; STRIP] = std::array::from_fn(|at| {
            let head = strip.start + at;
            if head < strip.end {
                near.from(head, room.floors[head])
            } else {
                u16::MAX
            }
        });
        for head in strip.clone() {
            self.left[head * self.runs..][tile.start / RUN_GROUPS..tile.end / RUN_GROUPS].fill(0.0);
        }
        for (group, wanted) in tile.clone().zip(&mut near.wanted) {
            let word = words[group];
            if word == 0 {
                continue;
            }
            let level = |head: usize| near.levels[head * near.groups + group];
            if strip.clone().zip(from).any(|(head, from)| level(head) >= from) {
                near.list.push((group - tile.start) as u32);
                *wanted = true;
                continue;
            }
            let keys = word.count_ones() as f32;
            for head in strip.clone() {
                let weight = Level(level(head)).weight() * keys * near.excess[head];
                self.left[head * self.runs + group / RUN_GROUPS] += weight;
            }
        }
    }
}
