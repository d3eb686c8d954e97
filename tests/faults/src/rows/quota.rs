//! Row 8 without a file system of its own: quotas. The system's, in the middle of a segment or at its beginning; our own limit of the
//! disk while all that is on it is leased; a tenant's budget of memory while the disk takes nothing. The store stays up, answers
//! from memory, and is back on the disk by itself once it may.

use std::{
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kvasir_block::{Checksum, LayerBlockKey};
use kvasir_cache::{BlockCache, CacheConfig, PutOutcome};
use kvasir_device::{
    FileIo, Psync,
    faulty::{Fault, Faulty, Operation, Rule},
};
use kvasir_tier::DiskPath;
use rand::Rng;

use crate::{
    Run, Tier,
    corpus::{Corpus, schema, tenant},
    data::{self, Read},
};

const LAYERS: u16 = 2;
const LAYER_BLOCK_BYTES: usize = 32 << 10;
/// What is there before: 3.5 MiB, in four segments of 1 MiB.
const BEFORE: usize = 56;
/// What comes while nothing may be written: 4 MiB.
const DURING: usize = 64;
const SEGMENT_BYTES: u64 = 1 << 20;
/// Of what comes, only so much can wait for the disk.
const QUEUE_BYTES: u64 = 1 << 20;
/// What the tenant with a budget may have in memory.
const BUDGET: u64 = 1 << 20;
/// How soon it must write again.
const BACK_WITHIN: Duration = Duration::from_secs(10);

/// Whose quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quota {
    /// The file system's, met by an operation.
    System(Operation),
    /// Ours of the disk; nothing on it may go.
    Leased,
    /// A tenant's of the memory, and the system's of the disk.
    Tenant,
}

const QUOTAS: [Quota; 4] = [
    Quota::System(Operation::Write),
    Quota::System(Operation::Preallocate),
    Quota::Leased,
    Quota::Tenant,
];

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    run.rounds(|run, round| {
        let quota = QUOTAS[round as usize % QUOTAS.len()];
        one_store(run, tempfile::tempdir()?.path(), quota).with_context(|| format!("{quota:?}"))?;
        run.tally.faults += 1;
        Ok(())
    })
}

fn one_store(run: &mut Run, dir: &Path, quota: Quota) -> Result<()> {
    let faulty = Arc::new(Faulty::new(Arc::new(Psync), run.rng.random()));
    let disk_bytes_max = if quota == Quota::Leased {
        4 * SEGMENT_BYTES
    } else {
        64 << 20
    };
    let mut config = CacheConfig {
        host_bytes_max: 16 << 20,
        segment_bytes: SEGMENT_BYTES,
        flush_queue_bytes_max: QUEUE_BYTES,
        disks: vec![DiskPath {
            dir: dir.join("disk"),
            bytes_max: disk_bytes_max,
            io: Some(Arc::clone(&faulty) as Arc<dyn FileIo>),
        }],
        ..data::config(dir)
    };
    config.tenant_host_bytes_max.insert(tenant("small"), BUDGET);
    std::fs::create_dir(dir.join("disk"))?;
    let shape = schema(LAYERS, LAYER_BLOCK_BYTES);
    let before = Corpus::new("before", &shape, run.rng.random(), BEFORE);
    let name = if quota == Quota::Tenant { "small" } else { "during" };
    let during = Corpus::new(name, &shape, run.rng.random(), DURING);
    let cache = data::open(config.clone(), &[&before, &during])?;
    data::put(&cache, &before, before.keys())?;

    let lease = match quota {
        Quota::Leased => {
            let matched = cache.match_prefix(before.namespace, &before.chain, Some(Duration::from_secs(60)))?;
            ensure!(
                matched.hit_blocks == BEFORE,
                "{} of {BEFORE} blocks match",
                matched.hit_blocks
            );
            matched.lease
        }
        Quota::System(operation) => {
            forbid(&faulty, operation, run.rng.random_range(0..3));
            None
        }
        Quota::Tenant => {
            forbid(&faulty, Operation::Write, 0);
            None
        }
    };
    let taken = put_during(run, &cache, &during)?;
    ensure!(
        cache.stats().disk.degraded.is_some(),
        "the disk takes {} layer blocks, whatever the quota says",
        taken.len()
    );
    served_meanwhile(run, &cache, &before, &during, &taken, quota)?;

    faulty.heal();
    if let Some(lease) = lease {
        cache.release(lease);
    }
    let back = Instant::now();
    while let Err(error) = cache.flush() {
        ensure!(
            back.elapsed() < BACK_WITHIN,
            "no write {BACK_WITHIN:?} after it may: {error}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    run.note_longest("longest until it wrote again, ms", back.elapsed());
    back_on_disk(run, cache, config, &during, &taken, quota)
}

/// The system's quota is used up, after `count` more operations of that kind. What is allocated already may still be written, or
/// that is what is forbidden.
fn forbid(faulty: &Faulty, operation: Operation, count: u64) {
    let used_up = Fault::Error(io::ErrorKind::QuotaExceeded);
    faulty.add(Rule::new(operation, used_up).after(count));
    // A segment that has room would take all of it.
    if operation == Operation::Preallocate {
        faulty.add(Rule::new(Operation::Write, used_up).after(count));
    }
}

/// Puts what the disk cannot take; gives what was answered as taken.
fn put_during(run: &mut Run, cache: &BlockCache, during: &Corpus) -> Result<Vec<LayerBlockKey>> {
    let mut taken = Vec::new();
    let begun = Instant::now();
    for key in during.keys() {
        let payload = during.payload(key);
        let checksum = Checksum::of(&payload);
        loop {
            match cache.put(key, payload.clone(), checksum)? {
                PutOutcome::Stored | PutOutcome::Present => taken.push(key),
                // Until the first write has failed the disk is only slow, and this is a put too many.
                PutOutcome::Busy if cache.stats().disk.degraded.is_none() && begun.elapsed() < BACK_WITHIN => {
                    run.tally.shed += 1;
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                PutOutcome::Busy => run.tally.shed += 1,
                PutOutcome::ChecksumMismatch => anyhow::bail!("{key:?} was refused for its checksum"),
            }
            break;
        }
    }
    // The queue may have held all of it; then the disk has to be met.
    let _ = cache.flush();
    Ok(taken)
}

/// While nothing can be written, what was there is there, and what was taken is answered from memory.
fn served_meanwhile(
    run: &mut Run,
    cache: &BlockCache,
    before: &Corpus,
    during: &Corpus,
    taken: &[LayerBlockKey],
    quota: Quota,
) -> Result<()> {
    // A file system that is full costs the oldest segment: a cache gives way before it gives up.
    let mut lost = 0;
    for key in before.keys() {
        let got = data::read(&mut run.tally, cache, before, key)?;
        lost += u64::from(!matches!(got, Read::Hit(_)));
    }
    let may_go = if quota == Quota::Leased {
        0
    } else {
        SEGMENT_BYTES / LAYER_BLOCK_BYTES as u64
    };
    ensure!(lost <= may_go, "{lost} layer blocks went that were on disk before");
    let mut in_memory = 0;
    for &key in taken {
        let got = data::read(&mut run.tally, cache, during, key)?;
        in_memory += u64::from(got == Read::Hit(Tier::Host)) * LAYER_BLOCK_BYTES as u64;
        // A tenant beyond its budget evicts its own, and there is no disk to have them.
        ensure!(
            matches!(got, Read::Hit(_) | Read::Wrong) || quota == Quota::Tenant,
            "{key:?} was taken and came to {got:?}"
        );
    }
    ensure!(in_memory > 0, "nothing was answered from memory");
    ensure!(
        quota != Quota::Tenant || in_memory <= BUDGET,
        "a tenant of {BUDGET} bytes has {in_memory} in memory"
    );
    Ok(())
}

/// What memory has goes to the disk as it is hit, and what comes now does too: it is there in the next life.
fn back_on_disk(
    run: &mut Run,
    cache: BlockCache,
    config: CacheConfig,
    during: &Corpus,
    taken: &[LayerBlockKey],
    quota: Quota,
) -> Result<()> {
    let mut saved: Vec<LayerBlockKey> = Vec::new();
    // A queue's worth at a time.
    for some in taken.chunks((QUEUE_BYTES as usize / LAYER_BLOCK_BYTES) / 2) {
        for &key in some {
            if matches!(data::read(&mut run.tally, &cache, during, key)?, Read::Hit(_)) {
                saved.push(key);
            }
        }
        cache.flush()?;
    }
    let after = Corpus::new("after", &during.schema, run.rng.random(), 8);
    cache.open_namespace(&after.tenant, &after.schema)?;
    data::put(&cache, &after, after.keys())?;
    cache.close()?;
    let cache = data::open(config, &[during, &after])?;
    // Under our own limit the disk holds the youngest of it only.
    let youngest = if quota == Quota::Leased { saved.len() / 2 } else { 0 };
    let mut hits = 0;
    for &key in &saved[youngest..] {
        let got = data::read(&mut run.tally, &cache, during, key)?;
        hits += u64::from(matches!(got, Read::Hit(_) | Read::Wrong));
    }
    let wanted = (saved.len() - youngest) as u64;
    ensure!(
        hits == wanted,
        "{hits} of {wanted} layer blocks came to the disk once it took them"
    );
    run.tally.note("layer blocks saved afterwards", hits);
    for key in after.keys() {
        let got = data::read(&mut run.tally, &cache, &after, key)?;
        ensure!(
            matches!(got, Read::Hit(_) | Read::Wrong),
            "{key:?} was synced afterwards and came to {got:?}"
        );
    }
    cache.close()?;
    Ok(())
}
