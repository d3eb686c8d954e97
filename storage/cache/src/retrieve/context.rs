//! Open contexts, and the bounds on them.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use half::f16;
use kvasir_block::{BlockHash, KvSchema, NamespaceId};
use kvasir_simd::cast_f16;
use parking_lot::Mutex;

use super::{Form, Plan, blocks::ContextBlocks, search::wants_scan};
use crate::{BasisId, CacheError, ErrorKind, cache::Shared, indexes::Covering, namespace::NamespaceBasis};

/// Generation of an index that was never looked up.
const NEVER: u64 = u64::MAX;

/// Why a query is answered otherwise than its context was opened for.
const BOUND: &str = "what was asked for, a bound or no bias, only a scan gives";
const LATER: &str = "it was built after this context was opened";
const UNUSABLE: &str =
    "the files of the built index are gone or damaged, or there is no room for them (index_bytes_max)";

/// A chain of held blocks, pinned until dropped. It does not keep its cache alive: once that is closed, it is of no use.
///
/// Contexts over the same chain share its blocks: they are pinned, verified and counted once.
#[derive(Debug)]
pub struct Context {
    cache: Weak<Shared>,
    blocks: Arc<ContextBlocks>,
    q_heads: usize,
    scale: f32,
    plan: Plan,
    /// The built index that serves it, and when that was looked up.
    covering: Mutex<(u64, Option<Covering>)>,
}

/// What serves a context, and why not something better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serving {
    /// Name of the index.
    pub index: &'static str,
    /// Why not a better one, for a person; empty where there is none.
    pub reason: &'static str,
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
pub(crate) enum Payload {
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
        plan: Plan,
    ) -> Result<Self, CacheError> {
        if !shared.contexts.open_one() {
            let message = format!(
                "{} contexts are open, contexts_max allows no more: close one or raise it",
                shared.config.contexts_max
            );
            return Err(CacheError::new(ErrorKind::LimitReached, message));
        }
        match ContextBlocks::of(shared, schema, namespace, chain) {
            Ok(blocks) => Ok(Self {
                cache: Arc::downgrade(shared),
                blocks,
                q_heads,
                scale,
                plan,
                covering: Mutex::new((NEVER, None)),
            }),
            Err(error) => {
                shared.contexts.close_one();
                Err(error)
            }
        }
    }

    pub(super) fn basis(&self) -> Option<&Arc<NamespaceBasis>> {
        self.plan.basis.as_ref()
    }

    /// The built index that is to serve it as of now, if there is one.
    pub(super) fn covering(&self, shared: &Shared) -> Option<Covering> {
        if self.plan.kinds.is_empty() {
            return None;
        }
        let now = shared.indexes.loaded.generation();
        let mut known = self.covering.lock();
        if known.0 != now {
            *known = (now, shared.covering(self.blocks.keys(), self.plan.kinds));
        }
        known.1
    }

    /// Id of the basis of the sketches that serve it, or help out; `None` where there are none.
    pub fn basis_id(&self) -> Option<BasisId> {
        self.plan.basis.as_ref().map(|basis| basis.id())
    }

    /// Tokens of the context.
    pub fn tokens(&self) -> usize {
        self.blocks.len() * usize::from(self.schema().block_tokens)
    }

    /// What served it when it was opened. An index that is built later serves from then on, and reports say so.
    pub fn serving(&self) -> Serving {
        self.plan.serving
    }

    /// Name of the index that serves it.
    pub fn index(&self) -> &'static str {
        self.plan.serving.index
    }

    /// Schema of its blocks.
    pub fn schema(&self) -> &Arc<KvSchema> {
        self.blocks.schema()
    }

    /// Query heads per layer.
    pub fn q_heads(&self) -> usize {
        self.q_heads
    }

    /// Whether queries of both contexts may be answered by one scan: same blocks, same heads, same scale.
    pub fn joins(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.blocks, &other.blocks)
            && self.q_heads == other.q_heads
            && self.scale.to_bits() == other.scale.to_bits()
            && self.plan.serving.index == other.plan.serving.index
            && self.plan.kinds == other.plan.kinds
    }

    /// Why `index` answers a query of this form, where that is not what it was opened with.
    pub(super) fn reason(&self, index: &'static str, form: Form) -> &'static str {
        match self.plan.serving.index {
            opened if opened == index => "",
            _ if wants_scan(form) => BOUND,
            _ if index == self.plan.scan => UNUSABLE,
            _ => LATER,
        }
    }

    /// Whether all blocks of a layer are in memory, verified and sketched, or on their way there; waits for nothing.
    pub fn is_warm(&self, layer: u16) -> bool {
        self.blocks.is_warm(layer) && (self.plan.basis.is_none() || self.blocks.is_sketched(layer))
    }

    /// Query heads per KV head.
    pub(super) fn group(&self) -> usize {
        self.q_heads / usize::from(self.schema().kv_heads)
    }

    pub(super) fn scale(&self) -> f32 {
        self.scale
    }

    pub(super) fn belongs_to(&self, shared: &Arc<Shared>) -> bool {
        Weak::as_ptr(&self.cache) == Arc::as_ptr(shared)
    }

    pub(super) fn blocks(&self) -> &Arc<ContextBlocks> {
        &self.blocks
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(shared) = self.cache.upgrade() {
            shared.contexts.close_one();
        }
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

    fn close_one(&self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn give_back(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether so many could be taken now.
    pub(super) fn has(&self, bytes: u64) -> bool {
        self.bytes().checked_add(bytes).is_some_and(|sum| sum <= self.bytes_max)
    }

    pub(super) fn take(&self, bytes: u64) -> bool {
        add_within(&self.bytes, bytes, self.bytes_max)
    }
}

fn add_within(count: &AtomicU64, more: u64, max: u64) -> bool {
    let within = |now: u64| now.checked_add(more).filter(|sum| *sum <= max);
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
}

impl Payload {
    pub(crate) fn new(bytes: Bytes) -> Self {
        if cast_f16(&bytes).is_some() {
            return Self::Shared(bytes);
        }
        // Once per context, not per query.
        let (pairs, _) = bytes.as_chunks::<2>();
        Self::Copied(pairs.iter().map(|&pair| f16::from_le_bytes(pair)).collect())
    }

    pub(crate) fn halves(&self) -> &[f16] {
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
        budget.close_one();
        budget.give_back(100);
        assert_eq!((budget.open(), budget.bytes()), (0, 0));
        assert!(!budget.take(u64::MAX) && budget.take(100));
    }
}
