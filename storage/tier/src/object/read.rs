//! Reading: which ranges to ask for, and taking records out of the answers as they come.
//!
//! A record counts only where its header (key, place, length, checksum) is byte for byte what the manifest promised and
//! its payload has that checksum. Records are taken as soon as they are whole, so an answer that breaks off or meets the
//! deadline still gives what came before, and a second attempt asks for the rest only.

use std::{
    collections::HashMap,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use kvasir_block::{
    LayerBlockKey, NamespaceId,
    planted::{Bug, planted},
};
use parking_lot::{Condvar, Mutex};
use tokio::{runtime::Handle, time::timeout_at};

use super::{
    ObjectRead, Shared,
    bucket::Unmade,
    catalog::Place,
    failure::ObjectFailure,
    format::{Entry, PackName, RECORD_HEADER_BYTES, is_record_header},
};

/// Before the first further attempt; doubles with each.
const BACKOFF: Duration = Duration::from_millis(20);

/// A record to read, and which answers it is.
#[derive(Debug, PartialEq, Eq)]
struct Want {
    entry: Entry,
    slots: Vec<usize>,
}

/// One ranged GET.
#[derive(Debug, PartialEq, Eq)]
struct Reading {
    namespace: NamespaceId,
    pack: PackName,
    /// By rising offset.
    wants: Vec<Want>,
}

/// The answers to one call, filled by the runtime's threads while the caller waits.
struct Answers {
    slots: Mutex<(Vec<Option<ObjectRead>>, usize)>,
    ready: Condvar,
}

impl Answers {
    fn set(&self, want: &Want, read: &ObjectRead) {
        let mut guard = self.slots.lock();
        let (slots, open) = &mut *guard;
        for slot in &want.slots {
            if slots[*slot].replace(read.clone()).is_none() {
                *open -= 1;
            }
        }
        if *open == 0 {
            self.ready.notify_all();
        }
    }

    fn set_all(&self, wants: &[Want], read: &ObjectRead) {
        wants.iter().for_each(|want| self.set(want, read));
    }

    /// Waits for all of them, until the deadline.
    fn wait(&self, deadline: Instant) -> Vec<ObjectRead> {
        let mut guard = self.slots.lock();
        while guard.1 > 0 {
            if self.ready.wait_until(&mut guard, deadline).timed_out() {
                break;
            }
        }
        let slots = guard.0.iter_mut();
        slots.map(|slot| slot.take().unwrap_or(ObjectRead::TooLate)).collect()
    }
}

pub(super) fn get_many(
    shared: &Arc<Shared>,
    runtime: &Handle,
    keys: &[LayerBlockKey],
    deadline: Instant,
) -> Vec<ObjectRead> {
    let mut slots: Vec<Option<ObjectRead>> = vec![None; keys.len()];
    let mut places = Vec::new();
    let mut queued = Vec::new();
    let state = shared.state.lock();
    let stopped = state.stop;
    for (slot, key) in keys.iter().enumerate() {
        if let Some((payload, checksum)) = state.queue.payload(*key) {
            queued.push((slot, payload.clone(), *checksum));
        } else if let Some(place) = state.catalog.place(*key) {
            places.push((slot, key.namespace, place));
        } else {
            slots[slot] = Some(ObjectRead::Miss);
        }
    }
    drop(state);
    for (slot, payload, checksum) in queued {
        let whole = checksum.verifies(&payload);
        slots[slot] = Some(if whole {
            ObjectRead::Hit { payload, checksum }
        } else {
            ObjectRead::Corrupt
        });
    }
    let late = Instant::now() >= deadline;
    for (slot, ..) in places.iter().filter(|_| late || stopped) {
        slots[*slot] = Some(if late {
            ObjectRead::TooLate
        } else {
            ObjectRead::Unavailable
        });
    }
    let open = slots.iter().filter(|slot| slot.is_none()).count();
    let answers = Arc::new(Answers {
        slots: Mutex::new((slots, open)),
        ready: Condvar::new(),
    });
    if open > 0 {
        let config = &shared.config;
        let readings = plan(places, config.gap_bytes_max, config.range_bytes_max);
        let (shared, answers) = (Arc::clone(shared), Arc::clone(&answers));
        // Ends by itself at the deadline, or with the runtime; one task for each caller that waits.
        runtime.spawn(async move {
            let gets_max = shared.config.gets_max;
            let readings = futures::stream::iter(readings);
            readings
                .for_each_concurrent(gets_max, |reading| read(&shared, reading, deadline, &answers))
                .await;
        });
    }
    answers.wait(deadline)
}

/// Which ranges to ask for: neighbours whose gap is small share one, up to a size.
fn plan(places: Vec<(usize, NamespaceId, Place)>, gap_bytes_max: u64, range_bytes_max: u64) -> Vec<Reading> {
    let mut packs: HashMap<(NamespaceId, PackName), Vec<(usize, Entry)>> = HashMap::new();
    let mut order = Vec::new();
    for (slot, namespace, place) in places {
        let wanted = packs.entry((namespace, place.pack)).or_insert_with(|| {
            order.push((namespace, place.pack));
            Vec::new()
        });
        wanted.push((slot, place.entry));
    }
    let mut readings: Vec<Reading> = Vec::new();
    for (namespace, pack) in order {
        let mut wanted = packs.remove(&(namespace, pack)).unwrap_or_default();
        wanted.sort_by_key(|(_, entry)| entry.offset);
        let first_reading = readings.len();
        for (slot, entry) in wanted {
            let open = &mut readings[first_reading..];
            match open.last_mut().map(|reading| &mut reading.wants) {
                Some(wants) if wants.last().is_some_and(|last| last.entry.offset == entry.offset) => {
                    if let Some(last) = wants.last_mut() {
                        last.slots.push(slot);
                    }
                }
                Some(wants) if joins(wants, &entry, gap_bytes_max, range_bytes_max) => {
                    wants.push(Want {
                        entry,
                        slots: vec![slot],
                    });
                }
                _ => readings.push(Reading {
                    namespace,
                    pack,
                    wants: vec![Want {
                        entry,
                        slots: vec![slot],
                    }],
                }),
            }
        }
    }
    readings
}

fn joins(wants: &[Want], entry: &Entry, gap_bytes_max: u64, range_bytes_max: u64) -> bool {
    let Range { start, end } = span(wants);
    u64::from(entry.offset).saturating_sub(end) <= gap_bytes_max && entry.end() - start <= range_bytes_max
}

/// From the first byte of the first to the last of the last.
fn span(wants: &[Want]) -> Range<u64> {
    let start = wants.first().map_or(0, |want| u64::from(want.entry.offset));
    start..wants.last().map_or(start, |want| want.entry.end())
}

/// How an attempt ended, when not well.
enum End {
    TooLate,
    Paused,
    Failed(ObjectFailure),
}

/// Reads one range, with further attempts for what did not come.
async fn read(shared: &Shared, reading: Reading, deadline: Instant, answers: &Answers) {
    let mut wants = &reading.wants[..];
    let mut attempts = 0;
    let verdict = loop {
        let Ok(Ok(_permit)) = timeout_at(deadline.into(), shared.gets.acquire()).await else {
            break ObjectRead::TooLate;
        };
        let (taken, end) = attempt(shared, &reading, wants, deadline, answers).await;
        wants = &wants[taken..];
        match end {
            None => return,
            Some(End::TooLate) => break ObjectRead::TooLate,
            Some(End::Paused) => break ObjectRead::Unavailable,
            Some(End::Failed(ObjectFailure::Missing)) => {
                tracing::debug!(pack = %reading.pack, "a pack is gone, forgetting it");
                let mut state = shared.state.lock();
                // Other ranges of the same pack find it gone too; it counts once.
                let was_known = state.catalog.forget_pack(reading.namespace, &reading.pack);
                state.counts.vanished_objects += u64::from(was_known);
                break ObjectRead::Miss;
            }
            Some(End::Failed(ObjectFailure::Malformed | ObjectFailure::Short)) => {
                wants.iter().for_each(|want| forget(shared, &reading, want));
                break ObjectRead::Corrupt;
            }
            Some(End::Failed(failure)) => {
                let pause = BACKOFF * 2_u32.pow(attempts.min(6));
                attempts += 1;
                if !failure.is_transient() || attempts > shared.config.retries_max {
                    break ObjectRead::Unavailable;
                }
                if Instant::now() + pause >= deadline {
                    break ObjectRead::TooLate;
                }
                drop(_permit);
                tokio::time::sleep(pause).await;
            }
        }
    };
    answers.set_all(wants, &verdict);
}

/// Asks once; answers how many of `wants` have their answer, and why not all of them.
async fn attempt(
    shared: &Shared,
    reading: &Reading,
    wants: &[Want],
    deadline: Instant,
    answers: &Answers,
) -> (usize, Option<End>) {
    let start = Instant::now();
    let range = span(wants);
    let mut pieces = match shared
        .bucket
        .get(reading.namespace, &reading.pack, range.clone(), deadline)
        .await
    {
        Ok(pieces) => pieces,
        Err(Unmade::TooLate) => return (0, Some(End::TooLate)),
        Err(Unmade::Paused) => return (0, Some(End::Paused)),
        Err(Unmade::Failed(failure)) => return (0, Some(End::Failed(failure))),
    };
    let until = deadline.min(start + shared.config.read_max);
    let mut records = Records::new(wants, range.start);
    let mut taken = 0;
    let failure = loop {
        match timeout_at(until.into(), pieces.next()).await {
            Ok(Some(Ok(piece))) => {
                records.take(&piece, |want, record| {
                    taken += 1;
                    let read = verify(reading.namespace, &want.entry, record);
                    if read == ObjectRead::Corrupt {
                        forget(shared, reading, want);
                    }
                    answers.set(want, &read);
                });
                if records.at > range.end {
                    break Some(ObjectFailure::Malformed);
                }
            }
            Ok(Some(Err(error))) => break Some(ObjectFailure::of(&error)),
            Ok(None) if taken < wants.len() => break Some(ObjectFailure::Short),
            Ok(None) => break None,
            Err(_) if until == deadline => {
                shared.bucket.read_bytes(records.at - range.start);
                shared.bucket.cut(start);
                return (taken, Some(End::TooLate));
            }
            Err(_) => break Some(ObjectFailure::Timeout),
        }
    };
    shared.bucket.read_bytes(records.at - range.start);
    shared.bucket.settled(failure);
    // Too long an answer spoils nothing that was verified; what it says behind is not asked for.
    (taken, failure.filter(|_| taken < wants.len()).map(End::Failed))
}

fn verify(namespace: NamespaceId, entry: &Entry, record: Bytes) -> ObjectRead {
    let (header, payload) = record.split_at(RECORD_HEADER_BYTES);
    if !is_record_header(header, namespace, entry)
        || !(entry.checksum.verifies(payload) || planted(Bug::ObjectChecksumSkipped))
    {
        return ObjectRead::Corrupt;
    }
    ObjectRead::Hit {
        payload: record.slice(RECORD_HEADER_BYTES..),
        checksum: entry.checksum,
    }
}

fn forget(shared: &Shared, reading: &Reading, want: &Want) {
    let place = Place {
        pack: reading.pack,
        entry: want.entry,
    };
    if shared.state.lock().catalog.forget_record(reading.namespace, &place) {
        tracing::warn!(pack = %reading.pack, offset = want.entry.offset, "record is corrupt, forgetting it");
    }
}

/// Cuts a stream of pieces into the wanted records. Each is copied once, into memory of its own: a block that is kept
/// does not keep its neighbours and the gaps between them.
struct Records<'a> {
    wants: &'a [Want],
    /// Place in the object of the next byte.
    at: u64,
    open: BytesMut,
}

impl<'a> Records<'a> {
    fn new(wants: &'a [Want], at: u64) -> Self {
        Self {
            wants,
            at,
            open: BytesMut::new(),
        }
    }

    fn take(&mut self, mut piece: &[u8], mut whole: impl FnMut(&Want, Bytes)) {
        while let (Some(want), false) = (self.wants.first(), piece.is_empty()) {
            let skipped = u64::from(want.entry.offset)
                .saturating_sub(self.at)
                .min(piece.len() as u64);
            piece = &piece[skipped as usize..];
            self.at += skipped;
            let bytes = (want.entry.end() - u64::from(want.entry.offset)) as usize;
            if self.open.capacity() == 0 && !piece.is_empty() {
                self.open.reserve(bytes);
            }
            let (taken, rest) = piece.split_at(piece.len().min(bytes - self.open.len()));
            self.open.extend_from_slice(taken);
            self.at += taken.len() as u64;
            piece = rest;
            if self.open.len() == bytes {
                whole(want, std::mem::take(&mut self.open).freeze());
                self.wants = &self.wants[1..];
            }
        }
        self.at += piece.len() as u64;
    }
}

#[cfg(test)]
mod tests;
