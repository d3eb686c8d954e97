//! The kernels' speed beside the machine's ceilings, measured in the same run.
//!
//! Times are the device's own, medians over repetitions, each over buffers that are rotated so that no input is still in
//! the L2 cache from the time before. Bytes are what the operation must move.

use kvasir_cuda::{
    Buffer, Decode, Dtype, Gpu, GpuError, KvShape, KvView, KvViewMut, Layout, PageTable, Partials, Query, copy_rows,
    key_scores, merge, top_k,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::{Value, json};

const TOKENS: usize = 128 * 1024;
const PAGE_TOKENS: usize = 64;
const KV_HEADS: usize = 8;
const Q_HEADS: usize = 32;
const HEAD_DIM: usize = 128;
const REPEATS: usize = 30;

/// The shape of one layer of Llama-3-8B.
const fn shape(dtype: Dtype) -> KvShape {
    KvShape {
        dtype,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
    }
}

/// Median microseconds of `REPEATS` runs of `work(i)`, after three that are not counted.
pub(crate) fn median(gpu: &Gpu, mut work: impl FnMut(usize) -> Result<(), GpuError>) -> Result<f64, GpuError> {
    let mut times = Vec::new();
    for i in 0..REPEATS + 3 {
        let watch = gpu.stopwatch()?;
        work(i)?;
        let time = watch.stop()?;
        if i >= 3 {
            times.push(time);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// A buffer of random numbers of the layout's element type; for e4m3 the scales are sane as well.
fn random(gpu: &Gpu, rng: &mut StdRng, shape: KvShape, layout: &Layout, count: usize) -> Result<Buffer<u8>, GpuError> {
    // A mebibyte of numbers, repeated: the kernels' speed does not depend on more randomness than that.
    let numbers: Vec<u8> = (0..1 << 20)
        .map(|i| match (shape.dtype, i % 2) {
            (Dtype::E4m3, _) => rng.random_range(0..0x70) | (rng.random_range(0..2) << 7),
            (_, 0) => rng.random(),
            // The high byte of a bf16 or f16 near 1.
            (_, _) => rng.random_range(0x3c..0x40) | (rng.random_range(0..2) << 7),
        })
        .collect();
    let mut host: Vec<u8> = numbers.iter().copied().cycle().take(layout.bytes * count).collect();
    if shape.dtype == Dtype::E4m3 {
        for page in host.chunks_exact_mut(layout.bytes) {
            for scale in page[layout.k_scale..].chunks_exact_mut(4) {
                scale.copy_from_slice(&0.01f32.to_le_bytes());
            }
        }
    }
    gpu.upload(&host)
}

/// A paged pool, and its pages in random order: dealt out to as many sequences as there is room for.
struct Pool {
    bytes: Buffer<u8>,
    numbers: Vec<u32>,
}

impl Pool {
    fn new(gpu: &Gpu, rng: &mut StdRng, shape: KvShape, tokens: usize) -> Result<Self, GpuError> {
        let pages = tokens.div_ceil(PAGE_TOKENS);
        let mut numbers: Vec<u32> = (0..pages as u32).collect();
        numbers.shuffle(rng);
        Ok(Self {
            bytes: random(gpu, rng, shape, &Layout::block(shape, PAGE_TOKENS), pages)?,
            numbers,
        })
    }

    /// At most 16 sequences of `tokens` tokens that share no page.
    fn tables(&self, gpu: &Gpu, tokens: usize) -> Result<Vec<PageTable>, GpuError> {
        let sequences = self.numbers.chunks_exact(tokens.div_ceil(PAGE_TOKENS)).take(16);
        sequences.map(|numbers| PageTable::upload(gpu, numbers)).collect()
    }

    fn view<'a>(&'a self, shape: KvShape, table: &'a PageTable, tokens: usize) -> Result<KvView<'a>, GpuError> {
        KvView::paged(shape, &self.bytes, PAGE_TOKENS, table, tokens)
    }
}

/// All figures, or the group of the name `only`; the ceilings always.
pub(crate) fn run(gpu: &Gpu, seed: u64, only: Option<&str>) -> Result<Value, GpuError> {
    let mut rng = StdRng::seed_from_u64(seed);
    let copy = copy_ceiling(gpu)?;
    let pinned = pinned_ceiling(gpu)?;
    let q: Vec<f32> = (0..Q_HEADS * HEAD_DIM).map(|_| rng.random_range(-1.0..1.0)).collect();
    let q = gpu.upload(&q)?;
    let mut figures = json!({
        "gpu": gpu.name(),
        "multiprocessors": gpu.multiprocessors(),
        "seed": seed,
        "repeats": REPEATS,
        "shape": format!("{Q_HEADS} query heads, {KV_HEADS} KV heads, d {HEAD_DIM}, batch 1"),
        "ceilings": { "copy_gb_s": round(copy), "pinned_copy_to_host_gb_s": round(pinned) },
    });
    let mut group = |name: &str, measure: &mut dyn FnMut() -> Result<Value, GpuError>| {
        if only.is_none_or(|only| name == only) {
            figures[name] = measure()?;
        }
        Ok::<_, GpuError>(())
    };
    group("decode_full_cache", &mut || {
        let by_dtype = [Dtype::Bf16, Dtype::E4m3].map(|dtype| full_cache(gpu, &mut rng, dtype, &q, copy));
        by_dtype.into_iter().collect()
    })?;
    group("decode_retrieval_set", &mut || retrieval_set(gpu, &mut rng, &q))?;
    group("push", &mut || push(gpu, &mut rng, copy))?;
    group("scan", &mut || scan(gpu, &mut rng, &q))?;
    Ok(figures)
}

/// GB/s, read and written, of a large copy on the device by the driver.
fn copy_ceiling(gpu: &Gpu) -> Result<f64, GpuError> {
    let shape = shape(Dtype::Bf16);
    let tokens = 2 * TOKENS;
    let bytes = Layout::block(shape, tokens).bytes;
    let (from, mut to) = (gpu.zeros::<u8>(bytes)?, gpu.zeros::<u8>(bytes)?);
    let time = median(gpu, |_| gpu.copy(&from, &mut to, bytes))?;
    Ok(2.0 * bytes as f64 / time / 1e3)
}

fn pinned_ceiling(gpu: &Gpu) -> Result<f64, GpuError> {
    let bytes = 512 << 20;
    let from = gpu.zeros::<u8>(bytes)?;
    let mut to = gpu.pinned(bytes)?;
    let time = median(gpu, |_| gpu.copy_to_host(&from, &mut to, 0, bytes))?;
    Ok(bytes as f64 / time / 1e3)
}

fn full_cache(gpu: &Gpu, rng: &mut StdRng, dtype: Dtype, q: &Buffer<f32>, copy: f64) -> Result<Value, GpuError> {
    let shape = shape(dtype);
    let pool = Pool::new(gpu, rng, shape, 2 * TOKENS)?;
    let layout = Layout::block(shape, TOKENS);
    let block = random(gpu, rng, shape, &layout, 1)?;
    let mut decode = Decode::new(gpu, shape, Q_HEADS)?;
    let mut out = Partials::empty(gpu, 1, Q_HEADS, HEAD_DIM)?;
    let mut figures = serde_json::Map::new();
    for tokens in [4096, 32 * 1024, TOKENS] {
        let tables = pool.tables(gpu, tokens)?;
        let mut measure = |decode: &mut Decode, name: &str| {
            let time = median(gpu, |i| {
                let view = match name {
                    "paged" => pool.view(shape, &tables[i % tables.len()], tokens)?,
                    _ => KvView::block(shape, &block, TOKENS, tokens)?,
                };
                decode.attend(gpu, Query::f32(q), &[view], 0.088, &mut out)
            })?;
            let rate = Layout::block(shape, tokens).bytes as f64 / time / 1e3;
            Ok::<Value, GpuError>(json!({
                "us": round(time), "gb_s": round(rate), "of_copy": round(rate / copy),
            }))
        };
        let mut entry = serde_json::Map::new();
        entry.insert("paged".into(), measure(&mut decode, "paged")?);
        if tokens == TOKENS {
            entry.insert("contiguous".into(), measure(&mut decode, "contiguous")?);
        }
        figures.insert(format!("{tokens}"), entry.into());
    }
    Ok(json!({ "dtype": format!("{dtype:?}"), "by_tokens": figures }))
}

/// What a layer costs with a static set of 640 tokens and 2,048 retrieved rows per KV head: one launch, and the merge with a
/// partial that came from elsewhere. 32 layers in a graph, each with rows of its own.
fn retrieval_set(gpu: &Gpu, rng: &mut StdRng, q: &Buffer<f32>) -> Result<Value, GpuError> {
    const LAYERS: usize = 32;
    let shape = shape(Dtype::Bf16);
    let fixed = (0..LAYERS)
        .map(|_| Pool::new(gpu, rng, shape, 640))
        .collect::<Result<Vec<_>, _>>()?;
    let tables = fixed
        .iter()
        .map(|pool| PageTable::upload(gpu, &pool.numbers))
        .collect::<Result<Vec<_>, _>>()?;
    let layout = Layout::records(shape, 2048);
    let rows = (0..LAYERS)
        .map(|_| random(gpu, rng, shape, &layout, 1))
        .collect::<Result<Vec<_>, _>>()?;
    let mut decode = Decode::new(gpu, shape, Q_HEADS)?;
    let mut out = Partials::empty(gpu, 1, Q_HEADS, HEAD_DIM)?;
    let far = Partials::empty(gpu, 1, Q_HEADS, HEAD_DIM)?;
    let mut joined = Partials::empty(gpu, 1, Q_HEADS, HEAD_DIM)?;
    let mut figures = Vec::new();
    for merged in [false, true] {
        let mut layer = |i: usize| {
            let views = [
                fixed[i].view(shape, &tables[i], 640)?,
                KvView::records(shape, &rows[i], 2048, 2048)?,
            ];
            decode.attend(gpu, Query::f32(q), &views, 0.088, &mut out)?;
            if merged {
                merge(gpu, &[&out, &far], &mut joined)
            } else {
                Ok(())
            }
        };
        layer(0)?;
        let graph = gpu.record(|_| (0..LAYERS).try_for_each(&mut layer))?;
        let time = median(gpu, |_| graph.replay())?;
        figures.push(round(time / LAYERS as f64));
    }
    Ok(json!({
        "static_tokens": 640, "rows": 2048,
        "us_per_layer_in_graph": figures[0],
        "us_per_layer_in_graph_with_outside_partial": figures[1],
    }))
}

fn push(gpu: &Gpu, rng: &mut StdRng, copy: f64) -> Result<Value, GpuError> {
    let mut figures = serde_json::Map::new();
    let shape = shape(Dtype::Bf16);
    let pool = Pool::new(gpu, rng, shape, TOKENS)?;
    let table = PageTable::upload(gpu, &pool.numbers)?;
    for dtype in [Dtype::Bf16, Dtype::E4m3] {
        let target = KvShape { dtype, ..shape };
        let layout = Layout::block(target, TOKENS);
        let mut packed = gpu.zeros::<u8>(layout.bytes)?;
        let mut host = gpu.pinned(layout.bytes)?;
        let pack = |packed: &mut Buffer<u8>| {
            let mut to = KvViewMut::block(target, packed, TOKENS, TOKENS)?;
            copy_rows(gpu, &pool.view(shape, &table, TOKENS)?, &mut to)
        };
        let alone = median(gpu, |_| pack(&mut packed))?;
        let whole = median(gpu, |_| {
            pack(&mut packed)?;
            gpu.copy_to_host(&packed, &mut host, 0, layout.bytes)
        })?;
        let moved = (layout.bytes + Layout::block(shape, TOKENS).bytes) as f64;
        let name = format!("{:?}_to_{dtype:?}", Dtype::Bf16);
        figures.insert(
            name,
            json!({
                "pack_us": round(alone), "pack_of_copy": round(moved / alone / 1e3 / copy),
                "pack_and_copy_to_host_us": round(whole),
                "pushed_gb_s": round(layout.bytes as f64 / whole / 1e3),
            }),
        );
    }
    Ok(figures.into())
}

fn scan(gpu: &Gpu, rng: &mut StdRng, q: &Buffer<f32>) -> Result<Value, GpuError> {
    let shape = shape(Dtype::Bf16);
    let pool = Pool::new(gpu, rng, shape, 2 * TOKENS)?;
    let tables = pool.tables(gpu, TOKENS)?;
    let mut scores = gpu.zeros::<f32>(Q_HEADS * TOKENS)?;
    let mut best = gpu.zeros::<u32>(Q_HEADS * 2048)?;
    let scored = median(gpu, |i| {
        key_scores(
            gpu,
            Query::f32(q),
            Q_HEADS,
            &pool.view(shape, &tables[i % 2], TOKENS)?,
            0.088,
            &mut scores,
        )
    })?;
    let selected = median(gpu, |_| top_k(gpu, &scores, Q_HEADS, 2048, &mut best))?;
    let moved = (Layout::block(shape, TOKENS).bytes / 2 + 4 * Q_HEADS * TOKENS) as f64;
    Ok(json!({
        "tokens": TOKENS, "k": 2048,
        "key_scores_us": round(scored), "key_scores_gb_s": round(moved / scored / 1e3),
        "top_k_us": round(selected),
    }))
}

pub(crate) fn round(x: f64) -> f64 {
    let scale = if x.abs() < 10.0 { 1e3 } else { 1e1 };
    (x * scale).round() / scale
}
