//! Sketches made ahead: after a put, in the background, from the bytes that were put.
//!
//! A sketch of a layer block takes a large part of what its put costs (README), so a put only leaves its key in a queue. The thread
//! sketches what is still in memory by then, keeps the sketch in memory and beside the block on disk, and gives way to callers. What
//! it did not get to is sketched by the query that first wants it: a block is searchable when its put returns, and sketches ahead
//! only make its first query quicker.
//!
//! Invariant: a sketch under a name is what that block gives in that basis. It is a pure function of both, so who makes it and
//! when does not matter, and a block that is gone leaves nothing wrong behind.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use kvasir_block::{Checksum, LayerBlockKey};
use kvasir_tier::DiskRead;
use parking_lot::Mutex;

use super::{
    background::{Background, Load},
    derived::{self, Kind},
};
use crate::{
    cache::Shared,
    namespace::NamespaceBasis,
    retrieve::{Payload, encode_layer, sketched_bytes},
};

/// Sketches read from disk at a time.
const READS: usize = 64;

/// Keys that wait to be sketched, and the sketches of late.
#[derive(Debug)]
pub(crate) struct Sketcher {
    pub(super) queue: Arc<Background<LayerBlockKey>>,
    bytes_max: u64,
    kept: Mutex<Kept>,
}

/// By derived key; the oldest go first.
#[derive(Debug, Default)]
struct Kept {
    sketches: HashMap<LayerBlockKey, Bytes>,
    order: VecDeque<LayerBlockKey>,
    bytes: u64,
}

impl Sketcher {
    pub(super) fn new(bytes_max: u64, queue_max: usize) -> Self {
        Self {
            queue: Arc::new(Background::new("kv-sketch", queue_max)),
            bytes_max,
            kept: Mutex::default(),
        }
    }

    pub(crate) fn load(&self) -> Load {
        self.queue.load()
    }

    /// Bytes of sketches in memory.
    pub(crate) fn bytes(&self) -> u64 {
        self.kept.lock().bytes
    }

    fn get(&self, key: LayerBlockKey) -> Option<Bytes> {
        self.kept.lock().sketches.get(&key).cloned()
    }

    fn keep(&self, key: LayerBlockKey, sketch: Bytes) {
        let bytes = sketch.len() as u64;
        if bytes > self.bytes_max {
            return;
        }
        let mut kept = self.kept.lock();
        if kept.sketches.insert(key, sketch).is_some() {
            // The same bytes: a sketch is a function of its name.
            return;
        }
        kept.order.push_back(key);
        kept.bytes += bytes;
        while kept.bytes > self.bytes_max
            && let Some(oldest) = kept.order.pop_front()
        {
            let gone = kept.sketches.remove(&oldest).map_or(0, |sketch| sketch.len() as u64);
            kept.bytes -= gone;
        }
    }
}

impl Shared {
    /// A layer block was stored: it is to be sketched when there is time.
    pub(crate) fn sketch_later(&self, key: LayerBlockKey) {
        if !self.sketches_ahead() || !self.namespaces.has_basis(key.namespace) {
            return;
        }
        if !self.indexes.sketcher.queue.push(key) {
            self.counters.sketches_dropped.add(1);
        }
    }

    pub(crate) fn sketches_ahead(&self) -> bool {
        self.config.sketch_bytes_max > 0 && self.config.sketch_queue_max > 0
    }

    /// Sketches a layer block that is in memory.
    pub(super) fn sketch_ahead(&self, key: LayerBlockKey) {
        if !self.indexes.sketcher.queue.step_aside(&self.indexes.busy) {
            return;
        }
        let begun = kvasir_device::thread::cpu_time();
        let (Some(basis), Some(schema)) = (self.namespaces.basis(key.namespace), self.namespaces.get(key.namespace))
        else {
            return;
        };
        let held = self.state.lock().host.get(key);
        // Bytes that are not verified now are not looked at; who reads them next drops them.
        let Some((payload, _)) = held.filter(|(payload, checksum)| checksum.verifies(payload)) else {
            self.counters.sketches_dropped.add(1);
            return;
        };
        let payload = Payload::new(payload);
        if let Some(sketch) = encode_layer(payload.halves(), &schema.layout(), basis.basis(), key.layer) {
            self.keep_sketch(key, &basis, sketch);
            self.counters.sketched_blocks.add(1);
            self.counters.sketched_ahead.add(1);
        }
        let used = kvasir_device::thread::cpu_time().saturating_sub(begun);
        self.counters
            .sketch_cpu_micros
            .add(u64::try_from(used.as_micros()).unwrap_or(u64::MAX));
    }

    /// Keeps a sketch in memory, and on disk where its block is.
    pub(crate) fn keep_sketch(&self, key: LayerBlockKey, basis: &NamespaceBasis, sketch: Vec<u8>) {
        if !self.sketches_ahead() {
            return;
        }
        let sketch = Bytes::from(sketch);
        let name = derived::sketches_of(key.namespace, basis.id())
            .block(key.hash)
            .layer(key.layer);
        if self.disk.contains(key) && !self.disk.contains(name) {
            let disk = self.disk.stats();
            // Puts come first: they are answered busy when the queue is full.
            if disk.queue_bytes * 2 < disk.queue_bytes_max {
                let checksum = Checksum::of(&sketch);
                let _ = self.disk.offer(name, sketch.clone(), checksum);
            }
        }
        self.indexes.sketcher.keep(name, sketch);
    }

    /// The sketches of `keys` (one layer's) that were made before, from memory or from the disk; `None` where there is none, or one
    /// that is not whole.
    pub(crate) fn sketches_made(&self, keys: &[LayerBlockKey], basis: &NamespaceBasis) -> Vec<Option<Bytes>> {
        let Some(first) = keys.first().filter(|_| self.sketches_ahead()) else {
            return vec![None; keys.len()];
        };
        let namespace = derived::sketches_of(first.namespace, basis.id());
        let names: Vec<LayerBlockKey> = (keys.iter())
            .map(|key| namespace.block(key.hash).layer(key.layer))
            .collect();
        let mut made: Vec<Option<Bytes>> = names.iter().map(|name| self.indexes.sketcher.get(*name)).collect();
        let below: Vec<usize> = (0..names.len())
            .filter(|&at| made[at].is_none() && self.disk.contains(names[at]))
            .collect();
        let expected = self
            .namespaces
            .get(first.namespace)
            .map(|schema| sketched_bytes(&schema.layout(), basis.basis(), first.layer));
        for batch in below.chunks(READS) {
            let wanted: Vec<LayerBlockKey> = batch.iter().map(|&at| names[at]).collect();
            let reads = self.disk.get_many(&wanted, &mut |_| None, None);
            for (&at, read) in batch.iter().zip(reads) {
                match read {
                    DiskRead::Hit { payload, .. } if Some(payload.len()) == expected => {
                        // Apart from the pages that it was read with.
                        let sketch = Bytes::copy_from_slice(&payload);
                        self.indexes.sketcher.keep(names[at], sketch.clone());
                        self.counters.sketches_loaded.add(1);
                        made[at] = Some(sketch);
                    }
                    DiskRead::Hit { .. } | DiskRead::Corrupt => self.counters.sketches_unusable.add(1),
                    DiskRead::Miss | DiskRead::TooLate => {}
                }
            }
        }
        made
    }

    /// Whether the disk's copy of what `kind` is may go without a slower tier taking it: sketches are made again in less time than
    /// a bucket takes to answer.
    pub(crate) fn is_worth_demoting(kind: Kind) -> bool {
        kind != Kind::Sketches
    }
}
