//! Attention of prompts' queries over a list of tiles.

use std::ops::Range;

use crate::{
    Buffer, DeviceTiles, Dtype, Family, Gpu, GpuError, KvView, Plain, Query,
    plan::{ROWS, TILE},
    tensor_map::{Rows, TensorMap},
    view::RawView,
};

/// Which instructions multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// `mma.sync`, on every GPU from Ampere on.
    Mma,
    /// `wgmma`, on Hopper alone.
    Wgmma,
}

impl Products {
    /// The faster ones that `gpu` has.
    pub fn best(gpu: &Gpu) -> Self {
        match gpu.capability() {
            (9, 0) => Self::Wgmma,
            _ => Self::Mma,
        }
    }
}

/// A sequence of a batch: the queries of its last positions, whose keys and values, these rows' own included, are in a view.
#[derive(Clone, Debug)]
pub struct PrefillSequence<'a> {
    /// Which rows of the queries are its.
    pub rows: Range<usize>,
    /// Keys and values of all its positions.
    pub view: KvView<'a>,
}

/// Sequences that one launch takes.
pub const SEQUENCES: usize = 64;

/// Attention of the last positions of one sequence or of several.
#[derive(Clone, Copy, Debug)]
pub struct Prefill {
    /// Queries, of all sequences and between them.
    pub rows: usize,
    /// Query heads, a multiple of the KV heads.
    pub q_heads: usize,
    /// Of the scores; usually `1 / sqrt(head_dim)`. Positive.
    pub scale: f32,
    /// Which instructions multiply; [`Products::best`] unless there is a reason.
    pub products: Products,
}

/// The kernels' `Sequence`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawSequence {
    pages: u64,
    tokens: u32,
    rows: u32,
    offset: u32,
    first_row: u32,
    first_block: u32,
    first_list: u32,
}

#[repr(C)]
struct PrefillParams {
    view: RawView,
    q: u64,
    out: u64,
    out_lse: u64,
    heads: u64,
    lists: u64,
    numbers: u64,
    scale: f32,
    rows: u32,
    blocks: u32,
    q_heads: u32,
    heads_per_kv: u32,
    count: u32,
    sequences: [RawSequence; SEQUENCES],
}

#[repr(C)]
struct WideParams {
    q: TensorMap,
    k: TensorMap,
    v: TensorMap,
    base: PrefillParams,
    section: u32,
    tensors: u32,
}

/// Heads whose keys and values together are at most this many bytes are worked through side by side: they stay in the L2
/// cache, and the longest row blocks of all of them come first.
const SECTION_BYTES: usize = 24 << 20;

impl Prefill {
    /// Writes the output, `[rows, q_heads, head_dim]` in the type of queries, keys and values (bf16 or f16), and the base-2
    /// logs of the sums of weights, `[q_heads, rows]`, of one sequence. A row that sees nothing has zeros and `-inf`.
    ///
    /// Products are summed in f32, and weights are rounded to the keys' type before they meet the values: within 1e-2
    /// (bf16) or 2e-3 (f16) of f64 in the relative 2-norm; the logs within 1e-3.
    ///
    /// # Errors
    /// If shapes or lengths do not fit, or the GPU has not the instructions; nothing is launched then.
    pub fn attend<T: Plain>(
        &self,
        gpu: &Gpu,
        q: Query<'_>,
        view: &KvView<'_>,
        tiles: &DeviceTiles,
        out: &mut Buffer<T>,
        out_lse: &mut Buffer<f32>,
    ) -> Result<(), GpuError> {
        let width = self.q_heads.saturating_mul(view.shape.head_dim);
        if self.rows.checked_mul(width) != Some(out.len()) || out_lse.len() != self.rows * self.q_heads {
            let why = format!(
                "{} rows of {width} into room for {}, with {} logs",
                self.rows,
                out.len(),
                out_lse.len()
            );
            return Err(GpuError::shape("prefill", why));
        }
        let whole = [PrefillSequence {
            rows: 0..self.rows,
            view: *view,
        }];
        self.attend_batch(gpu, q, &whole, tiles, out, 0, out_lse)
    }

    /// The same for several sequences of any lengths, in one launch for up to [`SEQUENCES`] of them, into the rows of `out`,
    /// `[.., q_heads, head_dim]`, that begin at `to`; rows of no sequence stay as they are, and `out_lse` may have room to spare.
    /// A row has the same bits as alone. Lists by row block count those of the sequences one after another, as they are given.
    ///
    /// # Errors
    /// As there; if rows of sequences overlap; or if there are several and they are not all in pages of one pool.
    #[expect(
        clippy::too_many_arguments,
        reason = "a kernel's operands, each with a name of its own"
    )]
    pub fn attend_batch<T: Plain>(
        &self,
        gpu: &Gpu,
        q: Query<'_>,
        sequences: &[PrefillSequence<'_>],
        tiles: &DeviceTiles,
        out: &mut Buffer<T>,
        to: usize,
        out_lse: &mut Buffer<f32>,
    ) -> Result<(), GpuError> {
        let refuse = |why: String| Err(GpuError::shape("prefill", why));
        let Some(PrefillSequence { view: first, .. }) = sequences.first() else {
            return Ok(());
        };
        let shape = first.shape;
        if self.q_heads == 0 || !self.q_heads.is_multiple_of(shape.kv_heads) || self.q_heads > 65_535 {
            return refuse(format!("{} query heads over {} KV heads", self.q_heads, shape.kv_heads));
        }
        if shape.dtype == Dtype::E4m3 || q.dtype != shape.dtype.code() || size_of::<T>() != 2 {
            return refuse(format!(
                "queries, keys and output must be bf16 or f16 alike; keys are {:?}",
                shape.dtype
            ));
        }
        let width = self.q_heads * shape.head_dim;
        let elements = self.rows.checked_mul(width);
        let end = to
            .checked_add(self.rows)
            .and_then(|rows| rows.checked_mul(width))
            .filter(|&end| end <= out.len());
        if elements != Some(q.elements) || end.is_none() || out_lse.len() < self.rows * self.q_heads {
            return refuse(format!(
                "{} rows of {} heads of {}: {} query elements, room for {} from row {to} on and {} logs",
                self.rows,
                self.q_heads,
                shape.head_dim,
                q.elements,
                out.len(),
                out_lse.len()
            ));
        }
        let blocks = self.check_sequences(sequences)?;
        if tiles.q_heads != self.q_heads || tiles.blocks < blocks {
            return refuse(format!(
                "tiles of {} heads and {} row blocks",
                tiles.q_heads, tiles.blocks
            ));
        }
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            return refuse(format!("scale {}; it must be positive", self.scale));
        }
        if self.products == Products::Wgmma && gpu.capability() != (9, 0) {
            return refuse(format!("{} has no wgmma; use Products::Mma", gpu.name()));
        }
        let mut first_list = 0;
        for some in sequences.chunks(SEQUENCES) {
            let params = PrefillParams {
                view: first.raw,
                q: q.pointer,
                out: out.pointer + (2 * to * width) as u64,
                out_lse: out_lse.pointer,
                heads: tiles.heads.pointer,
                lists: tiles.lists.pointer,
                numbers: tiles.numbers.pointer,
                scale: self.scale * std::f32::consts::LOG2_E,
                rows: self.rows as u32,
                blocks: 0,
                q_heads: self.q_heads as u32,
                heads_per_kv: (self.q_heads / shape.kv_heads) as u32,
                count: 0,
                sequences: [RawSequence::default(); SEQUENCES],
            };
            self.launch(gpu, q, some, &mut first_list, params)?;
        }
        Ok(())
    }

    /// Row blocks of all sequences.
    fn check_sequences(&self, sequences: &[PrefillSequence<'_>]) -> Result<usize, GpuError> {
        let mut ranges: Vec<_> = sequences.iter().map(|sequence| sequence.rows.clone()).collect();
        ranges.sort_by_key(|rows| rows.start);
        let apart = ranges.windows(2).all(|pair| pair[0].end <= pair[1].start);
        let inside = ranges
            .iter()
            .all(|rows| rows.start <= rows.end && rows.end <= self.rows);
        let first = &sequences[0].view;
        for PrefillSequence { rows, view } in sequences {
            if rows.len() > view.tokens() || view.raw.has_lengths() {
                let why = format!("{rows:?} of {} tokens, whose number must be the host's", view.tokens());
                return Err(GpuError::shape("prefill", why));
            }
            let together = sequences.len() == 1 || (view.raw.pages() != 0 && view.shares_pool(first));
            if !(together && apart && inside) {
                let why = format!(
                    "{} sequences in {} rows: theirs must not overlap, and their keys and values be in pages of one pool",
                    sequences.len(),
                    self.rows
                );
                return Err(GpuError::shape("prefill", why));
            }
        }
        Ok(ranges.iter().map(|rows| rows.len().div_ceil(ROWS)).sum())
    }

    fn launch(
        &self,
        gpu: &Gpu,
        q: Query<'_>,
        sequences: &[PrefillSequence<'_>],
        first_list: &mut u32,
        mut params: PrefillParams,
    ) -> Result<(), GpuError> {
        let mut raw = Vec::with_capacity(sequences.len());
        for PrefillSequence { rows, view } in sequences.iter().filter(|sequence| !sequence.rows.is_empty()) {
            raw.push(RawSequence {
                pages: view.raw.pages(),
                tokens: view.raw.tokens,
                rows: rows.len() as u32,
                offset: (view.tokens() - rows.len()) as u32,
                first_row: rows.start as u32,
                first_block: 0,
                first_list: *first_list,
            });
            *first_list += rows.len().div_ceil(ROWS) as u32;
        }
        // The longest are worked through first, from the end.
        raw.sort_by_key(|sequence| sequence.tokens);
        for (to, sequence) in params.sequences.iter_mut().zip(&raw) {
            *to = RawSequence {
                first_block: params.blocks,
                ..*sequence
            };
            params.blocks += sequence.rows.div_ceil(ROWS as u32);
        }
        params.count = raw.len() as u32;
        let view = &sequences[0].view;
        let (shape, wide) = (view.shape, self.products == Products::Wgmma);
        let kernel = match (shape.dtype, shape.head_dim, wide) {
            (Dtype::Bf16, 64, false) => "prefill_bf16_64",
            (Dtype::Bf16, _, false) => "prefill_bf16_128",
            (_, 64, false) => "prefill_f16_64",
            (_, _, false) => "prefill_f16_128",
            (Dtype::Bf16, 64, true) => "prefill_wide_bf16_64",
            (Dtype::Bf16, _, true) => "prefill_wide_bf16_128",
            (_, 64, true) => "prefill_wide_f16_64",
            (_, _, true) => "prefill_wide_f16_128",
        };
        if params.count == 0 {
            return Ok(());
        }
        if wide {
            let pages = sequences.iter().map(|sequence| sequence.view.pages()).max();
            return self.launch_wide(gpu, kernel, params, q, view, pages.unwrap_or(1));
        }
        let shared = ((ROWS + 2 * 2 * TILE) * shape.head_dim * 2 + 1024) as u32;
        let grid = (params.blocks, self.q_heads as u32, 1);
        // SAFETY: `PrefillParams` is prefill.cu's; the views were checked when they were made, the lists come from a `Mask` or
        // from `vs_build`, which keep tiles and columns below 2^30, and the kernel reads no key outside the views.
        unsafe { gpu.launch_with(Family::Prefill, kernel, grid, 128, shared, &params) }
    }

    fn launch_wide(
        &self,
        gpu: &Gpu,
        kernel: &'static str,
        base: PrefillParams,
        q: Query<'_>,
        view: &KvView<'_>,
        pages: usize,
    ) -> Result<(), GpuError> {
        let shape = view.shape;
        let queries = Rows {
            pointer: q.pointer,
            row_elements: shape.head_dim,
            rows: self.rows,
            row_stride: (self.q_heads * shape.head_dim * 2) as u64,
            heads: self.q_heads,
            head_stride: (shape.head_dim * 2) as u64,
            pages: 1,
            page_stride: (shape.head_dim * 2) as u64,
        };
        let (k, v, tensors) = match view.rows(pages) {
            Some([k, v]) => (k.map()?, v.map()?, 1),
            None => (TensorMap::default(), TensorMap::default(), 0),
        };
        let longest = base.sequences[base.count as usize - 1].tokens as usize;
        let kv_bytes = 2 * longest * shape.head_dim * 2;
        let together = (SECTION_BYTES / kv_bytes).clamp(1, shape.kv_heads);
        let Some(ctas) = (base.blocks as usize)
            .checked_mul(self.q_heads)
            .filter(|&ctas| i32::try_from(ctas).is_ok())
        else {
            let why = format!(
                "{} rows of {} heads; fewer at a time are possible",
                self.rows, self.q_heads
            );
            return Err(GpuError::shape("prefill", why));
        };
        let params = WideParams {
            q: queries.map()?,
            k,
            v,
            section: together as u32 * base.heads_per_kv,
            base,
            tensors,
        };
        let stages = if shape.head_dim == 64 { 3 } else { 2 };
        let shared = ((ROWS + stages * 2 * 2 * TILE) * shape.head_dim * 2 + 1024) as u32;
        // SAFETY: as in `launch`, `WideParams` being prefill_wide.cuh's; the maps describe the queries' and the views' rows.
        unsafe { gpu.launch_with(Family::Prefill, kernel, (ctas as u32, 1, 1), 384, shared, &params) }
    }
}
