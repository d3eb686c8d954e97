//! What was promised holds while everything is full: leases, budgets, deadlines.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvasir_cache::{BlockCache, CacheConfig, GetOptions, GetOutcome};
use rand::Rng;

use crate::{
    Run, Tier,
    corpus::{Corpus, schema, tenant},
    data::{self, Read},
};

/// Two layers of 8 KiB.
const LAYERS: u16 = 2;
const LAYER_BLOCK_BYTES: usize = 8 << 10;
/// Leased: 512 KiB of a memory of 2 MiB and a disk of 8.
const LEASED: usize = 32;
/// Put in each round by the one who has no lease: 2 MiB.
const CROWD: usize = 128;
/// What the tenant with a budget may have in memory.
const BUDGET: u64 = 256 << 10;

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    run.rounds(|run, _| one_store(run, tempfile::tempdir()?.path()))
}

fn one_store(run: &mut Run, dir: &std::path::Path) -> Result<()> {
    let shape = schema(LAYERS, LAYER_BLOCK_BYTES);
    let leased = Corpus::new("leased", &shape, run.rng.random(), LEASED);
    let small = Corpus::new("small", &shape, run.rng.random(), CROWD / 4);
    let mut config = CacheConfig {
        disk_bytes_max: 8 << 20,
        segment_bytes: 1 << 20,
        ..data::config(dir)
    };
    config.tenant_host_bytes_max.insert(tenant("small"), BUDGET);
    let host_bytes_max = config.host_bytes_max;
    let cache = data::open(config, &[&leased, &small])?;
    data::put(&cache, &leased, leased.keys())?;
    let matched = cache.match_prefix(leased.namespace, &leased.chain, Some(Duration::from_secs(60)))?;
    let lease = matched.lease.context("a lease on what was put")?;
    ensure!(matched.hit_blocks == LEASED, "{} blocks match", matched.hit_blocks);
    for round in 0..8 {
        let crowd = Corpus::new("crowd", &shape, run.rng.random(), CROWD);
        cache.open_namespace(&crowd.tenant, &crowd.schema)?;
        data::put(&cache, &crowd, crowd.keys())?;
        run.tally.faults += 1;
        let stats = cache.stats();
        ensure!(
            stats.host_bytes <= host_bytes_max,
            "{} bytes in memory",
            stats.host_bytes
        );
        ensure!(
            stats.disk.bytes <= stats.disk.bytes_max,
            "{} bytes on disk",
            stats.disk.bytes
        );
        let still = cache.match_prefix(leased.namespace, &leased.chain, None)?;
        ensure!(
            still.hit_blocks == LEASED && still.host_blocks == LEASED,
            "round {round}: of {LEASED} leased blocks {} are held, {} of them in memory",
            still.hit_blocks,
            still.host_blocks
        );
        for key in leased.keys() {
            let got = data::read(&mut run.tally, &cache, &leased, key)?;
            ensure!(
                matches!(got, Read::Hit(_) | Read::Wrong),
                "leased {key:?} came to {got:?}"
            );
        }
        for key in crowd.keys().step_by(8) {
            data::read(&mut run.tally, &cache, &crowd, key)?;
        }
        too_late(run, &cache, &crowd)?;
    }
    budget(run, &cache, &small)?;
    cache.release(lease);
    ensure!(cache.stats().pinned_blocks == 0, "blocks are pinned by nobody's lease");
    cache.close()?;
    Ok(())
}

/// After the deadline no slower tier is read, whatever it holds; what is in memory may be had.
fn too_late(run: &mut Run, cache: &BlockCache, corpus: &Corpus) -> Result<()> {
    let keys: Vec<_> = corpus.keys().collect();
    let options = GetOptions {
        deadline: Some(Instant::now()),
        ..GetOptions::default()
    };
    let mut late = 0;
    for (key, outcome) in keys.iter().zip(cache.get_many(&keys, &options)?) {
        let got = data::count(&mut run.tally, corpus, *key, &outcome);
        late += u64::from(outcome == GetOutcome::TooLate);
        ensure!(
            got != Read::Hit(Tier::Disk),
            "{key:?} was read from disk after the deadline"
        );
    }
    ensure!(late > 0, "of {} layer blocks none came too late", keys.len());
    Ok(())
}

/// A tenant with a budget puts more than that; what it has in memory is no more.
fn budget(run: &mut Run, cache: &BlockCache, small: &Corpus) -> Result<()> {
    data::put(cache, small, small.keys())?;
    run.tally.faults += 1;
    let matched = cache.match_prefix(small.namespace, &small.chain, None)?;
    let held = (matched.host_blocks * usize::from(LAYERS) * LAYER_BLOCK_BYTES) as u64;
    ensure!(held <= BUDGET, "a tenant of {BUDGET} bytes has {held} in memory");
    let mut in_memory = 0;
    for key in small.keys() {
        let got = data::read(&mut run.tally, cache, small, key)?;
        in_memory += u64::from(got == Read::Hit(Tier::Host)) * LAYER_BLOCK_BYTES as u64;
    }
    // Reading promotes, block after block, within the budget.
    ensure!(
        in_memory <= BUDGET,
        "{in_memory} bytes came from the memory of a tenant of {BUDGET}"
    );
    Ok(())
}
