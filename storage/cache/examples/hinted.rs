//! What a hint leaves behind its query: times of a search, of one that is done ahead, and of what the query then still waits for.
//!
//! `cargo run -p kvasir-cache --example hinted [tokens] [rounds] [layers that wait to be clustered]`
//!
//! Thirty layers of SmolLM2's shape (3 KV heads of 64, 3 query heads each) over a made-up context with the statistics of attention. Layers are
//! asked one after another, each with other memory, so that caches are as cold as while decoding; between a hint's search and its query as
//! much other memory is read as a layer has weights. A forecast is off by 0.3 of a query's length, as one layer ahead. Medians of single calls
//! on one thread, the three kinds in turn.
#![expect(clippy::print_stdout, reason = "an example's output is its purpose")]

use std::{
    error::Error,
    hint::black_box,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use half::f16;
use kvasir_block::{BlockHash, Checksum, Dtype, KvSchema, LayerBlockLayout, RopeStyle, Tenant};
use kvasir_cache::{
    BlockCache, CacheConfig, CacheStats,
    retrieve::{AttendOptions, Context, Form, IndexChoice, Query},
};
use kvasir_index::{
    Basis, Moments,
    evaluate::synthetic::{Shape, Synthetic},
};
use kvasir_simd::Pool;
use rand::{Rng, SeedableRng, rngs::SmallRng};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const LAYERS: u16 = 30;
const KV_HEADS: usize = 3;
const GROUP: usize = 3;
const HEAD_DIM: usize = 64;
const BLOCK: usize = 64;
/// Elements of one layer's weights, about.
const WEIGHTS: usize = 1 << 20;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (tokens, rounds, queue) = (number(6016)?.max(2048) / BLOCK * BLOCK, number(12)?, number(64)?);
    let pool = Pool::new(1);
    let heads = (0..KV_HEADS as u64).map(|seed| {
        let shape = Shape {
            tokens,
            head_dim: HEAD_DIM,
            heads: GROUP,
            theta: Shape::theta_for(tokens),
            seed,
        };
        Synthetic::generate(shape, &pool)
    });
    let heads = heads.collect::<std::result::Result<Vec<_>, _>>()?;
    let dir = tempfile::tempdir()?;
    let cache = cache(dir.path(), &heads, queue)?;
    let context = open(&cache, &heads, tokens)?;
    let weights = vec![1_u16; WEIGHTS];
    let (mut fresh, mut ahead, mut behind) = (Vec::new(), Vec::new(), Vec::new());
    let mut rng = SmallRng::seed_from_u64(9);
    // The first round reads and sketches the blocks; then they are clustered.
    for round in 0..=rounds {
        let token = tokens - 1 - round;
        let q: Vec<f32> = heads.iter().flat_map(|head| head.recording().group(token)).collect();
        let predicted = off(&q, &mut rng);
        for layer in 0..LAYERS {
            let begun = Instant::now();
            black_box(cache.retrieve(&context, &query(layer, &q))?);
            let alone = begun.elapsed();
            let other = (layer + LAYERS / 2) % LAYERS;
            let begun = Instant::now();
            let search = cache.search_ahead(&context, &query(other, &predicted), &Arc::new(AtomicBool::new(false)))?;
            let search = search.ok_or("a hint gains nothing here")?;
            search.work();
            let parked = search.wait().ok_or("nothing was kept")?;
            let before = begun.elapsed();
            black_box(weights.iter().fold(0, |sum: u16, weight| sum.wrapping_add(*weight)));
            let begun = Instant::now();
            let (_, report) = cache.retrieve_parked(&context, &query(other, &q), parked)?;
            if round > 0 {
                fresh.push(alone.as_secs_f64() * 1e6);
                if report.heads_ahead as usize == KV_HEADS {
                    ahead.push(before.as_secs_f64() * 1e6);
                    behind.push(begun.elapsed().as_secs_f64() * 1e6);
                }
            }
        }
        if round == 0 {
            until_clustered(&cache);
        }
    }
    let (served, of) = (behind.len(), fresh.len());
    let [fresh, ahead, behind] = [fresh, ahead, behind].map(median);
    println!("{tokens} tokens, {of} searches of each kind, {served} forecasts served all KV heads");
    println!("without a hint {fresh:.0} us; with one {ahead:.0} us ahead and {behind:.0} us behind the query");
    println!(
        "hidden: {:.0} % of what a hinted search takes",
        100.0 * ahead / (ahead + behind)
    );
    Ok(())
}

/// Waits until the layers that were asked for are clustered.
fn until_clustered(cache: &BlockCache) {
    let left = |stats: CacheStats| stats.clusters_running + stats.clusters_waiting;
    while left(cache.stats()) > 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let stats = cache.stats();
    println!(
        "{} layers clustered in {:.1} ms each",
        stats.clustered_layers,
        stats.cluster_cpu_micros as f64 / 1e3 / stats.clustered_layers.max(1) as f64
    );
}

fn query(layer: u16, q: &[f32]) -> Query<'_> {
    Query {
        layer,
        q,
        form: Form::Attend {
            target_mass: 0.99,
            k_max: None,
            options: AttendOptions {
                tail: true,
                ..AttendOptions::default()
            },
        },
        excluded: &[],
        deadline: None,
        local_lse: &[],
    }
}

/// A forecast that is off by 0.3 of each query's length.
fn off(q: &[f32], rng: &mut SmallRng) -> Vec<f32> {
    let length = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
    let mut out = Vec::with_capacity(q.len());
    for row in q.chunks_exact(HEAD_DIM) {
        let noise: Vec<f32> = row.iter().map(|_| rng.random_range(-1.0..1.0)).collect();
        let factor = 0.3 * length(row) / length(&noise);
        out.extend(row.iter().zip(&noise).map(|(q, noise)| q + factor * noise));
    }
    out
}

fn cache(dir: &std::path::Path, heads: &[Synthetic], cluster_queue_max: usize) -> Result<BlockCache> {
    let cache = BlockCache::open(CacheConfig {
        host_bytes_max: 1 << 30,
        disk_bytes_max: 2 << 30,
        segment_bytes: 64 << 20,
        flush_queue_bytes_max: 1 << 30,
        context_bytes_max: 1 << 30,
        cluster_queue_max,
        ..CacheConfig::in_dir(dir)
    })?;
    let namespace = cache.open_namespace(&Tenant::new("default").ok_or("a tenant's name")?, &schema())?;
    let mut bases = Vec::new();
    for head in heads {
        let (recording, mut moments) = (head.recording(), Moments::new(HEAD_DIM));
        moments.add_keys(recording.keys);
        (0..recording.tokens())
            .step_by(8)
            .for_each(|token| moments.add_queries(&recording.group(token)));
        bases.push(moments.basis(Basis::RANK)?.basis);
    }
    let basis = Basis {
        model: schema().model_fingerprint(),
        layers: LAYERS.into(),
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        rank: Basis::RANK,
        heads: (0..LAYERS).flat_map(|_| bases.clone()).collect(),
    };
    cache.set_basis(namespace, &basis.encode())?;
    Ok(cache)
}

fn open(cache: &BlockCache, heads: &[Synthetic], tokens: usize) -> Result<Context> {
    let namespace = cache.open_namespace(&Tenant::new("default").ok_or("a tenant's name")?, &schema())?;
    let layout: LayerBlockLayout = schema().layout();
    let mut chain = Vec::new();
    for block in 0..tokens / BLOCK {
        let mut hash = [0; 32];
        hash[..8].copy_from_slice(&(block as u64).to_le_bytes());
        let hash = BlockHash::from_bytes(hash);
        let mut halves = vec![f16::ZERO; layout.elements()];
        let rows = block * BLOCK * HEAD_DIM..(block + 1) * BLOCK * HEAD_DIM;
        for (kv_head, head) in heads.iter().enumerate() {
            let recording = head.recording();
            halves[layout.keys(kv_head)].copy_from_slice(&recording.keys[rows.clone()]);
            halves[layout.values(kv_head)].copy_from_slice(&recording.values[rows.clone()]);
        }
        let payload: bytes::Bytes = halves.iter().flat_map(|half| half.to_le_bytes()).collect();
        for layer in 0..LAYERS {
            let key = namespace.block(hash).layer(layer);
            cache.put(key, payload.clone(), Checksum::of(&payload))?;
        }
        chain.push(hash);
    }
    Ok(cache.open_context(namespace, &chain, KV_HEADS * GROUP, 0.125, IndexChoice::Best)?)
}

fn schema() -> KvSchema {
    KvSchema {
        model: "shape of SmolLM2-135M".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: LAYERS,
        kv_heads: KV_HEADS as u16,
        head_dim: HEAD_DIM as u16,
        block_tokens: BLOCK as u16,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 1e5,
        rope_dims: HEAD_DIM as u16,
        rope_style: RopeStyle::Halves,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "test/1".to_owned(),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
