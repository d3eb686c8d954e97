//! The blocks of a chain while contexts are open over it: pinned once, verified once, held once, for all of them.
//!
//! Invariant: what is in the [`Registry`] under a name has that name's blocks; a chain that only claims the name gets blocks of
//! its own. Locks are taken in one order: registry, then the cache's state.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::Instant,
};

use kvasir_block::{BlockHash, BlockKey, KvSchema, LayerBlockKey, NamespaceId};
use kvasir_index::Excluded;
use parking_lot::Mutex;

use super::{
    cluster::state,
    context::Payload,
    sketches::{LayerSketches, encode_layer},
    usual::Usual,
};
use crate::{CacheError, ErrorKind, GetOutcome, LeaseId, cache::Shared, namespace::NamespaceBasis};

/// Chains with open contexts, by the key of their last block. Not more than there are contexts.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<HashMap<BlockKey, Weak<ContextBlocks>>>);

/// Blocks of one chain, pinned until the last context over it is dropped.
#[derive(Debug)]
pub(crate) struct ContextBlocks {
    cache: Weak<Shared>,
    lease: LeaseId,
    schema: Arc<KvSchema>,
    blocks: Vec<BlockKey>,
    /// Verified payloads, one list per layer, filled by the first query that wants them.
    pub(super) layers: Vec<Mutex<Arc<[Option<Payload>]>>>,
    /// Sketches of the blocks of a layer, filled likewise.
    pub(super) sketches: Vec<Mutex<Arc<LayerSketches>>>,
    /// Whether those of a layer are to be clustered, see [`state`].
    pub(super) clustering: Vec<AtomicU8>,
    /// How much of the mass searches cover, as far as is known.
    pub(super) usual: Usual,
    /// Bytes of all payloads in `layers` and of all `sketches`, taken from the cache's budget.
    pub(super) held_bytes: AtomicU64,
}

impl ContextBlocks {
    /// Those that are open over this chain already, or new ones.
    pub(crate) fn of(
        shared: &Arc<Shared>,
        schema: Arc<KvSchema>,
        namespace: NamespaceId,
        chain: &[BlockHash],
    ) -> Result<Arc<Self>, CacheError> {
        let blocks: Vec<BlockKey> = chain.iter().map(|&hash| namespace.block(hash)).collect();
        // The caller checked that there is one.
        let Some(&name) = blocks.last() else {
            return Err(CacheError::new(
                ErrorKind::InvalidArgument,
                "hashes: the chain is empty",
            ));
        };
        let mut registry = shared.chains.0.lock();
        // Not dropped before the lock is: its end takes the lock too.
        let open = registry.get(&name).and_then(Weak::upgrade);
        let mut state = shared.state.lock();
        if let Some(at) = blocks.iter().position(|block| !state.available.contains(block)) {
            let message = format!(
                "block {at} of {} ({}) is not held: compute and put it, or open a shorter chain",
                chain.len(),
                chain[at]
            );
            drop((state, registry));
            return Err(CacheError::new(ErrorKind::NotHeld, message));
        }
        // From the tail to the head, so that eviction would take the tail first.
        blocks.iter().rev().for_each(|block| state.host.touch(block));
        if let Some(open) = &open
            && open.blocks == blocks
        {
            return Ok(Arc::clone(open));
        }
        let Some(lease) = state.leases.grant(blocks.clone(), Instant::now(), None) else {
            let message = format!(
                "{} leases are held, leases_max allows no more: give one back or raise it",
                shared.config.leases_max
            );
            drop((state, registry));
            return Err(CacheError::new(ErrorKind::LimitReached, message));
        };
        drop(state);
        let nothing: Arc<[Option<Payload>]> = Arc::new([]);
        let layers = (0..schema.layers).map(|_| Mutex::new(Arc::clone(&nothing))).collect();
        let none = Arc::new(LayerSketches::default());
        let sketches = (0..schema.layers).map(|_| Mutex::new(Arc::clone(&none))).collect();
        let clustering = (0..schema.layers).map(|_| AtomicU8::new(state::NEW)).collect();
        let usual = Usual::new(schema.layers.into(), schema.kv_heads.into());
        let new = Arc::new(Self {
            cache: Arc::downgrade(shared),
            lease,
            schema,
            blocks,
            layers,
            sketches,
            clustering,
            usual,
            held_bytes: AtomicU64::new(0),
        });
        if open.is_none() {
            registry.insert(name, Arc::downgrade(&new));
        }
        drop(registry);
        Ok(new)
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Their keys, from the first.
    pub(crate) fn keys(&self) -> &[BlockKey] {
        &self.blocks
    }

    /// Tokens of all of them.
    pub(crate) fn tokens(&self) -> usize {
        self.blocks.len() * usize::from(self.schema.block_tokens)
    }

    pub(crate) fn schema(&self) -> &Arc<KvSchema> {
        &self.schema
    }

    /// Whether no token of block `at` is searched.
    pub(super) fn is_excluded(&self, at: usize, excluded: &Excluded) -> bool {
        // Both fit: open_context checked that positions have 32 bits.
        let tokens = u32::from(self.schema.block_tokens);
        let start = at as u32 * tokens;
        excluded.searched(start..start + tokens).next().is_none()
    }

    /// Whether a layer is held whole, or being read.
    pub(super) fn is_warm(&self, layer: u16) -> bool {
        let Some(held) = self.layers.get(usize::from(layer)) else {
            return false;
        };
        // Who has the lock reads what is missing.
        held.try_lock()
            .is_none_or(|held| held.len() == self.blocks.len() && held.iter().all(Option::is_some))
    }

    /// Whether all blocks of a layer have sketches, or get them now.
    pub(super) fn is_sketched(&self, layer: u16) -> bool {
        let Some(held) = self.sketches.get(usize::from(layer)) else {
            return false;
        };
        held.try_lock()
            .is_none_or(|held| held.blocks() == self.blocks.len() && (0..held.blocks()).all(|at| held.has(at)))
    }

    /// The sketches of a layer's blocks whose payload is there: held already, made before, or made now until it is late.
    pub(super) fn sketch(
        &self,
        shared: &Shared,
        layer: u16,
        payloads: &[Option<Payload>],
        basis: &NamespaceBasis,
        late: &dyn Fn() -> bool,
    ) -> Arc<LayerSketches> {
        // Held while sketching: a second query of the same layer would sketch the same blocks.
        let mut held = self.sketches[usize::from(layer)].lock();
        let is_missing = |at: usize| !held.has(at) && payloads[at].is_some();
        let wanted: Vec<usize> = (0..payloads.len()).filter(|&at| is_missing(at)).collect();
        if wanted.is_empty() && held.blocks() == payloads.len() {
            return Arc::clone(&held);
        }
        let layout = self.schema.layout();
        let mut now = Arc::clone(&held);
        // What was made before has its bytes.
        let keep = if held.blocks() == payloads.len() {
            true
        } else {
            now = Arc::new(LayerSketches::none(payloads.len(), &layout, basis.basis(), layer));
            let bytes = LayerSketches::bytes_for(payloads.len(), &layout);
            let taken = shared.contexts.take(bytes);
            if taken {
                self.held_bytes.fetch_add(bytes, Ordering::Relaxed);
            }
            taken
        };
        if keep {
            // So that there is one user of what changes, unless a search is still at work.
            *held = Arc::default();
        }
        let sketches = Arc::make_mut(&mut now);
        let keys: Vec<LayerBlockKey> = wanted.iter().map(|&at| self.blocks[at].layer(layer)).collect();
        let made = shared.sketches_made(&keys, basis);
        for ((at, key), made) in wanted.into_iter().zip(keys).zip(made) {
            let Some(payload) = &payloads[at] else { continue };
            let halves = payload.halves();
            if made.is_some_and(|made| sketches.set(at, &made, &layout)) {
                sketches.learn(at, halves, &layout, basis.basis(), layer);
                continue;
            }
            if late() {
                break;
            }
            let Some(new) = encode_layer(halves, &layout, basis.basis(), layer) else {
                continue;
            };
            if sketches.set(at, &new, &layout) {
                sketches.learn(at, halves, &layout, basis.basis(), layer);
                shared.counters.sketched_blocks.add(1);
                shared.keep_sketch(key, basis, new);
            }
        }
        if keep {
            *held = Arc::clone(&now);
        }
        now
    }

    /// The verified payloads of a layer, one per block: held already, or read now until it is late. What is excluded whole is
    /// not read.
    pub(super) fn load(
        &self,
        shared: &Shared,
        layer: u16,
        excluded: &Excluded,
        late: &dyn Fn() -> bool,
    ) -> Arc<[Option<Payload>]> {
        // Held while reading: a second query of the same layer would read the same blocks.
        let mut held = self.layers[usize::from(layer)].lock();
        let is_missing = |at: usize| held.get(at).is_none_or(Option::is_none) && !self.is_excluded(at, excluded);
        let wanted: Vec<usize> = (0..self.blocks.len()).filter(|&at| is_missing(at)).collect();
        if wanted.is_empty() && held.len() == self.blocks.len() {
            return Arc::clone(&held);
        }
        let mut keep = held.to_vec();
        keep.resize(self.blocks.len(), None);
        let mut now = keep.clone();
        for at in wanted {
            if late() {
                break;
            }
            match shared.read(self.blocks[at].layer(layer)) {
                // The length is the schema's by the put; what a foreign writer left in the folder may have another.
                GetOutcome::Hit { payload, .. } if payload.len() == self.schema.layer_block_bytes() => {
                    let bytes = payload.len() as u64;
                    let payload = Payload::new(payload);
                    if shared.contexts.take(bytes) {
                        self.held_bytes.fetch_add(bytes, Ordering::Relaxed);
                        keep[at] = Some(payload.clone());
                    }
                    now[at] = Some(payload);
                }
                GetOutcome::Hit { .. }
                | GetOutcome::Miss
                | GetOutcome::Corrupt
                | GetOutcome::Busy
                | GetOutcome::TooLate => {
                    shared.counters.retrieve_missing.add(1);
                }
            }
        }
        *held = keep.into();
        now.into()
    }
}

impl Drop for ContextBlocks {
    fn drop(&mut self) {
        let Some(shared) = self.cache.upgrade() else { return };
        shared.contexts.give_back(self.held_bytes.load(Ordering::Relaxed));
        if let Some(name) = self.blocks.last() {
            let mut registry = shared.chains.0.lock();
            // Others may have opened the chain anew since the last context went.
            if registry.get(name).is_some_and(|open| open.strong_count() == 0) {
                registry.remove(name);
            }
        }
        shared.state.lock().leases.release(self.lease);
    }
}
