//! Where what is made of blocks lies: in namespaces of their own, whose ids are hashed from the one they were made for.
//!
//! To the tiers a sketch or an index is a layer block like any other: written to the same segments, checksummed, found again after
//! a restart, reclaimed with its segment. Only its name says what it is: another basis or another version is another namespace, so
//! what does not fit is simply not there. No schema belongs to such a namespace, so nobody can open, match or put it from outside.

use std::collections::HashMap;

use kvasir_block::{BlockKey, NamespaceId};
use parking_lot::RwLock;
use sha2::{Digest, Sha256};

use crate::BasisId;

/// Version of what lies under these names; another one is other names.
const VERSION: u8 = 1;

/// What lies in a derived namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Sketches of layer blocks, under the block's own hash and layer.
    Sketches,
    /// Built indexes, under the hash of the last block that they cover.
    Indexes,
}

/// Derived namespaces of those that are known here.
#[derive(Debug, Default)]
pub(crate) struct Derived(RwLock<HashMap<NamespaceId, (NamespaceId, Kind)>>);

impl Derived {
    pub(crate) fn note(&self, base: NamespaceId, basis: Option<BasisId>) {
        let mut known = self.0.write();
        known.insert(indexes_of(base), (base, Kind::Indexes));
        if let Some(basis) = basis {
            known.insert(sketches_of(base, basis), (base, Kind::Sketches));
        }
    }

    /// The block that `block` was made of, and what it is; `None` if it is a block itself, or was made for a basis that nobody has.
    pub(crate) fn base(&self, block: &BlockKey) -> Option<(BlockKey, Kind)> {
        let (base, kind) = *self.0.read().get(&block.namespace)?;
        Some((base.block(block.hash), kind))
    }
}

/// Where sketches of `base` in `basis` lie.
pub(crate) fn sketches_of(base: NamespaceId, basis: BasisId) -> NamespaceId {
    derive(b"kvasir.sketches", base, basis.as_bytes())
}

/// Where indexes built over `base` lie.
pub(crate) fn indexes_of(base: NamespaceId) -> NamespaceId {
    derive(b"kvasir.indexes", base, &[])
}

/// Each part has one length per `what`, so no two inputs are the same bytes.
fn derive(what: &[u8], base: NamespaceId, of: &[u8]) -> NamespaceId {
    let mut hasher = Sha256::new();
    for part in [what, &[VERSION], base.as_bytes(), of] {
        hasher.update(part);
    }
    NamespaceId::from_bytes(hasher.finalize().into())
}
