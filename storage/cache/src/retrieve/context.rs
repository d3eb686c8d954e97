//! Open contexts: what they pin and what they hold.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use half::f16;
use kvasir_block::{BlockHash, BlockKey, KvSchema, NamespaceId};
use kvasir_index::Excluded;
use kvasir_simd::cast_f16;
use parking_lot::Mutex;

use crate::{CacheError, ErrorKind, GetOutcome, LeaseId, cache::Shared};

/// A chain of held blocks, pinned until dropped. It does not keep its cache alive: once that is closed, it is of no use.
#[derive(Debug)]
pub struct Context {
    cache: Weak<Shared>,
    lease: LeaseId,
    schema: Arc<KvSchema>,
    blocks: Vec<BlockKey>,
    q_heads: usize,
    scale: f32,
    /// Verified payloads, one list per layer, filled by the first query that wants them.
    layers: Vec<Mutex<Arc<[Option<Payload>]>>>,
    /// Bytes of all payloads in `layers`, taken from the cache's budget.
    held_bytes: AtomicU64,
}

/// How many contexts are open and how many bytes they hold, under limits.
#[derive(Debug)]
pub(crate) struct ContextBudget {
    open: AtomicU64,
    open_max: u64,
    bytes: AtomicU64,
    bytes_max: u64,
}

/// A verified layer block whose elements can be read in place.
#[derive(Clone, Debug)]
pub(super) enum Payload {
    /// The tier's own bytes.
    Shared(Bytes),
    /// A copy, because the tier's bytes start at an odd address.
    Copied(Arc<[f16]>),
}

impl Context {
    pub(super) fn open(
        shared: &Arc<Shared>,
        schema: Arc<KvSchema>,
        namespace: NamespaceId,
        chain: &[BlockHash],
        q_heads: usize,
        scale: f32,
    ) -> Result<Self, CacheError> {
        let blocks: Vec<BlockKey> = chain.iter().map(|&hash| namespace.block(hash)).collect();
        let mut state = shared.state.lock();
        if let Some(at) = blocks.iter().position(|block| !state.available.contains(block)) {
            let message = format!(
                "block {at} of {} ({}) is not held: compute and put it, or open a shorter chain",
                chain.len(),
                chain[at]
            );
            return Err(CacheError::new(ErrorKind::NotHeld, message));
        }
        if !shared.contexts.open_one() {
            let message = format!(
                "{} contexts are open, contexts_max allows no more: close one or raise it",
                shared.config.contexts_max
            );
            return Err(CacheError::new(ErrorKind::LimitReached, message));
        }
        // From the tail to the head, so that eviction would take the tail first.
        blocks.iter().rev().for_each(|block| state.host.touch(block));
        let Some(lease) = state.leases.grant(blocks.clone(), std::time::Instant::now(), None) else {
            shared.contexts.close_one(0);
            let message = format!(
                "{} leases are held, leases_max allows no more: give one back or raise it",
                shared.config.leases_max
            );
            return Err(CacheError::new(ErrorKind::LimitReached, message));
        };
        drop(state);
        let nothing: Arc<[Option<Payload>]> = Arc::new([]);
        let layers = (0..schema.layers).map(|_| Mutex::new(Arc::clone(&nothing))).collect();
        Ok(Self {
            cache: Arc::downgrade(shared),
            lease,
            schema,
            blocks,
            q_heads,
            scale,
            layers,
            held_bytes: AtomicU64::new(0),
        })
    }

    /// Tokens of the context.
    pub fn tokens(&self) -> usize {
        self.blocks.len() * usize::from(self.schema.block_tokens)
    }

    /// Name of the index that serves it.
    pub fn index(&self) -> &'static str {
        "flat"
    }

    /// Schema of its blocks.
    pub fn schema(&self) -> &Arc<KvSchema> {
        &self.schema
    }

    /// Query heads per layer.
    pub fn q_heads(&self) -> usize {
        self.q_heads
    }

    /// Query heads per KV head.
    pub(super) fn group(&self) -> usize {
        self.q_heads / usize::from(self.schema.kv_heads)
    }

    pub(super) fn scale(&self) -> f32 {
        self.scale
    }

    pub(super) fn belongs_to(&self, shared: &Arc<Shared>) -> bool {
        Weak::as_ptr(&self.cache) == Arc::as_ptr(shared)
    }

    /// Whether no token of block `at` is searched.
    pub(super) fn is_excluded(&self, at: usize, excluded: &Excluded) -> bool {
        // Both fit: open_context checked that positions have 32 bits.
        let tokens = u32::from(self.schema.block_tokens);
        let start = at as u32 * tokens;
        excluded.searched(start..start + tokens).next().is_none()
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
                GetOutcome::Hit { .. } | GetOutcome::Miss | GetOutcome::Corrupt | GetOutcome::Busy => {
                    shared.counters.retrieve_missing.add(1);
                }
            }
        }
        *held = keep.into();
        now.into()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let Some(shared) = self.cache.upgrade() else { return };
        shared.contexts.close_one(self.held_bytes.load(Ordering::Relaxed));
        shared.state.lock().leases.release(self.lease);
    }
}

impl ContextBudget {
    pub(crate) fn new(open_max: usize, bytes_max: u64) -> Self {
        Self {
            open: AtomicU64::new(0),
            open_max: open_max as u64,
            bytes: AtomicU64::new(0),
            bytes_max,
        }
    }

    /// Contexts open.
    pub(crate) fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn open_one(&self) -> bool {
        add_within(&self.open, 1, self.open_max)
    }

    fn close_one(&self, bytes: u64) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn take(&self, bytes: u64) -> bool {
        add_within(&self.bytes, bytes, self.bytes_max)
    }
}

fn add_within(count: &AtomicU64, more: u64, max: u64) -> bool {
    let within = |now: u64| now.checked_add(more).filter(|sum| *sum <= max);
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
}

impl Payload {
    fn new(bytes: Bytes) -> Self {
        if cast_f16(&bytes).is_some() {
            return Self::Shared(bytes);
        }
        // Once per context, not per query.
        let (pairs, _) = bytes.as_chunks::<2>();
        Self::Copied(pairs.iter().map(|&pair| f16::from_le_bytes(pair)).collect())
    }

    pub(super) fn halves(&self) -> &[f16] {
        match self {
            // `new` made sure that the cast holds, and bytes do not move.
            Self::Shared(bytes) => cast_f16(bytes).unwrap_or_default(),
            Self::Copied(halves) => halves,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_addresses_read_the_same() {
        let bytes = Bytes::from((0..64).collect::<Vec<u8>>());
        let expected: Vec<f16> = (0..31).map(|i| f16::from_le_bytes([2 * i + 1, 2 * i + 2])).collect();
        let odd = Payload::new(bytes.slice(1..63));
        let even = Payload::new(bytes.slice(2..64));
        assert_eq!(
            odd.halves().iter().map(|half| half.to_bits()).collect::<Vec<_>>(),
            expected.iter().map(|half| half.to_bits()).collect::<Vec<_>>()
        );
        assert!(matches!(
            (&odd, &even),
            (Payload::Copied(_), Payload::Shared(_)) | (Payload::Shared(_), Payload::Copied(_))
        ));
    }

    #[test]
    fn the_budget_refuses_and_takes_back() {
        let budget = ContextBudget::new(1, 100);
        assert!(budget.open_one() && !budget.open_one());
        assert!(budget.take(60) && !budget.take(41) && budget.take(40));
        budget.close_one(100);
        assert_eq!((budget.open(), budget.bytes()), (0, 0));
        assert!(!budget.take(u64::MAX) && budget.take(100));
    }
}
