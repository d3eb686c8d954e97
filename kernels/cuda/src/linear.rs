//! Products of rows with a matrix of weights.

use std::ops::Range;

use crate::{
    Buffer, Dtype, Family, Gpu, GpuError, noise,
    tensor_map::{Rows as TensorRows, TensorMap},
};

/// Weights on the device: `[rows, columns]` of bf16 or f16, a row for each element of the result.
#[derive(Debug)]
pub struct Matrix {
    bits: Buffer<u16>,
    dtype: Dtype,
    rows: usize,
    columns: usize,
}

impl Matrix {
    /// Weights of [`noise`]: evenly spread between `-most` and `most`.
    ///
    /// # Errors
    /// As [`Matrix::upload`] and [`noise`].
    pub fn noise(gpu: &Gpu, dtype: Dtype, rows: usize, columns: usize, seed: u64, most: f32) -> Result<Self, GpuError> {
        let len = rows.saturating_mul(columns);
        Self::check(dtype, rows, columns, len)?;
        let mut bits = gpu.zeros(len)?;
        noise(gpu, dtype, &mut bits, seed, most)?;
        Ok(Self {
            bits,
            dtype,
            rows,
            columns,
        })
    }

    /// Copies weights to the device as the bits of `dtype`.
    ///
    /// # Errors
    /// If the length is not `rows * columns`, `columns` no multiple of 32, `dtype` has not 16 bits, or the device no room.
    pub fn upload(gpu: &Gpu, dtype: Dtype, rows: usize, columns: usize, bits: &[u16]) -> Result<Self, GpuError> {
        Self::check(dtype, rows, columns, bits.len())?;
        Ok(Self {
            bits: gpu.upload(bits)?,
            dtype,
            rows,
            columns,
        })
    }

    fn check(dtype: Dtype, rows: usize, columns: usize, len: usize) -> Result<(), GpuError> {
        let fits = rows.checked_mul(columns) == Some(len) && rows > 0 && rows < 1 << 31;
        if !fits || columns == 0 || !columns.is_multiple_of(32) || columns >= 1 << 31 || dtype == Dtype::E4m3 {
            let why = format!(
                "{} numbers of {dtype:?} for {rows} rows of {columns}; columns must be a multiple of 32, numbers bf16 or f16",
                len
            );
            return Err(GpuError::shape("matrix", why));
        }
        Ok(())
    }

    /// Rows: elements of a result.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: elements of what is multiplied.
    pub const fn columns(&self) -> usize {
        self.columns
    }

    /// Element type.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub(crate) const fn bits(&self) -> &Buffer<u16> {
        &self.bits
    }
}

/// Which kernel rows go through. The sum of a result runs in an order that depends on the kernel and on the number of
/// columns alone, so rows that always go through the same one have the same bits in any company.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// For a handful of rows: reads the weights once, at memory speed, for up to 32 of them.
    Few,
    /// For the rows of a prompt: bound by arithmetic.
    Many,
}

/// Where results go, and how.
#[derive(Debug)]
pub enum Sums<'a> {
    /// Rounded to the weights' type; beyond f16's range to its largest number.
    Store(&'a mut Buffer<u16>),
    /// As f32.
    StoreF32(&'a mut Buffer<f32>),
    /// Added to what is there.
    Add(&'a mut Buffer<f32>),
}

#[repr(C)]
struct LinearParams {
    w: u64,
    x: u64,
    out: u64,
    m: u32,
    n: u32,
    k: u32,
    how: u32,
}

#[repr(C)]
struct WideParams {
    x: TensorMap,
    w: TensorMap,
    base: LinearParams,
}

/// Multiplies rows `from` of `x`, `[.., matrix.columns()]` in the weights' type, with every row of the matrix, into the rows
/// of `sums`, `[.., matrix.rows()]`, that begin at `to`. Products of 16 bits with f32 sums: within 1e-5 of f64 in the
/// relative 2-norm before results are rounded.
///
/// # Errors
/// If a range lies outside its buffer; nothing is launched then.
pub fn linear(
    gpu: &Gpu,
    rows: Rows,
    matrix: &Matrix,
    x: &Buffer<u16>,
    from: Range<usize>,
    sums: Sums<'_>,
    to: usize,
) -> Result<(), GpuError> {
    let (m, n, k) = (from.len(), matrix.rows, matrix.columns);
    let (out, room, bytes, how) = match sums {
        Sums::Store(out) => (out.pointer, out.len(), 2, 0),
        Sums::StoreF32(out) => (out.pointer, out.len(), 4, 1),
        Sums::Add(out) => (out.pointer, out.len(), 4, 2),
    };
    let end = to.checked_add(m).and_then(|end| end.checked_mul(n));
    if from.end.checked_mul(k).is_none_or(|end| end > x.len()) || end.is_none_or(|end| end > room) || m >= 1 << 24 {
        let why = format!(
            "rows {from:?} of {} numbers by [{n}, {k}] to row {to} of room for {room}",
            x.len()
        );
        return Err(GpuError::shape("linear", why));
    }
    if m == 0 {
        return Ok(());
    }
    let params = LinearParams {
        w: matrix.bits.pointer,
        x: x.pointer + (from.start * k * 2) as u64,
        out: out + (to * n * bytes) as u64,
        m: m as u32,
        n: n as u32,
        k: k as u32,
        how,
    };
    let is_bf16 = matrix.dtype == Dtype::Bf16;
    if rows == Rows::Few {
        let (kernel, tall) = match (m, is_bf16) {
            (..=8, true) => ("few_bf16_1", 8),
            (..=8, false) => ("few_f16_1", 8),
            (..=16, true) => ("few_bf16_2", 16),
            (..=16, false) => ("few_f16_2", 16),
            (_, true) => ("few_bf16_4", 32),
            (_, false) => ("few_f16_4", 32),
        };
        let grid = (n.div_ceil(16) as u32, m.div_ceil(tall) as u32, 1);
        if grid.1 > 65_535 {
            return Err(GpuError::shape("linear", format!("{m} rows are too many for `Few`")));
        }
        // SAFETY: `LinearParams` is linear.cu's, and both ranges were checked against their buffers.
        return unsafe { gpu.launch(Family::Linear, kernel, grid, 256, &params) };
    }
    if gpu.capability() == (9, 0) {
        return many_wide(gpu, is_bf16, params);
    }
    // Small tiles where large ones would leave most of the device idle.
    let large = m.div_ceil(128) * n.div_ceil(128) >= gpu.multiprocessors();
    let (kernel, tile) = match (large, is_bf16) {
        (true, true) => ("many_bf16_128", 128),
        (true, false) => ("many_f16_128", 128),
        (false, true) => ("many_bf16_64", 64),
        (false, false) => ("many_f16_64", 64),
    };
    let blocks = tiles_of(m, n, tile, tile)?;
    let shared = (3 * 2 * tile * 128 + 128) as u32;
    // SAFETY: as above.
    unsafe { gpu.launch_with(Family::Linear, kernel, (blocks, 1, 1), 256, shared, &params) }
}

fn tiles_of(m: usize, n: usize, high: usize, wide: usize) -> Result<u32, GpuError> {
    let tiles = m.div_ceil(high).checked_mul(n.div_ceil(wide));
    tiles
        .and_then(|tiles| i32::try_from(tiles).ok())
        .map(i32::cast_unsigned)
        .ok_or_else(|| GpuError::shape("linear", format!("{m} rows of {n} results are too many")))
}

/// Hopper's kernels: tiles of 128 rows, as wide as keeps the device busiest. The width changes no bit.
fn many_wide(gpu: &Gpu, is_bf16: bool, base: LinearParams) -> Result<(), GpuError> {
    // Width, stages, and what a tile's time is worth, of 100: narrow ones read more for what they multiply.
    const WIDTHS: [(usize, usize, u32); 4] = [(256, 4, 100), (192, 5, 78), (128, 6, 58), (64, 8, 38)];
    let (m, n, k) = (base.m as usize, base.n as usize, base.k as usize);
    let ctas = gpu.multiprocessors() as u32;
    let mut best: Option<(u64, usize, usize, u32)> = None;
    for (width, stages, cost) in WIDTHS {
        let tiles = tiles_of(m, n, 128, width)?;
        let time = u64::from(tiles.div_ceil(ctas)) * u64::from(cost);
        if best.is_none_or(|(least, ..)| time < least) {
            best = Some((time, width, stages, tiles));
        }
    }
    let (_, width, stages, tiles) = best.unwrap_or((0, 256, 4, 0));
    let kernel = match (width, is_bf16) {
        (64, true) => "many_wide_bf16_64",
        (64, false) => "many_wide_f16_64",
        (128, true) => "many_wide_bf16_128",
        (128, false) => "many_wide_f16_128",
        (192, true) => "many_wide_bf16_192",
        (192, false) => "many_wide_f16_192",
        (_, true) => "many_wide_bf16_256",
        (_, false) => "many_wide_f16_256",
    };
    let rows = |pointer, rows| TensorRows {
        pointer,
        row_elements: k,
        rows,
        row_stride: 2 * k as u64,
        heads: 1,
        head_stride: 2 * k as u64,
        pages: 1,
        page_stride: 2 * k as u64,
    };
    let params = WideParams {
        x: rows(base.x, m).map()?,
        w: rows(base.w, n).map()?,
        base,
    };
    let shared = (stages * (128 + width) * 128 + 1024) as u32;
    // SAFETY: `WideParams` is linear_wide.cuh's; the maps describe the rows that `linear` checked.
    unsafe { gpu.launch_with(Family::Linear, kernel, (tiles.min(ctas), 1, 1), 384, shared, &params) }
}
