//! What the disk tier holds, in memory: block -> layers -> where. Loaded from the index at start-up.
//!
//! A 30-layer block costs about 1 KB here for 1.4 MB on disk; in exchange a prefix match does no I/O.
//!
//! Invariants: `queue` and the batches in flight hold every layer block whose place is `Queued`, by the order in which they
//! came (and may hold keys that were removed meanwhile); `queue_bytes` is the sum of the payloads that are `Queued`; a `Stored` place names a segment in `segments`,
//! whose `blocks` has its block.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::PathBuf,
    sync::Arc,
};

use bytes::Bytes;
use kvasir_block::{BlockKey, Checksum, LayerBlockKey};

use kvasir_device::BlockFile;

use super::format::{Identity, SegmentId, record_bytes};

/// A segment of a disk. Sorts by disk, then age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SegmentRef(u64);

impl SegmentRef {
    /// `None` for an id that no segment can have: they count up from 1.
    pub(crate) fn new(disk: u8, id: SegmentId) -> Option<Self> {
        (id < 1 << 56).then_some(Self(u64::from(disk) << 56 | id))
    }

    pub(crate) fn disk(self) -> u8 {
        (self.0 >> 56) as u8
    }

    pub(crate) fn id(self) -> SegmentId {
        self.0 & ((1 << 56) - 1)
    }

    /// All that a disk may have.
    pub(crate) fn of_disk(disk: u8) -> std::ops::RangeInclusive<Self> {
        let first = u64::from(disk) << 56;
        Self(first)..=Self(first | ((1 << 56) - 1))
    }
}

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) segment: SegmentRef,
    /// Of the record's header.
    pub(crate) offset: u32,
    pub(crate) payload_bytes: u32,
}

impl Location {
    pub(crate) fn record_bytes(&self) -> u64 {
        record_bytes(self.payload_bytes as usize)
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// Accepted, not yet synced. Boxed: most places are `Stored` and should not pay for this one.
    Queued(Box<(Bytes, Checksum)>),
    Stored(Location),
}

#[derive(Debug)]
pub(crate) struct SegmentState {
    pub(crate) file: Arc<BlockFile>,
    pub(crate) identity: Identity,
    /// Bytes of the file.
    pub(crate) bytes: u64,
    /// Bytes of records that are still wanted.
    pub(crate) live_bytes: u64,
    /// Reads of it that the disk failed.
    pub(crate) read_errors: u32,
    /// Takes nothing more.
    pub(crate) retired: bool,
    /// Blocks with a record here; reclaim forgets exactly these.
    pub(crate) blocks: HashSet<BlockKey>,
}

impl SegmentState {
    pub(crate) fn new(file: Arc<BlockFile>, identity: Identity, bytes: u64) -> Self {
        Self {
            file,
            identity,
            bytes,
            live_bytes: 0,
            read_errors: 0,
            retired: false,
            blocks: HashSet::new(),
        }
    }
}

/// A file that is no segment any more and still takes space.
#[derive(Clone, Debug)]
pub(crate) struct Doomed {
    pub(crate) file: Arc<BlockFile>,
    pub(crate) bytes: u64,
    /// Where it waits to become a segment again; `None` if it has no name any more and its space is given back.
    pub(crate) spare: Option<PathBuf>,
}

/// A file that was a segment and is read by nobody, to become one again: its space is there, and a file system is quicker with
/// space that was written before.
#[derive(Debug)]
pub(crate) struct Spare {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
}

/// What a writer took off the queue. It must be settled or given back.
#[derive(Debug)]
pub(crate) struct Batch {
    entries: Vec<(u64, LayerBlockKey)>,
    pub(crate) records: Vec<(LayerBlockKey, Bytes, Checksum)>,
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    blocks: HashMap<BlockKey, Vec<(u16, Place)>>,
    pub(crate) segments: BTreeMap<SegmentRef, SegmentState>,
    /// Removed segments that still take space.
    pub(crate) doomed: BTreeMap<SegmentRef, Doomed>,
    /// At most one for each disk. Not counted: the next segment takes its place.
    pub(crate) spares: BTreeMap<u8, Spare>,
    queue: BTreeMap<u64, LayerBlockKey>,
    in_flight: BTreeSet<u64>,
    pub(crate) queue_bytes: u64,
    pub(crate) queued: u64,
    pub(crate) stored: u64,
    /// Layer blocks ever queued; each has its number.
    pub(crate) accepted: u64,
}

impl Table {
    pub(crate) fn place(&self, key: LayerBlockKey) -> Option<&Place> {
        let layers = self.blocks.get(&key.block())?;
        let at = layers.binary_search_by_key(&key.layer, |&(layer, _)| layer).ok()?;
        Some(&layers[at].1)
    }

    /// Layers of a block, rising.
    pub(crate) fn layers(&self, block: &BlockKey) -> impl Iterator<Item = u16> {
        self.blocks.get(block).into_iter().flatten().map(|&(layer, _)| layer)
    }

    pub(crate) fn blocks(&self) -> impl Iterator<Item = (&BlockKey, impl Iterator<Item = u16>)> {
        self.blocks
            .iter()
            .map(|(block, layers)| (block, layers.iter().map(|&(layer, _)| layer)))
    }

    /// Queues a layer block that has no place yet.
    pub(crate) fn enqueue(&mut self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) {
        self.queue_bytes += payload.len() as u64;
        self.queued += 1;
        self.accepted += 1;
        self.queue.insert(self.accepted, key);
        let old = self.set(key, Place::Queued(Box::new((payload, checksum))));
        debug_assert!(old.is_none(), "a queued layer block has no place yet");
    }

    /// Takes the oldest queued records that fit into `bytes_max` of a segment, at least one, and with them the keys that
    /// were removed meanwhile.
    pub(crate) fn take_batch(&mut self, bytes_max: u64) -> Batch {
        let mut batch = Batch {
            entries: Vec::new(),
            records: Vec::new(),
        };
        let mut bytes = 0;
        for (&number, &key) in &self.queue {
            if let Some(Place::Queued(queued)) = self.place(key) {
                bytes += record_bytes(queued.0.len());
                if bytes > bytes_max && !batch.records.is_empty() {
                    break;
                }
                batch.records.push((key, queued.0.clone(), queued.1));
            }
            batch.entries.push((number, key));
        }
        for (number, _) in &batch.entries {
            self.queue.remove(number);
            self.in_flight.insert(*number);
        }
        batch
    }

    /// Bytes that the record at the head of the queue needs; 0 if there is none.
    pub(crate) fn first_queued_bytes(&self) -> u64 {
        let mut records = self.queue.values().filter_map(|&key| match self.place(key) {
            Some(Place::Queued(queued)) => Some(record_bytes(queued.0.len())),
            _ => None,
        });
        records.next().unwrap_or(0)
    }

    pub(crate) fn queue_is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The batch was written.
    pub(crate) fn settle(&mut self, batch: &Batch) {
        for (number, _) in &batch.entries {
            self.in_flight.remove(number);
        }
    }

    /// The batch was not written: back to where it was.
    pub(crate) fn give_back(&mut self, batch: Batch) {
        self.settle(&batch);
        self.queue.extend(batch.entries);
    }

    /// Of the first `accepted` layer blocks, those that are neither durable nor gone.
    pub(crate) fn unsettled(&self, accepted: u64) -> u64 {
        (self.queue.range(..=accepted).count() + self.in_flight.range(..=accepted).count()) as u64
    }

    /// A queued layer block now lies at `location`; false if it was removed meanwhile.
    pub(crate) fn publish(&mut self, key: LayerBlockKey, location: Location) -> bool {
        match self.place(key) {
            Some(Place::Queued(_)) => self.set_stored(key, location),
            // Removed and queued again before it was written: it was in the batch twice, and either record will do.
            Some(Place::Stored(_)) => {}
            None => return false,
        }
        true
    }

    /// A layer block lies at `location`, whatever was known before.
    pub(crate) fn set_stored(&mut self, key: LayerBlockKey, location: Location) {
        if let Some(segment) = self.segments.get_mut(&location.segment) {
            segment.blocks.insert(key.block());
            segment.live_bytes += location.record_bytes();
            let old = self.set(key, Place::Stored(location));
            self.forget_place(old);
            self.stored += 1;
        }
    }

    /// What of `block` lies in `segment`.
    pub(crate) fn layers_in(&self, block: &BlockKey, segment: SegmentRef) -> Vec<(LayerBlockKey, Location)> {
        let layers = self.blocks.get(block).into_iter().flatten();
        let here = layers.filter_map(|(layer, place)| match place {
            Place::Stored(location) if location.segment == segment => Some((block.layer(*layer), *location)),
            _ => None,
        });
        here.collect()
    }

    /// Blocks that have records in `segment`, with these.
    pub(crate) fn blocks_in(&self, segment: SegmentRef) -> Vec<(BlockKey, Vec<(LayerBlockKey, Location)>)> {
        let blocks = self.segments.get(&segment).into_iter().flat_map(|state| &state.blocks);
        let here = blocks.map(|block| (*block, self.layers_in(block, segment)));
        here.filter(|(_, records)| !records.is_empty()).collect()
    }

    /// All records of a segment, in the order in which they lie.
    pub(crate) fn records_of(&self, segment: SegmentRef) -> Vec<(LayerBlockKey, Location)> {
        let blocks = self.segments.get(&segment).into_iter().flat_map(|state| &state.blocks);
        let mut records: Vec<_> = blocks.flat_map(|block| self.layers_in(block, segment)).collect();
        records.sort_by_key(|(_, location)| location.offset);
        records
    }

    /// The record was written again at `to`; false if it is not at `from` any more.
    pub(crate) fn relocate(&mut self, key: LayerBlockKey, from: Location, to: Location) -> bool {
        let still = matches!(self.place(key), Some(Place::Stored(at)) if *at == from);
        if still {
            self.set_stored(key, to);
        }
        still
    }

    pub(crate) fn remove(&mut self, key: LayerBlockKey) -> bool {
        let Some(layers) = self.blocks.get_mut(&key.block()) else {
            return false;
        };
        let Ok(at) = layers.binary_search_by_key(&key.layer, |&(layer, _)| layer) else {
            return false;
        };
        let (_, place) = layers.remove(at);
        if layers.is_empty() {
            self.blocks.remove(&key.block());
        }
        self.forget_place(Some(place));
        true
    }

    /// Forgets a segment and every record in it; answers with their keys.
    pub(crate) fn remove_segment(&mut self, id: SegmentRef) -> Vec<LayerBlockKey> {
        let Some(segment) = self.segments.remove(&id) else {
            return Vec::new();
        };
        let mut removed = Vec::new();
        for block in segment.blocks {
            let Some(layers) = self.blocks.get_mut(&block) else {
                continue;
            };
            layers.retain(|(layer, place)| {
                let here = matches!(place, Place::Stored(location) if location.segment == id);
                if here {
                    removed.push(block.layer(*layer));
                }
                !here
            });
            if layers.is_empty() {
                self.blocks.remove(&block);
            }
        }
        self.stored -= removed.len() as u64;
        removed
    }

    /// Bytes of all segment files of a disk.
    pub(crate) fn disk_bytes(&self, disk: u8) -> u64 {
        let segments = self.segments.range(SegmentRef::of_disk(disk));
        segments.map(|(_, segment)| segment.bytes).sum()
    }

    /// Bytes of removed files of a disk that still take space.
    pub(crate) fn doomed_bytes(&self, disk: u8) -> u64 {
        let doomed = self.doomed.range(SegmentRef::of_disk(disk));
        doomed.map(|(_, doomed)| doomed.bytes).sum()
    }

    /// Whether a segment that goes should be kept as a spare: of the usual length, sound, of this format, and the only one.
    pub(crate) fn wants_spare(&self, at: SegmentRef, segment_bytes: u64) -> bool {
        let disk = at.disk();
        let mut doomed = self.doomed.range(SegmentRef::of_disk(disk));
        let usual = |segment: &SegmentState| {
            !segment.retired
                && segment.read_errors == 0
                && segment.identity.generation != 0
                && (segment_bytes / 2..=segment_bytes).contains(&segment.bytes)
        };
        self.segments.get(&at).is_some_and(usual)
            && !self.spares.contains_key(&disk)
            && doomed.all(|(_, doomed)| doomed.spare.is_none())
    }

    /// The newest segment of a disk.
    pub(crate) fn newest(&self, disk: u8) -> Option<SegmentRef> {
        let mut segments = self.segments.range(SegmentRef::of_disk(disk));
        segments.next_back().map(|(at, _)| *at)
    }

    pub(crate) fn segments_of(&self, disk: u8) -> u64 {
        self.segments.range(SegmentRef::of_disk(disk)).count() as u64
    }

    /// Forgets all segments of a disk.
    pub(crate) fn forget_disk(&mut self, disk: u8) {
        let ids: Vec<_> = self
            .segments
            .range(SegmentRef::of_disk(disk))
            .map(|(at, _)| *at)
            .collect();
        for id in ids {
            self.remove_segment(id);
        }
    }

    /// Segments of a disk in the order in which they should go: what is retired, then the oldest, but before it one with
    /// less than half of its live bytes. Oldest first keeps recency, wears a flash disk evenly and rewrites least; a segment
    /// that is mostly dead costs least to lose.
    pub(crate) fn victims(&self, disk: u8) -> Vec<SegmentRef> {
        let mut segments: Vec<_> = self.segments.range(SegmentRef::of_disk(disk)).collect();
        segments.sort_by_key(|(at, segment)| (!segment.retired, **at));
        let emptiest = (0..segments.len()).min_by_key(|&i| segments[i].1.live_bytes);
        if let Some(i) = emptiest
            && !segments[0].1.retired
            && segments[i].1.live_bytes * 2 < segments[0].1.live_bytes
        {
            segments[..=i].rotate_right(1);
        }
        segments.into_iter().map(|(at, _)| *at).collect()
    }

    fn set(&mut self, key: LayerBlockKey, place: Place) -> Option<Place> {
        let layers = self.blocks.entry(key.block()).or_default();
        match layers.binary_search_by_key(&key.layer, |&(layer, _)| layer) {
            Ok(at) => Some(std::mem::replace(&mut layers[at].1, place)),
            Err(at) => {
                layers.insert(at, (key.layer, place));
                None
            }
        }
    }

    fn forget_place(&mut self, place: Option<Place>) {
        match place {
            Some(Place::Queued(queued)) => {
                self.queue_bytes -= queued.0.len() as u64;
                self.queued -= 1;
            }
            Some(Place::Stored(location)) => {
                self.stored -= 1;
                if let Some(segment) = self.segments.get_mut(&location.segment) {
                    segment.live_bytes = segment.live_bytes.saturating_sub(location.record_bytes());
                }
            }
            None => {}
        }
    }
}
