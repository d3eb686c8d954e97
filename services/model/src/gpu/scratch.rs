//! Buffers of a step, reused, and the recorded steps over them.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use kvasir_cuda::{Buffer, DecodeRows, Gpu, GpuError, Graph, KvShape, PinnedBuffer, SampleRows, StepLimits, StepRows};

use crate::ModelShape;

/// Sampled rows that one attention launch takes; more take several.
pub(super) const SAMPLED_ROWS: usize = 64;

/// Sizes that buffers have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) rows: usize,
    pub(super) sampled: usize,
    /// Sampled rows of a step that tokens are drawn from.
    pub(super) drawn: usize,
    pub(super) tables: usize,
    /// Pages of the pool.
    pub(super) pages: usize,
}

/// Buffers of a step: `[rows, ..]` each, logits `[sampled, vocab]`.
pub(super) struct Scratch {
    pub(super) room: Room,
    pub(super) step: StepRows,
    /// The residual stream.
    pub(super) x: Buffer<f32>,
    pub(super) normed: Buffer<u16>,
    pub(super) qkv: Buffer<u16>,
    pub(super) q: Buffer<u16>,
    pub(super) attended: Buffer<u16>,
    pub(super) lse: Buffer<f32>,
    pub(super) gate_up: Buffer<u16>,
    pub(super) inner: Buffer<u16>,
    pub(super) logits: Buffer<f32>,
    /// Made when logits are first asked for: of tokens that are drawn nothing else leaves the device.
    pub(super) logits_on_host: Option<PinnedBuffer>,
    pub(super) draws: SampleRows,
    pub(super) decode: DecodeRows,
    /// Steps of sampled rows alone, by number of rows and of those that tokens are drawn from, over the pages named here.
    pub(super) graphs: HashMap<(usize, usize), Graph>,
    /// Such numbers whose kernels have been launched, and may be recorded.
    pub(super) launched: HashSet<(usize, usize)>,
    pub(super) recorded_over: Option<Arc<()>>,
}

impl Scratch {
    pub(super) fn new(
        gpu: &Gpu,
        shape: &ModelShape,
        kv: KvShape,
        page_tokens: usize,
        room: Room,
    ) -> Result<Self, GpuError> {
        let limits = StepLimits {
            vocab: shape.vocab,
            positions: shape.context_tokens_max,
            pages: room.pages,
            page_tokens,
        };
        let (rows, heads) = (room.rows, shape.q_heads * shape.head_dim);
        let table = shape.context_tokens_max.div_ceil(page_tokens);
        Ok(Self {
            room,
            step: StepRows::new(gpu, limits, rows, room.tables, table)?,
            x: gpu.zeros(rows * shape.hidden)?,
            normed: gpu.zeros(rows * shape.hidden)?,
            qkv: gpu.zeros(rows * (heads + 2 * shape.kv_heads * shape.head_dim))?,
            q: gpu.zeros(rows * heads)?,
            attended: gpu.zeros(rows * heads)?,
            lse: gpu.zeros(rows * shape.q_heads)?,
            gate_up: gpu.zeros(rows * 2 * shape.feed_forward)?,
            inner: gpu.zeros(rows * shape.feed_forward)?,
            logits: gpu.zeros(room.sampled * shape.vocab)?,
            logits_on_host: None,
            draws: SampleRows::new(gpu, shape.vocab, room.drawn)?,
            decode: DecodeRows::new(gpu, kv, shape.q_heads, SAMPLED_ROWS)?,
            graphs: HashMap::new(),
            launched: HashSet::new(),
            recorded_over: None,
        })
    }
}
