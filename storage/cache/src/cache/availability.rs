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
    /// the change was. Says which tiers have the block, as [`Self::held_in`].
    pub(super) fn refresh(&self, state: &mut State, block: BlockKey, tier: Tier) -> Option<Tier> {
        let layers = self.namespaces.layers(block.namespace)?;
        if !state.unsaved.is_empty() && state.host.layer_count(&block) == 0 {
            // Evicted.
            (0..layers).for_each(|layer| {
                state.unsaved.remove(&block.layer(layer as u16));
            });
        }
        let held = self.slowest_needed(state, &block, layers);
        let (changed, kind) = if held.is_some() {
            (state.available.insert(block), EventKind::Stored)
        } else {
            (state.available.remove(&block), EventKind::Removed)
        };
        if changed {
            state.events.publish(kind, block.namespace, block.hash, tier);
        }
        held
    }

    /// The slowest tier that is needed to have all layers; `None` where they are not all held.
    fn slowest_needed(&self, state: &State, block: &BlockKey, layers: usize) -> Option<Tier> {
        if state.host.layer_count(block) >= layers {
            return Some(Tier::Host);
        }
        let mut held = self.near_layers(state, block);
        if held.count >= layers {
            return Some(Tier::Disk);
        }
        self.object.as_ref()?.visit_layers(block, |layer| held.insert(layer));
        (held.count >= layers).then_some(Tier::Object)
    }

    /// Whether `block` is held as of now; see [`Self::held_in`].
    pub(super) fn is_available(&self, state: &mut State, block: &BlockKey) -> bool {
        if self.object.is_some() {
            self.refresh(state, *block, Tier::Object);
        }
        state.available.contains(block)
    }

    /// The slowest tier that is needed to have all of `block` as of now; `None` where it is not held. Other stores put into the object
    /// tier and take from it, which is noticed here.
    pub(super) fn held_in(&self, state: &mut State, block: &BlockKey, layers: usize) -> Option<Tier> {
        if self.object.is_some() {
            return self.refresh(state, *block, Tier::Object);
        }
        let in_host = state.host.layer_count(block) >= layers;
        let tier = if in_host { Tier::Host } else { Tier::Disk };
        state.available.contains(block).then_some(tier)
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
