//! The first level: of clustered segments a head's scan reads only those groups whose centroid is near enough to its floor. What the
//! others weigh is what their centroid does, times what a sample of such keys weighs beside it.

use std::ops::Range;

use kvasir_simd::{Found, GROUP, Near, RUN_GROUPS, UNIT, coded_levels, coded_scan_listed, near};

use super::{Masks, Room, Table};
use crate::sketch::column::Column;

/// Groups of a unit.
const UNIT_GROUPS: usize = UNIT / GROUP;

/// What is known of the groups of clustered segments.
#[derive(Debug, Default)]
pub(super) struct First {
    /// Levels of their centroids, `[heads][groups]`.
    levels: Vec<u16>,
    groups: usize,
    /// Per head, how far below its floor a centroid may lie whose group is scanned.
    pub(super) gaps: Vec<u16>,
    /// Per head, what a key of other groups weighs on average, over what their centroid does.
    pub(super) excess: Vec<f32>,
    /// Per head, the share of the groups that is scanned: expected, and then known.
    pub(super) shares: Vec<f64>,
    /// Per head, groups that are scanned, each by its number in its unit; how many of them were.
    lists: Vec<Vec<u32>>,
    scanned: Vec<usize>,
    /// Of a tile, groups that any head scanned.
    read: Vec<bool>,
    /// Of listed groups.
    sums: Vec<f32>,
}

/// Heads that share the unpacking of a group where all groups are scanned.
const STRIP: usize = 4;
/// Groups listed for as many heads, of all groups, up to which they are scanned alone: memory brings groups that lie apart at half the
/// rate of those that follow one another, and each head unpacks its own.
const WORTH: f64 = 0.6;

impl First {
    /// Levels of the centroids of all groups for one head.
    pub(super) fn levels(&self, head: usize) -> &[u16] {
        &self.levels[head * self.groups..][..self.groups]
    }
}

impl Table {
    /// Finds what the centroids of all clustered groups are to each head.
    pub(super) fn score_centroids(&mut self, column: &Column, room: &mut Room) {
        let (heads, groups) = (self.heads(), column.clustered_groups());
        let first = &mut room.first;
        first.groups = groups;
        first.levels.resize(heads * groups, 0);
        first.lists.resize_with(heads.max(first.lists.len()), Vec::new);
        first.scanned.resize(heads.max(first.scanned.len()), 0);
        let keys = column.centroids();
        coded_levels(&self.coded, 0..heads, keys, &mut first.levels, groups);
        self.coded_bytes += keys.codes.len() * 64;
    }

    /// Lists the groups that a scan of each of `heads` reads, and notes what the others weigh; answers whether they are few enough.
    pub(super) fn list(&mut self, heads: Range<usize>, masks: &Masks, room: &mut Room) -> bool {
        let groups = room.first.groups;
        let limit = WORTH * heads.len().div_ceil(STRIP) as f64;
        let expected = |room: &Room| heads.clone().map(|head| room.first.shares[head]).sum::<f64>();
        if groups == 0 || expected(room) > limit {
            return false;
        }
        for head in heads.clone() {
            let words = &masks.words[masks.sequence(head, self.heads())][..groups];
            let first = &mut room.first;
            let from = room.floors[head].0.saturating_sub(first.gaps[head]);
            let list = &mut first.lists[head];
            list.clear();
            first.scanned[head] = 0;
            let own = head * self.runs..head * self.runs + groups / RUN_GROUPS;
            let out = &mut Near {
                list,
                sums: &mut self.left[own],
            };
            let levels = &first.levels[head * groups..][..groups];
            near(levels, words, from, first.excess[head], out);
            first.shares[head] = first.lists[head].len() as f64 / groups as f64;
        }
        expected(room) <= limit
    }

    /// Scans the listed groups of a tile for `heads`, which are of one sequence.
    pub(super) fn scan_listed(
        &mut self,
        column: &Column,
        words: &[u16],
        heads: Range<usize>,
        tile: Range<usize>,
        room: &mut Room,
    ) {
        let unit = tile.start / UNIT_GROUPS * UNIT_GROUPS;
        let keys = column.coded(unit..tile.end, words);
        let Room { first, .. } = room;
        first.read.clear();
        first.read.resize(tile.len(), false);
        for head in heads {
            let list = &first.lists[head][first.scanned[head]..];
            // Lists begin anew with each unit.
            let here = |group: &&u32| tile.contains(&(unit + **group as usize));
            let count = list.iter().take_while(here).count();
            let list = &list[..count];
            first.scanned[head] += count;
            first.sums.resize(first.sums.len().max(count), 0.0);
            let mut found = Found {
                floors: &room.floors[head..=head],
                kept: &mut room.kept[head * room.stride..],
                stride: room.stride,
                counts: &mut room.found[head..=head],
                sums: &mut first.sums[..count],
                sums_stride: count,
            };
            coded_scan_listed(&self.coded, head..head + 1, keys, unit * GROUP, list, &mut found);
            let left = &mut self.left[head * self.runs..][..self.runs];
            for (group, sum) in list.iter().zip(&first.sums) {
                let group = unit + *group as usize;
                left[group / RUN_GROUPS] += sum;
                first.read[group - tile.start] = true;
            }
        }
        let read = first.read.iter().filter(|read| **read).count();
        self.coded_bytes += read * column.format().group_bytes();
    }
}
