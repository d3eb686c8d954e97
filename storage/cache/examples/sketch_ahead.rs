//! What sketching costs the put path: processor time of a thread that puts, with and without sketches made ahead, and that of the
//! thread that makes them.
//!
//! `cargo run -p kvasir-cache --example sketch_ahead [layer blocks] [rounds]`
//!
//! One layer of Llama-3-8B's shape (8 KV heads of 128, 64 tokens: 256 KiB a layer block) of random halves, put one after another; each
//! round opens a cache with and one without, in turn, and the medians of all rounds are compared. Times are of threads, not of the
//! clock, so that a busy machine changes them little.
#![expect(clippy::print_stdout, reason = "an example's output is its purpose")]

use std::{error::Error, time::Duration};

use bytes::Bytes;
use half::f16;
use kvasir_block::{BlockHash, Checksum, Dtype, KvSchema, RopeStyle, Tenant};
use kvasir_cache::{BlockCache, CacheConfig, PutOutcome};
use kvasir_device::thread::cpu_time;
use kvasir_index::{Basis, HeadBasis};
use rand::{Rng, SeedableRng, rngs::SmallRng};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (blocks, rounds) = (number(512)?, number(5)?);
    let schema = schema();
    let mut rng = SmallRng::seed_from_u64(1);
    // Some that differ: their bytes are not in the processor's cache when they are put.
    let payloads: Vec<Bytes> = (0..64).map(|_| payload(&schema, &mut rng)).collect();
    let basis = basis(&schema, &mut rng).encode();
    let (mut with, mut without, mut sketched) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        without.push(round(&schema, &payloads, &basis, blocks, 0)?.0);
        let (put, sketch) = round(&schema, &payloads, &basis, blocks, 64 << 20)?;
        with.push(put);
        sketched.push(sketch);
    }
    let [with, without, sketched] = [with, without, sketched].map(median);
    println!("put, no sketches ahead:    {without:.1} us of processor time a layer block");
    println!(
        "put, sketches ahead:       {with:.1} us ({:+.2} %)",
        100.0 * (with / without - 1.0)
    );
    println!(
        "its sketch, in the background: {sketched:.1} us ({:.0} % of the put, if it were part of it)",
        100.0 * sketched / without
    );
    Ok(())
}

/// Microseconds of a put, and of a sketch.
fn round(
    schema: &KvSchema,
    payloads: &[Bytes],
    basis: &[u8],
    blocks: usize,
    sketch_bytes_max: u64,
) -> Result<(f64, f64)> {
    let dir = tempfile::tempdir()?;
    let cache = BlockCache::open(CacheConfig {
        host_bytes_max: 512 << 20,
        disk_bytes_max: 1 << 30,
        segment_bytes: 64 << 20,
        flush_queue_bytes_max: 1 << 30,
        sketch_bytes_max,
        ..CacheConfig::in_dir(dir.path())
    })?;
    let tenant = Tenant::new("default").ok_or("a tenant's name")?;
    let namespace = cache.open_namespace(&tenant, schema)?;
    cache.set_basis(namespace, basis)?;
    let mut used = Duration::ZERO;
    for block in 0..blocks {
        let payload = &payloads[block % payloads.len()];
        let mut hash = [0; 32];
        hash[..8].copy_from_slice(&(block as u64).to_le_bytes());
        let key = namespace.block(BlockHash::from_bytes(hash)).layer(0);
        let checksum = Checksum::of(payload);
        let begun = cpu_time();
        let outcome = cache.put(key, payload.clone(), checksum)?;
        used += cpu_time() - begun;
        if outcome != PutOutcome::Stored {
            return Err(format!("block {block} was not stored: {outcome:?}").into());
        }
    }
    let expected = if sketch_bytes_max > 0 { blocks as u64 } else { 0 };
    let mut stats = cache.stats();
    while stats.sketched_ahead + stats.sketches_dropped < expected {
        std::thread::sleep(Duration::from_millis(10));
        stats = cache.stats();
    }
    let each = stats.sketch_cpu_micros as f64 / stats.sketched_ahead.max(1) as f64;
    cache.close()?;
    Ok((used.as_secs_f64() * 1e6 / blocks as f64, each))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn payload(schema: &KvSchema, rng: &mut SmallRng) -> Bytes {
    let half = |rng: &mut SmallRng| f16::from_f32(rng.random_range(-2.0..2.0)).to_le_bytes();
    let elements = schema.layer_block_bytes() / 2;
    (0..elements).flat_map(|_| half(rng)).collect()
}

fn basis(schema: &KvSchema, rng: &mut SmallRng) -> Basis {
    let head_dim = usize::from(schema.head_dim);
    let mut random = |count: usize| -> Vec<f32> { (0..count).map(|_| rng.random_range(-0.1..0.1)).collect() };
    let heads = (0..schema.kv_heads).map(|_| HeadBasis {
        mean: random(head_dim),
        keys: random(Basis::RANK * head_dim),
        queries: random(Basis::RANK * head_dim),
        streaming: false,
    });
    Basis {
        model: schema.model_fingerprint(),
        layers: 1,
        kv_heads: schema.kv_heads.into(),
        head_dim,
        rank: Basis::RANK,
        heads: heads.collect(),
    }
}

fn schema() -> KvSchema {
    KvSchema {
        model: "shape of Llama-3-8B, one layer".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: 1,
        kv_heads: 8,
        head_dim: 128,
        block_tokens: 64,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 5e5,
        rope_dims: 128,
        rope_style: RopeStyle::Halves,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "example/1".to_owned(),
    }
}
