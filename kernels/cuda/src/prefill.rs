//! Attention of a prompt's queries over a list of tiles.

use crate::{
    Buffer, Dtype, Family, Gpu, GpuError, HeadTiles, KvView, Plain, Query, TileList,
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

/// A [`TileList`] on the device.
#[derive(Debug)]
pub struct DeviceTiles {
    pub(crate) heads: Buffer<u32>,
    pub(crate) lists: Buffer<u32>,
    pub(crate) numbers: Buffer<u32>,
    pub(crate) q_heads: usize,
    /// Row blocks that every head with lists of its own per block has.
    pub(crate) blocks: usize,
}

impl DeviceTiles {
    /// Copies a list to the device, and waits.
    ///
    /// # Errors
    /// If it has more than 2^32 numbers, or the device has no room.
    pub fn upload(gpu: &Gpu, list: &TileList) -> Result<Self, GpuError> {
        let (mut heads, mut lists, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
        let mut blocks = usize::MAX;
        for head in list.heads() {
            heads.push(lists.len() as u32 / 7);
            match head {
                HeadTiles::Relative { tiles, columns } => {
                    heads.push(0);
                    lists.extend(relative_list(tiles, columns, &mut numbers));
                }
                HeadTiles::Absolute { rows } => {
                    heads.push(1);
                    blocks = blocks.min(rows.len());
                    for tiles in rows {
                        lists.extend([numbers.len() as u32, tiles.len() as u32, 0, 0, 0, 0, 1]);
                        numbers.extend(tiles);
                    }
                }
            }
        }
        if u32::try_from(numbers.len()).is_err() || u32::try_from(lists.len()).is_err() {
            return Err(GpuError::shape(
                "tiles",
                format!("{} numbers; 2^32 are possible", numbers.len()),
            ));
        }
        Ok(Self {
            heads: gpu.upload(&heads)?,
            lists: gpu.upload(&lists)?,
            numbers: gpu.upload(&numbers)?,
            q_heads: list.heads().len(),
            blocks,
        })
    }
}

/// A list, see prefill.cuh, whose numbers are appended to `numbers`.
pub(crate) fn relative_list(tiles: &[u32], columns: &[u32], numbers: &mut Vec<u32>) -> [u32; 7] {
    let first = numbers.len();
    numbers.extend(tiles);
    let column = numbers.len();
    numbers.extend(columns);
    let cover = numbers.len();
    let words = cover_words(tiles);
    numbers.extend(&words);
    [first, tiles.len(), column, columns.len(), cover, 32 * words.len(), 0].map(|number| number as u32)
}

/// Bit `u - 1` is set if a tile holds distance `u`.
fn cover_words(tiles: &[u32]) -> Vec<u32> {
    let bits = tiles.last().map_or(0, |&tile| tile as usize + crate::plan::TILE);
    let mut words = vec![0u32; bits.div_ceil(32)];
    for &tile in tiles {
        for bit in tile as usize..tile as usize + crate::plan::TILE {
            words[bit / 32] |= 1 << (bit % 32);
        }
    }
    words
}

/// Attention of the last `rows` positions of a sequence whose keys and values, these rows' own included, are in a view.
#[derive(Clone, Copy, Debug)]
pub struct Prefill {
    /// Queries.
    pub rows: usize,
    /// Query heads, a multiple of the KV heads.
    pub q_heads: usize,
    /// Of the scores; usually `1 / sqrt(head_dim)`. Positive.
    pub scale: f32,
    /// Which instructions multiply; [`Products::best`] unless there is a reason.
    pub products: Products,
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
    offset: u32,
    q_heads: u32,
    heads_per_kv: u32,
}

#[repr(C)]
struct WideParams {
    q: TensorMap,
    k: TensorMap,
    v: TensorMap,
    base: PrefillParams,
    section: u32,
    blocks: u32,
    tensors: u32,
}

/// Heads whose keys and values together are at most this many bytes are worked through side by side: they stay in the L2
/// cache, and the longest row blocks of all of them come first.
const SECTION_BYTES: usize = 24 << 20;

impl Prefill {
    /// Writes the output, `[rows, q_heads, head_dim]` in the type of queries, keys and values (bf16 or f16), and the base-2
    /// logs of the sums of weights, `[q_heads, rows]`. A row that sees nothing has zeros and `-inf`.
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
        self.attend_at(gpu, q, view, tiles, out, 0, out_lse)
    }

    /// The same into the rows of `out`, `[.., q_heads, head_dim]`, that begin at `to`; `out_lse` may have room to spare.
    ///
    /// # Errors
    /// As there.
    #[expect(
        clippy::too_many_arguments,
        reason = "a kernel's operands, each with a name of its own"
    )]
    pub fn attend_at<T: Plain>(
        &self,
        gpu: &Gpu,
        q: Query<'_>,
        view: &KvView<'_>,
        tiles: &DeviceTiles,
        out: &mut Buffer<T>,
        to: usize,
        out_lse: &mut Buffer<f32>,
    ) -> Result<(), GpuError> {
        let (shape, refuse) = (view.shape, |why: String| Err(GpuError::shape("prefill", why)));
        let elements = self
            .rows
            .checked_mul(self.q_heads)
            .and_then(|rows| rows.checked_mul(shape.head_dim));
        if self.q_heads == 0 || !self.q_heads.is_multiple_of(shape.kv_heads) || self.q_heads > 65_535 {
            return refuse(format!("{} query heads over {} KV heads", self.q_heads, shape.kv_heads));
        }
        if shape.dtype == Dtype::E4m3 || q.dtype != shape.dtype.code() || size_of::<T>() != 2 {
            return refuse(format!(
                "queries, keys and output must be bf16 or f16 alike; keys are {:?}",
                shape.dtype
            ));
        }
        let first = to.checked_mul(self.q_heads * shape.head_dim);
        let end = elements.and_then(|elements| elements.checked_add(first?));
        let fits = end.is_some_and(|end| end <= out.len()) && out_lse.len() >= self.rows * self.q_heads;
        if elements != Some(q.elements) || !fits {
            return refuse(format!(
                "{} rows of {} heads of {}: {} query elements, room for {} and {} logs",
                self.rows,
                self.q_heads,
                shape.head_dim,
                q.elements,
                out.len(),
                out_lse.len()
            ));
        }
        if self.rows > view.tokens() || view.raw.has_lengths() {
            return refuse(format!(
                "{} rows of {} tokens, whose number must be the host's",
                self.rows,
                view.tokens()
            ));
        }
        let blocks = self.rows.div_ceil(ROWS);
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
        if self.rows == 0 {
            return Ok(());
        }
        let wide = self.products == Products::Wgmma;
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
        let params = PrefillParams {
            view: view.raw,
            q: q.pointer,
            out: out.pointer + (2 * to * self.q_heads * shape.head_dim) as u64,
            out_lse: out_lse.pointer,
            heads: tiles.heads.pointer,
            lists: tiles.lists.pointer,
            numbers: tiles.numbers.pointer,
            scale: self.scale * std::f32::consts::LOG2_E,
            rows: self.rows as u32,
            offset: (view.tokens() - self.rows) as u32,
            q_heads: self.q_heads as u32,
            heads_per_kv: (self.q_heads / shape.kv_heads) as u32,
        };
        if wide {
            return self.launch_wide(gpu, kernel, params, q, view);
        }
        let shared = ((ROWS + 2 * 2 * TILE) * shape.head_dim * 2 + 1024) as u32;
        let grid = (blocks as u32, self.q_heads as u32, 1);
        // SAFETY: `PrefillParams` is prefill.cu's; the view was checked when it was made, the lists come from a `TileList` or
        // from `vs_build`, which keep tiles and columns below 2^30, and the kernel reads no key outside the view.
        unsafe { gpu.launch_with(Family::Prefill, kernel, grid, 128, shared, &params) }
    }
    fn launch_wide(
        &self,
        gpu: &Gpu,
        kernel: &'static str,
        base: PrefillParams,
        q: Query<'_>,
        view: &KvView<'_>,
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
        let (k, v, tensors) = match view.rows() {
            Some([k, v]) => (k.map()?, v.map()?, 1),
            None => (TensorMap::default(), TensorMap::default(), 0),
        };
        let kv_bytes = 2 * view.tokens() * shape.head_dim * 2;
        let together = (SECTION_BYTES / kv_bytes).clamp(1, shape.kv_heads);
        let blocks = self.rows.div_ceil(ROWS);
        let params = WideParams {
            q: queries.map()?,
            k,
            v,
            section: together as u32 * base.heads_per_kv,
            base,
            blocks: blocks as u32,
            tensors,
        };
        let Some(grid) = blocks
            .checked_mul(self.q_heads)
            .filter(|&ctas| i32::try_from(ctas).is_ok())
        else {
            let why = format!(
                "{} rows of {} heads; fewer at a time are possible",
                self.rows, self.q_heads
            );
            return Err(GpuError::shape("prefill", why));
        };
        let stages = if shape.head_dim == 64 { 3 } else { 2 };
        let shared = ((ROWS + stages * 2 * 2 * TILE) * shape.head_dim * 2 + 1024) as u32;
        // SAFETY: as in `attend`, `WideParams` being prefill_wide.cuh's; the maps describe the queries' and the view's rows.
        unsafe { gpu.launch_with(Family::Prefill, kernel, (grid as u32, 1, 1), 384, shared, &params) }
    }
}
