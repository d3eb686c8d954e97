//! XAttention's lists from a prompt itself, on the device: products of long rows, the fewest blocks with a share of the mass.

use crate::{
    Buffer, Dtype, Family, Gpu, GpuError,
    plan::{ROWS, TILE},
    planner::{Call, Heads, Lists, Parts, grow},
    tensor_map::{Rows, TensorMap},
    view::RawView,
};

/// The fewest key blocks of [`TILE`] that hold a share of the mass, told by sums of scores along antidiagonals (XAttention, arXiv
/// 2503.16428), as `kvasir_sparse`'s planner has it; those that a row block lies in and the first one are always among them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct XAttention {
    /// Distance of antidiagonals: 8 or 16.
    pub stride: usize,
    /// Share of the mass, in (0, 1].
    pub threshold: f32,
}

/// Strides that there are kernels for, as published.
pub(crate) const STRIDES: [usize; 2] = [8, 16];
/// Logarithms that are kept at a time; a prompt with more takes several launches.
const SCORES_MAX: usize = 64 << 20;
/// Masses of a row block lie in shared memory, which is full then.
pub(crate) const TOKENS_MAX: usize = 1 << 21;

impl XAttention {
    pub(crate) fn checked(self, head: usize, tokens_max: usize) -> Result<Self, GpuError> {
        let share = self.threshold > 0.0 && self.threshold <= 1.0;
        if !STRIDES.contains(&self.stride) || !share || tokens_max > TOKENS_MAX {
            let why =
                format!("head {head}: {self:?} over {tokens_max} tokens; strides are 8 and 16, tokens up to 2^21");
            return Err(GpuError::shape("planner", why));
        }
        Ok(self)
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct XAttentionParams {
    view: RawView,
    q: u64,
    plans: u64,
    heads: u64,
    gathered: u64,
    scores: u64,
    lists: u64,
    numbers: u64,
    parts: Parts,
    scale: f32,
    q_heads: u32,
    heads_per_kv: u32,
    key_blocks: u32,
    call_blocks: u32,
    first_head: u32,
    heads_count: u32,
    first_block: u32,
    blocks: u32,
    first_number: u32,
}

#[repr(C)]
struct WideParams {
    q: TensorMap,
    k: TensorMap,
    base: XAttentionParams,
}

/// Buffers of logarithms, and of keys that lay in pages.
#[derive(Debug)]
pub(crate) struct Antidiagonals {
    scores: Buffer<f32>,
    gathered: Buffer<u16>,
}

impl Antidiagonals {
    pub(crate) fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        Ok(Self {
            scores: gpu.zeros(0)?,
            gathered: gpu.zeros(0)?,
        })
    }

    /// Makes the lists of heads whose stride is `stride`.
    pub(crate) fn build(
        &mut self,
        call: &Call<'_>,
        stride: usize,
        heads: &Heads<()>,
        lists: Lists,
    ) -> Result<(), GpuError> {
        if heads.count == 0 {
            return Ok(());
        }
        let gpu = call.gpu;
        let (row_blocks, key_blocks) = (call.sparse_blocks(), call.tokens().div_ceil(TILE));
        let by_block = ROWS / stride * key_blocks;
        let heads_at_once = (SCORES_MAX / (row_blocks * by_block)).clamp(1, heads.count);
        let blocks_at_once = if heads_at_once > 1 {
            row_blocks
        } else {
            // Whole tiles of 128 long queries.
            (SCORES_MAX / by_block / stride * stride).max(stride).min(row_blocks)
        };
        grow(gpu, &mut self.scores, heads_at_once * blocks_at_once * by_block)?;
        let base = XAttentionParams {
            view: call.view,
            q: call.q,
            plans: call.plans,
            heads: heads.numbers.pointer,
            gathered: 0,
            scores: self.scores.pointer,
            lists: lists.lists,
            numbers: lists.numbers,
            parts: call.parts,
            scale: call.scale * std::f32::consts::LOG2_E / stride as f32,
            q_heads: call.q_heads as u32,
            heads_per_kv: call.heads_per_kv(),
            key_blocks: key_blocks as u32,
            call_blocks: call.row_blocks as u32,
            first_head: 0,
            heads_count: 0,
            first_block: 0,
            blocks: 0,
            first_number: lists.first_number,
        };
        let maps = self.maps(call, stride, base)?;
        let build = if stride == 8 {
            "x_attention_build_8"
        } else {
            "x_attention_build_16"
        };
        for first_head in (0..heads.count).step_by(heads_at_once) {
            let some_heads = heads_at_once.min(heads.count - first_head);
            for first_block in (0..row_blocks).step_by(blocks_at_once) {
                let blocks = blocks_at_once.min(row_blocks - first_block);
                let params = XAttentionParams {
                    first_head: first_head as u32,
                    heads_count: some_heads as u32,
                    first_block: first_block as u32,
                    blocks: blocks as u32,
                    ..base
                };
                // Fewer rows than a stride make no long query: all of their lists are full.
                if call.parts.rows as usize >= stride {
                    scores(call, stride, maps.as_ref(), params)?;
                }
                let grid = (blocks as u32, some_heads as u32, 1);
                let shared = (4 * (key_blocks + key_blocks.div_ceil(32))) as u32;
                // SAFETY: `XAttentionParams` is x_attention.cu's; the logarithms of these row blocks are there, and the numbers have
                // room for their lists.
                unsafe { gpu.launch_with(Family::XAttention, build, grid, 256, shared, &params)? };
            }
        }
        Ok(())
    }

    /// What Hopper's copy engine is told of long queries and long keys; nothing elsewhere.
    fn maps(
        &mut self,
        call: &Call<'_>,
        stride: usize,
        base: XAttentionParams,
    ) -> Result<Option<[TensorMap; 2]>, GpuError> {
        let (gpu, shape) = (call.gpu, call.shape);
        if gpu.capability() != (9, 0) || (call.parts.rows as usize) < stride {
            return Ok(None);
        }
        let row = 2 * (call.q_heads * shape.head_dim) as u64;
        let queries = Rows {
            pointer: call.q,
            row_elements: shape.head_dim,
            rows: call.parts.rows as usize / stride,
            row_stride: stride as u64 * row,
            heads: stride,
            head_stride: row,
            pages: call.q_heads,
            page_stride: 2 * shape.head_dim as u64,
        };
        let keys = match call.view.long_keys(shape, stride) {
            Some(keys) => keys,
            None => self.gather(call, stride, base)?,
        };
        Ok(Some([queries.map()?, keys.map()?]))
    }

    /// Copies keys out of their pages.
    fn gather(&mut self, call: &Call<'_>, stride: usize, base: XAttentionParams) -> Result<Rows, GpuError> {
        let (gpu, shape, tokens) = (call.gpu, call.shape, call.tokens());
        grow(gpu, &mut self.gathered, shape.kv_heads * tokens * shape.head_dim)?;
        let params = XAttentionParams {
            gathered: self.gathered.pointer,
            ..base
        };
        let kernel = if shape.head_dim == 64 {
            "gather_keys_64"
        } else {
            "gather_keys_128"
        };
        let grid = (tokens.div_ceil(16) as u32, shape.kv_heads as u32, 1);
        // SAFETY: `XAttentionParams` is x_attention.cu's; the planner checked the view, and there is room for all of its keys.
        unsafe { gpu.launch(Family::XAttention, kernel, grid, 128, &params)? };
        let row = 2 * shape.head_dim as u64;
        Ok(Rows {
            pointer: self.gathered.pointer,
            row_elements: shape.head_dim,
            rows: tokens / stride,
            row_stride: stride as u64 * row,
            heads: stride,
            head_stride: row,
            pages: shape.kv_heads,
            page_stride: tokens as u64 * row,
        })
    }
}

fn scores(
    call: &Call<'_>,
    stride: usize,
    maps: Option<&[TensorMap; 2]>,
    params: XAttentionParams,
) -> Result<(), GpuError> {
    let (gpu, shape) = (call.gpu, call.shape);
    let long_keys = params.key_blocks as usize * (TILE / stride);
    let across = (params.blocks as usize * (ROWS / stride)).div_ceil(128) * params.heads_count as usize;
    let tiles = |wide: usize| {
        let tiles = across.checked_mul(long_keys.div_ceil(wide));
        let tiles = tiles
            .and_then(|tiles| i32::try_from(tiles).ok())
            .map(i32::cast_unsigned);
        tiles.ok_or_else(|| GpuError::shape("planner", format!("{across} times {long_keys} long rows")))
    };
    if let Some(&[q, k]) = maps {
        let kernel = match (shape.dtype, shape.head_dim, stride) {
            (Dtype::Bf16, 64, 8) => "long_scores_wide_bf16_64_8",
            (Dtype::Bf16, 64, _) => "long_scores_wide_bf16_64_16",
            (Dtype::Bf16, _, 8) => "long_scores_wide_bf16_128_8",
            (Dtype::Bf16, _, _) => "long_scores_wide_bf16_128_16",
            (_, 64, 8) => "long_scores_wide_f16_64_8",
            (_, 64, _) => "long_scores_wide_f16_64_16",
            (_, _, 8) => "long_scores_wide_f16_128_8",
            (_, _, _) => "long_scores_wide_f16_128_16",
        };
        let (ctas, shared) = (
            tiles(256)?.min(gpu.multiprocessors() as u32),
            4 * (128 + 256) * 128 + 1024,
        );
        let params = WideParams { q, k, base: params };
        // SAFETY: `WideParams` is x_attention.cu's; the maps describe the queries and keys that the planner checked, and the logarithms
        // of these heads and row blocks fit `scores`.
        return unsafe { gpu.launch_with(Family::XAttention, kernel, (ctas, 1, 1), 384, shared, &params) };
    }
    let kernel = match (shape.dtype, shape.head_dim, stride) {
        (Dtype::Bf16, 64, 8) => "long_scores_bf16_64_8",
        (Dtype::Bf16, 64, _) => "long_scores_bf16_64_16",
        (Dtype::Bf16, _, 8) => "long_scores_bf16_128_8",
        (Dtype::Bf16, _, _) => "long_scores_bf16_128_16",
        (_, 64, 8) => "long_scores_f16_64_8",
        (_, 64, _) => "long_scores_f16_64_16",
        (_, _, 8) => "long_scores_f16_128_8",
        (_, _, _) => "long_scores_f16_128_16",
    };
    let grid = (tiles(128)?, 1, 1);
    // SAFETY: as above.
    unsafe { gpu.launch_with(Family::XAttention, kernel, grid, 256, 3 * 2 * 128 * 128 + 128, &params) }
}
