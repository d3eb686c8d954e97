//! Reading: from the queue, or whole pages from disk, many at a time; verified either way.

use std::{sync::Arc, time::Instant};

use kvasir_block::{
    Checksum, LayerBlockKey,
    planted::{Bug, planted},
};
use kvasir_device::{BlockFile, Buffer, ReadAt, ReadOutcome};

use super::{
    DiskRead, Place, Shared,
    format::{Identity, RECORD_HEADER_BYTES},
    segment::{pages_of, verify},
    table::Location,
    volume::Volume,
};

/// So many failed reads, and a segment takes nothing more.
const READ_ERRORS_MAX: u32 = 3;

/// A record to be read, and what became of it.
pub(crate) struct RecordRead {
    pub(crate) key: LayerBlockKey,
    pub(crate) location: Location,
    file: Arc<BlockFile>,
    identity: Identity,
    buffer: Buffer,
    pub(crate) outcome: RecordOutcome,
}

pub(crate) enum RecordOutcome {
    Right(Checksum),
    Wrong,
    Failed,
    TooLate,
}

/// A read record, and where to say what became of it.
struct Judged<'a> {
    key: LayerBlockKey,
    location: Location,
    identity: Identity,
    outcome: &'a mut RecordOutcome,
}

impl Judged<'_> {
    fn judge(&mut self, read: &ReadAt<'_>, volume: &Volume) {
        *self.outcome = match &read.outcome {
            ReadOutcome::TooLate => RecordOutcome::TooLate,
            ReadOutcome::Read(done) => {
                volume.pace.note(read.took, *done);
                // What lies behind the end of the file is not of this read.
                let right = verify(&read.buffer[..*done], self.identity, self.key, self.location);
                right.map_or(RecordOutcome::Wrong, RecordOutcome::Right)
            }
            ReadOutcome::Failed(error) => {
                tracing::warn!(file = %read.file.path().display(), offset = read.offset, %error, "a record cannot be read");
                RecordOutcome::Failed
            }
        };
    }
}

impl RecordRead {
    /// What a hit is made of.
    pub(crate) fn into_payload(self) -> bytes::Bytes {
        let (_, _, skew) = pages_of(self.location);
        let start = skew + RECORD_HEADER_BYTES;
        self.buffer.freeze(start..start + self.location.payload_bytes as usize)
    }
}

impl Shared {
    pub(super) fn read_many(
        &self,
        keys: &[LayerBlockKey],
        room: &mut dyn FnMut(usize) -> Option<Buffer>,
        deadline: Option<Instant>,
    ) -> Vec<DiskRead> {
        let deadline = deadline.filter(|_| !planted(Bug::DeadlineIgnored));
        let mut outcomes: Vec<DiskRead> = Vec::with_capacity(keys.len());
        let mut stored = Vec::new();
        let mut late = false;
        for (i, &key) in keys.iter().enumerate() {
            late = late || deadline.is_some_and(|deadline| Instant::now() >= deadline);
            let place = self.state.lock().table.place(key).cloned();
            outcomes.push(match place {
                None => DiskRead::Miss,
                Some(_) if late => DiskRead::TooLate,
                Some(Place::Queued(queued)) => {
                    let (payload, checksum) = *queued;
                    if checksum.verifies(&payload) {
                        DiskRead::Hit { payload, checksum }
                    } else {
                        self.forget_corrupt(key, |place| matches!(place, Place::Queued(_)));
                        DiskRead::Corrupt
                    }
                }
                Some(Place::Stored(location)) => {
                    stored.push((i, key, location));
                    DiskRead::Miss
                }
            });
        }
        let (places, wanted): (Vec<_>, Vec<_>) = stored.into_iter().map(|(i, key, at)| (i, (key, at))).unzip();
        // A segment that was dropped meanwhile leaves a miss.
        let reads = self.read_records(&wanted, room, deadline);
        for (i, read) in places.into_iter().zip(reads) {
            let Some(read) = read else { continue };
            outcomes[i] = match read.outcome {
                RecordOutcome::Right(checksum) => DiskRead::Hit {
                    payload: read.into_payload(),
                    checksum,
                },
                RecordOutcome::TooLate => DiskRead::TooLate,
                RecordOutcome::Wrong | RecordOutcome::Failed => {
                    self.drop_wrong(&read);
                    DiskRead::Corrupt
                }
            };
        }
        let too_late = outcomes.iter().filter(|read| matches!(read, DiskRead::TooLate)).count() as u64;
        if too_late > 0 {
            self.state.lock().counts.too_late += too_late;
        }
        outcomes
    }

    /// Reads records and verifies them, one answer each; `None` where the segment is gone.
    pub(super) fn read_records(
        &self,
        wanted: &[(LayerBlockKey, Location)],
        room: &mut dyn FnMut(usize) -> Option<Buffer>,
        deadline: Option<Instant>,
    ) -> Vec<Option<RecordRead>> {
        let mut records: Vec<Option<RecordRead>> = Vec::with_capacity(wanted.len());
        for &(key, location) in wanted {
            let segment = {
                let state = self.state.lock();
                let segment = state.table.segments.get(&location.segment);
                segment.map(|segment| (Arc::clone(&segment.file), segment.identity))
            };
            let (_, bytes, _) = pages_of(location);
            records.push(segment.map(|(file, identity)| {
                RecordRead {
                    key,
                    location,
                    file,
                    identity,
                    buffer: room(bytes)
                        .filter(|buffer| buffer.len() >= bytes)
                        .unwrap_or_else(|| Buffer::heap(bytes)),
                    outcome: RecordOutcome::TooLate,
                }
            }));
        }
        let mut sorted: Vec<&mut RecordRead> = records.iter_mut().flatten().collect();
        sorted.sort_by_key(|record| record.location.segment.disk());
        let mut reads: Vec<ReadAt<'_>> = Vec::with_capacity(sorted.len());
        let mut judged: Vec<Judged<'_>> = Vec::with_capacity(sorted.len());
        for record in &mut sorted {
            let (offset, bytes, _) = pages_of(record.location);
            let buffer = &mut record.buffer.as_mut_slice()[..bytes];
            reads.push(ReadAt::new(&record.file, offset, buffer));
            judged.push(Judged {
                key: record.key,
                location: record.location,
                identity: record.identity,
                outcome: &mut record.outcome,
            });
        }
        // Disks that share a way in are read in one go, all in flight together, and verified as they come.
        let mut start = 0;
        while start < reads.len() {
            let disk = |judged: &Judged<'_>| &self.volumes[usize::from(judged.location.segment.disk())];
            let io = &disk(&judged[start]).io;
            let same = |judged: &&Judged<'_>| Arc::ptr_eq(io, &disk(judged).io);
            let end = start + judged[start..].iter().take_while(same).count();
            let judged = &mut judged[start..end];
            io.read_each(&mut reads[start..end], deadline, &mut |i, read| {
                let volume = &self.volumes[usize::from(judged[i].location.segment.disk())];
                judged[i].judge(read, volume);
            });
            start = end;
        }
        records
    }

    /// Forgets a record whose bytes are wrong or cannot be read; three that cannot retire its segment.
    pub(super) fn drop_wrong(&self, read: &RecordRead) {
        let (key, location) = (read.key, read.location);
        tracing::warn!(?key, ?location, "record is corrupt or unreadable, dropping it");
        if matches!(read.outcome, RecordOutcome::Failed) {
            let mut state = self.state.lock();
            state.counts.read_errors += 1;
            if let Some(segment) = state.table.segments.get_mut(&location.segment) {
                segment.read_errors += 1;
                if segment.read_errors >= READ_ERRORS_MAX && !segment.retired {
                    segment.retired = true;
                    state.counts.retired_segments += 1;
                }
            }
        }
        self.forget_corrupt(key, |place| matches!(place, Place::Stored(at) if *at == location));
    }

    /// Forgets `key` if it is still where the wrong bytes came from.
    fn forget_corrupt(&self, key: LayerBlockKey, same: impl Fn(&Place) -> bool) {
        let mut state = self.state.lock();
        state.counts.corrupt += 1;
        let volume = match state.table.place(key) {
            Some(place) if same(place) => match place {
                Place::Stored(at) => Some(&self.volumes[usize::from(at.segment.disk())]),
                Place::Queued(_) => None,
            },
            _ => return,
        };
        if planted(Bug::CorruptRecordKept) {
            return;
        }
        state.table.remove(key);
        drop(state);
        if let Some(volume) = volume
            && let Err(error) = volume.index.forget(None, [key].into_iter())
        {
            tracing::warn!(?key, %error, "corrupt record stays in the index until it is read again");
        }
    }
}
