//! Building: one context after another, one KV head after another, by a thread of the lowest priority.
//!
//! A build pins its blocks, reads one layer at a time, and writes each head's index as soon as it is made; what a build that was cut
//! short had written is found by the next one for the same context. It gives way between heads. Nothing is taken from the memory of
//! contexts: a query must not wait for room because an index is being built.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use half::f16;
use kvasir_block::{BlockHash, Checksum, LayerBlockKey, NamespaceId};
use kvasir_index::{IndexError, KeyIndex as _, KeyRows, Roar, RoarParams, Samples, Wave, WaveParams};
use kvasir_simd::Pool;
use kvasir_tier::Offer;
use parking_lot::Mutex;

use super::{
    background::{Background, Load},
    built::{BuiltIndex, IndexName, Manifest},
};
use crate::{
    BlockCache, CacheError, ErrorKind, GetOptions, GetOutcome,
    cache::Shared,
    retrieve::{ContextBlocks, Payload},
};

/// How long a full write queue is left alone.
const QUEUE_FULL: Duration = Duration::from_millis(50);
/// Contexts whose failed build is remembered.
const FAILED_MAX: usize = 1024;

/// How an index of a context stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildState {
    /// It is not there and nobody builds it; why, or why not, for a person.
    Absent(String),
    /// It waits to be built.
    Queued,
    /// It is being built: so many heads of all layers are done.
    Building {
        /// Heads done.
        done: u32,
        /// Of so many.
        of: u32,
    },
    /// It is there and serves who asks for it.
    Ready {
        /// Tokens of the context that it covers: the first ones.
        tokens: u32,
    },
}

#[derive(Debug)]
pub(crate) struct Builder {
    pub(super) queue: Arc<Background<Job>>,
    states: Mutex<States>,
}

#[derive(Debug, Default)]
struct States {
    /// Of what is queued, built, or has failed.
    by_name: HashMap<IndexName, BuildState>,
    /// The oldest first.
    failed: VecDeque<IndexName>,
}

/// A context to build an index over.
#[derive(Debug)]
pub(crate) struct Job {
    name: IndexName,
    blocks: Arc<ContextBlocks>,
}

impl Builder {
    pub(super) fn new(queue_max: usize) -> Self {
        Self {
            queue: Arc::new(Background::new("kv-index", queue_max)),
            states: Mutex::default(),
        }
    }

    pub(crate) fn load(&self) -> Load {
        self.queue.load()
    }

    fn set(&self, name: IndexName, state: BuildState) {
        let mut states = self.states.lock();
        if matches!(state, BuildState::Absent(_)) {
            states.failed.push_back(name);
            if states.failed.len() > FAILED_MAX
                && let Some(oldest) = states.failed.pop_front()
                && matches!(states.by_name.get(&oldest), Some(BuildState::Absent(_)))
            {
                states.by_name.remove(&oldest);
            }
        }
        states.by_name.insert(name, state);
    }

    fn forget(&self, name: IndexName) {
        self.states.lock().by_name.remove(&name);
    }
}

impl BlockCache {
    /// Keeps query samples of a layer of a block, for indexes that are drawn by them; answers how many were new. The block may come
    /// later. They are in memory only, under `query_bytes_max`.
    ///
    /// # Errors
    /// `UnknownNamespace`; `InvalidArgument` naming the field: shapes that do not fit the schema, an element that is not finite, other
    /// query heads than the block's samples have.
    pub fn put_queries(
        &self,
        namespace: NamespaceId,
        block: BlockHash,
        samples: &super::QuerySamples<'_>,
    ) -> Result<usize, CacheError> {
        let schema = self.shared.schema_of(namespace)?;
        let new = self
            .shared
            .indexes
            .samples
            .put(namespace.block(block), &schema, samples)?;
        self.shared.counters.query_samples.add(new as u64);
        Ok(new)
    }

    /// Asks for an index over a chain of held blocks, which is built in the background; answers how it stands. Asking again is
    /// asking how far it is.
    ///
    /// # Errors
    /// `UnknownNamespace`; `Unsupported` and `InvalidArgument` as for [`BlockCache::open_context`]; `NotHeld` naming the first block
    /// that is missing; `LimitReached` when too many builds wait.
    pub fn build_index(
        &self,
        namespace: NamespaceId,
        chain: &[BlockHash],
        kind: BuiltIndex,
    ) -> Result<BuildState, CacheError> {
        let shared = &self.shared;
        let schema = shared.searchable(namespace, chain.len())?;
        let state = self.index_state(namespace, chain, kind)?;
        if !matches!(state, BuildState::Absent(_)) {
            return Ok(state);
        }
        let keys: Vec<_> = chain.iter().map(|&hash| namespace.block(hash)).collect();
        let name = self.index_name(namespace, chain, kind)?;
        let blocks = ContextBlocks::of(shared, Arc::clone(&schema), namespace, chain)?;
        if kind == BuiltIndex::Roar
            && let Some(layer) = shared.indexes.samples.first_without(&keys, schema.layers)
        {
            let why = format!(
                "layer {layer} has no query samples over this context: put some, or build \"wave\", which needs none"
            );
            return Ok(BuildState::Absent(why));
        }
        let builder = &shared.indexes.builder;
        builder.set(name, BuildState::Queued);
        if builder.queue.push(Job { name, blocks }) {
            return Ok(BuildState::Queued);
        }
        builder.forget(name);
        let message = format!(
            "{} builds wait, build_queue_max allows no more: ask again later",
            shared.config.build_queue_max
        );
        Err(CacheError::new(ErrorKind::LimitReached, message))
    }

    /// How an index over a chain stands.
    ///
    /// # Errors
    /// `UnknownNamespace`; `InvalidArgument` for an empty chain.
    pub fn index_state(
        &self,
        namespace: NamespaceId,
        chain: &[BlockHash],
        kind: BuiltIndex,
    ) -> Result<BuildState, CacheError> {
        let schema = self.shared.schema_of(namespace)?;
        let name = self.index_name(namespace, chain, kind)?;
        if let Some(state) = self.shared.indexes.builder.states.lock().by_name.get(&name) {
            return Ok(state.clone());
        }
        if self.shared.indexes.loaded.is_unusable(name) {
            return Ok(BuildState::Absent("its files are gone or damaged".to_owned()));
        }
        if self.shared.holds(name.manifest()) {
            let tokens = chain.len() * usize::from(schema.block_tokens);
            return Ok(BuildState::Ready {
                tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
            });
        }
        Ok(BuildState::Absent("nobody has asked for it".to_owned()))
    }

    fn index_name(
        &self,
        namespace: NamespaceId,
        chain: &[BlockHash],
        kind: BuiltIndex,
    ) -> Result<IndexName, CacheError> {
        let Some(&end) = chain.last() else {
            let message = "hashes: the chain is empty: name at least one whole block";
            return Err(CacheError::new(ErrorKind::InvalidArgument, message));
        };
        let end = namespace.block(end);
        Ok(IndexName { end, kind })
    }
}

impl Shared {
    pub(super) fn build(&self, job: Job) {
        let Job { name, blocks } = job;
        let builder = &self.indexes.builder;
        let begun = std::time::Instant::now();
        match self.build_heads(name, &blocks) {
            Ok(()) => {
                builder.forget(name);
                self.indexes.loaded.built(name);
                self.counters.indexes_built.add(1);
                let (index, tokens) = (name.kind.name(), blocks.tokens());
                tracing::info!(index, tokens, elapsed = ?begun.elapsed(), "index is built");
            }
            Err(Some(why)) => {
                tracing::warn!(index = name.kind.name(), why, "an index was not built");
                self.counters.index_builds_failed.add(1);
                builder.set(name, BuildState::Absent(why));
            }
            // The cache stops.
            Err(None) => builder.forget(name),
        }
    }

    /// Makes and writes what is missing; why that is at an end, or `None` where the cache stops.
    fn build_heads(&self, name: IndexName, blocks: &ContextBlocks) -> Result<(), Option<String>> {
        let schema = blocks.schema();
        let kv_heads = usize::from(schema.kv_heads);
        let heads = usize::from(schema.layers) * kv_heads;
        let basis = self.namespaces.basis(name.end.namespace);
        let streams = |layer: u16, kv_head| {
            let basis = basis.as_ref();
            basis.is_some_and(|basis| basis.basis().head(layer.into(), kv_head).streaming)
        };
        let pool = Pool::new(self.config.build_threads);
        let mut manifest = Manifest {
            tokens: u32::try_from(blocks.tokens()).map_err(|_| Some("it is too long".to_owned()))?,
            heads: vec![false; heads],
        };
        for layer in 0..schema.layers {
            // Read for the first head that needs it.
            let mut payloads = None;
            for kv_head in 0..kv_heads {
                let head = usize::from(layer) * kv_heads + kv_head;
                let state = BuildState::Building {
                    done: head as u32,
                    of: heads as u32,
                };
                self.indexes.builder.set(name, state);
                if streams(layer, kv_head) {
                    continue;
                }
                manifest.heads[head] = true;
                let too_many = || Some("the model has more heads than an index has files for".to_owned());
                let place = name.file(head).ok_or_else(too_many)?;
                if self.holds(place) {
                    continue;
                }
                if !self.indexes.builder.queue.step_aside(&self.indexes.busy) {
                    return Err(None);
                }
                let payloads: &Vec<Payload> = match &mut payloads {
                    Some(payloads) => payloads,
                    none => none.insert(self.read_layer(blocks, layer)?),
                };
                let file = self
                    .build_head(name, blocks, layer, kv_head, payloads, &pool)
                    .map_err(|error| Some(format!("layer {layer}, KV head {kv_head}: {error}")))?;
                self.write_record(place, file)?;
            }
        }
        self.write_record(name.manifest(), manifest.encode(name.kind))
    }

    fn build_head(
        &self,
        name: IndexName,
        blocks: &ContextBlocks,
        layer: u16,
        kv_head: usize,
        payloads: &[Payload],
        pool: &Pool,
    ) -> Result<Vec<u8>, IndexError> {
        let schema = blocks.schema();
        let layout = schema.layout();
        let head = usize::from(layer) * layout.kv_heads + kv_head;
        let of = |range: std::ops::Range<usize>| -> Vec<&[f16]> {
            payloads
                .iter()
                .map(|payload| &payload.halves()[range.clone()])
                .collect()
        };
        let keys = of(layout.keys(kv_head));
        match name.kind {
            BuiltIndex::Roar => {
                let samples = self.indexes.samples.of_group(blocks.keys(), schema, layer, kv_head);
                let rows = KeyRows::new(&keys, layout.block_tokens, layout.head_dim);
                let params = RoarParams::default();
                Roar::build(rows, Samples::Shared(&samples), params, name.origin(head), pool).map(|roar| roar.encode())
            }
            BuiltIndex::Wave => {
                let mut wave = Wave::new(layout.head_dim, WaveParams::default(), true, name.origin(head))?;
                for (keys, values) in keys.iter().zip(of(layout.values(kv_head))) {
                    wave.append_rows(keys, values)?;
                }
                Ok(wave.encode())
            }
        }
    }

    /// All blocks of a layer, verified; not kept.
    fn read_layer(&self, blocks: &ContextBlocks, layer: u16) -> Result<Vec<Payload>, Option<String>> {
        let keys: Vec<LayerBlockKey> = blocks.keys().iter().map(|block| block.layer(layer)).collect();
        let options = GetOptions::default();
        let outcomes = self.read_many(&keys, &options).into_iter().enumerate();
        outcomes
            .map(|(at, outcome)| match outcome {
                GetOutcome::Hit { payload, .. } if payload.len() == blocks.schema().layer_block_bytes() => {
                    Ok(Payload::new(payload))
                }
                _ => Err(Some(format!(
                    "block {at} of layer {layer} could not be read: ask again"
                ))),
            })
            .collect()
    }

    /// Hands a record to the disk, waiting for room as long as it takes.
    fn write_record(&self, place: LayerBlockKey, record: Vec<u8>) -> Result<(), Option<String>> {
        let record = Bytes::from(record);
        let checksum = Checksum::of(&record);
        loop {
            match self.disk.offer(place, record.clone(), checksum) {
                Offer::Queued => {
                    self.counters.index_bytes_written.add(record.len() as u64);
                    return Ok(());
                }
                Offer::Present => return Ok(()),
                Offer::Full => {
                    if !self.indexes.builder.queue.pause(QUEUE_FULL) {
                        return Err(None);
                    }
                }
                Offer::Degraded => return Err(Some("the disk takes nothing at the moment".to_owned())),
                Offer::TooLarge => {
                    let bytes = record.len();
                    return Err(Some(format!(
                        "a head's index has {bytes} bytes, more than a record may have: build it over a shorter context"
                    )));
                }
            }
        }
    }
}
