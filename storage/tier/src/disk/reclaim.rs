//! Making room: whole segments go, what must stay is written again first.
//!
//! While the current segment is young there is a spare one; when it is half full and no further segment fits, the victim
//! goes ([`Table::victims`](super::table::Table::victims) has the order) and what [`Fate`] keeps of it is appended to the current
//! one. At most half a segment is written again for one that goes, so reclaim always wins room. All reads and writes are
//! done without a lock, and readers that hold the victim's file read on. A large file takes the file system a tenth of a
//! second to free: its name goes at once, its space on a thread of its own (`disk/removal.rs`), until which it counts.

use std::sync::Arc;

use kvasir_block::{
    BlockKey, LayerBlockKey,
    planted::{Bug, planted},
};

use super::{
    Fate,
    flusher::{Flusher, WriteError},
    format::PAGE,
    read::RecordOutcome,
    segment::{Record, segment_path},
    table::{Doomed, Location, SegmentRef},
};

/// How often the owner is asked again about what it leased meanwhile.
const ROUNDS: usize = 3;
/// Most bytes of records that are read and written again at a time.
const SURVIVORS_BYTES: u64 = 8 << 20;

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
            if doomed_bytes > 0 && self.shared.wait_for_removal(number) {
                continue;
            }
            if !self.drop_one(0) {
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
            let budget = writer.room().min(segment_bytes / 2);
            self.drop_one(budget);
        }
    }

    /// Drops the first segment that may go; of each at most `budget` bytes are written again. The current one never goes:
    /// what is in it is newest.
    pub(super) fn drop_one(&mut self, budget: u64) -> bool {
        let current = self.writer.as_ref().map(|writer| writer.at);
        let victims = self.shared.state.lock().table.victims(self.volume().number);
        victims
            .into_iter()
            .filter(|at| Some(*at) != current)
            .any(|at| self.reclaim(at, budget))
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
        let dropped = victims.any(|at| self.reclaim(at, 0));
        while dropped && self.shared.wait_for_removal(number) {}
        dropped
    }

    fn reclaim(&mut self, at: SegmentRef, mut budget: u64) -> bool {
        let mut asked = self.blocks_of(at);
        for round in 0..ROUNDS {
            let mut keep = Vec::new();
            for block in asked {
                match self.watch.fate(&block) {
                    Fate::Forget => {}
                    Fate::Readmit => keep.push(block),
                    Fate::Demote if round == 0 => self.demote(at, &block),
                    Fate::Demote => {}
                }
            }
            if !self.readmit(at, &keep, &mut budget) {
                return false;
            }
            let rest = self.blocks_of(at);
            if self.forget(at, &rest) {
                return true;
            }
            // One of them must stay: which?
            let shared = &self.shared;
            let volume = self.volume();
            let mut pinned = Vec::new();
            for block in rest {
                let mut gone: Vec<LayerBlockKey> = Vec::new();
                let went = self.watch.reclaim(&[block], &mut || {
                    let mut state = shared.state.lock();
                    gone = state
                        .table
                        .layers_in(&block, at)
                        .into_iter()
                        .map(|(key, _)| key)
                        .collect();
                    for key in &gone {
                        state.table.remove(*key);
                    }
                    state.counts.reclaimed_layer_blocks += gone.len() as u64;
                });
                if went {
                    if let Err(error) = volume.index.forget(None, gone.into_iter()) {
                        tracing::warn!(segment = at.id(), %error, "index keeps entries of a dropped block");
                    }
                } else {
                    pinned.push(block);
                }
            }
            if budget == 0 || !self.readmit(at, &pinned, &mut budget) {
                return false;
            }
            asked = self.blocks_of(at);
        }
        let rest = self.blocks_of(at);
        self.forget(at, &rest)
    }

    /// Blocks that have a record in a segment.
    fn blocks_of(&self, at: SegmentRef) -> Vec<BlockKey> {
        let mut state = self.shared.state.lock();
        let Some(segment) = state.table.segments.get(&at) else {
            return Vec::new();
        };
        let blocks: Vec<BlockKey> = segment.blocks.iter().copied().collect();
        let (here, gone): (Vec<_>, Vec<_>) = blocks
            .into_iter()
            .partition(|block| !state.table.layers_in(block, at).is_empty());
        if let Some(segment) = state.table.segments.get_mut(&at) {
            for block in &gone {
                segment.blocks.remove(block);
            }
        }
        here
    }

    /// Forgets a segment with what is left in it, if the owner agrees.
    fn forget(&self, at: SegmentRef, blocks: &[BlockKey]) -> bool {
        let volume = self.volume();
        let mut removed = Vec::new();
        let mut doomed = None;
        let reclaimed = self.watch.reclaim(blocks, &mut || {
            let mut state = self.shared.state.lock();
            doomed = state.table.segments.get(&at).map(|segment| Doomed {
                file: Arc::clone(&segment.file),
                bytes: segment.bytes,
            });
            removed = state.table.remove_segment(at);
            state.counts.reclaimed_segments += 1;
            state.counts.reclaimed_layer_blocks += removed.len() as u64;
        });
        if !reclaimed {
            return false;
        }
        tracing::debug!(segment = at.id(), layer_blocks = removed.len(), "dropping a segment");
        // If either fails, recovery tidies up: entries without a file are dropped, a file without entries is read again.
        if let Err(error) = volume.index.forget(Some(at.id()), removed.into_iter()) {
            tracing::warn!(segment = at.id(), %error, "index keeps entries of a dropped segment");
        }
        match std::fs::remove_file(segment_path(&volume.segments_dir(), at.id())) {
            Ok(()) => {
                let mut state = self.shared.state.lock();
                state.table.doomed.extend(doomed.map(|doomed| (at, doomed)));
                self.shared.removal.notify_all();
            }
            Err(error) => tracing::warn!(segment = at.id(), %error, "cannot remove a dropped segment"),
        }
        true
    }

    /// Hands the layers of a block to the owner, verified.
    fn demote(&self, at: SegmentRef, block: &BlockKey) {
        let wanted = self.shared.state.lock().table.layers_in(block, at);
        for (key, payload, checksum) in self.read_verified(&wanted) {
            self.watch.demote(key, payload, checksum);
            self.shared.state.lock().counts.demoted_layer_blocks += 1;
        }
    }

    /// Writes blocks of a segment again, while the budget lasts: what wants to stay beyond it is left for the owner to
    /// decide. False if a write failed: the victim must stay.
    fn readmit(&mut self, at: SegmentRef, blocks: &[BlockKey], budget: &mut u64) -> bool {
        let mut wanted: Vec<(LayerBlockKey, Location)> = Vec::new();
        let mut bytes = 0;
        for block in blocks {
            let layers = self.shared.state.lock().table.layers_in(block, at);
            // Each rewrite ends at a page.
            let more: u64 = layers.iter().map(|(_, location)| location.record_bytes()).sum();
            if more + PAGE > *budget {
                continue;
            }
            *budget -= more;
            bytes += more;
            wanted.extend(layers);
            if bytes >= SURVIVORS_BYTES {
                if !self.rewrite(&std::mem::take(&mut wanted)) {
                    return false;
                }
                *budget = budget.saturating_sub(PAGE);
                bytes = 0;
            }
        }
        *budget = budget.saturating_sub(if wanted.is_empty() { 0 } else { PAGE });
        self.rewrite(&wanted)
    }

    fn rewrite(&mut self, wanted: &[(LayerBlockKey, Location)]) -> bool {
        let records = self.read_verified(wanted);
        if records.is_empty() {
            return true;
        }
        let published = match self.append(&records) {
            Ok(published) => published,
            Err(error) => {
                tracing::warn!(%error, "cannot write again what must stay");
                return false;
            }
        };
        let from = |key: LayerBlockKey| wanted.iter().find(|(wanted, _)| *wanted == key).map(|(_, from)| *from);
        let mut state = self.shared.state.lock();
        let mut stale = Vec::new();
        for (key, to) in published {
            match from(key) {
                Some(from) if state.table.relocate(key, from, to) => state.counts.readmitted_layer_blocks += 1,
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
        true
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
