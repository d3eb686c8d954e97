//! Query samples: prefill queries that tell how a context is looked at, which is what `roar` is drawn by.
//!
//! They belong to the block whose tokens asked them, so every context that shares the block shares them. They are in memory only,
//! under a limit; the blocks whose samples came first lose theirs first. An index that was built does not need them any more.

use std::collections::{BTreeMap, HashMap, VecDeque};

use half::f16;
use kvasir_block::{BlockKey, KvSchema};
use parking_lot::Mutex;

use crate::{CacheError, ErrorKind};

/// Bytes of bookkeeping per sample, about.
const SAMPLE_BYTES: u64 = 48;

/// Rotated queries of all heads at some tokens of one block, in one layer.
#[derive(Clone, Debug)]
pub struct QuerySamples<'a> {
    /// Layer index from 0.
    pub layer: u16,
    /// Query heads; a multiple of the schema's KV heads.
    pub q_heads: usize,
    /// Tokens of the block that they are of, counted from its first.
    pub tokens: &'a [u16],
    /// `[tokens, q_heads, head_dim]`, finite.
    pub q: &'a [f16],
}

#[derive(Debug)]
pub(crate) struct Samples {
    bytes_max: u64,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    blocks: HashMap<BlockKey, OfBlock>,
    /// In the order of their first samples.
    order: VecDeque<BlockKey>,
    bytes: u64,
}

#[derive(Debug)]
struct OfBlock {
    q_heads: usize,
    /// By layer and token, `[q_heads, head_dim]` each.
    rows: BTreeMap<(u16, u16), Box<[f16]>>,
    bytes: u64,
}

impl Samples {
    pub(super) fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            held: Mutex::default(),
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.held.lock().bytes
    }

    /// Takes the samples of one layer of a block; answers how many were new. What is there already stays.
    pub(super) fn put(
        &self,
        block: BlockKey,
        schema: &KvSchema,
        samples: &QuerySamples<'_>,
    ) -> Result<usize, CacheError> {
        check(schema, samples)?;
        let width = samples.q_heads * usize::from(schema.head_dim);
        let row_bytes = (width * size_of::<f16>()) as u64 + SAMPLE_BYTES;
        let mut guard = self.held.lock();
        let held = &mut *guard;
        if let Some(of_block) = held.blocks.get(&block)
            && of_block.q_heads != samples.q_heads
        {
            let problem = format!("{}, but the block has samples of {}", samples.q_heads, of_block.q_heads);
            return Err(invalid("q_heads", problem));
        }
        let of_block = held.blocks.entry(block).or_insert_with(|| {
            held.order.push_back(block);
            OfBlock {
                q_heads: samples.q_heads,
                rows: BTreeMap::new(),
                bytes: 0,
            }
        });
        let mut new = 0;
        for (token, row) in samples.tokens.iter().zip(samples.q.chunks_exact(width)) {
            of_block.rows.entry((samples.layer, *token)).or_insert_with(|| {
                new += 1;
                row.into()
            });
        }
        of_block.bytes += new as u64 * row_bytes;
        held.bytes += new as u64 * row_bytes;
        held.trim(self.bytes_max);
        Ok(new)
    }

    /// Samples of a layer over all blocks of a chain for the query heads of one KV head, `[samples, head_dim]`; every head's.
    pub(super) fn of_group(&self, chain: &[BlockKey], schema: &KvSchema, layer: u16, kv_head: usize) -> Vec<f32> {
        let (kv_heads, head_dim) = (usize::from(schema.kv_heads), usize::from(schema.head_dim));
        let held = self.held.lock();
        let mut out = Vec::new();
        for of_block in chain.iter().filter_map(|block| held.blocks.get(block)) {
            let group = of_block.q_heads / kv_heads * head_dim;
            for (_, row) in of_block.rows.range((layer, 0)..=(layer, u16::MAX)) {
                out.extend(row[kv_head * group..][..group].iter().map(|x| x.to_f32()));
            }
        }
        out
    }

    /// The first of `layers` that has no sample over a chain.
    pub(super) fn first_without(&self, chain: &[BlockKey], layers: u16) -> Option<u16> {
        let held = self.held.lock();
        let has = |layer: u16| {
            let mut blocks = chain.iter().filter_map(|block| held.blocks.get(block));
            blocks.any(|of_block| of_block.rows.range((layer, 0)..=(layer, u16::MAX)).next().is_some())
        };
        (0..layers).find(|&layer| !has(layer))
    }
}

impl Held {
    fn trim(&mut self, bytes_max: u64) {
        while self.bytes > bytes_max
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.blocks.remove(&oldest).map_or(0, |of_block| of_block.bytes);
        }
    }
}

fn check(schema: &KvSchema, samples: &QuerySamples<'_>) -> Result<(), CacheError> {
    if samples.layer >= schema.layers {
        let problem = format!(
            "{} does not exist: the schema has {} layers, from 0",
            samples.layer, schema.layers
        );
        return Err(invalid("layer", problem));
    }
    let kv_heads = usize::from(schema.kv_heads);
    if samples.q_heads == 0 || samples.q_heads > Q_HEADS_MAX || !samples.q_heads.is_multiple_of(kv_heads) {
        let problem = format!(
            "{} is not a multiple of the {kv_heads} KV heads up to {Q_HEADS_MAX}",
            samples.q_heads
        );
        return Err(invalid("q_heads", problem));
    }
    if let Some(token) = samples.tokens.iter().find(|token| **token >= schema.block_tokens) {
        let problem = format!("{token}: a block has {} tokens, from 0", schema.block_tokens);
        return Err(invalid("tokens", problem));
    }
    let expected = samples.tokens.len() * samples.q_heads * usize::from(schema.head_dim);
    if samples.q.len() != expected {
        let problem = format!(
            "{} elements, {expected} are wanted: {} tokens of {} query heads of {}",
            samples.q.len(),
            samples.tokens.len(),
            samples.q_heads,
            schema.head_dim
        );
        return Err(invalid("q", problem));
    }
    match samples.q.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(invalid(
            "q",
            format!("element {at} is not finite: the forward that made it went wrong"),
        )),
        None => Ok(()),
    }
}

/// As for a query.
const Q_HEADS_MAX: usize = 4096;

fn invalid(field: &str, problem: impl std::fmt::Display) -> CacheError {
    CacheError::new(ErrorKind::InvalidArgument, format!("{field}: {problem}"))
}
