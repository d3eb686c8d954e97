//! Row 2: the power goes at an operation of a write: before it is begun, before its sync, between sync and index. Every operation on
//! a segment file is such a point; what the index knows at that moment is what it knows after the loss.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use kvasir_block::LayerBlockKey;
use kvasir_device::Psync;
use rand::Rng;

use crate::{
    Run,
    corpus::{Corpus, schema},
    data::{self, Read},
    tier,
    witness::Witness,
};

/// Layer blocks of 16 KiB; 16 to a batch.
const BLOCKS: usize = 96;
const LAYERS: u16 = 2;
const BATCH: usize = 16;
/// Operations among which the point is drawn: several batches' worth.
const OPERATIONS: u64 = 9;

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    let mut points: BTreeMap<&'static str, u64> = BTreeMap::new();
    run.rounds(|run, round| {
        if let Some(point) = one_loss(run, round)? {
            *points.entry(point).or_default() += 1;
            run.tally.note(point, 1);
        }
        Ok(())
    })?;
    for point in ["write", "sync", "index"] {
        ensure!(
            run.plan.count < 30 || points.contains_key(point),
            "no loss before a {point}: {points:?}"
        );
    }
    Ok(())
}

fn one_loss(run: &mut Run, round: u64) -> Result<Option<&'static str>> {
    let (dir, image) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let seed = run.seed_of(round);
    let corpus = Corpus::new("power", &schema(LAYERS, 16 << 10), seed, BLOCKS);
    let keys: Vec<LayerBlockKey> = corpus.keys().collect();
    let witness = Witness::new(Arc::new(Psync));
    let io: Arc<dyn kvasir_device::FileIo> = Arc::clone(&witness) as _;
    // Three segments at most: the later batches make the first give way.
    let disk = tier::open(dir.path(), 6 << 20, Some(io))?;
    let mut batches = keys.chunks(BATCH);
    let mut durable: Vec<LayerBlockKey> = Vec::new();
    for batch in batches.by_ref().take(run.rng.random_range(1..4)) {
        tier::offer(&disk, &corpus, batch)?;
        disk.flush()?;
        durable.extend(batch);
    }
    witness.hold_after(run.rng.random_range(0..OPERATIONS));
    let mut queued = Vec::new();
    for batch in batches {
        tier::offer(&disk, &corpus, batch)?;
        queued.extend(batch);
        // Small batches: the writer comes by more often.
        if witness.held(Duration::from_millis(3)).is_some() {
            break;
        }
    }
    let point = witness.held(Duration::from_millis(300));
    if point.is_some() {
        data::copy_dir(dir.path(), image.path())?;
        let lost = witness.lose_power(&mut run.rng, dir.path(), image.path())?;
        run.tally.faults += 1;
        run.tally.note("sectors lost", lost);
    }
    witness.release();
    disk.stop()?;
    drop(disk);
    let Some(point) = point else { return Ok(None) };

    let disk = tier::open(image.path(), 6 << 20, None)?;
    let recovery = disk.recovery();
    ensure!(
        recovery.dangling == 0,
        "before a {point}: the index knew {} records that are not there",
        recovery.dangling
    );
    for &key in &durable {
        let got = tier::read(&mut run.tally, &disk, &corpus, key);
        ensure!(
            matches!(got, Read::Hit(_) | Read::Wrong),
            "before a {point}: {key:?} was synced and came to {got:?}"
        );
    }
    for &key in &queued {
        let got = tier::read(&mut run.tally, &disk, &corpus, key);
        ensure!(
            got != Read::Corrupt,
            "before a {point}: {key:?} was published before its bytes were synced"
        );
    }
    // And it writes on.
    let after = Corpus::new("power", &corpus.schema, !seed, 8);
    let more: Vec<_> = after.keys().collect();
    tier::offer(&disk, &after, &more)?;
    disk.flush()?;
    for key in more {
        let got = tier::read(&mut run.tally, &disk, &after, key);
        ensure!(
            matches!(got, Read::Hit(_) | Read::Wrong),
            "{key:?} was synced after it and came to {got:?}"
        );
    }
    disk.stop()?;
    Ok(Some(point))
}
