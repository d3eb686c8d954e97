//! What the disk tier holds, in memory: block -> layers -> where. Loaded from the index at start-up.
//!
//! A 30-layer block costs about 1 KB here for 1.4 MB on disk; in exchange a prefix match does no I/O.
//!
//! Invariants: `queue` holds every layer block whose place is `Queued`, oldest first (and may hold keys that were removed
//! meanwhile); `queue_bytes` is the sum of the payloads that are `Queued`; a `Stored` place names a segment in `segments`,
//! whose `blocks` has its block.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    fs::File,
    sync::Arc,
};

use bytes::Bytes;
use kvasir_block::{BlockKey, Checksum, LayerBlockKey};

use super::format::{SegmentId, record_bytes};

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) segment: SegmentId,
    /// Of the record's header.
    pub(crate) offset: u32,
    pub(crate) payload_bytes: u32,
}

#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// Accepted, not yet synced. Boxed: most places are `Stored` and should not pay for this one.
    Queued(Box<(Bytes, Checksum)>),
    Stored(Location),
}

#[derive(Debug)]
pub(crate) struct SegmentState {
    pub(crate) file: Arc<File>,
    /// Bytes of the file.
    pub(crate) bytes: u64,
    /// Blocks with a record here; reclaim forgets exactly these.
    pub(crate) blocks: HashSet<BlockKey>,
}

#[derive(Debug, Default)]
pub(crate) struct Table {
    blocks: HashMap<BlockKey, Vec<(u16, Place)>>,
    pub(crate) segments: BTreeMap<SegmentId, SegmentState>,
    queue: VecDeque<LayerBlockKey>,
    pub(crate) queue_bytes: u64,
    pub(crate) queued: u64,
    pub(crate) stored: u64,
    /// Layer blocks ever queued, and ever taken off the queue: a flush waits for the one to reach the other.
    pub(crate) accepted: u64,
    pub(crate) settled: u64,
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
        self.queue.push_back(key);
        let old = self.set(key, Place::Queued(Box::new((payload, checksum))));
        debug_assert!(old.is_none(), "a queued layer block has no place yet");
    }

    /// The oldest queued records that fit into `bytes_max` of a segment, at least one; keys that were removed meanwhile
    /// come without a payload, so that they are settled with the rest.
    pub(crate) fn next_batch(&self, bytes_max: u64) -> Vec<(LayerBlockKey, Option<(Bytes, Checksum)>)> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        for &key in &self.queue {
            let record = match self.place(key) {
                Some(Place::Queued(queued)) => Some((queued.0.clone(), queued.1)),
                _ => None,
            };
            bytes += record.as_ref().map_or(0, |(payload, _)| record_bytes(payload.len()));
            if bytes > bytes_max && !batch.is_empty() {
                break;
            }
            batch.push((key, record));
        }
        batch
    }

    pub(crate) fn queue_is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Takes the first `count` entries off the queue.
    pub(crate) fn settle(&mut self, count: usize) {
        self.queue.drain(..count);
        self.settled += count as u64;
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
            let old = self.set(key, Place::Stored(location));
            self.forget_place(old);
            self.stored += 1;
        }
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
    pub(crate) fn remove_segment(&mut self, id: SegmentId) -> Vec<LayerBlockKey> {
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

    /// Bytes of all segment files.
    pub(crate) fn disk_bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.bytes).sum()
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
            Some(Place::Stored(_)) => self.stored -= 1,
            None => {}
        }
    }
}
