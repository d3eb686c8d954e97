//! Block-Sparse lists from a prompt itself, on the device: means, their products, the best.

use std::ops::Range;

use crate::{
    Buffer, Dtype, Family, Gpu, GpuError,
    plan::TILE,
    planner::{Call, Heads, Lists, Parts, grow},
    scores::{TopKSet, launch_top_k},
    view::RawView,
};

/// Products that are kept at a time; a prompt with more takes several launches.
const SCORES_MAX: usize = 64 << 20;
/// Row blocks and key blocks that one CTA multiplies.
const SIDE: usize = 64;
/// Key blocks that a row block itself lies in, at most.
const OWN_MAX: usize = 3;

/// How many blocks of [`TILE`] keys each row block of [`ROWS`](crate::plan::ROWS) queries keeps: those whose mean key has the largest product
/// with the mean query (MInference, arXiv 2407.02490, algorithm 3, at the kernel's own height). Those that the row block lies in
/// are always among them, and the first one comes on top where it is not, as in `kvasir_sparse`'s own planner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSparse {
    /// Key blocks of a row block.
    pub blocks: usize,
}

impl BlockSparse {
    /// Keeps `blocks`, at least the up to three that a row block lies in.
    pub fn new(blocks: usize) -> Self {
        Self {
            blocks: blocks.max(OWN_MAX),
        }
    }

    pub(crate) fn checked(self, head: usize) -> Result<Self, GpuError> {
        if !(OWN_MAX..=1 << 24).contains(&self.blocks) {
            return Err(GpuError::shape("planner", format!("head {head}: {self:?}")));
        }
        Ok(self)
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BlocksParams {
    view: RawView,
    q: u64,
    plans: u64,
    heads: u64,
    queries: u64,
    keys: u64,
    scores: u64,
    lengths: u64,
    lists: u64,
    numbers: u64,
    parts: Parts,
    q_heads: u32,
    heads_per_kv: u32,
    row_blocks: u32,
    key_blocks: u32,
    call_blocks: u32,
    first_head: u32,
    first_block: u32,
    blocks: u32,
    first_number: u32,
    room: u32,
    as_they_are: u32,
}

/// Means of row blocks of queries and of blocks of keys, and their products.
#[derive(Debug)]
pub(crate) struct Means {
    queries: Buffer<u16>,
    keys: Buffer<u16>,
}

impl Means {
    pub(crate) fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        Ok(Self {
            queries: gpu.zeros(0)?,
            keys: gpu.zeros(0)?,
        })
    }

    /// Address of the means of keys, `[kv_heads, key_blocks, head_dim]`.
    pub(crate) fn keys(&self) -> u64 {
        self.keys.pointer
    }

    /// Takes the means that the heads in `numbers` need; the result is what a launch of products begins from. `lengths` has room
    /// for two numbers of each head and row block, or is 0.
    pub(crate) fn take(
        &mut self,
        call: &Call<'_>,
        numbers: &Buffer<u32>,
        heads: usize,
        lengths: u64,
    ) -> Result<BlocksParams, GpuError> {
        let (gpu, shape) = (call.gpu, call.shape);
        let (row_blocks, key_blocks) = (call.sparse_blocks(), call.tokens().div_ceil(TILE));
        grow(gpu, &mut self.queries, heads * row_blocks * shape.head_dim)?;
        grow(gpu, &mut self.keys, shape.kv_heads * key_blocks * shape.head_dim)?;
        let params = BlocksParams {
            view: call.view,
            q: call.q,
            plans: call.plans,
            heads: numbers.pointer,
            queries: self.queries.pointer,
            keys: self.keys.pointer,
            scores: 0,
            lengths,
            lists: 0,
            numbers: 0,
            parts: call.parts,
            q_heads: call.q_heads as u32,
            heads_per_kv: call.heads_per_kv(),
            row_blocks: row_blocks as u32,
            key_blocks: key_blocks as u32,
            call_blocks: call.row_blocks as u32,
            first_head: 0,
            first_block: 0,
            blocks: 0,
            first_number: 0,
            room: 0,
            as_they_are: 0,
        };
        let [queries, keys] = match (shape.dtype, shape.head_dim) {
            (Dtype::Bf16, 64) => ["mean_queries_bf16_64", "mean_keys_bf16_64"],
            (Dtype::Bf16, _) => ["mean_queries_bf16_128", "mean_keys_bf16_128"],
            (_, 64) => ["mean_queries_f16_64", "mean_keys_f16_64"],
            (_, _) => ["mean_queries_f16_128", "mean_keys_f16_128"],
        };
        // SAFETY: `BlocksParams` is blocks.cu's; view and queries were checked by the planner, and the buffers have room for
        // these counts.
        unsafe {
            gpu.launch(
                Family::Blocks,
                queries,
                (row_blocks as u32, heads as u32, 1),
                128,
                &params,
            )?;
            let grid = (key_blocks as u32, shape.kv_heads as u32, 1);
            gpu.launch(Family::Blocks, keys, grid, 128, &params)?;
        }
        Ok(params)
    }
}

/// Products of means of some heads and row blocks, into `scores`, `[heads, row blocks, key_blocks]`; `as_they_are` also where a row
/// block lies.
pub(crate) fn products(
    call: &Call<'_>,
    params: BlocksParams,
    heads: Range<usize>,
    blocks: Range<usize>,
    scores: &Buffer<f32>,
    as_they_are: bool,
) -> Result<(), GpuError> {
    let params = BlocksParams {
        scores: scores.pointer,
        first_head: heads.start as u32,
        first_block: blocks.start as u32,
        blocks: blocks.len() as u32,
        as_they_are: as_they_are.into(),
        ..params
    };
    let kernel = match (call.shape.dtype, call.shape.head_dim) {
        (Dtype::Bf16, 64) => "block_scores_bf16_64",
        (Dtype::Bf16, _) => "block_scores_bf16_128",
        (_, 64) => "block_scores_f16_64",
        (_, _) => "block_scores_f16_128",
    };
    let grid = (
        (params.key_blocks as usize).div_ceil(SIDE) as u32,
        blocks.len().div_ceil(SIDE) as u32,
        heads.len() as u32,
    );
    // SAFETY: `BlocksParams` is blocks.cu's; the means are there, and the callers' products fit `scores`.
    unsafe { call.gpu.launch(Family::Blocks, kernel, grid, 128, &params) }
}

/// Buffers of means and products.
#[derive(Debug)]
pub(crate) struct Blocks {
    means: Means,
    scores: Buffer<f32>,
    lengths: Buffer<u32>,
}

impl Blocks {
    pub(crate) fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        Ok(Self {
            means: Means::new(gpu)?,
            scores: gpu.zeros(0)?,
            lengths: gpu.zeros(0)?,
        })
    }

    /// Numbers that the lists of a call need.
    pub(crate) fn numbers(&self, call: &Call<'_>, heads: &Heads<BlockSparse>) -> usize {
        let blocks = call.sparse_blocks();
        room(call, heads).saturating_mul(blocks).saturating_mul(heads.count)
    }

    pub(crate) fn build(&mut self, call: &Call<'_>, heads: &Heads<BlockSparse>, lists: Lists) -> Result<(), GpuError> {
        if heads.count == 0 {
            return Ok(());
        }
        let gpu = call.gpu;
        let (row_blocks, key_blocks) = (call.sparse_blocks(), call.tokens().div_ceil(TILE));
        let room = room(call, heads);
        // Heads of a launch; row blocks of a launch, all of them unless it is of one head.
        let heads_at_once = (SCORES_MAX / (row_blocks * key_blocks)).clamp(1, heads.count);
        let blocks_at_once = if heads_at_once > 1 {
            row_blocks
        } else {
            (SCORES_MAX / key_blocks / SIDE * SIDE).max(SIDE).min(row_blocks)
        };
        grow(gpu, &mut self.scores, heads_at_once * blocks_at_once * key_blocks)?;
        grow(gpu, &mut self.lengths, heads.count * row_blocks * 2)?;
        let params = BlocksParams {
            lists: lists.lists,
            numbers: lists.numbers,
            first_number: lists.first_number,
            room: room as u32,
            ..self
                .means
                .take(call, &heads.numbers, heads.count, self.lengths.pointer)?
        };
        for first_head in (0..heads.count).step_by(heads_at_once) {
            let some_heads = heads_at_once.min(heads.count - first_head);
            for first_block in (0..row_blocks).step_by(blocks_at_once) {
                let blocks = blocks_at_once.min(row_blocks - first_block);
                products(
                    call,
                    params,
                    first_head..first_head + some_heads,
                    first_block..first_block + blocks,
                    &self.scores,
                    false,
                )?;
                let row = first_head * row_blocks + first_block;
                let set = TopKSet {
                    scores: self.scores.pointer,
                    out: lists.numbers + 4 * (lists.first_number as usize + row * room + 1) as u64,
                    lengths: self.lengths.pointer + 8 * row as u64,
                    n: key_blocks as u32,
                    k: room as u32 - 1,
                    score_stride: key_blocks as u32,
                    out_stride: room as u32,
                };
                // The rows of a launch follow each other in the numbers too: it is of whole heads, or of one.
                let rows = some_heads * blocks;
                launch_top_k(gpu, [set, TopKSet::default()], rows, rows)?;
            }
        }
        let by_head = (row_blocks as u32, heads.count as u32, 1);
        // SAFETY: `BlocksParams` is blocks.cu's; the numbers have room for these lists.
        unsafe { gpu.launch(Family::Blocks, "blocks_build", by_head, 128, &params) }
    }
}

/// Numbers of a row block's list: a free place, and the key blocks that it may choose.
fn room(call: &Call<'_>, heads: &Heads<BlockSparse>) -> usize {
    1 + heads.most.blocks.min(call.tokens().div_ceil(TILE))
}
