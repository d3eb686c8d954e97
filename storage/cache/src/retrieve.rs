//! Retrieve: find the keys that queries attend to, next to where they lie.
//!
//! [`BlockCache::open_context`] pins a chain of blocks; [`BlockCache::retrieve`] answers one layer's queries over it, as
//! *rows* or *attend* ([`Form`]), and says what that covers ([`Report`]). The index is the exact flat scan of
//! `kvasir-index`, its scan of sketches where the namespace has a basis, or one that was built over a prefix (`covered.rs`).
//!
//! Invariants:
//! - No byte is scanned that was not verified. A payload is verified when a context first wants it and then held by that
//!   context, so that verifying is paid once per context and not once per decoded token: a CRC over 4,000 tokens of a layer
//!   costs more than scanning them. What is held is bounded by `context_bytes_max`; beyond it blocks are read and verified
//!   for each query.
//! - What a report counts was done; what was not scanned is not called covered.
//! - A context pins its blocks from opening to drop, and gives back on drop all that it took. Contexts over one chain share
//!   blocks: what they pin and hold is counted once.
//! - An answer does not depend on which queries shared its scan, nor on how many threads worked on it: candidates of a query are
//!   its own. Where a search began ahead they are those of a prediction; what is found among them is the query's own still.
//! - It may depend on whether the layer's sketches were in clusters by then (`cluster.rs`): sums have another order, and keys at the edge
//!   of what is scored exactly may be others. Between two changes of that the same query has the same bits; what attends to every
//!   key is near exact attention in both.

mod blocks;
mod cluster;
mod context;
mod covered;
mod head;
mod parked;
mod query;
mod report;
mod search;
mod sketches;
mod usual;

use std::{
    ops::Range,
    sync::{Arc, atomic::AtomicBool},
    time::Instant,
};

use bytes::Bytes;
use kvasir_block::{BlockHash, Dtype, KvSchema, NamespaceId};
use kvasir_index::Excluded;

pub(crate) use self::{
    blocks::{ContextBlocks, Registry},
    cluster::{ClusterEnd, ClusterJob},
    context::{ContextBudget, Payload},
    sketches::{encode_layer, sketched_bytes},
};
pub use self::{
    context::{Context, Serving},
    parked::{ParkedSearch, SearchAhead},
    report::{Report, Shortfall},
    search::Search,
};
use self::{query::InvalidQuery, search::Purpose};
use crate::{BlockCache, CacheError, ErrorKind, cache::Shared, indexes::BuiltIndex, namespace::NamespaceBasis};

/// Name of the exact scan.
const FLAT: &str = "flat";
/// Name of the scan of sketches.
const SKETCH: &str = "sketch";

/// Why another index than the one that was asked for serves.
const NO_ROAR: &str = "no roar index is built over a prefix of this context: ask for one (BuildIndex)";
const NO_WAVE: &str = "no wave index is built over a prefix of this context: ask for one (BuildIndex)";
/// What a built index leaves to a scan.
const SHORTER: &str = "it covers the first blocks of this context, the keys behind are scanned";

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
        /// Share of the softmax mass, (0, 1]; 1 attends to every key. See [`Query::local_lse`].
        target_mass: f32,
        /// Most keys per query head, at least 1; `None` for no bound.
        k_max: Option<usize>,
        /// What else is wanted.
        options: AttendOptions,
    },
}

/// What is wanted beside attending to the best keys. The flat scan scores every key: it has no tail to estimate, its output is
/// not biased by sampling, and its bound is the mass that it left out, so both certificates are that. What sketches cannot give,
/// a deterministic certificate, or an output without bias together with a bound, the flat scan gives.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttendOptions {
    /// Estimate what is not attended to; the output then includes the estimate.
    pub tail: bool,
    /// No bias in expectation. Through sketches keys are drawn then (SoftmaxLift), so many as `effort` and `k_max` allow, and stand for
    /// the others; `tail` adds nothing to that.
    pub unbiased: bool,
    /// Share of the keys that may be scored exactly, (0, 1]; 0 for the default, 0.05.
    pub effort: f32,
    /// Whether the missed mass is to be bounded, and how.
    pub certificate: Certificate,
    /// Largest acceptable bound, [0, 1]; 0 for no demand. Where it is larger, more keys are attended to than `target_mass` and
    /// `k_max` ask for, and the report says so.
    pub missed_mass_max: f32,
}

/// How the mass that an answer misses is bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Certificate {
    /// Not at all.
    #[default]
    None,
    /// From sampled keys, at three standard errors.
    Statistical,
    /// For certain.
    Deterministic,
}

/// The index that is to serve a context. The best that is there serves, and [`Context::serving`] says why it is not a better one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IndexChoice {
    /// The best there is.
    #[default]
    Best,
    /// The exact scan.
    Flat,
    /// Sketches in the namespace's basis.
    Sketch,
    /// The graph drawn by query samples, where one was built over a prefix of the context.
    Roar,
    /// Clusters, where they were built over a prefix of the context.
    Wave,
}

/// What serves a context.
#[derive(Clone, Debug)]
struct Plan {
    serving: Serving,
    /// The scan that serves where no built index does.
    scan: &'static str,
    /// Of sketches, where they serve or help out.
    basis: Option<Arc<NamespaceBasis>>,
    /// Built indexes that may serve, the better first.
    kinds: &'static [BuiltIndex],
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
    /// When the answer is of no use any more. Looked at between blocks; between KV heads where sketches serve.
    pub deadline: Option<Instant>,
    /// Base-2 log-sum-exp of what the caller attends to by itself, `[q_heads]`, about; no number is NaN or +inf. `target_mass` is then a
    /// share of that and the searched mass together, where sketches serve: the exact scan covers as much of the searched mass, which
    /// is more. Empty: of the searched mass alone.
    pub local_lse: &'a [f32],
}

impl Query<'_> {
    /// Most excluded ranges. A caller has two (sink and window) or a few more; this only bounds the work of sorting them.
    pub const EXCLUDED_MAX: usize = 1024;

    /// Whether one scan can answer both: they differ in their queries and deadlines only, and for each of them it attends to as
    /// many keys as `target_mass` takes, no less and no more. (Rows are chosen for one sequence at a time.)
    pub fn joins(&self, other: &Query<'_>) -> bool {
        let unbounded = matches!(
            self.form,
            Form::Attend { k_max: None, options, .. } if options.missed_mass_max == 0.0
        );
        unbounded
            && self.layer == other.layer
            && self.form == other.form
            && self.excluded == other.excluded
            && self.local_lse.is_empty() == other.local_lse.is_empty()
    }
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
        index: IndexChoice,
    ) -> Result<Context, CacheError> {
        let schema = self.shared.searchable(namespace, chain.len())?;
        query::check_heads(&schema, q_heads, softmax_scale)?;
        let plan = self.plan(namespace, &schema, chain, index);
        Context::open(&self.shared, schema, namespace, chain, q_heads, softmax_scale, plan)
    }

    /// What is to serve a context.
    fn plan(&self, namespace: NamespaceId, schema: &KvSchema, chain: &[BlockHash], wanted: IndexChoice) -> Plan {
        if wanted == IndexChoice::Flat {
            let (index, reason) = (FLAT, "");
            return Plan {
                serving: Serving { index, reason },
                scan: FLAT,
                basis: None,
                kinds: &[],
            };
        }
        let (by_scan, basis) = self.scanning(namespace, schema);
        let (kinds, missing): (&'static [BuiltIndex], _) = match wanted {
            IndexChoice::Roar => (&[BuiltIndex::Roar], NO_ROAR),
            IndexChoice::Wave => (&[BuiltIndex::Wave], NO_WAVE),
            IndexChoice::Flat | IndexChoice::Sketch => (&[], ""),
            // Sketches find more for fewer bytes than any of them.
            IndexChoice::Best if basis.is_some() => (&[], ""),
            IndexChoice::Best => (&[BuiltIndex::Roar, BuiltIndex::Wave], by_scan.reason),
        };
        let blocks: Vec<_> = match kinds {
            [] => Vec::new(),
            _ => chain.iter().map(|&hash| namespace.block(hash)).collect(),
        };
        let serving = match self.shared.covering(&blocks, kinds) {
            Some(covering) => Serving {
                index: covering.name.kind.name(),
                reason: match (wanted, covering.blocks == chain.len()) {
                    (IndexChoice::Best, true) => by_scan.reason,
                    (_, true) => "",
                    (_, false) => SHORTER,
                },
            },
            None if kinds.is_empty() => by_scan,
            None => Serving {
                reason: missing,
                ..by_scan
            },
        };
        let scan = by_scan.index;
        Plan {
            serving,
            scan,
            basis,
            kinds,
        }
    }

    /// The scan that serves where no built index does, and the basis of its sketches.
    fn scanning(&self, namespace: NamespaceId, schema: &KvSchema) -> (Serving, Option<Arc<NamespaceBasis>>) {
        let flat = |reason| (Serving { index: FLAT, reason }, None);
        match self.shared.namespaces.basis(namespace) {
            None => flat(
                "the namespace has no sketch basis: calibrate the model (kvasir calibrate) and open the namespace with it",
            ),
            Some(basis) if basis.basis().rank < sketches::RANK => {
                flat("the namespace's sketch basis has less than the 32 directions that sketches take")
            }
            Some(_) if usize::from(schema.block_tokens) > sketches::BLOCK_TOKENS_MAX => {
                flat("its blocks have more than the 256 tokens that a sketch takes")
            }
            Some(basis) => {
                let (index, reason) = (SKETCH, "");
                (Serving { index, reason }, Some(basis))
            }
        }
    }

    /// Answers one query. CPU work on the calling thread; reads the disk where a block is not in memory. See [`Self::search`]
    /// for several queries at once, on several threads.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field. A deadline that passes or a block that is gone is no error: see
    /// [`Report::shortfall`].
    pub fn retrieve(&self, context: &Context, query: &Query<'_>) -> Result<(Found, Report), CacheError> {
        alone(&self.search(context, std::slice::from_ref(query))?)
    }

    /// As [`Self::retrieve`], beginning with what was [searched ahead](Self::search_ahead) for it. Where that is not
    /// [for it](ParkedSearch::is_for), or was predicted too far off, the search is an ordinary one; the report says how many KV heads
    /// gained.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field.
    pub fn retrieve_parked(
        &self,
        context: &Context,
        query: &Query<'_>,
        parked: ParkedSearch,
    ) -> Result<(Found, Report), CacheError> {
        alone(&self.search_parked(context, query, parked)?)
    }

    /// As [`Self::search`] for one query, beginning with what was searched ahead for it; see [`Self::retrieve_parked`].
    ///
    /// # Errors
    /// `InvalidArgument` naming the field.
    pub fn search_parked(
        &self,
        context: &Context,
        query: &Query<'_>,
        parked: ParkedSearch,
    ) -> Result<Search, CacheError> {
        self.check_query(context, query)?;
        let purpose = if parked.is_for(context, query) {
            parked.into_purpose()
        } else {
            Purpose::Answer(Vec::new())
        };
        let queries = std::slice::from_ref(query);
        Ok(Search::begin(&self.shared, context, query, queries, purpose))
    }

    /// Whether `query` can be answered over `context`; what [`Self::search`] checks of each.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field.
    pub fn check_query(&self, context: &Context, query: &Query<'_>) -> Result<(), CacheError> {
        if !context.belongs_to(&self.shared) {
            return Err(InvalidQuery::new("context", "it was opened on another cache: open it on this one").into());
        }
        Ok(query::check(query, context)?)
    }

    /// Begins one scan that answers all of `queries`, which [join](Query::joins) each other: of sequences that decode over
    /// contexts that [join](Context::joins), so that each key is read once for all of them. Reads the blocks; then threads
    /// [work](Search::work). The scan stops at the latest of the deadlines.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field.
    pub fn search(&self, context: &Context, queries: &[Query<'_>]) -> Result<Search, CacheError> {
        for query in queries {
            self.check_query(context, query)?;
        }
        let (first, others) = queries
            .split_first()
            .ok_or_else(|| InvalidQuery::new("queries", "there are none: ask for at least one"))?;
        if !others.iter().all(|other| first.joins(other)) {
            return Err(InvalidQuery::new("queries", "they cannot share a scan: ask one after another").into());
        }
        Ok(Search::begin(
            &self.shared,
            context,
            first,
            queries,
            Purpose::Answer(Vec::new()),
        ))
    }

    /// Begins a search ahead of the query that will want it: `predicted` is about what that will ask, in the same form and with the
    /// same exclusions. Reads the blocks; then threads [work](SearchAhead::work). It ends early once `dropped` is set. `None` where a
    /// prediction gains nothing, since every key is to be scored.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field.
    pub fn search_ahead(
        &self,
        context: &Context,
        predicted: &Query<'_>,
        dropped: &Arc<AtomicBool>,
    ) -> Result<Option<SearchAhead>, CacheError> {
        self.check_query(context, predicted)?;
        Ok(SearchAhead::begin(&self.shared, context, predicted, dropped))
    }

    /// Reads and verifies the blocks of a layer that a query will want soon, unless they are there: the query then finds them in
    /// memory. Nothing happens where the layer does not exist or memory for contexts is used up.
    pub fn warm(&self, context: &Context, layer: u16) {
        if layer < context.schema().layers && context.belongs_to(&self.shared) {
            if let Some(covering) = context.covering(&self.shared) {
                self.shared.layer_index(covering, layer);
            }
            let blocks = context.blocks();
            let payloads = blocks.load(&self.shared, layer, &Excluded::none(), &|| false);
            if let Some(basis) = context.basis() {
                let sketches = blocks.sketch(&self.shared, layer, &payloads, basis, &|| false);
                blocks.cluster_later(&self.shared, layer, &payloads, &sketches, &Excluded::none(), basis);
            }
        }
    }
}

impl Shared {
    /// The schema of a namespace, if a context of `blocks` blocks in it can be searched.
    pub(crate) fn searchable(&self, namespace: NamespaceId, blocks: usize) -> Result<Arc<KvSchema>, CacheError> {
        let schema = self.schema_of(namespace)?;
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
        query::check_blocks(&schema, blocks, self.config.context_blocks_max)?;
        Ok(schema)
    }
}

/// Does the search for one query on this thread.
fn alone(search: &Search) -> Result<(Found, Report), CacheError> {
    search.work();
    search.wait_for_one()
}

#[cfg(test)]
mod tests;
