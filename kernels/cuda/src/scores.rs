//! The exact scan: scores of every key, and the largest of them.

use crate::{
    Buffer, Dtype, Family, Gpu, GpuError, KvView, Query,
    decode::check_query,
    view::{Groups, RawView},
};

#[repr(C)]
struct ScoresParams {
    view: RawView,
    q: u64,
    out: u64,
    scale: f32,
    q_dtype: u32,
    heads_per_kv: u32,
    groups_per_kv: u32,
}

/// Scores `scale * q . k` of `q_heads` query heads with every key of their KV heads: `out` is `[q_heads, view.tokens()]`,
/// `-inf` past a head's length. Products of bf16 or f16 with f32 sums: within 1e-5 of f64 over the rounded query, relative
/// to the product of the norms.
///
/// # Errors
/// If shapes or lengths do not fit; nothing is launched then.
pub fn key_scores(
    gpu: &Gpu,
    q: Query<'_>,
    q_heads: usize,
    view: &KvView<'_>,
    scale: f32,
    out: &mut Buffer<f32>,
) -> Result<(), GpuError> {
    let shape = view.shape;
    let groups = Groups::new(shape, q_heads)?;
    check_query(q, q_heads, shape)?;
    if out.len() != q_heads * view.tokens() {
        let why = format!(
            "room for {} scores, {q_heads} heads of {} tokens",
            out.len(),
            view.tokens()
        );
        return Err(GpuError::shape("key_scores", why));
    }
    if view.tokens() == 0 {
        return Ok(());
    }
    let kernel = match (shape.dtype, shape.head_dim) {
        (Dtype::Bf16, 64) => "scores_bf16_64",
        (Dtype::Bf16, _) => "scores_bf16_128",
        (Dtype::F16, 64) => "scores_f16_64",
        (Dtype::F16, _) => "scores_f16_128",
        (Dtype::E4m3, 64) => "scores_e4m3_64",
        (Dtype::E4m3, _) => "scores_e4m3_128",
    };
    let params = ScoresParams {
        view: view.raw,
        q: q.pointer,
        out: out.pointer,
        scale,
        q_dtype: q.dtype,
        heads_per_kv: groups.heads_per_kv,
        groups_per_kv: groups.groups_per_kv,
    };
    let ctas = view
        .tokens()
        .div_ceil(8 * 16)
        .min((4 * gpu.multiprocessors()).div_ceil(groups.groups as usize)) as u32;
    // SAFETY: `ScoresParams` is scores.cu's; the view was checked when it was made, query and output above.
    unsafe { gpu.launch(Family::Scores, kernel, (ctas, groups.groups, 1), 256, &params) }
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct TopKSet {
    pub(crate) scores: u64,
    pub(crate) out: u64,
    /// Of each row how many scores it has and how many are chosen, at most those below, where that differs; 0: as below.
    pub(crate) lengths: u64,
    pub(crate) n: u32,
    pub(crate) k: u32,
    pub(crate) score_stride: u32,
    pub(crate) out_stride: u32,
}

#[repr(C)]
struct TopKParams {
    sets: [TopKSet; 2],
    rows: u32,
    all: u32,
}

/// Indices of the `k` largest scores of each of `rows` rows, `[rows, k]`, in rising order of index; ties go to the lower
/// index, and the two zeros are equal. Exact. The order is total: NaN of positive sign is above infinity.
///
/// # Errors
/// If the lengths do not fit or `k` is more than a row has; nothing is launched then.
pub fn top_k(gpu: &Gpu, scores: &Buffer<f32>, rows: usize, k: usize, out: &mut Buffer<u32>) -> Result<(), GpuError> {
    let sets = [set(scores, rows, k, out)?, TopKSet::default()];
    launch_top_k(gpu, sets, rows, rows)
}

fn set(scores: &Buffer<f32>, rows: usize, k: usize, out: &Buffer<u32>) -> Result<TopKSet, GpuError> {
    let n = scores.len().checked_div(rows).unwrap_or(0);
    if n * rows != scores.len() || k > n || n > 1 << 30 || rows > 1 << 20 || out.len() != rows * k {
        let why = format!(
            "{} scores in {rows} rows, room for {} of k = {k}",
            scores.len(),
            out.len()
        );
        return Err(GpuError::shape("top_k", why));
    }
    Ok(TopKSet {
        scores: scores.pointer,
        out: out.pointer,
        n: n as u32,
        k: k as u32,
        lengths: 0,
        score_stride: n as u32,
        out_stride: k as u32,
    })
}

/// `all` rows, of which the first `rows` are the first set's: a long row occupies one multiprocessor, so a few of a second set take
/// no longer. Addresses and lengths are the caller's to check.
pub(crate) fn launch_top_k(gpu: &Gpu, sets: [TopKSet; 2], rows: usize, all: usize) -> Result<(), GpuError> {
    if all == 0 || sets.iter().all(|set| set.k == 0) {
        return Ok(());
    }
    let params = TopKParams {
        sets,
        rows: rows as u32,
        all: all as u32,
    };
    let (kernel, ctas, threads) = match sets.iter().map(|set| set.n).max().unwrap_or(0) {
        ..=512 => ("top_k_512", all.div_ceil(4), 128),
        513..=2048 => ("top_k_2048", all.div_ceil(4), 128),
        2049..=16_384 => ("top_k_16384", all, 256),
        _ => ("top_k", all, 1024),
    };
    // SAFETY: `TopKParams` is top_k.cu's; this crate's callers checked the lengths, and the kernels look at no row beyond `all`.
    unsafe { gpu.launch(Family::TopK, kernel, (ctas as u32, 1, 1), threads, &params) }
}
