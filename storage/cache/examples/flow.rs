//! Replays a trace of block ids through the cache under each admission and promotion: hit rates by tier and bytes written to disk.
//!
//! `cargo run -p kvasir-cache --example flow -- conversation_trace.jsonl [requests]`
//!
//! The trace is in the format of Mooncake's published ones (FAST '25): a JSON object per line with `input_length` in tokens and
//! `hash_ids`, one per 512 tokens, equal ids being equal prefixes. Each request matches its whole blocks under a lease, gets what
//! is hit, and puts the rest. A block stands for 512 tokens and takes 2 KiB here, so a tier is sized in blocks.
#![expect(clippy::print_stdout, reason = "an example's output is its purpose")]

use std::{error::Error, path::Path, time::Duration};

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum, Dtype, KvSchema, RopeStyle, Tenant};
use kvasir_cache::{Admission, BlockCache, CacheConfig, GetOptions, GetOutcome, PutOutcome, Tier};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Tokens of a block of the trace.
const TRACE_TOKENS: usize = 512;
/// Blocks that fit in memory: a page and bookkeeping each.
const HOST_BLOCKS: u64 = 4_000;
/// Blocks that fit on disk.
const DISK_BLOCKS: u64 = 40_000;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments
        .next()
        .ok_or("say which trace: a file of JSON lines with hash_ids")?;
    let most = arguments.next().map_or(Ok(usize::MAX), |text| text.parse())?;
    let text = std::fs::read_to_string(&path)?;
    let requests: Vec<Vec<u64>> = text.lines().take(most).map(whole_blocks).collect::<Result<_>>()?;
    let blocks: usize = requests.iter().map(Vec::len).sum();
    println!(
        "{path}: {} requests, {blocks} blocks; memory for {HOST_BLOCKS}, disk for {DISK_BLOCKS}",
        requests.len()
    );
    println!(
        "| admission | promoted at read | hit % | in memory % | on disk % | written to disk, MiB | read from disk, blocks |"
    );
    println!("|---|---|---|---|---|---|---|");
    for (name, admission) in [("always", Admission::Always), ("reuse", Admission::Reuse)] {
        for promote_after_reads in [1, 2] {
            let [host, disk, written, read] = replay(&requests, admission, promote_after_reads)?;
            let share = |count: u64| 100.0 * count as f64 / blocks as f64;
            println!(
                "| {name} | {promote_after_reads} | {:.1} | {:.1} | {:.1} | {:.1} | {read} |",
                share(host + disk),
                share(host),
                share(disk),
                written as f64 / 1048576.0,
            );
        }
    }
    Ok(())
}

/// Ids of a request's whole blocks.
fn whole_blocks(line: &str) -> Result<Vec<u64>> {
    let after = |name: &str| {
        let at = line
            .find(name)
            .ok_or_else(|| format!("no {name} in a line of the trace"))?;
        Ok::<_, String>(line[at + name.len()..].trim_start_matches(['"', ':', ' ', '[']))
    };
    let tokens = after("input_length")?;
    let tokens: usize = tokens[..tokens.find(|c: char| !c.is_ascii_digit()).unwrap_or(tokens.len())].parse()?;
    let ids = after("hash_ids")?;
    let ids = &ids[..ids.find(']').ok_or("hash_ids do not end")?];
    let mut ids: Vec<u64> = ids
        .split(',')
        .filter(|id| !id.trim().is_empty())
        .map(|id| id.trim().parse())
        .collect::<std::result::Result<_, _>>()?;
    ids.truncate(tokens / TRACE_TOKENS);
    Ok(ids)
}

/// Blocks got from memory and from disk, payload bytes written to disk, and blocks read from it.
fn replay(requests: &[Vec<u64>], admission: Admission, promote_after_reads: u32) -> Result<[u64; 4]> {
    let folder = tempfile::tempdir()?;
    let cache = open(folder.path(), admission, promote_after_reads)?;
    let schema = schema();
    let namespace = cache.open_namespace(&Tenant::new("trace").ok_or("a name")?, &schema)?;
    let (mut host, mut disk) = (0, 0);
    for ids in requests {
        let chain: Vec<BlockHash> = ids.iter().map(|id| name(*id)).collect();
        let found = cache.match_prefix(namespace, &chain, Some(Duration::from_secs(60)))?;
        let keys: Vec<_> = chain.iter().map(|hash| namespace.block(*hash).layer(0)).collect();
        let options = GetOptions {
            lease: found.lease,
            ..GetOptions::default()
        };
        for outcome in cache.get_many(&keys[..found.hit_blocks], &options)? {
            match outcome {
                GetOutcome::Hit { tier: Tier::Host, .. } => host += 1,
                GetOutcome::Hit { .. } => disk += 1,
                _ => {}
            }
        }
        if let Some(lease) = found.lease {
            cache.release(lease);
        }
        for key in &keys[found.hit_blocks..] {
            let payload = Bytes::from(key.to_bytes().repeat(32)).slice(..schema.layer_block_bytes());
            let checksum = Checksum::of(&payload);
            while cache.put(*key, payload.clone(), checksum)? == PutOutcome::Busy {
                cache.flush()?;
            }
        }
    }
    cache.flush()?;
    let stats = cache.stats();
    Ok([host, disk, stats.disk.payload_bytes_written, stats.disk_reads])
}

fn open(folder: &Path, disk_admission: Admission, promote_after_reads: u32) -> Result<BlockCache> {
    Ok(BlockCache::open(CacheConfig {
        host_bytes_max: HOST_BLOCKS * (4096 + 416),
        disk_bytes_max: DISK_BLOCKS * 2200,
        segment_bytes: 4 << 20,
        flush_queue_bytes_max: 8 << 20,
        // One layer: what is ahead of it is nothing. What a lease brings first would count as memory.
        prefetch_layers: 0,
        disk_admission,
        promote_after_reads,
        ..CacheConfig::in_dir(folder)
    })?)
}

fn name(id: u64) -> BlockHash {
    let mut bytes = [0; 32];
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        // Spread like a hash.
        let spread = (id + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(16 * i as u32);
        word.copy_from_slice(&(spread ^ id).to_le_bytes());
    }
    BlockHash::from_bytes(bytes)
}

/// 2 KiB a block.
fn schema() -> KvSchema {
    KvSchema {
        model: "trace".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: 1,
        kv_heads: 1,
        head_dim: 8,
        block_tokens: 64,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 1e4,
        rope_dims: 8,
        rope_style: RopeStyle::Halves,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "trace/1".to_owned(),
    }
}
