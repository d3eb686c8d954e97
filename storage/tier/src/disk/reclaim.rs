//! Making room: whole segments go, what must stay is written again first.
//!
//! While the current segment is young there is a spare one; when it is half full and no further segment fits, the victim
//! goes ([`Table::victims`](super::table::Table::victims) has the order). Of what is in it the hottest blocks are appended to the
//! current segment, at most half a segment of them, so reclaim always wins room; what is left goes to a slower tier where
//! [`Fate`] says so, and is forgotten.
//!
//! No reader waits for it. Reads and writes are done without a lock; the owner is asked about a few blocks at a time, since its
//! lock is the one that gets take too; readers that hold the victim's file read on. The file becomes the next segment once no
//! reader has it, which a thread of its own waits for (`disk/removal.rs`); where its space is wanted back instead, that takes a
//! file system a tenth of a second for a large file, and the same thread does it.

use std::{cmp::Reverse, collections::HashMap, sync::Arc};

use kvasir_block::{
    BlockKey, LayerBlockKey,
    planted::{Bug, planted, point},
};

use super::{
    Fate, Heat,
    flusher::{Flusher, WriteError},
    format::PAGE,
    read::RecordOutcome,
    segment::{Record, segment_path, spare_path},
    table::{Doomed, Location, SegmentRef},
};

/// How often a segment is gone through: what was leased meanwhile is written again in the next round.
const ROUNDS: usize = 4;
/// Most bytes of records that are read and written again at a time: a reader's disk is busy with them.
const SURVIVORS_BYTES: u64 = 4 << 20;
/// Blocks that the owner is asked about at a time, under its lock.
const FORGET_BLOCKS: usize = 16;

/// A block in a segment that is to go.
struct Doubtful {
    fate: Fate,
    block: BlockKey,
    /// Its layers in that segment.
    records: Vec<(LayerBlockKey, Location)>,
    /// How many of them a slower tier has taken.
    demoted: u64,
}

impl Flusher {
    /// Drops segments until `bytes` more fit under the limit.
    pub(super) fn make_room(&mut self, bytes: u64) -> Result<(), WriteError> {
        let (number, bytes_max) = (self.volume().number, self.volume().bytes_max);
        loop {
            let (disk_bytes, doomed_bytes) = {
                let table = &self.shared.state.lock().table;
                (table.disk_bytes(number), table.doomed_bytes(number))
            };
            let claimed = disk_bytes + doomed_bytes;
            if claimed + bytes <= bytes_max || claimed == 0 || planted(Bug::DiskBudgetIgnored) {
                return Ok(());
            }
            // Before more is dropped. It may have been done by the time that we come to wait for it.
            if doomed_bytes > 0
                && (self.shared.wait_for_removal(number)
                    || self.shared.state.lock().table.doomed_bytes(number) < doomed_bytes)
            {
                continue;
            }
            // The current segment is full: nothing can be written again.
            if !self.drop_one(&mut 0) {
                return Err(WriteError::Leased { bytes_max });
            }
        }
    }

    /// Where no segment fits beside the current one, and that one is half full, drops one and keeps of it what must stay.
    pub(super) fn reclaim_ahead(&mut self) {
        let segment_bytes = self.shared.config.segment_bytes;
        let Some(writer) = &self.writer else { return };
        let disk_bytes = self.shared.state.lock().table.disk_bytes(self.volume().number);
        let half_full = writer.end * 2 >= writer.bytes;
        if half_full && disk_bytes + segment_bytes > self.volume().bytes_max && !planted(Bug::DiskBudgetIgnored) {
            let mut budget = writer.room().min(segment_bytes / 2);
            self.drop_one(&mut budget);
        }
    }

    /// Drops the first segment that may go; at most `budget` bytes are written again, of all that were looked at. The current one
    /// never goes: what is in it is newest.
    pub(super) fn drop_one(&mut self, budget: &mut u64) -> bool {
        let current = self.writer.as_ref().map(|writer| writer.at);
        let victims = self.shared.state.lock().table.victims(self.volume().number);
        victims
            .into_iter()
            .filter(|at| Some(*at) != current)
            .any(|at| self.reclaim(at, budget, false))
    }

    /// The file system is full, maybe with what others put there: drops one segment, but never the newest. False if there
    /// is none to drop.
    pub(super) fn give_way(&mut self) -> bool {
        let number = self.volume().number;
        let (newest, victims) = {
            let table = &self.shared.state.lock().table;
            (table.newest(number), table.victims(number))
        };
        let mut victims = victims.into_iter().filter(|at| Some(*at) != newest);
        let dropped = victims.any(|at| self.reclaim(at, &mut 0, true));
        while dropped && self.shared.wait_for_removal(number) {}
        dropped
    }

    /// Drops a segment; false if something in it must stay for which there is no room.
    fn reclaim(&mut self, at: SegmentRef, budget: &mut u64, give_back: bool) -> bool {
        for round in 0..ROUNDS {
            let mut doubtful = self.doubtful(at);
            if round > 0 {
                // The owner did not let them go: they were leased meanwhile.
                doubtful
                    .iter_mut()
                    .for_each(|doubtful| doubtful.fate.heat = Heat::Leased);
            }
            let Some(mut left) = self.readmit(doubtful, budget) else {
                return false;
            };
            // Before anything is forgotten: a segment that cannot go is of use as it is.
            if left.iter().any(|doubtful| doubtful.fate.heat == Heat::Leased) {
                return false;
            }
            for doubtful in left.iter_mut().filter(|doubtful| doubtful.fate.demote) {
                self.demote(doubtful);
            }
            self.forget(at, &left);
            if self.shared.state.lock().table.blocks_in(at).is_empty() {
                self.drop_file(at, give_back);
                return true;
            }
        }
        false
    }

    /// Blocks that have a record in a segment: the hottest first, and among equals as they lie.
    fn doubtful(&self, at: SegmentRef) -> Vec<Doubtful> {
        let here = self.shared.state.lock().table.blocks_in(at);
        let mut doubtful: Vec<Doubtful> = here
            .into_iter()
            .map(|(block, records)| Doubtful {
                fate: self.watch.fate(&block),
                block,
                records,
                demoted: 0,
            })
            .collect();
        let first = |doubtful: &Doubtful| doubtful.records.first().map(|(_, location)| location.offset);
        doubtful.sort_by_key(|doubtful| (Reverse(doubtful.fate.heat), first(doubtful)));
        doubtful
    }

    /// Writes again what is not cold, while the budget lasts; gives back the others. `None` if a write failed: the victim must stay.
    fn readmit(&mut self, doubtful: Vec<Doubtful>, budget: &mut u64) -> Option<Vec<Doubtful>> {
        let (mut wanted, mut bytes) = (Vec::new(), 0);
        let mut left = Vec::new();
        for doubtful in doubtful {
            let more: u64 = doubtful.records.iter().map(|(_, at)| at.record_bytes()).sum();
            // Each rewrite ends at a page.
            if doubtful.fate.heat == Heat::Cold || more + PAGE > *budget {
                left.push(doubtful);
                continue;
            }
            *budget -= more;
            bytes += more;
            wanted.extend(doubtful.records);
            if bytes >= SURVIVORS_BYTES {
                self.rewrite(&std::mem::take(&mut wanted))?;
                *budget = budget.saturating_sub(PAGE);
                bytes = 0;
            }
        }
        if !wanted.is_empty() {
            self.rewrite(&wanted)?;
            *budget = budget.saturating_sub(PAGE);
        }
        Some(left)
    }

    /// Hands the layers of a block to the owner, verified.
    fn demote(&self, doubtful: &mut Doubtful) {
        for (key, payload, checksum) in self.read_verified(&doubtful.records) {
            doubtful.demoted += u64::from(self.watch.demote(key, payload, checksum));
        }
        self.shared.state.lock().counts.demoted_layer_blocks += doubtful.demoted;
    }

    /// Forgets what a segment holds of blocks, as far as the owner agrees.
    fn forget(&self, at: SegmentRef, left: &[Doubtful]) {
        let volume = self.volume();
        for some in left.chunks(FORGET_BLOCKS) {
            let blocks: Vec<BlockKey> = some.iter().map(|doubtful| doubtful.block).collect();
            let mut gone: Vec<LayerBlockKey> = Vec::new();
            self.watch.reclaim(&blocks, &mut |block| {
                let mut state = self.shared.state.lock();
                let before = gone.len();
                gone.extend(state.table.layers_in(block, at).into_iter().map(|(key, _)| key));
                gone[before..].iter().for_each(|key| {
                    state.table.remove(*key);
                });
                let count = (gone.len() - before) as u64;
                state.counts.reclaimed_layer_blocks += count;
                let warm = some
                    .iter()
                    .find(|doubtful| doubtful.block == *block && doubtful.fate.heat != Heat::Cold);
                let kept_elsewhere = warm.map_or(count, |doubtful| doubtful.demoted);
                state.counts.forgotten_warm_layer_blocks += count.saturating_sub(kept_elsewhere);
            });
            point("reclaim: forgotten in memory");
            // If it fails, recovery tidies up: entries without a file are dropped.
            if let Err(error) = volume.index.forget(None, gone.into_iter()) {
                tracing::warn!(segment = at.id(), %error, "index keeps entries of dropped blocks");
            }
        }
    }

    /// Drops a segment in which nothing is left. Its file is kept for the next one, unless space is what is wanted.
    fn drop_file(&self, at: SegmentRef, give_back: bool) {
        let volume = self.volume();
        let path = segment_path(&volume.segments_dir(), at.id());
        let doomed = {
            let mut state = self.shared.state.lock();
            let keep = !give_back && state.table.wants_spare(at, self.shared.config.segment_bytes);
            let doomed = state.table.segments.get(&at).map(|segment| Doomed {
                file: Arc::clone(&segment.file),
                bytes: segment.bytes,
                spare: keep.then(|| spare_path(&path)),
            });
            state.table.remove_segment(at);
            state.counts.reclaimed_segments += u64::from(doomed.is_some());
            doomed
        };
        let Some(doomed) = doomed else { return };
        tracing::debug!(segment = at.id(), spare = doomed.spare.is_some(), "dropping a segment");
        // If either fails, recovery tidies up: a file that the index does not know is read again.
        if let Err(error) = volume.index.forget(Some(at.id()), std::iter::empty()) {
            tracing::warn!(segment = at.id(), %error, "index keeps the entry of a dropped segment");
        }
        point("reclaim: file to be removed");
        let gone = match &doomed.spare {
            Some(spare) => std::fs::rename(&path, spare),
            None => std::fs::remove_file(&path),
        };
        match gone {
            Ok(()) => {
                self.shared.state.lock().table.doomed.insert(at, doomed);
                self.shared.removal.notify_all();
            }
            Err(error) => tracing::warn!(segment = at.id(), %error, "cannot remove a dropped segment"),
        }
    }

    /// Reads records and appends them to the current segment; `None` if that failed.
    fn rewrite(&mut self, wanted: &[(LayerBlockKey, Location)]) -> Option<()> {
        let records = self.read_verified(wanted);
        if records.is_empty() {
            return Some(());
        }
        let published = match self.append(&records) {
            Ok(published) => published,
            Err(error) => {
                tracing::warn!(%error, "cannot write again what must stay");
                return None;
            }
        };
        point("reclaim: written again");
        let from: HashMap<LayerBlockKey, Location> = wanted.iter().copied().collect();
        let mut state = self.shared.state.lock();
        let mut stale = Vec::new();
        for (key, to) in published {
            match from.get(&key) {
                Some(&from) if state.table.relocate(key, from, to) => state.counts.readmitted_layer_blocks += 1,
                _ => stale.push(key),
            }
        }
        drop(state);
        // Found corrupt by a reader meanwhile: the index shall not bring it back.
        if !stale.is_empty()
            && let Err(error) = self.volume().index.forget(None, stale.into_iter())
        {
            tracing::warn!(%error, "index keeps entries of dropped records");
        }
        Some(())
    }

    /// Reads records and verifies them; those that are wrong are dropped and counted.
    fn read_verified(&self, wanted: &[(LayerBlockKey, Location)]) -> Vec<Record> {
        let mut records = Vec::with_capacity(wanted.len());
        for read in self
            .shared
            .read_records(wanted, &mut |_| None, None)
            .into_iter()
            .flatten()
        {
            match read.outcome {
                RecordOutcome::Right(checksum) => records.push((read.key, read.into_payload(), checksum)),
                RecordOutcome::Wrong | RecordOutcome::Failed | RecordOutcome::TooLate => self.shared.drop_wrong(&read),
            }
        }
        records
    }
}
