//! FlexPrefill's lists from a prompt itself, on the device: a test by head and part, then blocks with a share of the mass.

use crate::{
    Buffer, Dtype, Family, Gpu, GpuError,
    block_sparse::{Means, products},
    plan::{ROWS, TILE},
    planner::{Call, Heads, Lists, Parts, grow},
    scores::{TopKSet, launch_top_k},
    vertical_slash::{EstimateParams, SUMS_MAX, estimate, numbers_of_item},
    view::RawView,
};

/// Where the means of key blocks tell where the mass of a part's last 128 queries is, the best blocks of the part's map of means, else
/// whole blocks of columns and runs of diagonals; in both as many as hold a share of the mass (FlexPrefill, arXiv 2502.20766), as
/// `kvasir_sparse`'s planner has it. The blocks that a row block lies in and the first one are always among them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FlexPrefill {
    /// Share of the mass, in (0, 1].
    pub gamma: f32,
    /// Below this distance of the estimate from the truth, in [0, 1], the map's blocks are taken; 0 never takes them.
    pub tau: f32,
    /// Least keys per row block.
    pub budget_min: usize,
}

impl FlexPrefill {
    pub(crate) fn checked(self, head: usize) -> Result<Self, GpuError> {
        let share = self.gamma > 0.0 && self.gamma <= 1.0;
        if !share || !(0.0..=1.0).contains(&self.tau) || self.budget_min > 1 << 24 {
            return Err(GpuError::shape("planner", format!("head {head}: {self:?}")));
        }
        Ok(self)
    }
}

/// What was decided for a part and a head.
#[derive(Clone, Debug, PartialEq)]
pub struct FlexChosen {
    /// Distance of the estimate from the truth; 2 where tau is 0 and nobody asks.
    pub distance: f32,
    /// Blocks of columns, and runs of diagonals, in rising order; only the first of each where the map decides.
    pub blocks: [Vec<u32>; 2],
}

/// Products that are kept at a time, unless those of one head and part are more.
const MAP_MAX: usize = 64 << 20;

#[repr(C)]
#[derive(Clone, Copy)]
struct FlexParams {
    view: RawView,
    q: u64,
    plans: u64,
    heads: u64,
    columns: u64,
    diagonals: u64,
    pooled: u64,
    keys: u64,
    estimated: u64,
    distances: u64,
    lengths: u64,
    chosen: u64,
    map: u64,
    leasts: u64,
    lists: u64,
    numbers: u64,
    parts: Parts,
    scale: f32,
    q_heads: u32,
    heads_per_kv: u32,
    heads_count: u32,
    dim: u32,
    is_bf16: u32,
    width: u32,
    key_blocks: u32,
    call_blocks: u32,
    first_head: u32,
    first_part: u32,
    first_block: u32,
    blocks: u32,
    first_number: u32,
}

/// Buffers of sums, means and masses.
#[derive(Debug)]
pub(crate) struct Flex {
    means: Means,
    stats: Buffer<f32>,
    columns: Buffer<f32>,
    diagonals: Buffer<f32>,
    pooled: Buffer<f32>,
    estimated: Buffer<f32>,
    distances: Buffer<f32>,
    lengths: Buffer<u32>,
    chosen: Buffer<u32>,
    map: Buffer<f32>,
    leasts: Buffer<u32>,
    /// Items of the last group of parts, and key blocks.
    used: (usize, usize),
}

impl Flex {
    pub(crate) fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        Ok(Self {
            means: Means::new(gpu)?,
            stats: gpu.zeros(0)?,
            columns: gpu.zeros(0)?,
            diagonals: gpu.zeros(0)?,
            pooled: gpu.zeros(0)?,
            estimated: gpu.zeros(0)?,
            distances: gpu.zeros(0)?,
            lengths: gpu.zeros(0)?,
            chosen: gpu.zeros(0)?,
            map: gpu.zeros(0)?,
            leasts: gpu.zeros(0)?,
            used: (0, 0),
        })
    }

    /// Makes lists; `heads.most` says whether any of them has a test.
    pub(crate) fn build(&mut self, call: &Call<'_>, heads: &Heads<bool>, lists: Lists) -> Result<(), GpuError> {
        if heads.count == 0 {
            return Ok(());
        }
        let (gpu, key_blocks) = (call.gpu, call.tokens().div_ceil(TILE));
        let [stats, width] = numbers_of_item(call);
        let group = (SUMS_MAX / (4 * heads.count * width)).clamp(1, call.count).min(32_767);
        let items = group * heads.count;
        grow(gpu, &mut self.stats, 2 * items * stats)?;
        grow(gpu, &mut self.columns, 2 * items * width)?;
        grow(gpu, &mut self.diagonals, 2 * items * width)?;
        grow(gpu, &mut self.pooled, 2 * items * key_blocks)?;
        grow(gpu, &mut self.estimated, items * key_blocks)?;
        grow(gpu, &mut self.distances, items)?;
        grow(gpu, &mut self.lengths, 4 * items)?;
        grow(gpu, &mut self.chosen, 2 * items * key_blocks)?;
        grow(gpu, &mut self.leasts, items)?;
        let means = if heads.most {
            Some(self.means.take(call, &heads.numbers, heads.count, 0)?)
        } else {
            None
        };
        for first in (0..call.count).step_by(group) {
            let parts = group.min(call.count - first);
            let params = FlexParams {
                view: call.view,
                q: call.q,
                plans: call.plans,
                heads: heads.numbers.pointer,
                columns: self.columns.pointer,
                diagonals: self.diagonals.pointer,
                pooled: self.pooled.pointer,
                keys: self.means.keys(),
                estimated: self.estimated.pointer,
                distances: self.distances.pointer,
                lengths: self.lengths.pointer,
                chosen: self.chosen.pointer,
                map: 0,
                leasts: self.leasts.pointer,
                lists: lists.lists,
                numbers: lists.numbers,
                parts: Parts {
                    first: first as u32,
                    ..call.parts
                },
                scale: call.scale * std::f32::consts::LOG2_E,
                q_heads: call.q_heads as u32,
                heads_per_kv: call.heads_per_kv(),
                heads_count: heads.count as u32,
                dim: call.shape.head_dim as u32,
                is_bf16: (call.shape.dtype == Dtype::Bf16).into(),
                width: width as u32,
                key_blocks: key_blocks as u32,
                call_blocks: call.row_blocks as u32,
                first_head: 0,
                first_part: 0,
                first_block: 0,
                blocks: 0,
                first_number: lists.first_number,
            };
            self.choose(call, stats, parts, &params)?;
            self.used = (parts * heads.count, key_blocks);
            let part_blocks = (call.parts.part_rows as usize).div_ceil(ROWS);
            // Of a map all of a part is needed; without one the lists of all parts are written at once.
            let [heads_at_once, parts_at_once] = match means {
                Some(_) => {
                    let parts_at_once = (MAP_MAX / (part_blocks * key_blocks)).clamp(1, parts);
                    let heads_at_once = MAP_MAX / (parts_at_once * part_blocks * key_blocks);
                    [heads_at_once.clamp(1, heads.count), parts_at_once]
                }
                None => [heads.count, parts],
            };
            for first_head in (0..heads.count).step_by(heads_at_once) {
                let some_heads = first_head..heads.count.min(first_head + heads_at_once);
                for first_part in (0..parts).step_by(parts_at_once) {
                    let some_parts = parts_at_once.min(parts - first_part);
                    let first_block = (first + first_part) * part_blocks;
                    let blocks = first_block..call.sparse_blocks().min(first_block + some_parts * part_blocks);
                    let mut params = FlexParams {
                        first_head: first_head as u32,
                        first_part: first_part as u32,
                        first_block: first_block as u32,
                        blocks: blocks.len() as u32,
                        ..params
                    };
                    let grid = (blocks.len() as u32, some_heads.len() as u32, 1);
                    if let Some(means) = means {
                        let entries = blocks.len() * key_blocks;
                        if u32::try_from(entries).is_err() {
                            return Err(GpuError::shape("planner", format!("a map of {entries} key blocks")));
                        }
                        grow(gpu, &mut self.map, some_heads.len() * entries)?;
                        params.map = self.map.pointer;
                        products(call, means, some_heads.clone(), blocks, &self.map, true)?;
                        let by_part = (some_heads.len() as u32, some_parts as u32, 1);
                        // SAFETY: `FlexParams` is flex_prefill.cu's; the products of these heads and row blocks are in the map.
                        unsafe {
                            gpu.launch(Family::FlexPrefill, "flex_map", grid, 128, &params)?;
                            gpu.launch(Family::FlexPrefill, "flex_cover", by_part, 512, &params)?;
                        }
                    }
                    let bits = 4 * key_blocks.div_ceil(32) as u32;
                    // SAFETY: as there; the numbers have room for these lists.
                    unsafe { gpu.launch_with(Family::FlexPrefill, "flex_build", grid, 128, bits, &params)? };
                }
            }
        }
        Ok(())
    }

    /// Sums of the last queries, the test, and blocks of columns and diagonals.
    fn choose(&self, call: &Call<'_>, stats: usize, parts: usize, params: &FlexParams) -> Result<(), GpuError> {
        let (gpu, heads) = (call.gpu, params.heads_count);
        let sums = EstimateParams {
            view: call.view,
            q: call.q,
            plans: call.plans,
            heads: params.heads,
            stats: self.stats.pointer,
            columns: self.columns.pointer,
            diagonals: self.diagonals.pointer,
            lengths: 0,
            scale: params.scale,
            parts: params.parts,
            q_heads: params.q_heads,
            heads_per_kv: params.heads_per_kv,
            splits: (stats / (64 * 2)) as u32,
            width: params.width,
            halves: 2,
        };
        estimate(call, heads as usize, 2 * parts * heads as usize, &sums)?;
        let by_eight = (params.key_blocks.div_ceil(8), 2 * heads, parts as u32);
        // SAFETY: `FlexParams` is flex_prefill.cu's; the buffers have room for these parts and heads, and their sums are there.
        unsafe {
            gpu.launch(Family::FlexPrefill, "flex_pool", by_eight, 256, params)?;
            gpu.launch(Family::FlexPrefill, "flex_test", (heads, parts as u32, 1), 512, params)?;
            gpu.launch(
                Family::FlexPrefill,
                "flex_choose",
                (2 * heads, parts as u32, 1),
                512,
                params,
            )?;
        }
        // The first block is chosen whatever it has: the best of the others.
        let others = TopKSet {
            scores: params.pooled + 4,
            out: params.chosen,
            lengths: params.lengths,
            n: params.key_blocks - 1,
            k: params.key_blocks - 1,
            score_stride: params.key_blocks,
            out_stride: params.key_blocks,
        };
        let rows = 2 * parts * heads as usize;
        launch_top_k(gpu, [others, TopKSet::default()], rows, rows)
    }

    /// What was decided in the last group of parts: by part, by head.
    pub(crate) fn chosen(&self) -> Result<Vec<FlexChosen>, GpuError> {
        let (items, key_blocks) = self.used;
        let distances = self.distances.download_range(0..items)?;
        let lengths = self.lengths.download_range(0..4 * items)?;
        let chosen = self.chosen.download_range(0..2 * items * key_blocks)?;
        let rows: Vec<_> = chosen.chunks_exact(key_blocks.max(1)).collect();
        let blocks = |row: usize| {
            let others = rows[row].iter().take(lengths[2 * row + 1] as usize);
            std::iter::once(0).chain(others.map(|block| block + 1)).collect()
        };
        let item = |(item, &distance): (usize, &f32)| FlexChosen {
            distance,
            blocks: [blocks(2 * item), blocks(2 * item + 1)],
        };
        Ok(distances.iter().enumerate().map(item).collect())
    }
}
