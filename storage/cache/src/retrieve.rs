//! Retrieve: find the keys that queries attend to, next to where they lie.

use std::{ops::Range, sync::Arc, time::Instant};

use bytes::Bytes;
use kvasir_block::{BlockHash, KvSchema, NamespaceId};

use crate::{BlockCache, CacheError};

/// A chain of held blocks, pinned until dropped.
#[derive(Debug)]
pub struct Context;

/// How the keys that were found are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// The `k` best keys of each query head, as rows.
    Rows {
        /// Keys per query head.
        k: usize,
    },
    /// Partial attention over the fewest best keys that cover `target_mass`, at most `k_max`.
    Attend {
        /// Share of the searched softmax mass, (0, 1].
        target_mass: f32,
        /// Most keys per query head; `None` for no bound.
        k_max: Option<usize>,
    },
}

/// Queries of all heads of one layer.
#[derive(Clone, Debug)]
pub struct Query<'a> {
    /// Layer index from 0.
    pub layer: u16,
    /// `[q_heads, head_dim]`, rotated.
    pub q: &'a [f32],
    /// What to answer with.
    pub form: Form,
    /// Positions the caller holds itself; never searched, never counted.
    pub excluded: &'a [Range<u32>],
    /// When the answer is of no use any more.
    pub deadline: Option<Instant>,
}

/// Keys and values of one KV head, by rising position; `[positions, head_dim]` in the schema's dtype.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadRows {
    /// Token positions.
    pub positions: Vec<u32>,
    /// Keys.
    pub keys: Bytes,
    /// Values.
    pub values: Bytes,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// One per KV head: the union of its query heads' best keys.
    Rows(Vec<HeadRows>),
    /// Partial attention: `o[q_heads, head_dim]`, `lse[q_heads]` base 2.
    Attend {
        /// Outputs.
        o: Vec<f32>,
        /// Base-2 log-sum-exp.
        lse: Vec<f32>,
    },
}

/// Why a result covers less than was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortfall {
    /// The deadline passed.
    Deadline,
    /// A block vanished or was corrupt.
    MissingBlocks,
    /// `k_max` was reached before `target_mass`.
    KMax,
}

/// What a retrieval did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Keys whose score was computed exactly, summed over KV heads.
    pub keys_scanned: u64,
    /// Keys that could have been searched, summed over KV heads.
    pub keys_total: u64,
    /// Keys that took part in the result, summed over query heads.
    pub keys_attended: u64,
    /// Share of the searched mass that the result covers, per query head.
    pub mass_covered: Vec<f32>,
    /// Why it covers less than was asked.
    pub shortfall: Option<Shortfall>,
    /// Bytes of keys and values read.
    pub bytes_read: u64,
}

impl BlockCache {
    /// Opens a context for retrieval: its blocks are pinned until the context is dropped.
    ///
    /// # Errors
    /// `UnknownNamespace`, `NotHeld` naming the first block that is missing, `Unsupported`, `InvalidArgument`, `LimitReached`.
    pub fn open_context(&self, _namespace: NamespaceId, _chain: &[BlockHash], _q_heads: usize, _softmax_scale: f32) -> Result<Context, CacheError> {
        unimplemented!()
    }

    /// Answers one query. CPU work on the calling thread; reads the disk where a block is not in memory.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub fn retrieve(&self, _context: &Context, _query: &Query<'_>) -> Result<(Found, Report), CacheError> {
        unimplemented!()
    }
}

impl Context {
    /// Tokens of the context.
    pub fn tokens(&self) -> usize { unimplemented!() }
    /// Name of the index that serves it.
    pub fn index(&self) -> &'static str { unimplemented!() }
    /// Schema of its blocks.
    pub fn schema(&self) -> &Arc<KvSchema> { unimplemented!() }
}
