//! The thread that writes to one disk: queue -> segment -> sync -> index -> table, one batch at a time, each in one segment.
//!
//! Two-phase publish: the index is told of a record only after `sync_data` of its bytes returned; the table calls it
//! stored only after the index has it. A sync that failed is never tried again on the same file (the kernel may have
//! dropped the pages and would report success): the segment is retired and the batch goes back to the queue, for a new
//! segment or another disk.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use kvasir_block::{
    LayerBlockKey,
    planted::{Bug, planted, point},
};
use kvasir_device::Buffer;

use super::{
    DiskWatch, Shared,
    format::{Identity, PAGE, SegmentId},
    recovery::Start,
    segment::{Record, SegmentWriter, segment_path},
    table::{Batch, Location, SegmentRef, SegmentState, Spare},
    volume::Volume,
};

/// Between attempts on a disk that does not work.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Most bytes of one batch: a flush waits for at most this much of what others queued behind it.
const BATCH_BYTES_MAX: u64 = 16 << 20;

/// Why a batch was not written.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the index: {0}")]
    Index(#[from] rocksdb::Error),
    #[error("the limit of {bytes_max} bytes is reached and every segment holds a leased block")]
    Leased { bytes_max: u64 },
    #[error("{free} bytes are free on the file system and free_bytes_min leaves {floor} to others: make room there")]
    Floor { free: u64, floor: u64 },
    #[error("segment ids are used up")]
    NoIds,
}

impl WriteError {
    pub(super) fn is_disk_full(&self) -> bool {
        match self {
            Self::Io(error) => matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded),
            Self::Floor { .. } => true,
            Self::Index(_) | Self::Leased { .. } | Self::NoIds => false,
        }
    }
}

pub(super) struct Flusher {
    pub(super) shared: Arc<Shared>,
    pub(super) number: usize,
    pub(super) watch: Arc<dyn DiskWatch>,
    pub(super) writer: Option<SegmentWriter>,
    next_segment: SegmentId,
    last_generation: u64,
    staging: Buffer,
}

/// Tells those who wait that nothing more will come from this disk, also when the thread panics.
struct Farewell(Arc<Shared>, usize);

impl Drop for Farewell {
    fn drop(&mut self) {
        self.0.state.lock().health[self.1].running = false;
        self.0.progress.notify_all();
        // What this one will not take, another may.
        self.0.work.notify_all();
        self.0.removal.notify_all();
    }
}

impl Flusher {
    pub(super) fn new(shared: Arc<Shared>, number: usize, watch: Arc<dyn DiskWatch>, start: Start) -> Self {
        Self {
            shared,
            number,
            watch,
            writer: start.writer,
            next_segment: start.next_segment,
            last_generation: start.last_generation,
            staging: Buffer::heap(0),
        }
    }

    pub(super) fn volume(&self) -> &Volume {
        &self.shared.volumes[self.number]
    }

    pub(super) fn run(mut self) {
        let _farewell = Farewell(Arc::clone(&self.shared), self.number);
        while self.wait_for_work() {
            let written = self.write_batch();
            let room = self.writer.as_ref().map_or(0, SegmentWriter::room);
            let mut state = self.shared.state.lock();
            let stop = state.stop;
            let health = &mut state.health[self.number];
            health.room = room;
            let dir = self.volume().dir.display();
            match written {
                Ok(()) => {
                    if let Some(reason) = health.works() {
                        tracing::info!(%dir, was = reason, "disk writes again");
                    }
                }
                Err(error) => {
                    let mut reason = error.to_string();
                    if let Some(until) = health.rests_until() {
                        let rest = until.saturating_duration_since(Instant::now());
                        reason = format!(
                            "{reason}; three segments failed within a minute, the next try is in {} s",
                            rest.as_secs_f32().ceil()
                        );
                    }
                    health.failures += 1;
                    if health.degraded.is_none() {
                        tracing::error!(%dir, reason, "disk takes nothing, keeping blocks in memory");
                    }
                    health.degraded = Some(reason);
                    state.counts.failures += 1;
                    if stop {
                        break;
                    }
                }
            }
            drop(state);
            self.shared.progress.notify_all();
            self.shared.work.notify_all();
        }
        self.seal();
    }

    /// Sleeps until there is something to write and the disk may be tried; false when all is written and it is time to go.
    fn wait_for_work(&self) -> bool {
        let mut state = self.shared.state.lock();
        let retry_at = Instant::now() + RETRY_AFTER;
        loop {
            if state.table.queue_is_empty() {
                if state.stop {
                    return false;
                }
                self.shared.work.wait(&mut state);
                continue;
            }
            if state.stop {
                return true;
            }
            let health = &state.health[self.number];
            let now = Instant::now();
            if health.rests(now) {
                let until = health.rests_until().unwrap_or(now);
                self.shared.work.wait_until(&mut state, until);
            } else if health.degraded.is_some() && !health.hurry && now < retry_at {
                self.shared.work.wait_until(&mut state, retry_at);
            } else if self.leaves_it_to_others(&state) {
                self.shared.work.wait(&mut state);
            } else {
                state.health[self.number].hurry = false;
                return true;
            }
        }
    }

    /// A disk that would have to forget something lets those go first that have room, while the queue is short.
    fn leaves_it_to_others(&self, state: &super::State) -> bool {
        let segment_bytes = self.shared.config.segment_bytes;
        let has_room = |volume: &Volume| {
            state.health[usize::from(volume.number)].room >= state.table.first_queued_bytes()
                || state.table.disk_bytes(volume.number) + segment_bytes <= volume.bytes_max
        };
        let healthy = |volume: &&Volume| {
            let health = &state.health[usize::from(volume.number)];
            health.running && health.degraded.is_none()
        };
        let mut others = self
            .shared
            .volumes
            .iter()
            .filter(|volume| usize::from(volume.number) != self.number);
        state.table.queue_bytes < self.shared.config.queue_bytes_max / 2
            && others.clone().count() > 0
            && !has_room(self.volume())
            && others.any(|volume| healthy(&volume) && has_room(volume))
    }

    fn write_batch(&mut self) -> Result<(), WriteError> {
        self.leave_failing_segment();
        // Before the batch is taken: nothing is in this thread's hands while it looks for room.
        let first = self
            .shared
            .state
            .lock()
            .table
            .first_queued_bytes()
            .next_multiple_of(PAGE);
        if self.writer.as_ref().is_some_and(|writer| writer.room() < first) {
            self.seal();
        }
        let shared = Arc::clone(&self.shared);
        if self.writer.is_none() && first > 0 {
            match self.begin_segment(first) {
                // A cache gives way before it gives up: drop a segment once, then try again.
                Err(error) if error.is_disk_full() && self.is_healthy() && self.give_way() => {
                    self.begin_segment(first)?;
                }
                begun => begun?,
            }
        }
        self.reclaim_ahead();
        let room = self.writer.as_ref().map_or(BATCH_BYTES_MAX, |writer| {
            // Room that only this one record fits into is for this one record.
            writer.room().clamp(first, BATCH_BYTES_MAX.max(first))
        });
        if self.writer.as_ref().is_some_and(|writer| writer.room() < first) {
            // Reclaim filled the segment with what must stay: another round.
            return Ok(());
        }
        let begun_now = self.writer.as_ref().is_none_or(|writer| writer.end == PAGE);
        let batch = shared.state.lock().table.take_batch(room);
        match self.write(&batch) {
            Ok(()) => Ok(()),
            Err(error) => {
                shared.state.lock().table.give_back(batch);
                if error.is_disk_full() && self.is_healthy() && !begun_now {
                    // The next round tries a new segment and makes room for it; this one does not count as a failure.
                    return Ok(());
                }
                Err(error)
            }
        }
    }

    fn write(&mut self, batch: &Batch) -> Result<(), WriteError> {
        if batch.records.is_empty() {
            self.shared.state.lock().table.settle(batch);
            return Ok(());
        }
        let published = self.append(&batch.records)?;
        let mut state = self.shared.state.lock();
        let removed: Vec<_> = published
            .iter()
            .filter(|(key, at)| !state.table.publish(*key, *at))
            .map(|(key, _)| *key)
            .collect();
        state.table.settle(batch);
        drop(state);
        // Found corrupt while it was being written: nobody shall find it after a restart.
        if !removed.is_empty() {
            self.volume().index.forget(None, removed.into_iter())?;
        }
        Ok(())
    }

    /// Appends to the current segment, syncs, tells the index.
    pub(super) fn append(&mut self, records: &[Record]) -> Result<Vec<(LayerBlockKey, Location)>, WriteError> {
        let volume = &self.shared.volumes[self.number];
        let Some(writer) = &mut self.writer else {
            return Err(WriteError::NoIds);
        };
        let before = writer.end;
        let locations = match writer.append(&*volume.io, records, &mut self.staging) {
            Ok(locations) => locations,
            Err(error) => {
                let error = WriteError::from(error);
                self.retire(&error);
                return Err(error);
            }
        };
        let published: Vec<_> = records.iter().map(|(key, ..)| *key).zip(locations).collect();
        point("publish: synced");
        volume.index.publish(writer.identity, writer.end, published.iter())?;
        point("publish: index told");
        if planted(Bug::PublishBeforeSync) {
            writer.sync(&*volume.io)?;
        }
        let mut state = self.shared.state.lock();
        state.counts.syncs += 1;
        state.counts.bytes_written += writer.end - before;
        state.counts.payload_bytes_written += records.iter().map(|(_, payload, _)| payload.len() as u64).sum::<u64>();
        Ok(published)
    }

    /// The current segment failed: nothing is written to it or synced any more. What it holds stays readable.
    fn retire(&mut self, error: &WriteError) {
        let Some(writer) = self.writer.take() else { return };
        let volume = &self.shared.volumes[self.number];
        // Garbage behind the end would only cost the next start a scan.
        let cut = volume.io.truncate(&writer.file, writer.end);
        tracing::warn!(segment = writer.identity.id, %error, "retiring the segment");
        let mut state = self.shared.state.lock();
        if !error.is_disk_full() {
            state.counts.retired_segments += u64::from(writer.end > PAGE);
            state.health[self.number].segment_failed(Instant::now(), self.shared.config.rest_after_failures);
        }
        // Or a disk that fails for a day would leave a file and an open descriptor for every attempt.
        if writer.end == PAGE {
            state.table.remove_segment(writer.at);
            drop(state);
            let _ = std::fs::remove_file(segment_path(&volume.segments_dir(), writer.identity.id));
        } else if let Some(segment) = state.table.segments.get_mut(&writer.at) {
            // A full disk is no reason to let it go before older ones.
            segment.retired = !error.is_disk_full();
            if cut.is_ok() {
                segment.bytes = writer.end;
            }
        }
    }

    /// Reads of the current segment failed: it takes nothing more.
    fn leave_failing_segment(&mut self) {
        let retired = self.writer.as_ref().is_some_and(|writer| {
            let state = self.shared.state.lock();
            state
                .table
                .segments
                .get(&writer.at)
                .is_none_or(|segment| segment.retired)
        });
        if retired {
            self.seal();
        }
    }

    /// Ends the current segment where its last record ends, and gives the rest of its space back.
    fn seal(&mut self) {
        let Some(writer) = self.writer.take() else { return };
        if writer.end == writer.bytes {
            return;
        }
        let volume = self.volume();
        match volume.io.truncate(&writer.file, writer.end) {
            Ok(()) => {
                if let Some(segment) = self.shared.state.lock().table.segments.get_mut(&writer.at) {
                    segment.bytes = writer.end;
                }
            }
            Err(error) => {
                tracing::warn!(segment = writer.identity.id, %error, "cannot give back the rest of a segment")
            }
        }
    }

    /// Begins a segment that takes a record of `first` bytes.
    fn begin_segment(&mut self, first: u64) -> Result<(), WriteError> {
        let bytes = self.shared.config.segment_bytes.max(PAGE + first);
        self.make_room(bytes)?;
        let spare = self.shared.state.lock().table.spares.remove(&self.volume().number);
        match (self.begin_in(bytes, spare.as_ref()), spare) {
            (Err(error), Some(spare)) => {
                // What it has of space may be what is missing.
                let _ = std::fs::remove_file(spare.path);
                if error.is_disk_full() {
                    self.begin_in(bytes, None)
                } else {
                    Err(error)
                }
            }
            (begun, _) => begun,
        }
    }

    fn begin_in(&mut self, bytes: u64, spare: Option<&Spare>) -> Result<(), WriteError> {
        let volume = &self.shared.volumes[self.number];
        let floor = self.shared.config.free_bytes_min;
        if floor > 0 {
            let free = volume.io.free_bytes(&volume.dir)?;
            let wanted = bytes.saturating_sub(spare.map_or(0, |spare| spare.bytes));
            if free < floor.saturating_add(wanted) {
                return Err(WriteError::Floor { free, floor });
            }
        }
        let id = self.next_segment;
        let at = SegmentRef::new(volume.number, id).ok_or(WriteError::NoIds)?;
        volume.index.use_up(id + 1)?;
        point("segment: id used up");
        self.next_segment = id + 1;
        // Time, so that it also differs from that of a folder this one was copied from; and rising, should time go back.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let nanos = now.map_or(0, |since| since.as_nanos() as u64);
        self.last_generation = nanos.max(self.last_generation.saturating_add(1));
        let identity = Identity {
            id,
            generation: self.last_generation,
        };
        let writer = match SegmentWriter::create(volume, at, identity, bytes, spare.map(|spare| spare.path.as_path())) {
            Ok(writer) => writer,
            Err(error) => {
                let error = WriteError::from(error);
                if !error.is_disk_full() {
                    let mut state = self.shared.state.lock();
                    state.health[self.number].segment_failed(Instant::now(), self.shared.config.rest_after_failures);
                }
                return Err(error);
            }
        };
        point("segment: begun");
        let segment = SegmentState::new(Arc::clone(&writer.file), identity, bytes);
        self.shared.state.lock().table.segments.insert(at, segment);
        self.writer = Some(writer);
        Ok(())
    }

    pub(super) fn is_healthy(&self) -> bool {
        self.shared.state.lock().health[self.number].degraded.is_none()
    }
}
