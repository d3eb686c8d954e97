//! The map itself.
//!
//! Invariant: `entries` and `order` hold the same blocks, each once; an entry has at least one holder.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

use kvasir_block::{BlockHash, BlockKey, NamespaceId};

/// Block key -> holders, at most `max_blocks` blocks; the block that was inserted longest ago is forgotten first.
#[derive(Clone, Debug)]
pub struct PrefixMap<H> {
    max_blocks: usize,
    entries: HashMap<BlockKey, Entry<H>>,
    /// Insertion number -> block, oldest first.
    order: BTreeMap<u64, BlockKey>,
    next: u64,
    forgotten: u64,
}

#[derive(Clone, Debug)]
struct Entry<H> {
    /// Few: a linear search beats a set.
    holders: Vec<H>,
    inserted: u64,
}

impl<H: Copy + Eq + Hash> PrefixMap<H> {
    /// An empty map that remembers at most `max_blocks` blocks (at least one).
    pub fn new(max_blocks: usize) -> Self {
        Self {
            max_blocks: max_blocks.max(1),
            entries: HashMap::new(),
            order: BTreeMap::new(),
            next: 0,
            forgotten: 0,
        }
    }

    /// Notes that `holder` has `key`; true if that is news. Repeating it makes the block young again.
    pub fn insert(&mut self, key: BlockKey, holder: H) -> bool {
        let inserted = self.next;
        self.next += 1;
        let entry = self.entries.entry(key).or_insert_with(|| Entry {
            holders: Vec::new(),
            inserted,
        });
        if entry.inserted != inserted {
            self.order.remove(&entry.inserted);
            entry.inserted = inserted;
        }
        self.order.insert(inserted, key);
        let news = !entry.holders.contains(&holder);
        if news {
            entry.holders.push(holder);
        }
        if self.entries.len() > self.max_blocks
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.entries.remove(&oldest);
            self.forgotten += 1;
        }
        news
    }

    /// Notes that `holder` no longer has `key`; true if it was known to.
    pub fn remove(&mut self, key: BlockKey, holder: H) -> bool {
        let Some(entry) = self.entries.get_mut(&key) else {
            return false;
        };
        let Some(at) = entry.holders.iter().position(|&known| known == holder) else {
            return false;
        };
        entry.holders.remove(at);
        if entry.holders.is_empty() {
            self.order.remove(&entry.inserted);
            self.entries.remove(&key);
        }
        true
    }

    /// Forgets everything `holder` had: it left, or its snapshot starts anew. Visits every block.
    pub fn remove_holder(&mut self, holder: H) {
        let order = &mut self.order;
        self.entries.retain(|_, entry| {
            entry.holders.retain(|&known| known != holder);
            if entry.holders.is_empty() {
                order.remove(&entry.inserted);
            }
            !entry.holders.is_empty()
        });
    }

    /// How many blocks of the chain each holder has from its start without a gap. Holders with none are left out;
    /// longest first, and in the order they became known for the first block where equal.
    pub fn longest_prefix(&self, namespace: NamespaceId, chain: &[BlockHash]) -> Vec<(H, usize)> {
        let Some(first) = chain.first().and_then(|&hash| self.entries.get(&namespace.block(hash))) else {
            return Vec::new();
        };
        let mut hits: Vec<(H, usize)> = first.holders.iter().map(|&holder| (holder, 1)).collect();
        for (before, &hash) in chain.iter().enumerate().skip(1) {
            let Some(entry) = self.entries.get(&namespace.block(hash)) else {
                break;
            };
            let mut alive = false;
            for (holder, blocks) in hits.iter_mut().filter(|(_, blocks)| *blocks == before) {
                if entry.holders.contains(holder) {
                    *blocks += 1;
                    alive = true;
                }
            }
            if !alive {
                break;
            }
        }
        hits.sort_by_key(|&(_, blocks)| std::cmp::Reverse(blocks));
        hits
    }

    /// Who is known to have `key`.
    pub fn holders(&self, key: BlockKey) -> &[H] {
        self.entries.get(&key).map_or(&[], |entry| &entry.holders)
    }

    /// Blocks remembered.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Most blocks remembered.
    pub fn max_blocks(&self) -> usize {
        self.max_blocks
    }

    /// Blocks forgotten because the map was full, since it was made.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }
}

#[cfg(test)]
mod tests;
