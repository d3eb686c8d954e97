//! Rows 9 and 10: a disk that fails to read, write or sync, and one that takes its time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use kvasir_block::LayerBlockKey;
use kvasir_device::{
    FileIo, Psync,
    faulty::{EIO, Fault, Faulty, Operation, Rule},
};
use kvasir_tier::DiskTier;
use rand::Rng;

use crate::{
    Run,
    corpus::{Corpus, schema},
    data::Read,
    tier,
    witness::{Witness, ensure_never_synced_again},
};

/// Layer blocks of 16 KiB.
const LAYERS: u16 = 2;
const LAYER_BLOCK_BYTES: usize = 16 << 10;
const DISK_BYTES: u64 = 64 << 20;
/// How soon a disk that works again must be written to again.
const BACK_WITHIN: Duration = Duration::from_secs(10);

struct Device {
    faulty: Arc<Faulty>,
    witness: Arc<Witness>,
}

impl Device {
    fn new(seed: u64) -> Self {
        let faulty = Arc::new(Faulty::new(Arc::new(Psync), seed));
        let inner: Arc<dyn FileIo> = Arc::clone(&faulty) as _;
        Self {
            faulty,
            witness: Witness::new(inner),
        }
    }

    fn io(&self) -> Option<Arc<dyn FileIo>> {
        Some(Arc::clone(&self.witness) as _)
    }
}

/// Row 9.
pub(super) fn fail(run: &mut Run) -> Result<()> {
    run.rounds(|run, round| one_failing_disk(run, run.seed_of(round)))
}

fn one_failing_disk(run: &mut Run, seed: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let device = Device::new(seed);
    let before = run.tally.faults;
    let disk = tier::open(dir.path(), DISK_BYTES, device.io())?;
    let shape = schema(LAYERS, LAYER_BLOCK_BYTES);
    let mut durable: Vec<(Corpus, Vec<LayerBlockKey>)> = Vec::new();
    // Writing: whatever fails, a flush that came back well has said the truth.
    for (i, operation) in [
        Operation::Write,
        Operation::Sync,
        Operation::Preallocate,
        Operation::Sync,
    ]
    .into_iter()
    .enumerate()
    {
        let one_in = run.rng.random_range(1..4);
        let times = run.rng.random_range(1..4);
        device.faulty.add(Rule::new(operation, EIO).one_in(one_in).times(times));
        let corpus = Corpus::new("device", &shape, seed ^ (1 + i as u64), 32);
        let keys: Vec<_> = corpus.keys().collect();
        for batch in keys.chunks(16) {
            tier::offer(&disk, &corpus, batch)?;
            let _ = disk.flush();
        }
        device.faulty.heal();
        flush_again(run, &disk)?;
        durable.push((corpus, keys));
        // Some disks have two failing segments within a minute; this one would have many.
        std::thread::sleep(Duration::from_millis(1));
    }
    ensure_never_synced_again(&device.witness)?;
    hits(run, &disk, &durable, "after failed writes and syncs")?;
    disk.stop()?;
    drop(disk);
    let disk = tier::open(dir.path(), DISK_BYTES, device.io())?;
    hits(run, &disk, &durable, "after a restart")?;
    // Reading: what cannot be read is a miss, and what can be is right.
    device.faulty.add(Rule::new(Operation::Read, EIO).one_in(4));
    device.faulty.add(Rule::new(Operation::Read, Fault::Flip).one_in(4));
    device
        .faulty
        .add(Rule::new(Operation::Read, Fault::Short(700)).one_in(8));
    for (corpus, keys) in &durable {
        for &key in keys {
            tier::read(&mut run.tally, &disk, corpus, key);
        }
    }
    device.faulty.heal();
    run.tally.faults = before + device.faulty.faults();
    // It still takes blocks, those that it lost too.
    for (corpus, keys) in &durable {
        tier::offer(&disk, corpus, keys)?;
    }
    flush_again(run, &disk)?;
    hits(run, &disk, &durable, "put again")?;
    run.tally.note("segments retired", disk.stats().retired_segments);
    disk.stop()?;
    Ok(())
}

/// The disk works again: so must the tier, soon.
fn flush_again(run: &mut Run, disk: &DiskTier) -> Result<()> {
    let healed = Instant::now();
    while let Err(error) = disk.flush() {
        ensure!(
            healed.elapsed() < BACK_WITHIN,
            "no write {BACK_WITHIN:?} after the disk works again: {error}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    run.note_longest("longest until it wrote again, ms", healed.elapsed());
    Ok(())
}

fn hits(run: &mut Run, disk: &DiskTier, durable: &[(Corpus, Vec<LayerBlockKey>)], when: &str) -> Result<()> {
    for (corpus, keys) in durable {
        for &key in keys {
            let got = tier::read(&mut run.tally, disk, corpus, key);
            ensure!(
                matches!(got, Read::Hit(_) | Read::Wrong),
                "{key:?} was flushed and came to {got:?}, {when}"
            );
        }
    }
    Ok(())
}

/// Row 10.
pub(super) fn delay(run: &mut Run) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let device = Device::new(run.plan.seed);
    let disk = tier::open(dir.path(), DISK_BYTES, device.io())?;
    let corpus = Corpus::new("slow", &schema(LAYERS, LAYER_BLOCK_BYTES), run.plan.seed, 64);
    let keys: Vec<_> = corpus.keys().collect();
    tier::offer(&disk, &corpus, &keys)?;
    disk.flush()?;
    while run.wants_more() {
        let each = Duration::from_millis(run.rng.random_range(2..20));
        let patience = Duration::from_millis(run.rng.random_range(5..60));
        device.faulty.add(Rule::new(Operation::Read, Fault::Delay(each)));
        let before = device.faulty.faults();
        let begun = Instant::now();
        let reads = disk.get_many(&keys, &mut |_| None, Some(begun + patience));
        let took = begun.elapsed();
        device.faulty.heal();
        let mut late = 0;
        for (key, read) in keys.iter().zip(&reads) {
            let got = tier::count(&mut run.tally, &corpus, *key, read);
            ensure!(
                matches!(got, Read::Hit(_) | Read::Shed | Read::Wrong),
                "{key:?} on a slow disk came to {got:?}"
            );
            late += u64::from(got == Read::Shed);
        }
        run.tally.faults += 1;
        run.tally.note("reads that were slow", device.faulty.faults() - before);
        // 128 reads of at least 2 ms each cannot be had in 60, one after the other; and nothing is begun after the deadline, so
        // only what was begun is waited for.
        ensure!(
            late > 0,
            "{} slow reads of {each:?} were all in time for {patience:?}",
            keys.len()
        );
        run.note_longest("longest past the deadline, ms", took.saturating_sub(patience));
    }
    // Nothing was lost to impatience.
    for &key in &keys {
        let got = tier::read(&mut run.tally, &disk, &corpus, key);
        ensure!(
            matches!(got, Read::Hit(_) | Read::Wrong),
            "{key:?} came to {got:?} once the disk was quick"
        );
    }
    disk.stop()?;
    Ok(())
}
