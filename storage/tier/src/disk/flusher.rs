//! The thread that writes: queue -> segment -> sync -> index -> table, one batch at a time, each batch in one segment.
//!
//! Two-phase publish: the index is told of a record only after `sync_data` of its bytes returned; the table calls it
//! stored only after the index has it. A sync that failed is never tried again on the same file (the kernel may have
//! dropped the pages and would report success): the segment is retired and the batch goes into a new one.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_block::LayerBlockKey;

use super::{
    DiskWatch, Shared,
    format::{RECORD_ALIGN, SEGMENT_HEADER_BYTES, SegmentId, record_bytes},
    segment::{Record, SegmentWriter, segment_path},
    table::{Location, SegmentState},
};

/// Between attempts on a disk that does not work.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Most bytes of one batch: a flush waits for at most this much of what others queued behind it.
const BATCH_BYTES_MAX: u64 = 16 << 20;

/// Why a batch was not written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the index: {0}")]
    Index(#[from] rocksdb::Error),
    #[error("the limit of {bytes_max} bytes is reached and every segment holds a leased block")]
    Leased { bytes_max: u64 },
}

impl WriteError {
    fn is_disk_full(&self) -> bool {
        matches!(self, Self::Io(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

pub(super) struct Flusher {
    shared: Arc<Shared>,
    watch: Arc<dyn DiskWatch>,
    writer: Option<SegmentWriter>,
    next_segment: SegmentId,
}

/// Tells those who wait that nothing more will come, also when the thread panics.
struct Farewell(Arc<Shared>);

impl Drop for Farewell {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.stop = true;
        state.stopped = true;
        self.0.progress.notify_all();
    }
}

impl Flusher {
    pub(super) fn new(
        shared: Arc<Shared>,
        watch: Arc<dyn DiskWatch>,
        writer: Option<SegmentWriter>,
        next_segment: SegmentId,
    ) -> Self {
        Self {
            shared,
            watch,
            writer,
            next_segment,
        }
    }

    pub(super) fn run(mut self) {
        let _farewell = Farewell(Arc::clone(&self.shared));
        while self.wait_for_work() {
            let written = self.write_batch();
            let mut state = self.shared.state.lock();
            match written {
                Ok(()) => {
                    if let Some(reason) = state.degraded.take() {
                        tracing::info!(was = reason, "disk tier writes again");
                    }
                }
                Err(error) => {
                    state.failures += 1;
                    if state.degraded.is_none() {
                        tracing::error!(%error, queued = state.table.queued, "disk tier cannot write, keeping blocks in memory");
                    }
                    state.degraded = Some(error.to_string());
                    if state.stop {
                        return;
                    }
                }
            }
            drop(state);
            self.shared.progress.notify_all();
        }
    }

    /// Sleeps until there is something to write and the disk may be tried; false when all is written and it is time to go.
    fn wait_for_work(&self) -> bool {
        let mut state = self.shared.state.lock();
        while state.table.queue_is_empty() {
            if state.stop {
                return false;
            }
            self.shared.work.wait(&mut state);
        }
        let retry_at = Instant::now() + RETRY_AFTER;
        while state.degraded.is_some() && !state.hurry && !state.stop {
            if self.shared.work.wait_until(&mut state, retry_at).timed_out() {
                break;
            }
        }
        state.hurry = false;
        true
    }

    fn write_batch(&mut self) -> Result<(), WriteError> {
        let (entries, records) = self.next_batch();
        if records.is_empty() {
            self.shared.state.lock().table.settle(entries);
            return Ok(());
        }
        let bytes: u64 = records.iter().map(|(_, payload, _)| record_bytes(payload.len())).sum();
        self.make_room(bytes + SEGMENT_HEADER_BYTES as u64)?;
        let locations = match self.append(&records) {
            // A cache gives way before it gives up: drop the oldest segment once, then try again.
            Err(error) if error.is_disk_full() && self.is_healthy() && self.reclaim_oldest() => {
                self.append(&records)?
            }
            appended => appended?,
        };
        let (Some(segment), Some(end)) = (
            locations.first().map(|at| at.segment),
            self.writer.as_ref().map(|w| w.end),
        ) else {
            return Ok(());
        };
        let published: Vec<(LayerBlockKey, Location)> = records.iter().map(|(key, ..)| *key).zip(locations).collect();
        self.shared.index.publish(segment, end, published.iter())?;

        let mut state = self.shared.state.lock();
        if let Some(segment) = state.table.segments.get_mut(&segment) {
            segment.bytes = end;
        }
        let removed: Vec<_> = published
            .iter()
            .filter(|(key, at)| !state.table.publish(*key, *at))
            .collect();
        state.table.settle(entries);
        state.syncs += 1;
        drop(state);
        // Found corrupt while it was being written: nobody shall find it after a restart.
        if !removed.is_empty() {
            self.shared
                .index
                .forget(None, removed.into_iter().map(|(key, _)| *key))?;
        }
        Ok(())
    }

    /// How many queue entries the next batch settles, and the records among them, all for the current segment.
    fn next_batch(&mut self) -> (usize, Vec<Record>) {
        let segment_bytes = self.shared.config.segment_bytes;
        let room = self
            .writer
            .as_ref()
            .map(|writer| segment_bytes.saturating_sub(writer.end));
        let state = self.shared.state.lock();
        let mut batch = state
            .table
            .next_batch(room.unwrap_or(segment_bytes).min(BATCH_BYTES_MAX));
        let first = batch
            .iter()
            .find_map(|(_, record)| record.as_ref())
            .map_or(0, |(payload, _)| record_bytes(payload.len()));
        if room.is_some_and(|room| first > room) {
            self.writer = None;
            batch = state.table.next_batch(segment_bytes.min(BATCH_BYTES_MAX));
        }
        drop(state);
        let entries = batch.len();
        let records = batch
            .into_iter()
            .filter_map(|(key, record)| record.map(|(payload, checksum)| (key, payload, checksum)));
        (entries, records.collect())
    }

    /// Appends to the current segment, or to a new one.
    fn append(&mut self, records: &[Record]) -> Result<Vec<Location>, WriteError> {
        let dir = self.segments_dir();
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => {
                let id = self.next_segment;
                let writer = SegmentWriter::create(&dir, id, &self.shared.faults)?;
                let state = SegmentState {
                    file: Arc::clone(&writer.file),
                    bytes: writer.end,
                    blocks: Default::default(),
                };
                self.next_segment += 1;
                self.shared.state.lock().table.segments.insert(id, state);
                none.insert(writer)
            }
        };
        debug_assert!(
            writer.end.is_multiple_of(RECORD_ALIGN),
            "records start at aligned places"
        );
        match writer.append(records, &self.shared.faults) {
            Ok(locations) => Ok(locations),
            Err(error) => {
                let cut = writer.file.set_len(writer.end);
                let error = WriteError::from(error);
                if !error.is_disk_full() || cut.is_err() {
                    tracing::warn!(segment = writer.id, %error, "retiring the segment");
                    let empty = (writer.end == SEGMENT_HEADER_BYTES as u64).then_some(writer.id);
                    self.writer = None;
                    // Or a disk that fails for a day would leave a file and an open descriptor for every attempt.
                    if let Some(id) = empty {
                        self.shared.state.lock().table.remove_segment(id);
                        let _ = std::fs::remove_file(segment_path(&dir, id));
                    }
                }
                Err(error)
            }
        }
    }

    /// Drops the oldest segments until `bytes` more fit under the limit.
    fn make_room(&mut self, bytes: u64) -> Result<(), WriteError> {
        let bytes_max = self.shared.config.disks[0].bytes_max;
        loop {
            let disk_bytes = self.shared.state.lock().table.disk_bytes();
            // With nothing left to drop, a record larger than the limit is still written: sizes were checked at the door.
            if disk_bytes + bytes <= bytes_max || disk_bytes == 0 {
                return Ok(());
            }
            if !self.reclaim_oldest() {
                return Err(WriteError::Leased { bytes_max });
            }
        }
    }

    /// Drops the oldest segment that holds nothing leased; the current one only when no other may go.
    fn reclaim_oldest(&mut self) -> bool {
        let current = self.writer.as_ref().map(|writer| writer.id);
        let ids: Vec<SegmentId> = self.shared.state.lock().table.segments.keys().copied().collect();
        let others = ids.into_iter().filter(|id| Some(*id) != current);
        for id in others.chain(current).collect::<Vec<_>>() {
            if self.reclaim(id) {
                if Some(id) == current {
                    self.writer = None;
                }
                return true;
            }
        }
        false
    }

    fn reclaim(&self, id: SegmentId) -> bool {
        let blocks: Vec<_> = match self.shared.state.lock().table.segments.get(&id) {
            Some(segment) => segment.blocks.iter().copied().collect(),
            None => return false,
        };
        let mut removed = Vec::new();
        let reclaimed = self.watch.reclaim(&blocks, &mut || {
            let mut state = self.shared.state.lock();
            removed = state.table.remove_segment(id);
            state.reclaimed_segments += 1;
            state.reclaimed_layer_blocks += removed.len() as u64;
        });
        if !reclaimed {
            return false;
        }
        tracing::debug!(segment = id, layer_blocks = removed.len(), "dropping a segment");
        // If either fails, recovery tidies up: entries without a file are dropped, a file without entries is read again.
        if let Err(error) = self.shared.index.forget(Some(id), removed.into_iter()) {
            tracing::warn!(segment = id, %error, "index keeps entries of a dropped segment");
        }
        if let Err(error) = std::fs::remove_file(segment_path(&self.segments_dir(), id)) {
            tracing::warn!(segment = id, %error, "cannot remove a dropped segment");
        }
        true
    }

    fn is_healthy(&self) -> bool {
        self.shared.state.lock().degraded.is_none()
    }

    fn segments_dir(&self) -> std::path::PathBuf {
        self.shared.config.dir().join("segments")
    }
}
