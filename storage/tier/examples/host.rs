//! What the host tier's calls cost: `cargo run -p kvasir-tier --example host`.
//!
//! 100,000 blocks of one page each, in a tier that holds exactly them; medians of rounds, in ns a call.
#![expect(clippy::print_stdout, reason = "an example's output is its purpose")]

use std::{error::Error, hint::black_box, time::Instant};

use bytes::Bytes;
use kvasir_block::{BlockHash, BlockKey, Checksum, NamespaceId};
use kvasir_device::{Arena, ArenaConfig};
use kvasir_tier::{HostConfig, HostPolicy, HostTier, HugePages, Owner};

const BLOCKS: u32 = 100_000;
const ROUNDS: usize = 7;
/// What a block of one page costs in the tier, with its bookkeeping.
const BLOCK_BYTES: u64 = 4096 + 160 + 256;

fn main() -> Result<(), Box<dyn Error>> {
    let arena = Arena::new(ArenaConfig {
        bytes: 64 << 20,
        huge_pages: HugePages::Auto,
    })?;
    for bytes in [4 << 10, 48 << 10, 1 << 20] {
        let cost = median(|| {
            for _ in 0..10_000 {
                black_box(arena.try_reserve(bytes).map(|buffer| buffer.freeze(0..bytes)));
            }
            10_000
        });
        println!(
            "reserve, freeze and drop {bytes} bytes: {cost:.0} ns ({:?})",
            arena.page_kind()
        );
    }
    for policy in HostPolicy::ALL {
        let mut host = HostTier::new(HostConfig {
            bytes_max: u64::from(BLOCKS) * BLOCK_BYTES,
            policy,
            huge_pages: HugePages::Auto,
        })?;
        let payload = Bytes::from(vec![1; 4096]);
        let checksum = Checksum::of(&payload);
        let mut next = 0;
        let mut put = |host: &mut HostTier| {
            let key = block(next).layer(0);
            next += 1;
            let evicted = host.insert(key, payload.clone(), checksum, Owner::default(), |_| false);
            evicted.map_or(0, |evicted| evicted.len())
        };
        (0..BLOCKS).for_each(|_| assert_eq!(put(&mut host), 0, "the tier holds them all"));
        let get = median(|| {
            (0..BLOCKS).for_each(|i| drop(black_box(host.get(block(i).layer(0)))));
            BLOCKS
        });
        let touch = median(|| {
            (0..BLOCKS).rev().for_each(|i| host.touch(&block(i)));
            BLOCKS
        });
        let evict = median(|| {
            (0..BLOCKS / 10).for_each(|_| assert!(put(&mut host) <= 1));
            BLOCKS / 10
        });
        println!(
            "{}: get {get:.0}, touch {touch:.0}, insert of 4 KiB with an eviction {evict:.0} ns",
            policy.name()
        );
    }
    Ok(())
}

fn block(i: u32) -> BlockKey {
    let mut hash = [0; 32];
    hash[..4].copy_from_slice(&i.wrapping_mul(0x9e37_79b9).to_be_bytes());
    hash[4..8].copy_from_slice(&i.to_be_bytes());
    NamespaceId::from_bytes([1; 32]).block(BlockHash::from_bytes(hash))
}

/// Nanoseconds for each of the calls that `round` says it made.
fn median(mut round: impl FnMut() -> u32) -> f64 {
    let mut costs: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            let calls = round();
            start.elapsed().as_nanos() as f64 / f64::from(calls)
        })
        .collect();
    costs.sort_by(f64::total_cmp);
    costs[ROUNDS / 2]
}
