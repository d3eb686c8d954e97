//! Which blocks are available, kept up to date by whoever changes a tier.

use std::collections::{HashMap, HashSet};

use kvasir_block::{BlockHash, BlockKey, NamespaceId};

use super::{Shared, State, Tier};
use crate::EventKind;

/// The blocks whose layers are all held.
#[derive(Debug, Default)]
pub(crate) struct Available {
    by_namespace: HashMap<NamespaceId, HashSet<BlockHash>>,
    count: usize,
}

impl Available {
    pub(crate) fn contains(&self, block: &BlockKey) -> bool {
        self.by_namespace
            .get(&block.namespace)
            .is_some_and(|hashes| hashes.contains(&block.hash))
    }

    pub(super) fn insert(&mut self, block: BlockKey) -> bool {
        let new = self.by_namespace.entry(block.namespace).or_default().insert(block.hash);
        self.count += usize::from(new);
        new
    }

    fn remove(&mut self, block: &BlockKey) -> bool {
        let Some(hashes) = self.by_namespace.get_mut(&block.namespace) else {
            return false;
        };
        let removed = hashes.remove(&block.hash);
        self.count -= usize::from(removed);
        if hashes.is_empty() {
            self.by_namespace.remove(&block.namespace);
        }
        removed
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn by_namespace(
        &self,
        only: Option<NamespaceId>,
    ) -> impl Iterator<Item = (NamespaceId, Vec<BlockHash>)> {
        let wanted = self
            .by_namespace
            .iter()
            .filter(move |(namespace, _)| only.is_none_or(|only| only == **namespace));
        wanted.map(|(namespace, hashes)| (*namespace, hashes.iter().copied().collect()))
    }
}

impl Shared {
    /// Looks at what the tiers hold of `block`, and tells everyone if it became available or ceased to be. `tier` is where
    /// the change was.
    pub(super) fn refresh(&self, state: &mut State, block: BlockKey, tier: Tier) {
        let Some(layers) = self.namespaces.layers(block.namespace) else {
            return;
        };
        if !state.unsaved.is_empty() && state.host.layer_count(&block) == 0 {
            // Evicted.
            (0..layers).for_each(|layer| {
                state.unsaved.remove(&block.layer(layer as u16));
            });
        }
        let (changed, kind) = if self.holds_all(state, &block, layers) {
            (state.available.insert(block), EventKind::Stored)
        } else {
            (state.available.remove(&block), EventKind::Removed)
        };
        if changed {
            state.events.publish(kind, block.namespace, block.hash, tier);
        }
    }

    fn holds_all(&self, state: &State, block: &BlockKey, layers: usize) -> bool {
        if state.host.layer_count(block) >= layers {
            return true;
        }
        let mut held = self.near_layers(state, block);
        if held.count < layers
            && let Some(object) = &self.object
        {
            object.visit_layers(block, |layer| held.insert(layer));
        }
        held.count >= layers
    }

    /// Whether `block` is held as of now. Other stores put into the object tier and take from it, which is noticed here.
    pub(super) fn is_available(&self, state: &mut State, block: &BlockKey) -> bool {
        if self.object.is_some() {
            self.refresh(state, *block, Tier::Object);
        }
        state.available.contains(block)
    }

    /// Whether memory and disk alone hold all layers of a block that is available.
    pub(super) fn is_near(&self, state: &State, block: &BlockKey, layers: usize) -> bool {
        self.object.is_none() || self.near_layers(state, block).count >= layers
    }

    /// Layers of a block that memory and disk hold.
    fn near_layers(&self, state: &State, block: &BlockKey) -> LayerSet {
        let mut held = LayerSet::default();
        state.host.layers(block).for_each(|layer| held.insert(layer));
        self.disk.visit_layers(block, |layer| held.insert(layer));
        held
    }
}

/// A set of layer numbers.
#[derive(Default)]
struct LayerSet {
    words: Vec<u64>,
    count: usize,
}

impl LayerSet {
    fn insert(&mut self, layer: u16) {
        let (word, bit) = (usize::from(layer / 64), layer % 64);
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.count += usize::from(self.words[word] >> bit & 1 == 0);
        self.words[word] |= 1 << bit;
    }
}
