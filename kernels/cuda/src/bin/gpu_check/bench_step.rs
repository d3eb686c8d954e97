//! The speed of what a step has besides products and decode: drawing tokens, and prefill of several sequences at once.

use kvasir_cuda::{
    DeviceTiles, Dtype, Gpu, GpuError, KvShape, KvView, Layout, PageTable, Prefill, PrefillSequence, Products, Query,
    SampleRow, SampleRows, noise,
};
use rand::{Rng, rngs::StdRng, seq::SliceRandom};
use serde_json::{Value, json};

use crate::{
    bench::{median, round},
    cases::numbers,
};

/// Of Llama 3.
const VOCAB: usize = 128_256;
const PAGE_TOKENS: usize = 64;

/// Microseconds in a graph, the copy of the tokens to the host included.
pub(crate) fn sampling(gpu: &Gpu, rng: &mut StdRng) -> Result<Vec<Value>, GpuError> {
    let mut figures = Vec::new();
    // Weights that fall as words' frequencies do, and as flat as a temperature of 2 over noise makes them.
    let mut ranks: Vec<f32> = (0..VOCAB).map(|rank| -1.2 * (rank as f32 + 1.0).ln()).collect();
    ranks.shuffle(rng);
    let bell = numbers(rng, VOCAB);
    for (name, logits) in [("zipf", &ranks), ("bell", &bell)] {
        for rows in [1, 8, 32] {
            let all: Vec<f32> = logits.iter().copied().cycle().take(rows * VOCAB).collect();
            let on_device = gpu.upload(&all)?;
            let mut sample = SampleRows::new(gpu, VOCAB, rows)?;
            for (how, temperature, top_p) in [("greedy", 0.0, 1.0), ("top_p_0.9", 0.8, 0.9), ("all", 0.8, 1.0)] {
                let set: Vec<SampleRow> = (0..rows)
                    .map(|_| SampleRow {
                        temperature,
                        top_p,
                        uniform: rng.random(),
                    })
                    .collect();
                sample.set(gpu, &set)?;
                sample.sample(gpu, &on_device, rows)?;
                let graph = gpu.record(|gpu| sample.sample(gpu, &on_device, rows))?;
                let time = median(gpu, |_| graph.replay())?;
                figures.push(json!({"logits": name, "rows": rows, "how": how, "us": round(time)}));
            }
        }
    }
    Ok(figures)
}

/// Milliseconds of dense prefill of sequences in pages, in one launch and in one each.
pub(crate) fn batches(gpu: &Gpu, rng: &mut StdRng) -> Result<Vec<Value>, GpuError> {
    let (shape, q_heads) = (
        KvShape {
            dtype: Dtype::F16,
            kv_heads: 8,
            head_dim: 128,
        },
        32,
    );
    let tiles = DeviceTiles::dense(gpu, q_heads)?;
    let mut figures = Vec::new();
    for (count, tokens) in [(4, 2048), (16, 512), (64, 128)] {
        let pages = count * tokens / PAGE_TOKENS;
        let mut random = |len| {
            let mut to = gpu.zeros::<u16>(len)?;
            noise(gpu, shape.dtype, &mut to, rng.random(), 1.0)?;
            Ok::<_, GpuError>(to)
        };
        let pool = random(pages * Layout::block(shape, PAGE_TOKENS).bytes / 2)?;
        let elements = count * tokens * q_heads * shape.head_dim;
        let q = random(elements)?;
        let (mut out, mut lse) = (gpu.zeros::<u16>(elements)?, gpu.zeros::<f32>(count * tokens * q_heads)?);
        let mut numbers: Vec<u32> = (0..pages as u32).collect();
        numbers.shuffle(rng);
        let tables = numbers
            .chunks_exact(tokens / PAGE_TOKENS)
            .map(|numbers| PageTable::upload(gpu, numbers))
            .collect::<Result<Vec<_>, _>>()?;
        let sequences = tables
            .iter()
            .enumerate()
            .map(|(i, table)| {
                let view = KvView::paged(shape, &pool, PAGE_TOKENS, table, tokens)?;
                let rows = i * tokens..(i + 1) * tokens;
                Ok(PrefillSequence { rows, view })
            })
            .collect::<Result<Vec<_>, GpuError>>()?;
        let prefill = Prefill {
            rows: count * tokens,
            q_heads,
            scale: 0.088,
            products: Products::best(gpu),
        };
        let query = Query::bits(&q, shape.dtype);
        let mut time = |at_once: usize| {
            median(gpu, |_| {
                sequences
                    .chunks(at_once)
                    .try_for_each(|some| prefill.attend_batch(gpu, query, some, &tiles, &mut out, 0, &mut lse))
            })
        };
        let (together, apart) = (time(count)?, time(1)?);
        figures.push(json!({
            "sequences": count, "tokens_each": tokens,
            "one_launch_us": round(together), "one_launch_each_us": round(apart),
        }));
    }
    Ok(figures)
}
