//! Retrieve: find the keys that queries attend to, next to where they lie.
//!
//! [`BlockCache::open_context`] pins a chain of blocks; [`BlockCache::retrieve`] answers one layer's queries over it, as
//! *rows* or *attend* ([`Form`]), and says what that covers ([`Report`]). The index is the exact flat scan of `kvasir-index`.
//!
//! Invariants:
//! - No byte is scanned that was not verified. A payload is verified when a context first wants it and then held by that
//!   context, so that verifying is paid once per context and not once per decoded token: a CRC over 4,000 tokens of a layer
//!   costs more than scanning them. What is held is bounded by `context_bytes_max`; beyond it blocks are read and verified
//!   for each query.
//! - What a report counts was done; what was not scanned is not called covered.
//! - A context pins its blocks from opening to drop, and gives back on drop all that it took.

mod context;
mod query;
mod report;

use std::{ops::Range, time::Instant};

use bytes::{BufMut, Bytes, BytesMut};
use kvasir_block::{BlockHash, Dtype, NamespaceId};
use kvasir_index::{Excluded, FlatScan, Segment};

pub(crate) use self::context::ContextBudget;
pub use self::{
    context::Context,
    report::{Report, Shortfall},
};
use self::{context::Payload, query::InvalidQuery, report::Progress};
use crate::{BlockCache, CacheError, ErrorKind};

/// How the keys that were found are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// The `k` best keys of each query head, as rows.
    Rows {
        /// Keys per query head, at least 1.
        k: usize,
    },
    /// Partial attention over the fewest best keys that cover `target_mass`, at most `k_max`.
    Attend {
        /// Share of the searched softmax mass, (0, 1]; 1 attends to every key.
        target_mass: f32,
        /// Most keys per query head, at least 1; `None` for no bound.
        k_max: Option<usize>,
    },
}

/// Queries of all heads of one layer.
#[derive(Clone, Debug)]
pub struct Query<'a> {
    /// Layer index from 0.
    pub layer: u16,
    /// `[q_heads, head_dim]`, rotated, finite.
    pub q: &'a [f32],
    /// What to answer with.
    pub form: Form,
    /// Positions the caller holds itself; never searched, never counted. In any order, may overlap and reach beyond the
    /// context; at most [`Query::EXCLUDED_MAX`].
    pub excluded: &'a [Range<u32>],
    /// When the answer is of no use any more. Looked at between blocks.
    pub deadline: Option<Instant>,
}

impl Query<'_> {
    /// Most excluded ranges. A caller has two (sink and window) or a few more; this only bounds the work of sorting them.
    pub const EXCLUDED_MAX: usize = 1024;
}

/// Keys and values of one KV head, by rising position; `[positions, head_dim]` in the schema's dtype.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadRows {
    /// Token positions.
    pub positions: Vec<u32>,
    /// Keys, little-endian.
    pub keys: Bytes,
    /// Values, little-endian.
    pub values: Bytes,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// One per KV head: the union of its query heads' best keys.
    Rows(Vec<HeadRows>),
    /// Partial attention: `o[q_heads, head_dim]`, `lse[q_heads]` base 2; 0 and -inf where nothing was searched.
    Attend {
        /// Outputs.
        o: Vec<f32>,
        /// Base-2 log-sum-exp.
        lse: Vec<f32>,
    },
}

impl BlockCache {
    /// Opens a context for retrieval: its blocks are pinned until the context is dropped. `softmax_scale` is multiplied into
    /// `q . k`; `q_heads` is a multiple of the schema's KV heads. No I/O: blocks are read when a query first wants them.
    ///
    /// # Errors
    /// `UnknownNamespace`; `Unsupported` for keys that are not f16 or attention that is not full; `InvalidArgument` naming
    /// the argument; `NotHeld` naming the first block that is missing; `LimitReached` when too many contexts or leases are
    /// open.
    pub fn open_context(
        &self,
        namespace: NamespaceId,
        chain: &[BlockHash],
        q_heads: usize,
        softmax_scale: f32,
    ) -> Result<Context, CacheError> {
        let schema = self.shared.schema_of(namespace)?;
        if schema.dtype != Dtype::F16 {
            let message = format!(
                "retrieval scans f16 keys, this namespace has {}: attend in the worker",
                schema.dtype
            );
            return Err(CacheError::new(ErrorKind::Unsupported, message));
        }
        if schema.attention != "full" {
            let message = format!(
                "retrieval serves \"full\" attention, this namespace has {:?}",
                schema.attention
            );
            return Err(CacheError::new(ErrorKind::Unsupported, message));
        }
        query::check_context(
            &schema,
            chain.len(),
            q_heads,
            softmax_scale,
            self.shared.config.context_blocks_max,
        )?;
        Context::open(&self.shared, schema, namespace, chain, q_heads, softmax_scale)
    }

    /// Answers one query. CPU work on the calling thread; reads the disk where a block is not in memory.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field. A deadline that passes or a block that is gone is no error: see
    /// [`Report::shortfall`].
    pub fn retrieve(&self, context: &Context, query: &Query<'_>) -> Result<(Found, Report), CacheError> {
        if !context.belongs_to(&self.shared) {
            return Err(InvalidQuery::new("context", "it was opened on another cache: open it on this one").into());
        }
        query::check(query, context)?;
        let excluded = Excluded::new(query.excluded);
        let late = || query.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let blocks = context.load(&self.shared, query.layer, &excluded, &late);
        let mut progress = Progress::new(context, &excluded);
        let found = search(context, query, &excluded, &blocks, &late, &mut progress);
        let report = progress.finish();
        let counters = &self.shared.counters;
        counters.retrieve_queries.add(1);
        counters
            .retrieve_late
            .add(u64::from(report.shortfall == Some(Shortfall::Deadline)));
        counters.retrieve_keys_scanned.add(report.keys_scanned);
        counters.retrieve_bytes.add(report.bytes_read);
        Ok((found, report))
    }
}

/// Scans KV head after KV head; stops where it is late.
fn search(
    context: &Context,
    query: &Query<'_>,
    excluded: &Excluded,
    blocks: &[Option<Payload>],
    late: &dyn Fn() -> bool,
    progress: &mut Progress,
) -> Found {
    let (layout, group) = (context.schema().layout(), context.group());
    let head_dim = layout.head_dim;
    let halves: Vec<Option<&[half::f16]>> = blocks.iter().map(|block| block.as_ref().map(Payload::halves)).collect();
    let mut scan = FlatScan::new(head_dim, context.scale());
    let mut rows = Vec::new();
    let mut o = Vec::with_capacity(query.q.len());
    let mut lse = Vec::with_capacity(context.q_heads());
    for (kv_head, q) in query.q.chunks_exact(group * head_dim).enumerate() {
        scan.begin(q);
        for (at, halves) in halves.iter().enumerate() {
            if context.is_excluded(at, excluded) {
                continue;
            }
            if progress.is_late() || late() {
                progress.late();
                break;
            }
            match halves {
                Some(halves) => scan.scan(
                    Segment {
                        keys: &halves[layout.keys(kv_head)],
                        values: &halves[layout.values(kv_head)],
                        position: at * layout.block_tokens,
                    },
                    excluded,
                ),
                None => progress.missing(),
            }
        }
        match query.form {
            Form::Rows { k } => {
                let found = scan.rows(k);
                progress.head(
                    scan.keys_scanned(),
                    &found.mass,
                    found.positions().len() * group,
                    found.positions().len(),
                );
                rows.push(gather(&scan, &found, head_dim));
            }
            Form::Attend { target_mass, k_max } => {
                let found = scan.attend(target_mass, k_max);
                progress.head(
                    scan.keys_scanned(),
                    &found.mass,
                    found.keys.iter().sum(),
                    found.value_rows,
                );
                progress.cut_short(found.cut_short);
                o.extend_from_slice(&found.o);
                lse.extend_from_slice(&found.lse);
            }
        }
    }
    match query.form {
        Form::Rows { .. } => Found::Rows(rows),
        Form::Attend { .. } => Found::Attend { o, lse },
    }
}

/// Copies chosen rows out of their blocks: they travel, the blocks stay.
fn gather(scan: &FlatScan<'_>, found: &kvasir_index::Rows, head_dim: usize) -> HeadRows {
    let bytes = found.positions().len() * head_dim * Dtype::F16.bytes();
    let (mut keys, mut values) = (BytesMut::with_capacity(bytes), BytesMut::with_capacity(bytes));
    scan.each_row(found, |key, value| {
        key.iter().for_each(|half| keys.put_u16_le(half.to_bits()));
        value.iter().for_each(|half| values.put_u16_le(half.to_bits()));
    });
    HeadRows {
        positions: found.positions().to_vec(),
        keys: keys.freeze(),
        values: values.freeze(),
    }
}

#[cfg(test)]
mod tests;
