//! What is known to lie in the bucket: per namespace its packs and where each layer block lies, and across namespaces
//! what this store wrote.
//!
//! Derived from listings and manifests, bounded, and allowed to be wrong in one direction: it may name what somebody has
//! removed since. Where two packs hold a block, the newer one is kept, since stores remove their oldest packs first.

use std::collections::{BTreeMap, HashMap, HashSet};

use kvasir_block::{BlockHash, BlockKey, Checksum, LayerBlockKey, NamespaceId};

use super::{
    bucket::Listed,
    config::StoreId,
    format::{Entry, PackName},
};

/// Packs with a manifest that cannot be used, remembered per namespace so that it is not read at each scan.
const REFUSED_MAX: usize = 4096;

/// Where a layer block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) pack: PackName,
    pub(super) entry: Entry,
}

#[derive(Clone, Copy, Debug)]
struct Stored {
    layer: u16,
    pack: u32,
    offset: u32,
    payload_bytes: u32,
    checksum: Checksum,
}

#[derive(Debug)]
struct Pack {
    name: PackName,
    bytes: u64,
    modified_ms: i64,
    blocks: Vec<BlockHash>,
    /// The last scan that listed it, or the scan that was running when it was learned.
    scan: u64,
}

/// Scans of a namespace: asked for, and done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Scans {
    pub(super) requested: u64,
    pub(super) done: u64,
    /// Whether the last one reached the end of the listing and read every new manifest.
    pub(super) complete: bool,
}

#[derive(Debug, Default)]
struct Namespace {
    packs: HashMap<u32, Pack>,
    names: HashMap<PackName, u32>,
    next_pack: u32,
    /// Layers of a block by rising number.
    blocks: HashMap<BlockHash, Vec<Stored>>,
    entries: usize,
    refused: HashSet<PackName>,
    scan: u64,
    scans: Scans,
}

/// A pack that this store wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Own {
    pub(super) namespace: NamespaceId,
    pub(super) name: PackName,
    pub(super) bytes: u64,
    pub(super) modified_ms: i64,
}

#[derive(Debug)]
pub(super) struct Catalog {
    store: StoreId,
    namespaces_max: usize,
    entries_max: usize,
    namespaces: HashMap<NamespaceId, Namespace>,
    /// By sequence, so the oldest first.
    own: BTreeMap<(u64, PackName), Own>,
    own_bytes: u64,
}

/// Sizes at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CatalogSizes {
    pub(super) namespaces: u64,
    pub(super) packs: u64,
    pub(super) bytes: u64,
    pub(super) layer_blocks: u64,
    pub(super) refused: u64,
    pub(super) own_packs: u64,
    pub(super) own_bytes: u64,
}

impl Catalog {
    pub(super) fn new(store: StoreId, namespaces_max: usize, entries_max: usize) -> Self {
        Self {
            store,
            namespaces_max,
            entries_max,
            namespaces: HashMap::new(),
            own: BTreeMap::new(),
            own_bytes: 0,
        }
    }

    /// Makes a namespace known; false where there are too many.
    pub(super) fn open(&mut self, namespace: NamespaceId) -> bool {
        if self.namespaces.len() >= self.namespaces_max && !self.namespaces.contains_key(&namespace) {
            return false;
        }
        self.namespaces.entry(namespace).or_insert_with(|| Namespace {
            scans: Scans {
                requested: 1,
                ..Scans::default()
            },
            ..Namespace::default()
        });
        true
    }

    pub(super) fn namespaces(&self) -> Vec<NamespaceId> {
        self.namespaces.keys().copied().collect()
    }

    pub(super) fn scans(&mut self, namespace: NamespaceId) -> Option<&mut Scans> {
        self.namespaces.get_mut(&namespace).map(|known| &mut known.scans)
    }

    pub(super) fn place(&self, key: LayerBlockKey) -> Option<Place> {
        let known = self.namespaces.get(&key.namespace)?;
        let layers = known.blocks.get(&key.hash)?;
        let at = layers.binary_search_by_key(&key.layer, |stored| stored.layer).ok()?;
        let stored = layers[at];
        let entry = Entry {
            hash: key.hash,
            layer: key.layer,
            offset: stored.offset,
            payload_bytes: stored.payload_bytes,
            checksum: stored.checksum,
        };
        Some(Place {
            pack: known.packs.get(&stored.pack)?.name,
            entry,
        })
    }

    /// Layers of `block`, rising.
    pub(super) fn layers(&self, block: &BlockKey) -> impl Iterator<Item = u16> + '_ {
        let layers = self
            .namespaces
            .get(&block.namespace)
            .and_then(|known| known.blocks.get(&block.hash));
        layers.into_iter().flatten().map(|stored| stored.layer)
    }

    pub(super) fn blocks(&self, namespace: NamespaceId) -> impl Iterator<Item = (BlockKey, usize)> + '_ {
        let blocks = self.namespaces.get(&namespace).map(|known| &known.blocks);
        let blocks = blocks.into_iter().flatten();
        blocks.map(move |(hash, layers)| (namespace.block(*hash), layers.len()))
    }

    /// A scan of `namespace` begins. What is learned while it runs counts as listed.
    pub(super) fn begin_scan(&mut self, namespace: NamespaceId) {
        if let Some(known) = self.namespaces.get_mut(&namespace) {
            known.scan += 1;
        }
    }

    /// The running scan met these; answers with those whose manifest should be read.
    pub(super) fn listed(&mut self, namespace: NamespaceId, met: &[Listed]) -> Vec<Listed> {
        let store = self.store;
        for listed in met.iter().filter(|listed| listed.name.store == store) {
            self.wrote(listed);
        }
        let Some(known) = self.namespaces.get_mut(&namespace) else {
            return Vec::new();
        };
        let mut unknown = Vec::new();
        for listed in met {
            match known.names.get(&listed.name).and_then(|pack| known.packs.get_mut(pack)) {
                Some(pack) => pack.scan = known.scan,
                None if known.refused.contains(&listed.name) => {}
                None => unknown.push(*listed),
            }
        }
        unknown
    }

    /// The running scan reached the end: forgets what it did not meet. Answers how many packs.
    pub(super) fn end_scan(&mut self, namespace: NamespaceId) -> u64 {
        let Some(known) = self.namespaces.get(&namespace) else {
            return 0;
        };
        let gone: Vec<PackName> = known
            .packs
            .values()
            .filter(|pack| pack.scan < known.scan)
            .map(|pack| pack.name)
            .collect();
        gone.iter().filter(|name| self.forget_pack(namespace, name)).count() as u64
    }

    /// Whether a pack of that age and size would be taken, given the bound on entries.
    pub(super) fn would_learn(&self, listed: &Listed) -> bool {
        let Some(known) = self.namespaces.get(&listed.namespace) else {
            return false;
        };
        let records = listed.name.records as usize;
        known.entries + records <= self.entries_max
            || known
                .packs
                .values()
                .any(|pack| age_order(pack) < (listed.modified_ms, listed.name.sequence))
    }

    /// Takes in a manifest; false where the namespace is not known or the bound leaves no room.
    pub(super) fn learn(&mut self, listed: &Listed, entries: &[Entry]) -> bool {
        if listed.name.store == self.store {
            self.wrote(listed);
        }
        let (entries_max, order) = (self.entries_max, (listed.modified_ms, listed.name.sequence));
        let Some(known) = self.namespaces.get_mut(&listed.namespace) else {
            return false;
        };
        if known.names.contains_key(&listed.name) {
            return true;
        }
        while known.entries + entries.len() > entries_max {
            let oldest = known.packs.iter().min_by_key(|(_, pack)| age_order(pack));
            match oldest {
                Some((&id, pack)) if age_order(pack) < order => known.remove(id),
                _ => return false,
            };
        }
        known.add(listed, entries);
        true
    }

    /// The manifest of this pack cannot be used.
    pub(super) fn refuse(&mut self, namespace: NamespaceId, name: PackName) {
        if let Some(known) = self.namespaces.get_mut(&namespace) {
            if known.refused.len() >= REFUSED_MAX {
                known.refused.clear();
            }
            known.refused.insert(name);
        }
    }

    /// The pack is gone from the bucket; false where it was not known any more.
    pub(super) fn forget_pack(&mut self, namespace: NamespaceId, name: &PackName) -> bool {
        if let Some(own) = self.own.remove(&(name.sequence, *name)) {
            self.own_bytes -= own.bytes;
        }
        let Some(known) = self.namespaces.get_mut(&namespace) else {
            return false;
        };
        let id = known.names.get(name).copied();
        id.inspect(|id| known.remove(*id)).is_some()
    }

    /// The record at this place is no good; false where it lies elsewhere by now.
    pub(super) fn forget_record(&mut self, namespace: NamespaceId, place: &Place) -> bool {
        let Some(known) = self.namespaces.get_mut(&namespace) else {
            return false;
        };
        let Some(&pack) = known.names.get(&place.pack) else {
            return false;
        };
        known.forget(place.entry.hash, |stored| {
            stored.pack == pack && stored.layer == place.entry.layer
        }) > 0
    }

    /// A pack of this store is in the bucket.
    pub(super) fn wrote(&mut self, listed: &Listed) {
        let own = Own {
            namespace: listed.namespace,
            name: listed.name,
            bytes: listed.bytes,
            modified_ms: listed.modified_ms,
        };
        let old = self.own.insert((own.name.sequence, own.name), own);
        self.own_bytes = self.own_bytes + own.bytes - old.map_or(0, |old| old.bytes);
    }

    /// The oldest pack of this store, where there is one.
    pub(super) fn oldest_own(&self) -> Option<Own> {
        self.own.values().next().copied()
    }

    pub(super) fn own_bytes(&self) -> u64 {
        self.own_bytes
    }

    /// The highest sequence this store has used.
    pub(super) fn last_sequence(&self) -> u64 {
        self.own.last_key_value().map_or(0, |((sequence, _), _)| *sequence)
    }

    pub(super) fn sizes(&self) -> CatalogSizes {
        let mut sizes = CatalogSizes {
            namespaces: self.namespaces.len() as u64,
            own_packs: self.own.len() as u64,
            own_bytes: self.own_bytes,
            ..CatalogSizes::default()
        };
        for known in self.namespaces.values() {
            sizes.packs += known.packs.len() as u64;
            sizes.bytes += known.packs.values().map(|pack| pack.bytes).sum::<u64>();
            sizes.layer_blocks += known.entries as u64;
            sizes.refused += known.refused.len() as u64;
        }
        sizes
    }
}

fn age_order(pack: &Pack) -> (i64, u64) {
    (pack.modified_ms, pack.name.sequence)
}

impl Namespace {
    fn add(&mut self, listed: &Listed, entries: &[Entry]) {
        let id = self.next_pack;
        self.next_pack = self.next_pack.wrapping_add(1);
        let order = (listed.modified_ms, listed.name.sequence);
        let mut blocks = Vec::new();
        for entry in entries {
            let stored = Stored {
                layer: entry.layer,
                pack: id,
                offset: entry.offset,
                payload_bytes: entry.payload_bytes,
                checksum: entry.checksum,
            };
            let layers = self.blocks.entry(entry.hash).or_default();
            match layers.binary_search_by_key(&entry.layer, |stored| stored.layer) {
                Ok(at) => {
                    let newer = self
                        .packs
                        .get(&layers[at].pack)
                        .is_none_or(|pack| age_order(pack) <= order);
                    if newer {
                        layers[at] = stored;
                    }
                }
                Err(at) => {
                    layers.insert(at, stored);
                    self.entries += 1;
                }
            }
            if blocks.last() != Some(&entry.hash) {
                blocks.push(entry.hash);
            }
        }
        blocks.sort_unstable();
        blocks.dedup();
        blocks.shrink_to_fit();
        let pack = Pack {
            name: listed.name,
            bytes: listed.bytes,
            modified_ms: listed.modified_ms,
            blocks,
            scan: self.scan,
        };
        self.packs.insert(id, pack);
        self.names.insert(listed.name, id);
    }

    fn remove(&mut self, id: u32) {
        if let Some(pack) = self.packs.remove(&id) {
            self.names.remove(&pack.name);
            for hash in pack.blocks {
                self.forget(hash, |stored| stored.pack == id);
            }
        }
    }

    /// Forgets the layers of a block that `is_gone` names; answers how many.
    fn forget(&mut self, hash: BlockHash, is_gone: impl Fn(&Stored) -> bool) -> usize {
        let Some(layers) = self.blocks.get_mut(&hash) else {
            return 0;
        };
        let before = layers.len();
        layers.retain(|stored| !is_gone(stored));
        let gone = before - layers.len();
        if layers.is_empty() {
            self.blocks.remove(&hash);
        }
        self.entries -= gone;
        gone
    }
}

#[cfg(test)]
mod tests;
