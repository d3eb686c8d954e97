//! Attention of the rows of a step, each over keys and values of its own, in one launch.

use std::ops::Range;

use super::{DecodeParams, MAX_SPLITS, MAX_VIEWS, Partials, WARPS};
use crate::{
    Buffer, Dtype, Family, Gpu, GpuError, KvShape, KvView, Plain, StepRows,
    step::Array,
    view::{Groups, RawView},
};

/// As [`crate::Decode`], for rows that each have a page table and a length in a [`StepRows`]. How a row's keys are split
/// depends on their number alone, so its bits are the same in any step.
#[derive(Debug)]
pub struct DecodeRows {
    shape: KvShape,
    q_heads: usize,
    groups: Groups,
    most_splits: usize,
    room: usize,
    splits: Partials,
    arrived: Buffer<u32>,
}

/// Where results of [`DecodeRows::attend`] go.
#[derive(Debug)]
pub enum RowsOut<'a> {
    /// Into the same rows, `[.., q_heads, head_dim]`, rounded to the type of the products.
    Rounded(&'a mut Buffer<u16>),
    /// Into the one set of `rows * q_heads` heads that this has room for.
    Partial(&'a mut Partials),
}

impl DecodeRows {
    /// For layers of `q_heads` query heads over keys and values of `shape`, up to `room` rows at a time.
    ///
    /// # Errors
    /// If the shape has no kernel, `q_heads` is no multiple of the KV heads, or the device has no room.
    pub fn new(gpu: &Gpu, shape: KvShape, q_heads: usize, room: usize) -> Result<Self, GpuError> {
        shape.check()?;
        let groups = Groups::new(shape, q_heads)?;
        let most_splits = (2 * gpu.multiprocessors() / groups.groups as usize).clamp(1, MAX_SPLITS);
        if room == 0 || room > 65_535 {
            return Err(GpuError::shape(
                "decode",
                format!("{room} rows; 1 to 65,535 are possible"),
            ));
        }
        Ok(Self {
            shape,
            q_heads,
            groups,
            most_splits,
            room,
            splits: Partials::empty(gpu, most_splits * room, q_heads, shape.head_dim)?,
            arrived: gpu.zeros(groups.groups as usize * room)?,
        })
    }

    /// Rows that one call may have.
    pub const fn room(&self) -> usize {
        self.room
    }

    /// Attention of `rows` of `q`, `[.., q_heads, head_dim]` in the type of the products (bf16 for bf16 keys, else f16), each
    /// over the first tokens of its table in `pool` that the step says it sees. A row that sees nothing has zeros. As near
    /// to f64 as [`crate::Decode::attend`], before results are rounded.
    ///
    /// # Errors
    /// If anything does not fit; nothing is launched then.
    #[expect(
        clippy::too_many_arguments,
        reason = "a kernel's operands, each with a name of its own"
    )]
    pub fn attend<T: Plain>(
        &mut self,
        gpu: &Gpu,
        q: &Buffer<u16>,
        step: &StepRows,
        rows: Range<usize>,
        pool: &Buffer<T>,
        scale: f32,
        out: RowsOut<'_>,
    ) -> Result<(), GpuError> {
        let width = self.q_heads * self.shape.head_dim;
        step.check_rows(&rows)?;
        let refuse = |why: String| Err(GpuError::shape("decode", why));
        if rows.len() > self.room || rows.end * width > q.len() {
            return refuse(format!("rows {rows:?} of {} numbers; room for {}", q.len(), self.room));
        }
        let Some((tables, stride)) = step.table(0) else {
            return refuse("a step without page tables".to_owned());
        };
        let (out_f32, out_lse, out_16) = match out {
            RowsOut::Rounded(to) if rows.end * width <= to.len() => {
                (0, 0, to.pointer + (rows.start * width * 2) as u64)
            }
            RowsOut::Partial(to)
                if (to.count, to.heads, to.head_dim) == (1, rows.len() * self.q_heads, self.shape.head_dim) =>
            {
                (to.o.pointer, to.lse.pointer, 0)
            }
            RowsOut::Rounded(to) => return refuse(format!("rows {rows:?} into {} numbers", to.len())),
            RowsOut::Partial(to) => {
                return refuse(format!("rows {rows:?} into {} sets of {} heads", to.count, to.heads));
            }
        };
        if rows.is_empty() {
            return Ok(());
        }
        let view = KvView::of_step(self.shape, pool, step, 0, 0)?;
        let mut views = [RawView::default(); MAX_VIEWS];
        views[0] = view.raw;
        let page_tokens = step.limits().page_tokens;
        let params = DecodeParams {
            views,
            q: q.pointer + (rows.start * width * 2) as u64,
            out: out_f32,
            out_lse,
            splits_o: self.splits.o.pointer,
            splits_lse: self.splits.lse.pointer,
            arrived: self.arrived.pointer,
            scale: scale * std::f32::consts::LOG2_E,
            view_count: 1,
            q_dtype: match self.shape.dtype {
                Dtype::Bf16 => Dtype::Bf16.code(),
                Dtype::F16 | Dtype::E4m3 => Dtype::F16.code(),
            },
            q_heads: self.q_heads as u32,
            heads_per_kv: self.groups.heads_per_kv,
            groups_per_kv: self.groups.groups_per_kv,
            row_tables: step.array(Array::Tables, rows.start),
            row_lengths: step.array(Array::Sees, rows.start),
            out_16,
            table_stride: stride as u32,
            table_tokens: u32::try_from(stride * page_tokens).unwrap_or(u32::MAX),
        };
        debug_assert_eq!(
            params.views[0].pages(),
            tables,
            "tables of all rows begin with the first"
        );
        let kernel = match (self.shape.dtype, self.shape.head_dim) {
            (Dtype::Bf16, 64) => "decode_rows_bf16_64",
            (Dtype::Bf16, _) => "decode_rows_bf16_128",
            (Dtype::F16, 64) => "decode_rows_f16_64",
            (Dtype::F16, _) => "decode_rows_f16_128",
            (Dtype::E4m3, 64) => "decode_rows_e4m3_64",
            (Dtype::E4m3, _) => "decode_rows_e4m3_128",
        };
        let grid = (self.most_splits as u32, self.groups.groups, rows.len() as u32);
        // SAFETY: `DecodeParams` is decode.cu's; tables, lengths and page numbers were looked at when the step was set, and
        // its pages lie in the pool; queries, outputs and splits have room for the rows.
        unsafe { gpu.launch(Family::Decode, kernel, grid, 32 * WARPS, &params) }
    }
}
