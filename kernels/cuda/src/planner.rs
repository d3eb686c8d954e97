//! Sparse lists of tiles from a prompt itself, on the device: each head of a layer does what its plan says, and what depends on
//! queries and keys is planned for part by part.

mod layer;

use std::ops::Range;

use self::layer::LayerPlans;
use crate::{
    Buffer, DeviceTiles, Dtype, Family, FlexChosen, FlexPrefill, Gpu, GpuError, HeadMask, KvShape, KvView, Plain,
    Query, XAttention,
    block_sparse::{BlockSparse, Blocks},
    flex_prefill::Flex,
    plan::{ROWS, TILE},
    tiles::{DENSE_LIST, LIST_WORDS, read_list},
    vertical_slash::{Slashes, VerticalSlash},
    view::RawView,
    x_attention::{Antidiagonals, STRIDES},
};

/// What a query head does in prefill.
#[derive(Clone, Debug, PartialEq)]
pub enum HeadPlan {
    /// The same distances for every row block, whatever the prompt: dense, A-shape.
    Fixed(HeadMask),
    /// Columns and diagonals that the last 64 queries of a part attend to.
    VerticalSlash(VerticalSlash),
    /// The key blocks whose mean fits the mean query of a row block.
    BlockSparse(BlockSparse),
    /// Blocks of columns and runs of diagonals, or the best blocks of a map of means, with a share of the mass.
    FlexPrefill(FlexPrefill),
    /// The fewest key blocks with a share of the mass, told by sums along antidiagonals.
    XAttention(XAttention),
}

/// The rows of a call, and which of them are planned for together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SparseRows {
    /// Rows of the call, the last positions of its view.
    pub rows: usize,
    /// Those that attend as their heads' plans say, from a row block's first row on and up to a row block's last or the call's;
    /// all others attend densely.
    pub sparse: Range<usize>,
    /// Rows of a part, the unit that a plan is made for from its own queries and the keys up to its end: whole row blocks, if
    /// there are several.
    pub part_rows: usize,
}

/// The kernels' twin of [`SparseRows`], see planner.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    pub(crate) rows: u32,
    pub(crate) offset: u32,
    pub(crate) part_rows: u32,
    pub(crate) first: u32,
    pub(crate) before: u32,
}

/// A call, checked, as the kinds of plans see it.
#[derive(Clone, Copy)]
pub(crate) struct Call<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) shape: KvShape,
    pub(crate) q_heads: usize,
    /// The first sparse row's queries.
    pub(crate) q: u64,
    /// Ends with the sparse rows.
    pub(crate) view: RawView,
    /// Plans of the layer's heads.
    pub(crate) plans: u64,
    pub(crate) parts: Parts,
    /// How many parts.
    pub(crate) count: usize,
    /// Row blocks of the call.
    pub(crate) row_blocks: usize,
    pub(crate) scale: f32,
}

impl Call<'_> {
    /// Row blocks of the sparse rows.
    pub(crate) fn sparse_blocks(&self) -> usize {
        (self.parts.rows as usize).div_ceil(ROWS)
    }

    /// Numbers of `heads` heads' lists by row block if each has room for all key blocks that it sees, as share.cuh lays them out.
    fn triangle(&self, heads: usize) -> usize {
        let blocks = self.sparse_blocks();
        let first = (self.parts.offset as usize + ROWS).div_ceil(TILE);
        (blocks * (first + blocks - 1)).saturating_mul(heads)
    }

    /// Keys up to the last sparse row, that row's included.
    pub(crate) fn tokens(&self) -> usize {
        self.view.tokens as usize
    }

    pub(crate) fn heads_per_kv(&self) -> u32 {
        (self.q_heads / self.shape.kv_heads) as u32
    }
}

/// Where lists and their numbers go.
#[derive(Clone, Copy)]
pub(crate) struct Lists {
    pub(crate) lists: u64,
    pub(crate) numbers: u64,
    pub(crate) first_number: u32,
}

/// Some query heads of a layer, as the device has them.
#[derive(Debug)]
pub(crate) struct Heads<T> {
    pub(crate) numbers: Buffer<u32>,
    pub(crate) count: usize,
    /// The largest of their plans in each respect.
    pub(crate) most: T,
}

#[repr(C)]
struct ListsParams {
    plans: u64,
    heads: u64,
    lists: u64,
    parts: Parts,
    row_blocks: u32,
    dense: [u32; LIST_WORDS],
}

/// Makes lists for the layers of a model. Its buffers grow to what the largest call needs, and are used for every layer.
#[derive(Debug)]
pub struct Planner {
    shape: KvShape,
    q_heads: usize,
    tokens_max: usize,
    layers: Vec<LayerPlans>,
    /// What `tiles.numbers` begins with: the numbers of all fixed lists.
    fixed: Vec<u32>,
    tiles: DeviceTiles,
    slashes: Slashes,
    blocks: Blocks,
    flex: Flex,
    antidiagonals: Antidiagonals,
}

impl Planner {
    /// For layers whose query heads do what `layers` says, over keys of `shape`, in prompts of up to `tokens_max` tokens.
    ///
    /// # Errors
    /// If the shape has no kernel, a plan cannot be, or the device has no room.
    pub fn new(gpu: &Gpu, shape: KvShape, tokens_max: usize, layers: &[Vec<HeadPlan>]) -> Result<Self, GpuError> {
        shape.check()?;
        let q_heads = layers.first().map_or(0, Vec::len);
        let fits = q_heads.is_multiple_of(shape.kv_heads)
            && (1..=65_535).contains(&q_heads)
            && shape.dtype != Dtype::E4m3
            && (1..=1 << 24).contains(&tokens_max)
            && layers.iter().all(|heads| heads.len() == q_heads);
        if !fits {
            let why = format!(
                "{} layers of {q_heads} heads of {shape:?}, {tokens_max} tokens",
                layers.len()
            );
            return Err(GpuError::shape("planner", why));
        }
        let mut fixed = Vec::new();
        let layers = layers
            .iter()
            .map(|heads| LayerPlans::new(gpu, heads, tokens_max, &mut fixed))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            shape,
            q_heads,
            tokens_max,
            layers,
            fixed,
            tiles: DeviceTiles {
                heads: gpu.zeros(2 * q_heads)?,
                lists: gpu.zeros(0)?,
                numbers: gpu.zeros(0)?,
                q_heads,
                blocks: 0,
            },
            slashes: Slashes::new(gpu)?,
            blocks: Blocks::new(gpu)?,
            flex: Flex::new(gpu)?,
            antidiagonals: Antidiagonals::new(gpu)?,
        })
    }

    /// The lists of layer `layer` for queries `q [rows, q_heads, head_dim]`, the last positions of `view`; nothing leaves the
    /// device. They hold until the next call. Scores are multiplied by `scale` before the softmax.
    ///
    /// A part's lists depend on its own queries and the keys up to its end, to the last bit, and not on the GPU's size. Sums of
    /// attention weights are within 1e-2 of f64 in the relative 2-norm; means of blocks are rounded to the keys' type, so blocks
    /// whose products differ by less than 1e-3 of the product of the norms may stand for each other.
    ///
    /// FlexPrefill's sums are those of Vertical-Slash, its distances within 1e-2; XAttention's masses are within 1e-3 of the row block's.
    /// Both take key blocks of equal mass together, as f32 and fixed point have it.
    ///
    /// # Errors
    /// If shapes or lengths do not fit, or a head does FlexPrefill and the first sparse position is no multiple of [`TILE`]; nothing is
    /// launched then. If the device has no room.
    pub fn build(
        &mut self,
        gpu: &Gpu,
        layer: usize,
        q: Query<'_>,
        rows: &SparseRows,
        view: &KvView<'_>,
        scale: f32,
    ) -> Result<&DeviceTiles, GpuError> {
        let call = self.call(gpu, layer, q, rows, view, scale)?;
        let layer = &self.layers[layer];
        // Where the numbers of each kind begin, and where all end.
        let mut end = self.fixed.len();
        let mut room = |numbers: usize| {
            let first = end;
            end = first.saturating_add(numbers);
            first
        };
        let slashes = room(self.slashes.numbers(&call, &layer.vertical_slash));
        let blocks = room(self.blocks.numbers(&call, &layer.block_sparse));
        let flex = room(call.triangle(layer.flex_prefill.count));
        let antidiagonals = layer
            .x_attention
            .each_ref()
            .map(|heads| room(call.triangle(heads.count)));
        let numbers = end;
        if u32::try_from(numbers).is_err() {
            return Err(GpuError::shape(
                "planner",
                format!("{numbers} numbers; 2^32 are possible"),
            ));
        }
        if self.tiles.numbers.len() < numbers {
            grow(gpu, &mut self.tiles.numbers, numbers)?;
            self.tiles.numbers.upload(&self.fixed)?;
        }
        grow(gpu, &mut self.tiles.lists, self.q_heads * call.row_blocks * LIST_WORDS)?;
        self.tiles.blocks = call.row_blocks;
        let params = ListsParams {
            plans: call.plans,
            heads: self.tiles.heads.pointer,
            lists: self.tiles.lists.pointer,
            parts: call.parts,
            row_blocks: call.row_blocks as u32,
            dense: DENSE_LIST,
        };
        let grid = (call.row_blocks.div_ceil(128) as u32, self.q_heads as u32, 1);
        // SAFETY: `ListsParams` is plan.cu's; there are as many plans as heads, and room for a list of each row block.
        unsafe { gpu.launch(Family::Plan, "fixed_lists", grid, 128, &params)? };
        let lists = |first: usize| Lists {
            lists: self.tiles.lists.pointer,
            numbers: self.tiles.numbers.pointer,
            first_number: first as u32,
        };
        self.slashes.build(&call, &layer.vertical_slash, lists(slashes))?;
        self.blocks.build(&call, &layer.block_sparse, lists(blocks))?;
        self.flex.build(&call, &layer.flex_prefill, lists(flex))?;
        for ((stride, heads), first) in STRIDES.into_iter().zip(&layer.x_attention).zip(antidiagonals) {
            self.antidiagonals.build(&call, stride, heads, lists(first))?;
        }
        Ok(&self.tiles)
    }

    fn call<'a>(
        &self,
        gpu: &'a Gpu,
        layer: usize,
        q: Query<'_>,
        rows: &SparseRows,
        view: &KvView<'_>,
        scale: f32,
    ) -> Result<Call<'a>, GpuError> {
        let SparseRows {
            rows: count,
            sparse,
            part_rows,
        } = rows;
        let width = self.q_heads * self.shape.head_dim;
        let fits = layer < self.layers.len()
            && view.shape == self.shape
            && !view.raw.has_lengths()
            && view.tokens() <= self.tokens_max
            && (1..=view.tokens()).contains(count)
            && count.checked_mul(width) == Some(q.elements)
            && q.dtype == self.shape.dtype.code()
            && sparse.start < sparse.end
            && sparse.end <= *count
            && sparse.start.is_multiple_of(ROWS)
            && (sparse.end.is_multiple_of(ROWS) || sparse.end == *count)
            && *part_rows > 0
            && (part_rows.is_multiple_of(ROWS) || *part_rows >= sparse.len())
            && scale > 0.0
            && scale.is_finite();
        // Runs of diagonals are key blocks there.
        let aligned = || {
            let first = view.tokens() - count + sparse.start;
            self.layers[layer].flex_prefill.count == 0 || first.is_multiple_of(TILE)
        };
        if !fits || !aligned() {
            let why = format!(
                "layer {layer} of {}, {rows:?} of {} heads ({} elements) over {} of up to {} tokens of {:?}, scale {scale}",
                self.layers.len(),
                self.q_heads,
                q.elements,
                view.tokens(),
                self.tokens_max,
                view.shape
            );
            return Err(GpuError::shape("planner", why));
        }
        let offset = view.tokens() - count;
        Ok(Call {
            gpu,
            shape: self.shape,
            q_heads: self.q_heads,
            q: q.pointer + (2 * sparse.start * width) as u64,
            view: view.raw.first((offset + sparse.end) as u32),
            plans: self.layers[layer].plans.pointer,
            parts: Parts {
                rows: sparse.len() as u32,
                offset: (offset + sparse.start) as u32,
                part_rows: (*part_rows).min(sparse.len()) as u32,
                first: 0,
                before: sparse.start as u32,
            },
            count: sparse.len().div_ceil(*part_rows),
            row_blocks: count.div_ceil(ROWS),
            scale,
        })
    }

    /// The lists that were made last, by query head and row block, each as if that row block were the only one; waits for the
    /// device.
    ///
    /// # Errors
    /// If the device failed.
    pub fn lists(&self) -> Result<Vec<Vec<HeadMask>>, GpuError> {
        let lists = self.tiles.lists.download()?;
        let numbers = self.tiles.numbers.download()?;
        let lists = &lists.as_chunks::<LIST_WORDS>().0[..self.q_heads * self.tiles.blocks];
        let heads = lists.chunks_exact(self.tiles.blocks.max(1));
        Ok(heads
            .map(|head| head.iter().map(|list| read_list(list, &numbers)).collect())
            .collect())
    }

    /// Of the Vertical-Slash heads and parts that were planned for last, in this order: sums by column and by diagonal, each
    /// `[parts, heads, tokens]` over the keys up to the last part's end, and the diagonals chosen, `[parts, heads, most]`. For
    /// checks: a call of many parts keeps the last ones. Waits for the device.
    ///
    /// # Errors
    /// If the device failed.
    pub fn estimated(&self) -> Result<[Vec<f32>; 2], GpuError> {
        self.slashes.sums()
    }

    /// What was decided for FlexPrefill's heads in the parts that were planned for last: by part, by head. Waits for the device.
    ///
    /// # Errors
    /// If the device failed.
    pub fn flex_chosen(&self) -> Result<Vec<FlexChosen>, GpuError> {
        self.flex.chosen()
    }

    /// The diagonals that were chosen last, as there, in rising order.
    ///
    /// # Errors
    /// If the device failed.
    pub fn chosen_slashes(&self) -> Result<Vec<u32>, GpuError> {
        self.slashes.chosen()
    }
}

/// Makes room for `len` numbers; what was there is lost.
pub(crate) fn grow<T: Plain>(gpu: &Gpu, buffer: &mut Buffer<T>, len: usize) -> Result<(), GpuError> {
    if buffer.len() < len {
        // Calls get longer as a prompt goes on: not every one of them is to allocate.
        *buffer = gpu.zeros(len + len / 2)?;
    }
    Ok(())
}
