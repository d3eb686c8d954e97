//! Vertical-Slash lists from a prompt itself, on the device: estimate, choose, build.

use crate::{
    Buffer, Dtype, Family, Gpu, GpuError,
    plan::{ROWS, TILE},
    planner::{Call, Heads, Lists, Parts, grow},
    scores::{TopKSet, launch_top_k},
    view::RawView,
};

/// How many columns and diagonals a head keeps. Always among them are the first columns and the nearest diagonals, as in
/// MInference's code: attention gathers there whatever the last queries show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerticalSlash {
    /// Columns, `k_v`.
    pub verticals: usize,
    /// Diagonals, `k_s`; at least one.
    pub slashes: usize,
    /// First columns that are always kept.
    pub sink: usize,
    /// Nearest diagonals that are always kept. Without any, a query may not see its own key.
    pub near: usize,
}

impl VerticalSlash {
    pub(crate) const NOTHING: Self = Self {
        verticals: 0,
        slashes: 0,
        sink: 0,
        near: 0,
    };

    /// Keeps `verticals` columns and `slashes` diagonals, at least 30 and 50, with MInference's 30 and 100 forced.
    pub fn new(verticals: usize, slashes: usize) -> Self {
        Self {
            verticals: verticals.max(30),
            slashes: slashes.max(50),
            sink: 30,
            near: 100,
        }
    }

    /// The larger of both in each respect.
    pub(crate) fn most(self, other: Self) -> Self {
        Self {
            verticals: self.verticals.max(other.verticals),
            slashes: self.slashes.max(other.slashes),
            ..self
        }
    }

    pub(crate) fn checked(self, head: usize) -> Result<Self, GpuError> {
        let most = 1 << 24;
        if self.slashes == 0 || self.verticals > most || self.slashes > most || self.sink > most || self.near > most {
            return Err(GpuError::shape("planner", format!("head {head}: {self:?}")));
        }
        Ok(self)
    }
}

/// Sums of a launch, in numbers: parts beyond it take another launch.
pub(crate) const SUMS_MAX: usize = 64 << 20;
/// Keys that one CTA estimates from, see plan.cu.
const STRETCH: usize = 32 * TILE;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct EstimateParams {
    pub(crate) view: RawView,
    pub(crate) q: u64,
    pub(crate) plans: u64,
    pub(crate) heads: u64,
    pub(crate) stats: u64,
    pub(crate) columns: u64,
    pub(crate) diagonals: u64,
    pub(crate) lengths: u64,
    pub(crate) scale: f32,
    pub(crate) parts: Parts,
    pub(crate) q_heads: u32,
    pub(crate) heads_per_kv: u32,
    pub(crate) splits: u32,
    pub(crate) width: u32,
    pub(crate) halves: u32,
}

/// Sums of the attention of a part's last queries, 64 of them or, in two halves, 128: `items` of them, one for each head, part and
/// half. How many numbers `stats` has for each, and one item's sums up to the next one's: [`numbers_of_item`].
pub(crate) fn estimate(call: &Call<'_>, heads: usize, items: usize, params: &EstimateParams) -> Result<(), GpuError> {
    let (gpu, shape) = (call.gpu, call.shape);
    let [stats, sums] = match (shape.dtype, shape.head_dim) {
        (Dtype::Bf16, 64) => ["estimate_stats_bf16_64", "estimate_sums_bf16_64"],
        (Dtype::Bf16, _) => ["estimate_stats_bf16_128", "estimate_sums_bf16_128"],
        (_, 64) => ["estimate_stats_f16_64", "estimate_sums_f16_64"],
        (_, _) => ["estimate_stats_f16_128", "estimate_sums_f16_128"],
    };
    let grid = (params.splits, heads as u32, (items / heads) as u32);
    let shared = (2 * TILE * shape.head_dim * 2 + 64 * (TILE + 8) * 4) as u32;
    // SAFETY: `EstimateParams` is plan.cu's; view and queries were checked by the planner, and the callers' buffers have room
    // for these items.
    unsafe {
        gpu.launch(Family::Plan, stats, grid, 128, params)?;
        gpu.launch_with(Family::Plan, sums, grid, 128, shared, params)
    }
}

/// Numbers of an item: of `stats`, and of the sums of each kind.
pub(crate) fn numbers_of_item(call: &Call<'_>) -> [usize; 2] {
    // A row begins where 16 bytes do, so that it is read in words of as many.
    [
        call.tokens().div_ceil(STRETCH) * 64 * 2,
        call.tokens().next_multiple_of(4),
    ]
}

#[repr(C)]
struct BuildParams {
    plans: u64,
    heads: u64,
    slashes: u64,
    lists: u64,
    numbers: u64,
    parts: Parts,
    row_blocks: u32,
    first_number: u32,
    column_room: u32,
    slash_room: u32,
    tile_room: u32,
    cover_words: u32,
}

/// Numbers of one item of a call: tiles, columns, and which distances the tiles cover.
#[derive(Clone, Copy)]
struct Room {
    tiles: usize,
    columns: usize,
    slashes: usize,
    cover_words: usize,
}

impl Room {
    fn of(call: &Call<'_>, most: VerticalSlash) -> Self {
        let tokens = call.tokens();
        let slashes = most.slashes.min(tokens);
        Self {
            // Slashes apart cost two tiles each; together they cannot exceed the prompt and the last one's overhang.
            tiles: (slashes * ROWS / TILE).min((tokens + ROWS).div_ceil(TILE) + 1),
            columns: most.verticals.min(tokens),
            slashes,
            cover_words: (tokens + ROWS + TILE).div_ceil(32),
        }
    }

    const fn stride(self) -> usize {
        self.tiles + self.columns + self.cover_words
    }
}

/// Buffers of estimates.
#[derive(Debug)]
pub(crate) struct Slashes {
    stats: Buffer<f32>,
    columns: Buffer<f32>,
    diagonals: Buffer<f32>,
    slashes: Buffer<u32>,
    lengths: Buffer<u32>,
    /// Numbers that the last launch wrote: sums of each kind, slashes.
    used: (usize, usize),
}

impl Slashes {
    pub(crate) fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        Ok(Self {
            stats: gpu.zeros(0)?,
            columns: gpu.zeros(0)?,
            diagonals: gpu.zeros(0)?,
            slashes: gpu.zeros(0)?,
            lengths: gpu.zeros(0)?,
            used: (0, 0),
        })
    }

    /// Numbers that the lists of a call need.
    pub(crate) fn numbers(&self, call: &Call<'_>, heads: &Heads<VerticalSlash>) -> usize {
        Room::of(call, heads.most)
            .stride()
            .saturating_mul(call.count)
            .saturating_mul(heads.count)
    }

    pub(crate) fn build(
        &mut self,
        call: &Call<'_>,
        heads: &Heads<VerticalSlash>,
        lists: Lists,
    ) -> Result<(), GpuError> {
        if heads.count == 0 {
            return Ok(());
        }
        let room = Room::of(call, heads.most);
        let [stats, width] = numbers_of_item(call);
        let group = (SUMS_MAX / (2 * heads.count * width)).clamp(1, call.count).min(65_535);
        let items = group * heads.count;
        let gpu = call.gpu;
        grow(gpu, &mut self.stats, items * stats)?;
        grow(gpu, &mut self.columns, items * width)?;
        grow(gpu, &mut self.diagonals, items * width)?;
        grow(gpu, &mut self.slashes, items * room.slashes)?;
        grow(gpu, &mut self.lengths, items * 4)?;
        for first in (0..call.count).step_by(group) {
            let parts = group.min(call.count - first);
            let items = parts * heads.count;
            let params = EstimateParams {
                view: call.view,
                q: call.q,
                plans: call.plans,
                heads: heads.numbers.pointer,
                stats: self.stats.pointer,
                columns: self.columns.pointer,
                diagonals: self.diagonals.pointer,
                lengths: self.lengths.pointer,
                scale: call.scale * std::f32::consts::LOG2_E,
                parts: Parts {
                    first: first as u32,
                    ..call.parts
                },
                q_heads: call.q_heads as u32,
                heads_per_kv: call.heads_per_kv(),
                splits: (stats / (64 * 2)) as u32,
                width: width as u32,
                halves: 1,
            };
            estimate(call, heads.count, items, &params)?;
            let grid = (1, heads.count as u32, parts as u32);
            // SAFETY: as there; `lengths` has room for these items.
            unsafe { gpu.launch(Family::Plan, "favour", grid, 256, &params)? };
            let item = first * heads.count;
            let columns = lists.numbers + 4 * (lists.first_number as usize + item * room.stride() + room.tiles) as u64;
            let set = |nth: usize, scores: &Buffer<f32>, out: u64, k: usize, stride: usize| TopKSet {
                scores: scores.pointer,
                out,
                lengths: self.lengths.pointer + (8 * nth * items) as u64,
                n: call.tokens() as u32,
                k: k as u32,
                score_stride: width as u32,
                out_stride: stride as u32,
            };
            let sets = [
                set(0, &self.columns, columns, room.columns, room.stride()),
                set(1, &self.diagonals, self.slashes.pointer, room.slashes, room.slashes),
            ];
            launch_top_k(gpu, sets, items, 2 * items)?;
            let params = BuildParams {
                plans: call.plans,
                heads: heads.numbers.pointer,
                slashes: self.slashes.pointer,
                lists: lists.lists,
                numbers: lists.numbers,
                parts: params.parts,
                row_blocks: call.row_blocks as u32,
                first_number: lists.first_number,
                column_room: room.columns as u32,
                slash_room: room.slashes as u32,
                tile_room: room.tiles as u32,
                cover_words: room.cover_words as u32,
            };
            // SAFETY: `BuildParams` is plan.cu's; the buffers have room for these items, and the numbers for all of the call.
            unsafe { gpu.launch(Family::Plan, "vs_build", grid, 1024, &params)? };
            self.used = (items * width, items * room.slashes);
        }
        Ok(())
    }

    pub(crate) fn sums(&self) -> Result<[Vec<f32>; 2], GpuError> {
        let used = 0..self.used.0;
        Ok([
            self.columns.download_range(used.clone())?,
            self.diagonals.download_range(used)?,
        ])
    }

    pub(crate) fn chosen(&self) -> Result<Vec<u32>, GpuError> {
        self.slashes.download_range(0..self.used.1)
    }
}
