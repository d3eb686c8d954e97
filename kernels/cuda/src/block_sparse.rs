//! A Block-Sparse list from the prompt itself, on the device: means, their products, the best.

use crate::{
    Buffer, DeviceTiles, Dtype, Family, Gpu, GpuError, KvShape, KvView, Query,
    plan::{ROWS, TILE},
    scores::{TopKSet, launch_top_k},
    view::RawView,
};

/// Products that are kept at a time; a prompt with more takes several launches.
const SCORES_MAX: usize = 64 << 20;
/// Row blocks and key blocks that one CTA multiplies.
const SIDE: usize = 64;
/// Key blocks that a row block itself lies in, at most.
const OWN_MAX: usize = 3;

/// How many blocks of [`TILE`] keys each row block of [`ROWS`] queries keeps: those whose mean key has the largest product
/// with the mean query (MInference, arXiv 2407.02490, algorithm 3, at the kernel's own height). Those that the row block lies in
/// are always among them, and the first one comes on top where it is not, as in `kvasir_sparse`'s own planner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSparse {
    /// Key blocks of a row block.
    pub blocks: usize,
}

/// A Block-Sparse list and what it is built from; made once per prompt, used for every layer.
#[derive(Debug)]
pub struct BlockSparseTiles {
    shape: KvShape,
    q_heads: usize,
    rows: usize,
    tokens: usize,
    chosen: usize,
    /// Heads of a launch; row blocks of a launch, all of them unless it is of one head.
    heads: usize,
    blocks: usize,
    queries: Buffer<u16>,
    keys: Buffer<u16>,
    scores: Buffer<f32>,
    tiles: DeviceTiles,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct BlocksParams {
    view: RawView,
    q: u64,
    queries: u64,
    keys: u64,
    scores: u64,
    best: u64,
    heads: u64,
    lists: u64,
    rows: u32,
    offset: u32,
    q_heads: u32,
    heads_per_kv: u32,
    row_blocks: u32,
    key_blocks: u32,
    first_head: u32,
    first_block: u32,
    blocks: u32,
    chosen: u32,
}

impl BlockSparseTiles {
    /// Buffers for the last `rows` of `tokens` positions, of layers with `q_heads` query heads over keys of `shape`.
    ///
    /// # Errors
    /// If the shape has no kernel, fewer blocks are asked for than a row block may lie in, or the device has no room.
    pub fn new(
        gpu: &Gpu,
        plan: BlockSparse,
        shape: KvShape,
        q_heads: usize,
        rows: usize,
        tokens: usize,
    ) -> Result<Self, GpuError> {
        shape.check()?;
        let refuse = || {
            let why = format!("{plan:?}, {q_heads} heads of {shape:?}, {rows} rows of {tokens} tokens");
            GpuError::shape("block-sparse", why)
        };
        let fits = q_heads.is_multiple_of(shape.kv_heads)
            && (1..=65_535).contains(&q_heads)
            && shape.dtype != Dtype::E4m3
            && (1..=1 << 24).contains(&tokens)
            && (1..=tokens).contains(&rows)
            && plan.blocks >= OWN_MAX;
        if !fits {
            return Err(refuse());
        }
        let (row_blocks, key_blocks) = (rows.div_ceil(ROWS), tokens.div_ceil(TILE));
        let chosen = plan.blocks.min(key_blocks);
        let numbers = q_heads * row_blocks * (1 + chosen).max(7);
        if u32::try_from(numbers).is_err() {
            return Err(refuse());
        }
        let heads = (SCORES_MAX / (row_blocks * key_blocks)).clamp(1, q_heads);
        let blocks = if heads > 1 {
            row_blocks
        } else {
            (SCORES_MAX / key_blocks / SIDE * SIDE).max(SIDE).min(row_blocks)
        };
        Ok(Self {
            queries: gpu.zeros(q_heads * row_blocks * shape.head_dim)?,
            keys: gpu.zeros(shape.kv_heads * key_blocks * shape.head_dim)?,
            scores: gpu.zeros(heads * blocks * key_blocks)?,
            tiles: DeviceTiles {
                heads: gpu.zeros(2 * q_heads)?,
                lists: gpu.zeros(7 * q_heads * row_blocks)?,
                numbers: gpu.zeros(q_heads * row_blocks * (1 + chosen))?,
                q_heads,
                blocks: row_blocks,
            },
            shape,
            q_heads,
            rows,
            tokens,
            chosen,
            heads,
            blocks,
        })
    }

    /// Chooses the blocks for queries `q [rows, q_heads, head_dim]`, the last positions of `view`, and builds the list; nothing
    /// leaves the device. Means are rounded to the keys' type, their products summed in f32: blocks whose products differ by
    /// less than 1e-3 of the product of the norms may stand for each other.
    ///
    /// # Errors
    /// If shapes or lengths do not fit; nothing is launched then.
    pub fn build(&mut self, gpu: &Gpu, q: Query<'_>, view: &KvView<'_>) -> Result<&DeviceTiles, GpuError> {
        let shape = self.shape;
        let fits = view.shape == shape
            && view.tokens() == self.tokens
            && !view.raw.has_lengths()
            && q.dtype == shape.dtype.code()
            && q.elements == self.rows * self.q_heads * shape.head_dim;
        if !fits {
            let why = format!(
                "{} query elements over {} tokens of {:?}, made for {} rows of {} heads over {} of {shape:?}",
                q.elements,
                view.tokens(),
                view.shape,
                self.rows,
                self.q_heads,
                self.tokens
            );
            return Err(GpuError::shape("block-sparse", why));
        }
        let (row_blocks, key_blocks) = (self.rows.div_ceil(ROWS), self.tokens.div_ceil(TILE));
        let params = BlocksParams {
            view: view.raw,
            q: q.pointer,
            queries: self.queries.pointer,
            keys: self.keys.pointer,
            scores: self.scores.pointer,
            best: self.tiles.numbers.pointer,
            heads: self.tiles.heads.pointer,
            lists: self.tiles.lists.pointer,
            rows: self.rows as u32,
            offset: (self.tokens - self.rows) as u32,
            q_heads: self.q_heads as u32,
            heads_per_kv: (self.q_heads / shape.kv_heads) as u32,
            row_blocks: row_blocks as u32,
            key_blocks: key_blocks as u32,
            first_head: 0,
            first_block: 0,
            blocks: 0,
            chosen: self.chosen as u32,
        };
        let [queries, keys, scores] = match (shape.dtype, shape.head_dim) {
            (Dtype::Bf16, 64) => ["mean_queries_bf16_64", "mean_keys_bf16_64", "block_scores_bf16_64"],
            (Dtype::Bf16, _) => ["mean_queries_bf16_128", "mean_keys_bf16_128", "block_scores_bf16_128"],
            (_, 64) => ["mean_queries_f16_64", "mean_keys_f16_64", "block_scores_f16_64"],
            (_, _) => ["mean_queries_f16_128", "mean_keys_f16_128", "block_scores_f16_128"],
        };
        let by_head = (row_blocks as u32, self.q_heads as u32, 1);
        // SAFETY: `BlocksParams` is blocks.cu's; the view was checked when it was made, the queries above, and `new` made the
        // buffers for these counts.
        unsafe {
            gpu.launch(Family::Blocks, queries, by_head, 128, &params)?;
            let grid = (key_blocks as u32, shape.kv_heads as u32, 1);
            gpu.launch(Family::Blocks, keys, grid, 128, &params)?;
        }
        for first_head in (0..self.q_heads).step_by(self.heads) {
            let heads = self.heads.min(self.q_heads - first_head);
            for first_block in (0..row_blocks).step_by(self.blocks) {
                let blocks = self.blocks.min(row_blocks - first_block);
                let some = BlocksParams {
                    first_head: first_head as u32,
                    first_block: first_block as u32,
                    blocks: blocks as u32,
                    ..params
                };
                let grid = (
                    key_blocks.div_ceil(SIDE) as u32,
                    blocks.div_ceil(SIDE) as u32,
                    heads as u32,
                );
                // SAFETY: as above; this launch's products fit `scores`.
                unsafe { gpu.launch(Family::Blocks, scores, grid, 128, &some)? };
                let set = TopKSet {
                    scores: self.scores.pointer,
                    out: self.tiles.numbers.pointer
                        + 4 * (1 + (first_head * row_blocks + first_block) * (1 + self.chosen)) as u64,
                    n: key_blocks as u32,
                    k: self.chosen as u32,
                    stride: 1 + self.chosen as u32,
                };
                // The rows of a launch follow each other in the numbers too: it is of whole heads, or of one.
                launch_top_k(gpu, [set, TopKSet::default()], heads * blocks, heads * blocks)?;
            }
        }
        // SAFETY: as above.
        unsafe { gpu.launch(Family::Blocks, "blocks_build", by_head, 128, &params)? };
        Ok(&self.tiles)
    }

    /// The first key of each block that was chosen last, in rising order, a list for each row block of each query head; waits for
    /// the device.
    ///
    /// # Errors
    /// If the device failed.
    pub fn chosen(&self) -> Result<Vec<Vec<u32>>, GpuError> {
        let (numbers, lists) = (self.tiles.numbers.download()?, self.tiles.lists.download()?);
        let tiles = |list: &[u32; 7]| numbers[list[0] as usize..][..list[1] as usize].to_vec();
        Ok(lists.as_chunks::<7>().0.iter().map(tiles).collect())
    }
}
