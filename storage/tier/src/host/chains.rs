//! Which block continues which, as callers ask for chains before the blocks are here.
//!
//! Depth rises by one from a parent to its child, and a block keeps the depth it was first seen at: so links cannot form a ring,
//! whatever chains are claimed.

use std::collections::{HashMap, VecDeque};

use kvasir_block::{BlockHash, BlockKey};

/// Blocks that are not here and whose parent is remembered; beyond it the oldest is forgotten. About 2 MiB.
const ABSENT_MAX: usize = 16_384;

/// A block's place in its chain and who comes before it, if it is not the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descent {
    pub(super) depth: u32,
    pub(super) parent: Option<BlockHash>,
}

/// Descent of blocks that are not here.
#[derive(Debug, Default)]
pub(super) struct Absent {
    known: HashMap<BlockKey, Descent>,
    /// Oldest first; may name blocks that came meanwhile.
    order: VecDeque<BlockKey>,
}

impl Absent {
    pub(super) fn note(&mut self, key: BlockKey, descent: Descent) {
        if self.known.insert(key, descent).is_some() {
            return;
        }
        self.order.push_back(key);
        while self.order.len() > ABSENT_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.known.remove(&oldest);
            }
        }
    }

    /// What is known of a block that came.
    pub(super) fn take(&mut self, key: &BlockKey) -> Option<Descent> {
        self.known.remove(key)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.len().max(self.order.len())
    }
}
