//! What was brought into memory ahead of its reader, for whom, and whether it came in time. Pure; kept under the state's lock.
//!
//! Invariant: `bytes` is the sum over `brought`; a layer block is in it until it is read, or until its lease ends.

use std::{collections::HashMap, ops::Range};

use kvasir_block::LayerBlockKey;

use crate::LeaseId;

/// Layer blocks brought ahead and not read yet.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    brought: HashMap<LayerBlockKey, (LeaseId, u64)>,
    /// By lease: the layers below it were wanted already.
    wanted: HashMap<LeaseId, u16>,
    bytes: u64,
    /// Read from memory after they were brought.
    pub(crate) useful: u64,
    /// Not read before their lease ended.
    pub(crate) wasted: u64,
}

impl Ahead {
    /// The layers to bring for a reader that is at `layer` of `layers`, looking `depth` layers ahead; each is asked for once.
    pub(crate) fn want(&mut self, lease: LeaseId, layer: u16, depth: u16, layers: u16) -> Range<u16> {
        let end = layer.saturating_add(1).saturating_add(depth).min(layers);
        self.want_below(lease, layer.saturating_add(1), end)
    }

    /// The first `depth` layers, for a reader that is yet to come.
    pub(crate) fn want_first(&mut self, lease: LeaseId, depth: u16, layers: u16) -> Range<u16> {
        self.want_below(lease, 0, depth.min(layers))
    }

    fn want_below(&mut self, lease: LeaseId, start: u16, end: u16) -> Range<u16> {
        let wanted = self.wanted.entry(lease).or_default();
        let start = start.max(*wanted);
        *wanted = end.max(*wanted);
        start..end.max(start)
    }

    /// `key` is in memory now, for a reader with `lease`.
    pub(crate) fn brought(&mut self, key: LayerBlockKey, lease: LeaseId, bytes: u64) {
        if self.brought.insert(key, (lease, bytes)).is_none() {
            self.bytes += bytes;
        }
    }

    /// `key` was read.
    pub(crate) fn used(&mut self, key: LayerBlockKey) {
        if !self.brought.is_empty()
            && let Some((_, bytes)) = self.brought.remove(&key)
        {
            self.bytes -= bytes;
            self.useful += 1;
        }
    }

    /// Lets go of leases that ended; what they did not read was brought in vain.
    pub(crate) fn sweep(&mut self, is_live: impl Fn(LeaseId) -> bool) {
        self.wanted.retain(|lease, _| is_live(*lease));
        let Self {
            brought, bytes, wasted, ..
        } = self;
        brought.retain(|_, (lease, size)| {
            let live = is_live(*lease);
            if !live {
                *bytes -= *size;
                *wasted += 1;
            }
            live
        });
    }

    /// Bytes brought and not read yet.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use kvasir_block::{BlockHash, NamespaceId};

    use super::*;

    fn key(layer: u16) -> LayerBlockKey {
        NamespaceId::from_bytes([1; 32])
            .block(BlockHash::from_bytes([2; 32]))
            .layer(layer)
    }

    #[test]
    fn each_layer_is_wanted_once_and_in_order() {
        let (mut ahead, lease, other) = (Ahead::default(), LeaseId::from_u64(1), LeaseId::from_u64(2));
        assert_eq!(ahead.want_first(lease, 2, 8), 0..2);
        let table = [(0, 2..3), (0, 3..3), (1, 3..4), (5, 6..8), (7, 8..8)];
        for (at, expected) in table {
            assert_eq!(ahead.want(lease, at, 2, 8), expected, "at layer {at}");
        }
        assert_eq!(ahead.want(other, 0, 2, 8), 1..3, "another reader's are others");
        assert!(ahead.want(other, u16::MAX, u16::MAX, 8).is_empty());
    }

    #[test]
    fn what_is_read_was_useful_and_what_is_left_was_not() {
        let (mut ahead, lease, other) = (Ahead::default(), LeaseId::from_u64(1), LeaseId::from_u64(2));
        ahead.brought(key(0), lease, 10);
        ahead.brought(key(1), lease, 10);
        ahead.brought(key(1), lease, 10);
        ahead.brought(key(2), other, 5);
        ahead.used(key(0));
        ahead.used(key(0));
        assert_eq!((ahead.bytes(), ahead.useful, ahead.wasted), (15, 1, 0));
        ahead.sweep(|live| live == other);
        assert_eq!((ahead.bytes(), ahead.useful, ahead.wasted), (5, 1, 1));
        assert_eq!(ahead.want_first(lease, 2, 8), 0..2, "forgotten");
    }
}
