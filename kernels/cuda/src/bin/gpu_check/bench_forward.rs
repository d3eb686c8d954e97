//! The speed of products and of a step's attention, at the shapes of Llama-3-8B; inputs are noise.

use kvasir_cuda::{
    Buffer, DecodeRows, Dtype, Gpu, GpuError, KvShape, Layout, Matrix, Rows, RowsOut, StepLimits, StepRow, StepRows,
    Sums, linear, noise,
};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};
use serde_json::{Value, json};

use crate::{
    bench::{median, round},
    bench_step,
};

/// Results and columns of the matrices of a layer: query, key and value; output; gate and up; down.
const MATRICES: [(&str, usize, usize); 4] = [
    ("qkv", 6144, 4096),
    ("output", 4096, 4096),
    ("gate_up", 28_672, 4096),
    ("down", 4096, 14_336),
];
const PAGE_TOKENS: usize = 64;

fn random(gpu: &Gpu, rng: &mut StdRng, dtype: Dtype, len: usize) -> Result<Buffer<u16>, GpuError> {
    let mut out = gpu.zeros(len)?;
    noise(gpu, dtype, &mut out, rng.random(), 1.0)?;
    Ok(out)
}

pub(crate) fn run(gpu: &Gpu, rng: &mut StdRng) -> Result<Value, GpuError> {
    let (mut many, mut few) = (Vec::new(), Vec::new());
    for dtype in [Dtype::F16, Dtype::Bf16] {
        for (name, n, k) in MATRICES {
            // Rotated past the L2 cache.
            let copies = (200usize << 20).div_ceil(2 * n * k).max(2);
            let matrices = (0..copies)
                .map(|_| Matrix::noise(gpu, dtype, n, k, rng.random(), 1.0))
                .collect::<Result<Vec<_>, _>>()?;
            let mut measure = |kind: Rows, m: usize| {
                let (x, mut out) = (random(gpu, rng, dtype, m * k)?, gpu.zeros::<u16>(m * n)?);
                median(gpu, |i| {
                    let sums = Sums::Store(&mut out);
                    linear(gpu, kind, &matrices[i % copies], &x, 0..m, sums, 0)
                })
            };
            for m in [128, 512, 2048, 4096, 8192] {
                let time = measure(Rows::Many, m)?;
                let rate = 2.0 * (m * n * k) as f64 / time / 1e6;
                many.push(json!({
                    "dtype": format!("{dtype:?}"), "matrix": name, "rows": m, "us": round(time), "tflop_s": round(rate),
                }));
            }
            for m in [1, 8, 16, 32] {
                let time = in_a_graph(gpu, rng, &matrices, m)?;
                let rate = (2 * n * k) as f64 / time / 1e6;
                few.push(json!({
                    "dtype": format!("{dtype:?}"), "matrix": name, "rows": m, "us": round(time), "tb_s": round(rate),
                }));
            }
        }
    }
    let mut rows = Vec::new();
    for (count, sees) in [(1, 128 * 1024), (8, 16 * 1024), (32, 4096), (32, 16 * 1024)] {
        rows.push(step_rows(gpu, rng, count, sees)?);
    }
    let (sampling, batches) = (bench_step::sampling(gpu, rng)?, bench_step::batches(gpu, rng)?);
    Ok(json!({
        "gpu": gpu.name(), "many": many, "few": few, "decode_rows": rows,
        "sampling": sampling, "prefill_of_several": batches,
    }))
}

/// Microseconds of a product of a few rows where many follow each other in a graph, as decode runs them.
fn in_a_graph(gpu: &Gpu, rng: &mut StdRng, matrices: &[Matrix], m: usize) -> Result<f64, GpuError> {
    const LAUNCHES: usize = 12;
    let (n, k, dtype) = (matrices[0].rows(), matrices[0].columns(), matrices[0].dtype());
    let (x, mut out) = (random(gpu, rng, dtype, m * k)?, gpu.zeros::<u16>(m * n)?);
    let mut one = |i: usize| {
        let matrix = &matrices[i % matrices.len()];
        linear(gpu, Rows::Few, matrix, &x, 0..m, Sums::Store(&mut out), 0)
    };
    one(0)?;
    let graph = gpu.record(|_| (0..LAUNCHES).try_for_each(&mut one))?;
    Ok(median(gpu, |_| graph.replay())? / LAUNCHES as f64)
}

fn step_rows(gpu: &Gpu, rng: &mut StdRng, count: usize, sees: usize) -> Result<Value, GpuError> {
    let shape = KvShape {
        dtype: Dtype::F16,
        kv_heads: 8,
        head_dim: 128,
    };
    let blocks = sees / PAGE_TOKENS;
    let pages = count * blocks;
    let limits = StepLimits {
        vocab: 1,
        positions: sees + 1,
        pages,
        page_tokens: PAGE_TOKENS,
    };
    let mut numbers: Vec<u32> = (0..pages as u32).collect();
    numbers.shuffle(rng);
    let tables: Vec<Vec<u32>> = numbers.chunks_exact(blocks).map(<[u32]>::to_vec).collect();
    let set: Vec<StepRow> = (0..count)
        .map(|row| StepRow {
            table: row as u32,
            sees: sees as u32,
            ..StepRow::default()
        })
        .collect();
    let mut step = StepRows::new(gpu, limits, count, count, blocks)?;
    step.set(gpu, &set, &tables)?;
    let bytes = pages * Layout::block(shape, PAGE_TOKENS).bytes;
    let pool = random(gpu, rng, shape.dtype, bytes / 2)?;
    let q = random(gpu, rng, shape.dtype, count * 32 * 128)?;
    let mut out = gpu.zeros::<u16>(count * 32 * 128)?;
    let mut decode = DecodeRows::new(gpu, shape, 32, count)?;
    let time = median(gpu, |_| {
        decode.attend(gpu, &q, &step, 0..count, &pool, 0.09, RowsOut::Rounded(&mut out))
    })?;
    let rate = bytes as f64 / time / 1e6;
    Ok(json!({"rows": count, "tokens": sees, "us": round(time), "tb_s": round(rate)}))
}
