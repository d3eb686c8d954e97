//! Replays traces of block ids through the host tier under each policy, and prints how many blocks were hit.
//!
//! `cargo run -p kvasir-tier --example policies -- TRACE.jsonl...`, where a line has `"hash_ids": [..]`, the chain of a prompt,
//! as Mooncake's traces do. A prompt hits the longest prefix of its chain that is held; what is missing of it is then put. Every block is
//! one layer block of a page: only the number of blocks matters here.
#![expect(clippy::print_stdout, reason = "an example's output is its purpose")]

use std::{error::Error, fs};

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum, NamespaceId};
use kvasir_tier::{HostConfig, HostPolicy, HostTier, HugePages, Owner};

/// Blocks that a tier holds: from one in a hundred of a trace's to nearly all of them.
const SIZES: [u64; 6] = [1_000, 3_000, 10_000, 30_000, 60_000, 100_000];
/// What a block of one page costs in the tier, with its bookkeeping.
const BLOCK_BYTES: u64 = 4096 + 160 + 256;

fn main() -> Result<(), Box<dyn Error>> {
    for path in std::env::args().skip(1) {
        let chains = chains(&fs::read_to_string(&path)?);
        let asked: usize = chains.iter().map(Vec::len).sum();
        let mut known: Vec<_> = chains.iter().flatten().collect();
        known.sort_unstable();
        known.dedup();
        let best = 1.0 - known.len() as f64 / asked as f64;
        println!(
            "{path}: {} prompts, {asked} blocks, {} different; all kept: {best:.4}",
            chains.len(),
            known.len()
        );
        println!(
            "| blocks held | {} |",
            HostPolicy::ALL.map(HostPolicy::name).join(" | ")
        );
        println!("|---|{}", "---|".repeat(HostPolicy::ALL.len()));
        for blocks in SIZES {
            let mut rates = Vec::new();
            for policy in HostPolicy::ALL {
                rates.push(format!("{:.4}", replay(&chains, blocks, policy)? as f64 / asked as f64));
            }
            println!("| {blocks} | {} |", rates.join(" | "));
        }
    }
    Ok(())
}

/// Blocks that were hit.
fn replay(chains: &[Vec<BlockHash>], blocks: u64, policy: HostPolicy) -> Result<usize, Box<dyn Error>> {
    let mut host = HostTier::new(HostConfig {
        bytes_max: blocks * BLOCK_BYTES,
        policy,
        huge_pages: HugePages::Off,
    })?;
    let namespace = NamespaceId::from_bytes([0; 32]);
    let payload = Bytes::from_static(b"KV");
    let checksum = Checksum::of(&payload);
    let mut hits = 0;
    for chain in chains {
        host.note_chain(namespace, chain);
        let held = chain
            .iter()
            .take_while(|&&hash| host.layer_count(&namespace.block(hash)) > 0);
        let held = held.count();
        hits += held;
        for &hash in chain[..held].iter().rev() {
            host.touch(&namespace.block(hash));
        }
        // As while a prompt is computed: what it hit is leased.
        let leased = &chain[..held];
        for &hash in &chain[held..] {
            let key = namespace.block(hash).layer(0);
            let _full = host.insert(key, payload.clone(), checksum, Owner::default(), |block| {
                leased.contains(&block.hash)
            });
        }
    }
    Ok(hits)
}

fn chains(text: &str) -> Vec<Vec<BlockHash>> {
    text.lines().filter_map(chain).collect()
}

fn chain(line: &str) -> Option<Vec<BlockHash>> {
    let (_, ids) = line.split_once("\"hash_ids\": [")?;
    let (ids, _) = ids.split_once(']')?;
    let hash = |id: &str| {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&id.trim().parse::<u64>().ok()?.to_be_bytes());
        Some(BlockHash::from_bytes(bytes))
    };
    ids.split(',').map(hash).collect()
}
