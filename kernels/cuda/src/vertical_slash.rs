//! A Vertical-Slash list from the prompt itself, on the device: estimate, choose, build.

use crate::{
    Buffer, DeviceTiles, Dtype, Family, Gpu, GpuError, KvView, Query,
    plan::{ROWS, TILE},
    scores::top_k_of_two,
    view::RawView,
};

/// How many columns and diagonals the heads of a layer keep. Always among them are the first columns and the nearest
/// diagonals, as in MInference's code: attention gathers there whatever the last queries show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerticalSlash {
    /// Columns, `k_v`.
    pub verticals: usize,
    /// Diagonals, `k_s`.
    pub slashes: usize,
    /// First columns that are always kept.
    pub sink: usize,
    /// Nearest diagonals that are always kept.
    pub near: usize,
}

/// Prompts of up to this many tokens are attended densely as fast as by a Vertical-Slash list with its index. Measured on an
/// NVIDIA H100, 32 query heads, 8 KV heads, d 128, bf16, (1000, 6096), ms of dense against attention and index: 0.87 and 1.43
/// at 8K; 3.22 and 2.95 (diagonals side by side) to 3.44 (in 95 runs) at 16K; 13.6 and 6.33 to 8.18 at 32K.
pub const DENSE_UP_TO: usize = 16 * 1024;

impl VerticalSlash {
    /// Whether a list is worth its making for a prompt of `tokens`: beyond [`DENSE_UP_TO`]. The caller takes
    /// [`HeadMask::Dense`](crate::HeadMask::Dense) otherwise.
    pub const fn pays(tokens: usize) -> bool {
        tokens > DENSE_UP_TO
    }

    /// Keeps `verticals` columns and `slashes` diagonals, at least 30 and 50, with MInference's 30 and 100 forced.
    pub fn new(verticals: usize, slashes: usize) -> Self {
        Self {
            verticals: verticals.max(30),
            slashes: slashes.max(50),
            sink: 30,
            near: 100,
        }
    }
}

/// The estimate and its buffers; made once per prompt length, used for every layer.
#[derive(Debug)]
pub struct Estimate {
    q_heads: usize,
    tokens: usize,
    splits: usize,
    stats: Buffer<f32>,
    /// Attention of the last 64 queries by key, `[q_heads, tokens]`.
    pub columns: Buffer<f32>,
    /// The same by distance of key from query.
    pub diagonals: Buffer<f32>,
}

#[repr(C)]
struct EstimateParams {
    view: RawView,
    q: u64,
    stats: u64,
    columns: u64,
    diagonals: u64,
    scale: f32,
    rows: u32,
    q_heads: u32,
    heads_per_kv: u32,
    splits: u32,
    sink: u32,
    near: u32,
}

#[repr(C)]
struct BuildParams {
    columns: u64,
    slashes: u64,
    heads: u64,
    lists: u64,
    numbers: u64,
    column_count: u32,
    slash_count: u32,
    tile_room: u32,
    cover_words: u32,
}

impl Estimate {
    /// Buffers for prompts of `tokens` tokens.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(gpu: &Gpu, q_heads: usize, tokens: usize) -> Result<Self, GpuError> {
        if q_heads == 0 || q_heads > 65_535 || tokens == 0 || tokens > 1 << 24 {
            return Err(GpuError::shape(
                "estimate",
                format!("{q_heads} heads of {tokens} tokens"),
            ));
        }
        // Some CTAs for every multiprocessor, and not less than a few tiles for each.
        let splits = (8 * gpu.multiprocessors())
            .div_ceil(q_heads)
            .min(tokens.div_ceil(4 * TILE));
        Ok(Self {
            q_heads,
            tokens,
            splits,
            stats: gpu.zeros(q_heads * splits * 64 * 2)?,
            columns: gpu.zeros(q_heads * tokens)?,
            diagonals: gpu.zeros(q_heads * tokens)?,
        })
    }

    /// Sums the attention weights of the last 64 of `rows` queries (`q [rows, q_heads, head_dim]`, the last positions of
    /// `view`) by key and by diagonal: within 1e-2 of f64 in the relative 2-norm. Keys `0..sink` and diagonals `0..near` get
    /// 3e38, so that they are chosen first.
    ///
    /// # Errors
    /// If shapes or lengths do not fit; nothing is launched then.
    pub fn run(
        &mut self,
        gpu: &Gpu,
        q: Query<'_>,
        rows: usize,
        view: &KvView<'_>,
        scale: f32,
        plan: VerticalSlash,
    ) -> Result<(), GpuError> {
        let shape = view.shape;
        let fits = self.q_heads.is_multiple_of(shape.kv_heads)
            && view.tokens() == self.tokens
            && !view.raw.has_lengths()
            && shape.dtype != Dtype::E4m3
            && q.dtype == shape.dtype.code()
            && (1..=self.tokens).contains(&rows)
            && rows.checked_mul(self.q_heads * shape.head_dim) == Some(q.elements)
            && scale > 0.0
            && scale.is_finite();
        if !fits {
            let why = format!(
                "{rows} rows of {} heads ({} elements) over {} tokens of {shape:?}, buffers for {}, scale {scale}",
                self.q_heads,
                q.elements,
                view.tokens(),
                self.tokens
            );
            return Err(GpuError::shape("estimate", why));
        }
        let [stats, sums] = match (shape.dtype, shape.head_dim) {
            (Dtype::Bf16, 64) => ["estimate_stats_bf16_64", "estimate_sums_bf16_64"],
            (Dtype::Bf16, _) => ["estimate_stats_bf16_128", "estimate_sums_bf16_128"],
            (_, 64) => ["estimate_stats_f16_64", "estimate_sums_f16_64"],
            (_, _) => ["estimate_stats_f16_128", "estimate_sums_f16_128"],
        };
        self.diagonals.fill(0)?;
        let params = EstimateParams {
            view: view.raw,
            q: q.pointer,
            stats: self.stats.pointer,
            columns: self.columns.pointer,
            diagonals: self.diagonals.pointer,
            scale: scale * std::f32::consts::LOG2_E,
            rows: rows as u32,
            q_heads: self.q_heads as u32,
            heads_per_kv: (self.q_heads / shape.kv_heads) as u32,
            splits: self.splits as u32,
            sink: plan.sink.min(self.tokens) as u32,
            near: plan.near.min(self.tokens) as u32,
        };
        let grid = (self.splits as u32, self.q_heads as u32, 1);
        let shared = (2 * TILE * shape.head_dim * 2 + 64 * (TILE + 8) * 4) as u32;
        // SAFETY: `EstimateParams` is plan.cu's; the view was checked when it was made, the rest above.
        unsafe {
            gpu.launch(Family::Plan, stats, grid, 128, &params)?;
            gpu.launch_with(Family::Plan, sums, grid, 128, shared, &params)?;
            gpu.launch(Family::Plan, "favour", (self.q_heads as u32, 1, 1), 256, &params)
        }
    }
}

/// A Vertical-Slash list and what it is built from; made once per prompt length, used for every layer.
#[derive(Debug)]
pub struct VerticalSlashTiles {
    plan: VerticalSlash,
    verticals: Buffer<u32>,
    slashes: Buffer<u32>,
    tiles: DeviceTiles,
    tile_room: usize,
    cover_words: usize,
}

impl VerticalSlashTiles {
    /// Buffers for prompts of `tokens` tokens and `q_heads` heads that all keep what `plan` says.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(gpu: &Gpu, plan: VerticalSlash, q_heads: usize, tokens: usize) -> Result<Self, GpuError> {
        if q_heads == 0 || q_heads > 65_535 || tokens == 0 || tokens > 1 << 24 || plan.slashes == 0 {
            return Err(GpuError::shape(
                "vertical-slash",
                format!("{plan:?}, {q_heads} heads of {tokens} tokens"),
            ));
        }
        let plan = VerticalSlash {
            verticals: plan.verticals.min(tokens),
            slashes: plan.slashes.min(tokens),
            ..plan
        };
        // Slashes apart cost two tiles each; together they cannot exceed the prompt and the last one's overhang.
        let tile_room = (plan.slashes * ROWS / TILE).min((tokens + ROWS).div_ceil(TILE) + 1);
        let cover_words = (tokens + ROWS + TILE).div_ceil(32);
        let numbers = q_heads
            .checked_mul(tile_room + plan.verticals + cover_words)
            .filter(|&numbers| u32::try_from(numbers).is_ok())
            .ok_or_else(|| GpuError::shape("vertical-slash", "more than 2^32 numbers"))?;
        Ok(Self {
            plan,
            verticals: gpu.zeros(q_heads * plan.verticals)?,
            slashes: gpu.zeros(q_heads * plan.slashes)?,
            tiles: DeviceTiles {
                heads: gpu.zeros(2 * q_heads)?,
                lists: gpu.zeros(7 * q_heads)?,
                numbers: gpu.zeros(numbers)?,
                q_heads,
                blocks: usize::MAX,
            },
            tile_room,
            cover_words,
        })
    }

    /// Chooses each head's best columns and diagonals of an estimate, and builds the list; nothing leaves the device.
    ///
    /// # Errors
    /// If the estimate is of another shape.
    pub fn build(&mut self, gpu: &Gpu, estimate: &Estimate) -> Result<&DeviceTiles, GpuError> {
        let (q_heads, plan) = (self.tiles.q_heads, self.plan);
        top_k_of_two(
            gpu,
            q_heads,
            (&estimate.columns, plan.verticals, &mut self.verticals),
            (&estimate.diagonals, plan.slashes, &mut self.slashes),
        )?;
        let params = BuildParams {
            columns: self.verticals.pointer,
            slashes: self.slashes.pointer,
            heads: self.tiles.heads.pointer,
            lists: self.tiles.lists.pointer,
            numbers: self.tiles.numbers.pointer,
            column_count: plan.verticals as u32,
            slash_count: plan.slashes as u32,
            tile_room: self.tile_room as u32,
            cover_words: self.cover_words as u32,
        };
        // SAFETY: `BuildParams` is plan.cu's, and `new` made the buffers for these counts.
        unsafe { gpu.launch(Family::Plan, "vs_build", (q_heads as u32, 1, 1), 1024, &params)? };
        Ok(&self.tiles)
    }

    /// The columns and diagonals that were chosen last, `[q_heads, k]` each, in rising order; waits for the device.
    ///
    /// # Errors
    /// If the device failed.
    pub fn chosen(&self) -> Result<(Vec<u32>, Vec<u32>), GpuError> {
        Ok((self.verticals.download()?, self.slashes.download()?))
    }
}
