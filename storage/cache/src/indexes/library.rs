//! Built indexes in memory: read when a search first wants a layer, under a limit, the least recently used go first.
//!
//! A file that is missing, damaged or of something else makes its whole layer unusable; that is remembered until an index is built
//! again, so that not every query finds it out anew.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvasir_block::{BlockKey, LayerBlockKey};
use kvasir_tier::{DiskRead, ObjectRead};
use parking_lot::Mutex;

use super::built::{BuiltIndex, HeadIndex, IndexName, Manifest};
use crate::cache::Shared;

/// How long a file is waited for where it lies in the object tier.
const OBJECT_READ_MAX: Duration = Duration::from_secs(10);

/// An index that covers the first blocks of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Covering {
    pub(crate) name: IndexName,
    /// Blocks that it covers.
    pub(crate) blocks: usize,
}

/// The indexes of one layer, by KV head; `None` for heads that have none.
pub(crate) struct LayerIndex {
    pub(crate) heads: Vec<Option<HeadIndex>>,
    bytes: u64,
}

#[derive(Debug)]
pub(crate) struct Library {
    bytes_max: u64,
    /// Changes when there is an index more or one less.
    generation: AtomicU64,
    held: Mutex<Held>,
    /// Held while reading: a second search would read the same files.
    reading: Mutex<()>,
}

#[derive(Debug, Default)]
struct Held {
    layers: HashMap<(IndexName, u16), Place>,
    bytes: u64,
    used: u64,
}

#[derive(Debug)]
struct Place {
    /// `None` if it cannot be used.
    index: Option<Arc<LayerIndex>>,
    used: u64,
}

/// Layers whose files turned out useless that are remembered.
const UNUSABLE_MAX: usize = 4096;

impl Library {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            generation: AtomicU64::new(0),
            held: Mutex::default(),
            reading: Mutex::default(),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.held.lock().bytes
    }

    /// Rises when an index is built or found useless.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// An index is whole now, perhaps again.
    pub(super) fn built(&self, name: IndexName) {
        let mut held = self.held.lock();
        held.layers
            .retain(|(of, _), place| *of != name || place.index.is_some());
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Whether a file of it turned out to be gone or damaged.
    pub(super) fn is_unusable(&self, name: IndexName) -> bool {
        let held = self.held.lock();
        held.layers
            .iter()
            .any(|((of, _), place)| *of == name && place.index.is_none())
    }

    fn get(&self, name: IndexName, layer: u16) -> Option<Option<Arc<LayerIndex>>> {
        let mut held = self.held.lock();
        held.used += 1;
        let now = held.used;
        let place = held.layers.get_mut(&(name, layer))?;
        place.used = now;
        Some(place.index.clone())
    }

    /// Keeps a layer; false if there is no room, since the rest is in use.
    fn keep(&self, name: IndexName, layer: u16, index: Option<Arc<LayerIndex>>) -> bool {
        let bytes = index.as_ref().map_or(0, |index| index.bytes);
        let mut held = self.held.lock();
        if index.is_none() && held.layers.len() >= UNUSABLE_MAX {
            held.layers.retain(|_, place| place.index.is_some());
        }
        while held.bytes + bytes > self.bytes_max {
            let idle = held.layers.iter().filter(|(_, place)| {
                let index = place.index.as_ref();
                index.is_some_and(|index| Arc::strong_count(index) == 1)
            });
            let Some(oldest) = idle.min_by_key(|(_, place)| place.used).map(|(key, _)| *key) else {
                return false;
            };
            let gone = held.layers.remove(&oldest).and_then(|place| place.index);
            held.bytes -= gone.map_or(0, |index| index.bytes);
        }
        held.bytes += bytes;
        let used = held.used;
        held.layers.insert((name, layer), Place { index, used });
        true
    }
}

impl std::fmt::Debug for LayerIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerIndex")
            .field("heads", &self.heads.iter().flatten().count())
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// The built index of one of `kinds` that covers most of a chain; the earlier kind where several cover as much.
    pub(crate) fn covering(&self, chain: &[BlockKey], kinds: &[BuiltIndex]) -> Option<Covering> {
        (1..=chain.len()).rev().find_map(|blocks| {
            let end = chain[blocks - 1];
            let mut names = kinds.iter().map(|&kind| IndexName { end, kind });
            let name = names.find(|name| self.holds(name.manifest()))?;
            Some(Covering { name, blocks })
        })
    }

    /// The index of a layer; `None` where it cannot be used.
    pub(crate) fn layer_index(&self, covering: Covering, layer: u16) -> Option<Arc<LayerIndex>> {
        let library = &self.indexes.loaded;
        let Covering { name, blocks } = covering;
        if let Some(known) = library.get(name, layer) {
            return known;
        }
        let _reading = library.reading.lock();
        if let Some(known) = library.get(name, layer) {
            return known;
        }
        let read = self.read_layer_index(name, blocks, layer);
        match &read {
            Some(index) => {
                self.counters.indexes_loaded.add(1);
                if !library.keep(name, layer, Some(Arc::clone(index))) {
                    // Reading it for each query would cost more than it saves.
                    self.counters.indexes_without_room.add(1);
                    return None;
                }
            }
            None => {
                tracing::warn!(
                    index = name.kind.name(),
                    layer,
                    "the file of an index is gone or damaged, going on without it"
                );
                self.counters.indexes_unusable.add(1);
                library.keep(name, layer, None);
            }
        }
        read
    }

    fn read_layer_index(&self, name: IndexName, blocks: usize, layer: u16) -> Option<Arc<LayerIndex>> {
        let schema = self.namespaces.get(name.end.namespace)?;
        let kv_heads = usize::from(schema.kv_heads);
        let keys = blocks * usize::from(schema.block_tokens);
        let all = usize::from(schema.layers) * kv_heads;
        let manifest = self.read_record(name.manifest())?;
        let manifest = Manifest::decode(&manifest, name.kind, u32::try_from(keys).ok()?, all)?;
        let (mut heads, mut bytes) = (Vec::with_capacity(kv_heads), 0);
        for kv_head in 0..kv_heads {
            let head = usize::from(layer) * kv_heads + kv_head;
            if !manifest.heads[head] {
                heads.push(None);
                continue;
            }
            let file = self.read_record(name.file(head)?)?;
            match name.decode(head, keys, &file) {
                Ok(index) => {
                    bytes += index.keys().bytes() as u64;
                    heads.push(Some(index));
                }
                Err(error) => {
                    tracing::warn!(index = name.kind.name(), layer, kv_head, %error, "the file of an index is not one");
                    return None;
                }
            }
        }
        Some(Arc::new(LayerIndex { heads, bytes }))
    }

    /// Whether a record of an index is here, or in the bucket as far as this store knows.
    pub(crate) fn holds(&self, key: LayerBlockKey) -> bool {
        self.disk.contains(key) || self.object.as_ref().is_some_and(|object| object.contains(key))
    }

    /// A record of an index, verified by the tier that has it.
    fn read_record(&self, key: LayerBlockKey) -> Option<Bytes> {
        if let DiskRead::Hit { payload, .. } = self.disk.get(key) {
            return Some(payload);
        }
        let object = self.object.as_ref().filter(|object| object.contains(key))?;
        match object.get_many(&[key], Instant::now() + OBJECT_READ_MAX).pop() {
            Some(ObjectRead::Hit { payload, .. }) => Some(payload),
            _ => None,
        }
    }
}
