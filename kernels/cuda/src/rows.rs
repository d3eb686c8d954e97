//! What a forward does to rows between products and attention: embedding, norm, rope with the way into pages, gate.

use std::ops::Range;

use crate::{Buffer, Dtype, Family, Gpu, GpuError, KvShape, Layout, Matrix, Plain, StepRows, step::Array};

/// Elements `rows * width` must lie in a buffer.
fn within<T: Plain>(what: &'static str, buffer: &Buffer<T>, rows: &Range<usize>, width: usize) -> Result<(), GpuError> {
    if rows.start > rows.end || rows.end.checked_mul(width).is_none_or(|end| end > buffer.len()) {
        let why = format!("rows {rows:?} of {width} in a buffer of {}", buffer.len());
        return Err(GpuError::shape(what, why));
    }
    Ok(())
}

fn sixteen_bits(what: &'static str, dtype: Dtype) -> Result<bool, GpuError> {
    match dtype {
        Dtype::Bf16 => Ok(true),
        Dtype::F16 => Ok(false),
        Dtype::E4m3 => Err(GpuError::shape(what, "rows are bf16 or f16, not e4m3")),
    }
}

#[repr(C)]
struct EmbedParams {
    table: u64,
    tokens: u64,
    out: u64,
    hidden: u32,
}

/// Rows of the embedding `table` of the tokens of `rows`, exactly, into the same rows of `out`, `[.., table.columns()]`.
///
/// # Errors
/// If the rows do not fit, or tokens may be beyond the table; nothing is launched then.
pub fn embed(
    gpu: &Gpu,
    table: &Matrix,
    step: &StepRows,
    rows: Range<usize>,
    out: &mut Buffer<f32>,
) -> Result<(), GpuError> {
    step.check_rows(&rows)?;
    within("embed", out, &rows, table.columns())?;
    if step.limits().vocab > table.rows() {
        let why = format!("tokens below {} and {} embeddings", step.limits().vocab, table.rows());
        return Err(GpuError::shape("embed", why));
    }
    if rows.is_empty() {
        return Ok(());
    }
    let kernel = if table.dtype() == Dtype::Bf16 {
        "embed_bf16"
    } else {
        "embed_f16"
    };
    let params = EmbedParams {
        table: table.bits().pointer,
        tokens: step.array(Array::Tokens, rows.start),
        out: out.pointer + (rows.start * table.columns() * 4) as u64,
        hidden: table.columns() as u32,
    };
    // SAFETY: `EmbedParams` is rows.cu's; tokens are below the step's limit, which is the table's, and `out` was checked.
    unsafe { gpu.launch(Family::Rows, kernel, (rows.len() as u32, 1, 1), 128, &params) }
}

#[repr(C)]
struct NormParams {
    x: u64,
    weight: u64,
    out: u64,
    hidden: u32,
    epsilon: f32,
}

/// `out = x / sqrt(mean(x^2) + epsilon) * weight` for each of `rows` of `x`, `[.., weight.len()]`, rounded to `dtype`:
/// within 1e-5 of f64 before it is rounded.
///
/// # Errors
/// If the rows do not fit or their length is no multiple of 4; nothing is launched then.
pub fn rms_norm(
    gpu: &Gpu,
    dtype: Dtype,
    x: &Buffer<f32>,
    weight: &Buffer<f32>,
    epsilon: f32,
    rows: Range<usize>,
    out: &mut Buffer<u16>,
) -> Result<(), GpuError> {
    let hidden = weight.len();
    let is_bf16 = sixteen_bits("rms_norm", dtype)?;
    within("rms_norm", x, &rows, hidden)?;
    within("rms_norm", out, &rows, hidden)?;
    if hidden == 0 || !hidden.is_multiple_of(4) {
        return Err(GpuError::shape(
            "rms_norm",
            format!("rows of {hidden}; a multiple of 4 is needed"),
        ));
    }
    if rows.is_empty() {
        return Ok(());
    }
    let params = NormParams {
        x: x.pointer + (rows.start * hidden * 4) as u64,
        weight: weight.pointer,
        out: out.pointer + (rows.start * hidden * 2) as u64,
        hidden: hidden as u32,
        epsilon,
    };
    let kernel = if is_bf16 { "norm_bf16" } else { "norm_f16" };
    // SAFETY: `NormParams` is rows.cu's, and the rows were checked against all three buffers.
    unsafe { gpu.launch(Family::Rows, kernel, (rows.len() as u32, 1, 1), 256, &params) }
}

#[repr(C)]
struct GateParams {
    gate_up: u64,
    out: u64,
    inner: u32,
}

/// `out = silu(gate) * up` for each of `rows` of `gate_up`, `[.., 2, inner]`, in `dtype`: within 1e-5 of f64 before it is
/// rounded, and beyond f16's range its largest number.
///
/// # Errors
/// If the rows do not fit or `inner` is odd; nothing is launched then.
pub fn silu_mul(
    gpu: &Gpu,
    dtype: Dtype,
    gate_up: &Buffer<u16>,
    inner: usize,
    rows: Range<usize>,
    out: &mut Buffer<u16>,
) -> Result<(), GpuError> {
    let is_bf16 = sixteen_bits("silu_mul", dtype)?;
    within("silu_mul", gate_up, &rows, 2 * inner)?;
    within("silu_mul", out, &rows, inner)?;
    if inner == 0 || !inner.is_multiple_of(2) {
        return Err(GpuError::shape(
            "silu_mul",
            format!("{inner} inner elements; an even number is needed"),
        ));
    }
    if rows.is_empty() {
        return Ok(());
    }
    let params = GateParams {
        gate_up: gate_up.pointer + (rows.start * 2 * inner * 2) as u64,
        out: out.pointer + (rows.start * inner * 2) as u64,
        inner: inner as u32,
    };
    let kernel = if is_bf16 { "gate_bf16" } else { "gate_f16" };
    let wide = (inner / 2).div_ceil(256).min(64) as u32;
    // SAFETY: `GateParams` is rows.cu's, and the rows were checked against both buffers.
    unsafe { gpu.launch(Family::Rows, kernel, (rows.len() as u32, wide, 1), 256, &params) }
}

/// Which elements of a head are turned together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// `(2 i, 2 i + 1)`.
    Interleaved,
    /// `(i, i + dims / 2)`.
    Halves,
}

/// Rotary embedding: angles `position * theta^(-2 i / dims)` of all positions, worked out in f64 and kept on the device.
#[derive(Debug)]
pub struct Rope {
    turns: Buffer<f32>,
    positions: usize,
    dims: usize,
    pairs: Pairs,
}

#[repr(C)]
struct RopeParams {
    qkv: u64,
    positions: u64,
    slots: u64,
    turns: u64,
    q: u64,
    pool: u64,
    q_heads: u32,
    kv_heads: u32,
    d: u32,
    dims: u32,
    halves: u32,
    page_tokens: u32,
    heads: u32,
}

impl Rope {
    /// Angles for positions below `positions`; the first `dims` elements of a head are turned.
    ///
    /// # Errors
    /// If `dims` is odd, or the device has no room.
    pub fn new(gpu: &Gpu, positions: usize, dims: usize, theta: f32, pairs: Pairs) -> Result<Self, GpuError> {
        if !dims.is_multiple_of(2) || positions.checked_mul(dims).is_none_or(|numbers| numbers >= 1 << 32) {
            let why = format!("{positions} positions of {dims} turned elements; an even number is needed");
            return Err(GpuError::shape("rope", why));
        }
        let rates: Vec<f64> = (0..dims / 2)
            .map(|i| f64::from(theta).powf(-2.0 * i as f64 / dims as f64))
            .collect();
        let turns: Vec<f32> = (0..positions)
            .flat_map(|position| {
                rates.iter().flat_map(move |rate| {
                    let (sin, cos) = (position as f64 * rate).sin_cos();
                    [cos as f32, sin as f32]
                })
            })
            .collect();
        Ok(Self {
            turns: gpu.upload(&turns)?,
            positions,
            dims,
            pairs,
        })
    }

    /// Turns queries and keys of `rows` of `qkv`, `[.., q_heads + 2 kv_heads, head_dim]`, puts the queries into the same rows
    /// of `q`, `[.., q_heads, head_dim]`, and keys and values into the pages of `pool` that the step names; without a pool, the queries alone. Within 1e-5 of
    /// f64 over the same angles before results are rounded; values are copied.
    ///
    /// # Errors
    /// If anything does not fit; nothing is launched then.
    #[expect(
        clippy::too_many_arguments,
        reason = "a kernel's operands, each with a name of its own"
    )]
    pub fn apply<T: Plain>(
        &self,
        gpu: &Gpu,
        shape: KvShape,
        q_heads: usize,
        step: &StepRows,
        rows: Range<usize>,
        qkv: &Buffer<u16>,
        q: &mut Buffer<u16>,
        pool: Option<&mut Buffer<T>>,
    ) -> Result<(), GpuError> {
        shape.check()?;
        let is_bf16 = sixteen_bits("rope", shape.dtype)?;
        let (d, limits) = (shape.head_dim, step.limits());
        let heads = q_heads + 2 * shape.kv_heads;
        let bytes = Layout::block(shape, limits.page_tokens).bytes;
        let room = pool.as_ref().map_or(usize::MAX, |pool| pool.bytes());
        if limits.pages.checked_mul(bytes).is_none_or(|bytes| bytes > room) {
            let why = format!("{} pages of {bytes} bytes in a pool of {room}", limits.pages);
            return Err(GpuError::shape("rope", why));
        }
        step.check_rows(&rows)?;
        within("rope", qkv, &rows, heads * d)?;
        within("rope", q, &rows, q_heads * d)?;
        if limits.positions > self.positions || self.dims > d {
            let why = format!(
                "positions below {} and angles of {}; {} turned elements of {d}",
                limits.positions, self.positions, self.dims
            );
            return Err(GpuError::shape("rope", why));
        }
        if rows.is_empty() {
            return Ok(());
        }
        let params = RopeParams {
            qkv: qkv.pointer + (rows.start * heads * d * 2) as u64,
            positions: step.array(Array::Positions, rows.start),
            slots: step.array(Array::Slots, rows.start),
            turns: self.turns.pointer,
            q: q.pointer + (rows.start * q_heads * d * 2) as u64,
            pool: pool.map_or(0, |pool| pool.pointer),
            q_heads: q_heads as u32,
            kv_heads: shape.kv_heads as u32,
            d: d as u32,
            dims: self.dims as u32,
            halves: u32::from(self.pairs == Pairs::Halves),
            page_tokens: limits.page_tokens as u32,
            heads: heads as u32,
        };
        let kernel = if is_bf16 { "rope_bf16" } else { "rope_f16" };
        // SAFETY: `RopeParams` is rows.cu's; positions and slots are within the step's limits, which the angles and the pool
        // have room for, and the rows were checked.
        unsafe { gpu.launch(Family::Rows, kernel, (rows.len() as u32, 1, 1), 256, &params) }
    }
}

#[repr(C)]
struct RoundParams {
    from: u64,
    to: u64,
    pairs: u32,
}

/// Rounds all of `from` to `dtype`, into `to` from element `at` on.
///
/// # Errors
/// If it does not fit or a number is odd; nothing is launched then.
pub fn round(gpu: &Gpu, dtype: Dtype, from: &Buffer<f32>, to: &mut Buffer<u16>, at: usize) -> Result<(), GpuError> {
    let is_bf16 = sixteen_bits("round", dtype)?;
    let fits = at.checked_add(from.len()).is_some_and(|end| end <= to.len());
    if !fits || !(at | from.len()).is_multiple_of(2) || from.len() >= 1 << 31 {
        let why = format!(
            "{} numbers to {at} of {}; even numbers are needed",
            from.len(),
            to.len()
        );
        return Err(GpuError::shape("round", why));
    }
    if from.is_empty() {
        return Ok(());
    }
    let params = RoundParams {
        from: from.pointer,
        to: to.pointer + (2 * at) as u64,
        pairs: (from.len() / 2) as u32,
    };
    let kernel = if is_bf16 { "round_bf16" } else { "round_f16" };
    let grid = (params.pairs.div_ceil(256), 1, 1);
    // SAFETY: `RoundParams` is rows.cu's, and the lengths were checked.
    unsafe { gpu.launch(Family::Rows, kernel, grid, 256, &params) }
}

#[repr(C)]
struct NoiseParams {
    to: u64,
    pairs: u64,
    seed: u64,
    most: f32,
}

/// Fills a buffer with numbers of `dtype` that are spread evenly between `-most` and `most` and depend on nothing but the seed
/// and their place: [`reference::noise`](crate::reference::noise), bit for bit. For measurements at shapes that no weights
/// are at hand for.
///
/// # Errors
/// If the length is odd or `most` is no positive number of f16's range; nothing is launched then.
pub fn noise(gpu: &Gpu, dtype: Dtype, to: &mut Buffer<u16>, seed: u64, most: f32) -> Result<(), GpuError> {
    let is_bf16 = sixteen_bits("noise", dtype)?;
    let fits = to.len().is_multiple_of(2) && most > 0.0 && most <= 65_504.0;
    if !fits {
        let why = format!("{} numbers up to {most}; an even number is needed", to.len());
        return Err(GpuError::shape("noise", why));
    }
    if to.is_empty() {
        return Ok(());
    }
    let params = NoiseParams {
        to: to.pointer,
        pairs: (to.len() / 2) as u64,
        seed,
        most: most * NOISE_UNIT,
    };
    let kernel = if is_bf16 { "noise_bf16" } else { "noise_f16" };
    let grid = params.pairs.div_ceil(256).min(16 * gpu.multiprocessors() as u64) as u32;
    // SAFETY: `NoiseParams` is rows.cu's, and the buffer has this many pairs.
    unsafe { gpu.launch(Family::Rows, kernel, (grid, 1, 1), 256, &params) }
}

/// 2^-31.
pub(crate) const NOISE_UNIT: f32 = 1.0 / 2_147_483_648.0;
