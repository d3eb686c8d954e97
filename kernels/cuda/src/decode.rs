//! Attention of one token over views, and how partials join.

mod rows;

use crate::{
    Buffer, Dtype, Family, Gpu, GpuError, KvShape, KvView, Query,
    view::{Groups, RawView},
};

pub use self::rows::{DecodeRows, RowsOut};

/// Views that one [`Decode::attend`] takes, and sets that one [`merge`] takes.
pub const MAX_VIEWS: usize = 8;

const WARPS: u32 = 8;
const TILE: usize = 16;
/// Tiles that make a split worth its place in the merge.
const SPLIT_TILES: usize = 11;
/// What the kernel's last step has room for.
const MAX_SPLITS: usize = 256;

/// Partial attention of `count` disjoint sets of keys: for each the output over the set, normalised, `[heads, head_dim]`,
/// and the base-2 log of the sum of its weights, `[heads]`. A set without keys has `lse = -inf`, and a new one has none.
#[derive(Debug)]
pub struct Partials {
    o: Buffer<f32>,
    lse: Buffer<f32>,
    count: usize,
    heads: usize,
    head_dim: usize,
}

impl Partials {
    /// `count` empty sets.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn empty(gpu: &Gpu, count: usize, heads: usize, head_dim: usize) -> Result<Self, GpuError> {
        let rows = count.saturating_mul(heads);
        if rows == 0 || rows > 1 << 24 || head_dim == 0 || head_dim > 1024 {
            let why = format!("{count} sets of {heads} heads of {head_dim} elements");
            return Err(GpuError::shape("partials", why));
        }
        Ok(Self {
            o: gpu.zeros(rows * head_dim)?,
            lse: gpu.upload(&vec![f32::NEG_INFINITY; rows])?,
            count,
            heads,
            head_dim,
        })
    }

    /// Takes a partial that was computed elsewhere, say by a store: the only set that this has room for.
    ///
    /// # Errors
    /// If the lengths are not `heads * head_dim` and `heads`, or this has room for several sets.
    pub fn upload(&mut self, o: &[f32], lse: &[f32]) -> Result<(), GpuError> {
        if self.count != 1 || o.len() != self.o.len() || lse.len() != self.heads {
            let why = format!(
                "{} outputs and {} lse for {} sets of {} heads",
                o.len(),
                lse.len(),
                self.count,
                self.heads
            );
            return Err(GpuError::shape("partials", why));
        }
        self.o.upload(o)?;
        self.lse.upload(lse)
    }

    /// Outputs, `[count, heads, head_dim]`.
    pub const fn o(&self) -> &Buffer<f32> {
        &self.o
    }

    /// Base-2 logs of the sums of weights, `[count, heads]`.
    pub const fn lse(&self) -> &Buffer<f32> {
        &self.lse
    }

    /// Fills outputs and logs with a byte; for tests that ask whether everything is written.
    ///
    /// # Errors
    /// If the device failed.
    pub fn poison(&mut self, byte: u8) -> Result<(), GpuError> {
        self.o.fill(byte)?;
        self.lse.fill(byte)
    }
}

/// Attention of one token's query heads over keys and values on the device; holds the memory that its splits need.
///
/// Each KV head's rows are read once for all the query heads that share it. The keys are cut into splits so that every
/// multiprocessor has work, and the last one to finish joins them: one launch, one partial.
#[derive(Debug)]
pub struct Decode {
    shape: KvShape,
    q_heads: usize,
    groups: Groups,
    most_splits: usize,
    splits: Partials,
    arrived: Buffer<u32>,
}

#[repr(C)]
struct DecodeParams {
    views: [RawView; MAX_VIEWS],
    q: u64,
    out: u64,
    out_lse: u64,
    splits_o: u64,
    splits_lse: u64,
    arrived: u64,
    scale: f32,
    view_count: u32,
    q_dtype: u32,
    q_heads: u32,
    heads_per_kv: u32,
    groups_per_kv: u32,
    row_tables: u64,
    row_lengths: u64,
    out_16: u64,
    table_stride: u32,
    table_tokens: u32,
}

impl Decode {
    /// For layers of `q_heads` query heads over keys and values of `shape`.
    ///
    /// # Errors
    /// If the shape has no kernel, `q_heads` is no multiple of the KV heads, or the device has no room.
    pub fn new(gpu: &Gpu, shape: KvShape, q_heads: usize) -> Result<Self, GpuError> {
        shape.check()?;
        let groups = Groups::new(shape, q_heads)?;
        // Two CTAs of 256 threads and 128 registers fit a multiprocessor: one full wave, no tail.
        let most_splits = (2 * gpu.multiprocessors() / groups.groups as usize).clamp(1, MAX_SPLITS);
        Ok(Self {
            shape,
            q_heads,
            groups,
            most_splits,
            splits: Partials::empty(gpu, most_splits, q_heads, shape.head_dim)?,
            arrived: gpu.zeros(groups.groups as usize)?,
        })
    }

    /// Attention over all keys of `views` (at most [`MAX_VIEWS`], all of the shape that this was made for); `scale` is
    /// that of the scores, usually `1 / sqrt(head_dim)`. No keys at all give zeros and `-inf`.
    ///
    /// Products are of bf16 (bf16 keys) or f16 (f16 and e4m3 keys) with f32 sums, and the weights are rounded to the same
    /// type before they meet the values: within 5e-3 (bf16) or 1e-3 (f16, e4m3) of f64 in the relative 2-norm.
    ///
    /// # Errors
    /// If shapes or lengths do not fit; nothing is launched then.
    pub fn attend(
        &mut self,
        gpu: &Gpu,
        q: Query<'_>,
        views: &[KvView<'_>],
        scale: f32,
        out: &mut Partials,
    ) -> Result<(), GpuError> {
        if views.len() > MAX_VIEWS {
            let why = format!("{} views; {MAX_VIEWS} are possible", views.len());
            return Err(GpuError::shape("decode", why));
        }
        if let Some(view) = views.iter().find(|view| view.shape != self.shape) {
            let why = format!("a view of {:?} where {:?} is expected", view.shape, self.shape);
            return Err(GpuError::shape("decode", why));
        }
        check_query(q, self.q_heads, self.shape)?;
        if out.count != 1 || out.heads != self.q_heads || out.head_dim != self.shape.head_dim {
            let why = format!(
                "output of {} sets, {} heads, {} elements",
                out.count, out.heads, out.head_dim
            );
            return Err(GpuError::shape("decode", why));
        }
        let tiles: usize = views.iter().map(|view| view.tokens().div_ceil(TILE)).sum();
        let splits = tiles.div_ceil(SPLIT_TILES).clamp(1, self.most_splits) as u32;
        let mut raw = [RawView::default(); MAX_VIEWS];
        for (raw, view) in raw.iter_mut().zip(views) {
            *raw = view.raw;
        }
        let params = DecodeParams {
            views: raw,
            q: q.pointer,
            out: out.o.pointer,
            out_lse: out.lse.pointer,
            splits_o: self.splits.o.pointer,
            splits_lse: self.splits.lse.pointer,
            arrived: self.arrived.pointer,
            scale: scale * std::f32::consts::LOG2_E,
            view_count: views.len() as u32,
            q_dtype: q.dtype,
            q_heads: self.q_heads as u32,
            heads_per_kv: self.groups.heads_per_kv,
            groups_per_kv: self.groups.groups_per_kv,
            row_tables: 0,
            row_lengths: 0,
            out_16: 0,
            table_stride: 0,
            table_tokens: 0,
        };
        let kernel = match (self.shape.dtype, self.shape.head_dim) {
            (Dtype::Bf16, 64) => "decode_bf16_64",
            (Dtype::Bf16, _) => "decode_bf16_128",
            (Dtype::F16, 64) => "decode_f16_64",
            (Dtype::F16, _) => "decode_f16_128",
            (Dtype::E4m3, 64) => "decode_e4m3_64",
            (Dtype::E4m3, _) => "decode_e4m3_128",
        };
        // SAFETY: `DecodeParams` is decode.cu's; views were checked against their buffers when they were made, query and
        // output above, and the splits have room for `most_splits`.
        unsafe {
            gpu.launch(
                Family::Decode,
                kernel,
                (splits, self.groups.groups, 1),
                32 * WARPS,
                &params,
            )
        }
    }
}

pub(crate) fn check_query(q: Query<'_>, q_heads: usize, shape: KvShape) -> Result<(), GpuError> {
    if q.elements != q_heads * shape.head_dim {
        let why = format!("{} elements for {q_heads} heads of {}", q.elements, shape.head_dim);
        return Err(GpuError::shape("query", why));
    }
    Ok(())
}

#[repr(C)]
struct MergeParams {
    o: [u64; MAX_VIEWS],
    lse: [u64; MAX_VIEWS],
    count: [u32; MAX_VIEWS],
    out: u64,
    out_lse: u64,
    sets: u32,
    heads: u32,
    head_dim: u32,
}

/// Joins partials over disjoint sets of keys, exactly up to f32 rounding (1e-5 in the relative 2-norm). Empty sets, and no
/// sets at all, are as welcome as others.
///
/// # Errors
/// If the shapes differ or there are more than [`MAX_VIEWS`].
pub fn merge(gpu: &Gpu, sets: &[&Partials], out: &mut Partials) -> Result<(), GpuError> {
    if sets.len() > MAX_VIEWS || out.count != 1 {
        let why = format!("{} partials into {}; at most {MAX_VIEWS} into 1", sets.len(), out.count);
        return Err(GpuError::shape("merge", why));
    }
    if let Some(set) = sets
        .iter()
        .find(|set| (set.heads, set.head_dim) != (out.heads, out.head_dim))
    {
        let why = format!(
            "{} heads of {} into {} of {}",
            set.heads, set.head_dim, out.heads, out.head_dim
        );
        return Err(GpuError::shape("merge", why));
    }
    let mut params = MergeParams {
        o: [0; MAX_VIEWS],
        lse: [0; MAX_VIEWS],
        count: [0; MAX_VIEWS],
        out: out.o.pointer,
        out_lse: out.lse.pointer,
        sets: sets.len() as u32,
        heads: out.heads as u32,
        head_dim: out.head_dim as u32,
    };
    for (i, set) in sets.iter().enumerate() {
        params.o[i] = set.o.pointer;
        params.lse[i] = set.lse.pointer;
        params.count[i] = set.count as u32;
    }
    let threads = out.head_dim.next_multiple_of(32).min(256) as u32;
    // SAFETY: `MergeParams` is merge.cu's, and every set has `count * heads` rows, as its own shape says.
    unsafe { gpu.launch(Family::Merge, "merge", (out.heads as u32, 1, 1), threads, &params) }
}
