//! Throughput of the kernels at the shapes of SmolLM2-135M, as a table on standard output.
//!
//! `cargo run --release -p kvasir-simd --example throughput [threads] [scalar|avx2|avx512] [section]`; sections are the functions that `main` names.
#![expect(clippy::print_stdout, reason = "a table to read is what this program is for")]

mod coded;
mod scattered;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use half::f16;
use kvasir_simd::{
    Activations, Isa, Partial, Pool, Segment, Weights, attend, log_sum_exp2, matmul, scores, top_k, weighted_values,
};

/// (rows, cols) of the products of a layer, q, k and v, output, gate and up, down.
const PRODUCTS: [(usize, usize); 7] = [
    (576, 576),
    (192, 576),
    (192, 576),
    (576, 576),
    (1536, 576),
    (1536, 576),
    (576, 1536),
];
const HEAD_DIM: usize = 64;
const CONTEXT: usize = 4096;
const PAGE: usize = 64;
/// Keys of a run of the scan.
const RUN: usize = 1 << 14;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().and_then(|threads| threads.parse().ok()).unwrap_or(1);
    let isa = match arguments.next().as_deref() {
        Some("scalar") => Isa::limit(Isa::Scalar),
        Some("avx2") => Isa::limit(Isa::Avx2),
        _ => Isa::active(),
    };
    let pool = Pool::new(threads);
    println!("{isa:?}, {threads} threads");
    let section = arguments.next();
    let sections: [(&str, &dyn Fn()); 6] = [
        ("products", &|| products(&pool)),
        ("attention", &attention),
        ("scan", &scan),
        ("coded", &coded::coded),
        ("scattered", &scattered::scattered),
        ("regions", &|| regions(&pool)),
    ];
    for (name, run) in sections {
        if section.as_deref().is_none_or(|section| section == name) {
            run();
        }
    }
}

/// The fastest of runs over half a second: what the code can do when nothing else runs.
fn fastest(mut run: impl FnMut()) -> f64 {
    let begun = Instant::now();
    let mut best = f64::INFINITY;
    while begun.elapsed() < Duration::from_millis(500) {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn wave(len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 2_654_435_761) % 1_000_003) as f32 / 500_001.5 - 1.0)
        .collect()
}

fn halves(len: usize) -> Vec<f16> {
    wave(len).into_iter().map(f16::from_f32).collect()
}

fn products(pool: &Pool) {
    // Few tokens stream eight layers, more than the second cache holds, as a real step does; many tokens take one.
    let layer = || PRODUCTS.map(|(rows, cols)| random_q4_1(rows, cols));
    let layers: Vec<_> = (0..8).map(|_| layer()).collect();
    for tokens in [1, 8, 64, 256] {
        let layers = &layers[..if tokens > 8 { 1 } else { layers.len() }];
        let macs: usize = layers
            .iter()
            .flatten()
            .map(|weights| weights.rows() * weights.cols())
            .sum();
        let bytes: usize = layers.iter().flatten().map(Weights::bytes).sum();
        let inputs = [576, 1536].map(|cols| {
            let mut x = Activations::default();
            x.quantize(&wave(tokens * cols), cols, pool);
            x
        });
        let mut out = vec![0.0; tokens * 1536];
        let mut product = |weights: &Weights| {
            let x = if weights.cols() == 576 { &inputs[0] } else { &inputs[1] };
            matmul(weights, x, black_box(&mut out[..tokens * weights.rows()]), pool);
        };
        // Runs of many tokens are long: one matrix at a time, so that a run is not cut by another process.
        let seconds = if tokens > 8 {
            layers
                .iter()
                .flatten()
                .map(|weights| fastest(|| product(weights)))
                .sum()
        } else {
            fastest(|| layers.iter().flatten().for_each(&mut product))
        };
        let gops = 2.0 * (macs * tokens) as f64 / seconds / 1e9;
        println!(
            "matmul Q4_1, {tokens:3} tokens: {gops:7.1} GOP/s, weights {:5.1} GB/s",
            bytes as f64 / seconds / 1e9
        );
        let x = wave(tokens * 576);
        let mut quantised = Activations::default();
        let seconds = fastest(|| quantised.quantize(&x, 576, pool));
        println!(
            "quantise,    {tokens:3} tokens: {:7.2} G elements/s",
            x.len() as f64 / seconds / 1e9
        );
    }
    let output = Weights::from_f32(&wave(49_152 * 576), 49_152, 576);
    let Ok(output) = output else { return };
    let mut x = Activations::default();
    x.quantize(&wave(576), 576, pool);
    let mut out = vec![0.0; 49_152];
    let seconds = fastest(|| matmul(&output, &x, &mut out, pool));
    println!(
        "output Q8_0,   1 token : {:7.2} ms, {:5.1} GB/s",
        seconds * 1e3,
        output.bytes() as f64 / seconds / 1e9
    );
}

fn random_q4_1(rows: usize, cols: usize) -> Weights {
    let mut raw: Vec<u8> = (0..rows * cols / 32 * 20)
        .map(|i| ((i * 2_654_435_761) >> 7) as u8)
        .collect();
    for block in raw.chunks_exact_mut(20) {
        block[..2].copy_from_slice(&f16::from_f32(0.01).to_le_bytes());
        block[2..4].copy_from_slice(&f16::from_f32(-0.08).to_le_bytes());
    }
    match Weights::from_q4_1(&raw, rows, cols) {
        Ok(weights) => weights,
        Err(error) => unreachable!("a matrix of whole blocks: {error}"),
    }
}

fn attention() {
    let (keys, values) = (halves(CONTEXT * HEAD_DIM), halves(CONTEXT * HEAD_DIM));
    let pages = keys
        .chunks(PAGE * HEAD_DIM)
        .zip(values.chunks(PAGE * HEAD_DIM))
        .enumerate();
    let segments: Vec<_> = pages
        .map(|(page, (keys, values))| Segment {
            keys,
            values,
            position: page * PAGE,
        })
        .collect();
    for (name, tokens) in [("decode ", 1), ("prefill", 32)] {
        let rows = tokens * 3;
        let visible: Vec<usize> = (0..rows).map(|row| CONTEXT - tokens + row / 3 + 1).collect();
        let q = wave(rows * HEAD_DIM);
        let mut out = Partial::default();
        let seconds = fastest(|| attend(&q, &visible, HEAD_DIM, 0.125, &segments, &mut out));
        let gflops = 4.0 * (rows * CONTEXT * HEAD_DIM) as f64 / seconds / 1e9;
        let gigabytes = 4.0 * (CONTEXT * HEAD_DIM) as f64 / seconds / 1e9;
        println!(
            "attend {name}, {rows:3} rows of {CONTEXT} keys: {:8.1} us, {gflops:5.1} GFLOP/s, KV {gigabytes:5.2} GB/s",
            seconds * 1e6
        );
    }
}

fn scan() {
    let n = 1 << 18;
    let keys = halves(n * HEAD_DIM);
    // Run over run of 16 Ki keys, so that a run is short and none finds its keys in a cache.
    let runs: Vec<_> = keys.chunks(RUN * HEAD_DIM).collect();
    let mut next = (0..runs.len()).cycle();
    let read = fastest(|| {
        let run = runs[next.next().unwrap_or(0)];
        black_box(run.iter().fold(0_u16, |sum, key| sum.wrapping_add(key.to_bits())));
    });
    let gigabytes = |seconds: f64| 2.0 * (RUN * HEAD_DIM) as f64 / seconds / 1e9;
    println!("plain read of {} MiB: {:5.1} GB/s", keys.len() >> 19, gigabytes(read));
    for heads in [1, 3, 8] {
        let mut out = vec![0.0; heads * RUN];
        let q = wave(heads * HEAD_DIM);
        let seconds = fastest(|| scores(&q, runs[next.next().unwrap_or(0)], HEAD_DIM, 0.125, &mut out));
        println!("scores, {heads} heads: {:5.1} GB/s", gigabytes(seconds));
    }
    let mut out = vec![0.0; n];
    scores(&wave(HEAD_DIM), &keys, HEAD_DIM, 3.0, &mut out);
    let mut chosen = Vec::new();
    let each = |seconds: f64| seconds * 1e9 / n as f64;
    println!(
        "top_k 256 of {n}: {:.2} ns a score",
        each(fastest(|| top_k(&out, 256, &mut chosen)))
    );
    println!(
        "log_sum_exp2: {:.2} ns a score",
        each(fastest(|| {
            black_box(log_sum_exp2(&out));
        }))
    );
    let lse = log_sum_exp2(&out);
    let mut o = [0.0; HEAD_DIM];
    let seconds = fastest(|| weighted_values(&out, &chosen, lse, &keys, HEAD_DIM, &mut o));
    println!("weighted_values of 256 rows: {:.1} us", seconds * 1e6);
}

fn regions(pool: &Pool) {
    const LOOPS: u32 = 10_000;
    let start = Instant::now();
    for _ in 0..LOOPS {
        pool.run(pool.threads(), &|index| {
            black_box(index);
        });
    }
    println!(
        "an empty parallel loop: {:.2} us on average",
        start.elapsed().as_secs_f64() * 1e6 / f64::from(LOOPS)
    );
}
