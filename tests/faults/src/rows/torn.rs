//! Row 3: what a crash leaves of the newest segment. It is cut at every sector, its end is zeros or garbage, and of the writes
//! that were not synced any subset reached the disk.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use kvasir_block::LayerBlockKey;
use rand::Rng;
use tempfile::TempDir;

use crate::{
    Run,
    corpus::{Corpus, schema},
    data::{self, Place, Read},
};

const SECTOR: u64 = 512;
/// 330 layer blocks of 8 KiB: a segment of 4 MiB holds them however the writer batches them, each batch ending at a page.
const BLOCKS: usize = 165;
const LAYERS: u16 = 2;
/// Blocks of the last batch, which the crash meets.
const LAST: usize = 25;

/// What the index knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Index {
    /// It is gone.
    Gone,
    /// Everything but the last batch.
    Before,
    /// Everything: bytes were lost that the disk had called safe.
    After,
}

/// A folder as it was before the last batch and after it.
struct Crash {
    before: TempDir,
    after: TempDir,
    corpus: Corpus,
    /// The only segment, from the folder.
    segment: PathBuf,
    places: Vec<Place>,
    /// What was there before the last batch.
    early: HashSet<LayerBlockKey>,
}

impl Crash {
    fn make(seed: u64) -> Result<Self> {
        let (before, after) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let corpus = Corpus::new("torn", &schema(LAYERS, 8192), seed, BLOCKS);
        let early: Vec<_> = corpus.keys().take((BLOCKS - LAST) * usize::from(LAYERS)).collect();
        let cache = data::open(data::config(after.path()), &[&corpus])?;
        for batch in early.chunks(100) {
            data::put(&cache, &corpus, batch.iter().copied())?;
        }
        // Nothing is under way: the folder is as a kill at this moment would leave it.
        data::copy_dir(after.path(), before.path())?;
        data::put(&cache, &corpus, corpus.keys())?;
        cache.close()?;
        let segments = data::segments(after.path())?;
        ensure!(segments.len() == 1, "{} segments, one was meant", segments.len());
        let segment = segments[0].strip_prefix(after.path())?.to_owned();
        let places = data::locate(after.path(), &corpus)?;
        ensure!(places.len() == corpus.keys().count(), "{} records found", places.len());
        Ok(Self {
            before,
            after,
            corpus,
            segment,
            places,
            early: early.into_iter().collect(),
        })
    }

    /// A folder with the segment `bytes`.
    fn image(&self, bytes: &[u8], index: Index) -> Result<TempDir> {
        let dir = tempfile::tempdir()?;
        match index {
            Index::After => data::copy_dir(self.after.path(), dir.path())?,
            Index::Before | Index::Gone => data::copy_dir(self.before.path(), dir.path())?,
        }
        if index == Index::Gone {
            data::remove_index(dir.path())?;
        }
        fs::write(dir.path().join(&self.segment), bytes)?;
        Ok(dir)
    }

    /// Opens the image and reads everything.
    fn check(&self, run: &mut Run, dir: &Path, expected: impl Fn(&Place) -> Expected) -> Result<()> {
        let cache = data::open(data::config(dir), &[&self.corpus])?;
        for place in &self.places {
            let got = data::read(&mut run.tally, &cache, &self.corpus, place.key)?;
            let expected = expected(place);
            let right = match expected {
                Expected::There => matches!(got, Read::Hit(_)),
                Expected::Perhaps => matches!(got, Read::Hit(_) | Read::Miss),
                Expected::Gone => got == Read::Miss,
                Expected::Hurt => matches!(got, Read::Miss | Read::Corrupt),
            };
            ensure!(
                right || got == Read::Wrong,
                "the record at {:?} should be {expected:?} and came to {got:?}",
                place.bytes
            );
        }
        cache.close()?;
        Ok(())
    }

    /// The layer blocks that were synced before the last batch.
    fn is_early(&self, place: &Place) -> bool {
        self.early.contains(&place.key)
    }
}

/// What must come of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// It was synced, and nothing touched it.
    There,
    /// Its bytes may be whole.
    Perhaps,
    /// Recovery read it, saw that it is not whole, and does not claim to have it.
    Gone,
    /// The index knows it, so only a read finds out.
    Hurt,
}

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    let crash = Crash::make(run.plan.seed)?;
    let bytes = fs::read(crash.after.path().join(&crash.segment))?;
    let sectors = bytes.len() as u64 / SECTOR;
    // A run of less takes its cuts evenly from all of them.
    let cuts = (run.plan.count * 4 / 9).min(sectors).max(1);
    for i in 0..cuts {
        let at = (i * sectors / cuts + run.rng.random_range(0..(sectors / cuts).max(1))).min(sectors) * SECTOR;
        cut(run, &crash, &bytes, at).with_context(|| format!("cut at {at}"))?;
    }
    run.tally.note("cuts", cuts);
    while run.wants_more() {
        reorder(run, &crash, &bytes)?;
        run.tally.note("reorderings", 1);
    }
    Ok(())
}

/// What lies behind the cut.
#[derive(Clone, Copy, Debug)]
enum Behind {
    /// Nothing: the file ends.
    End,
    Zeros,
    Garbage,
}

fn cut(run: &mut Run, crash: &Crash, whole: &[u8], at: u64) -> Result<()> {
    let behind = [Behind::End, Behind::Zeros, Behind::Garbage][run.rng.random_range(0..3)];
    let mut bytes = whole.to_vec();
    let (_, tail) = bytes.split_at_mut(at as usize);
    match behind {
        Behind::End => bytes.truncate(at as usize),
        Behind::Zeros => tail.fill(0),
        Behind::Garbage => run.rng.fill(tail),
    }
    let index = [Index::Gone, Index::Before, Index::After][run.rng.random_range(0..3)];
    run.tally.faults += 1;
    let dir = crash.image(&bytes, index)?;
    let expected = |place: &Place| {
        let known = match index {
            Index::Gone => false,
            Index::Before => crash.is_early(place),
            Index::After => true,
        };
        match place.bytes.end <= at {
            true => Expected::There,
            false if known => Expected::Hurt,
            false => Expected::Gone,
        }
    };
    crash
        .check(run, dir.path(), expected)
        .with_context(|| format!("then {behind:?}, index {index:?}"))
}

/// Of the sectors that the last batch wrote any may be missing; the index was not told of the batch.
fn reorder(run: &mut Run, crash: &Crash, whole: &[u8]) -> Result<()> {
    let old = fs::read(crash.before.path().join(&crash.segment))?;
    let share = [0.02, 0.3, 0.9][run.rng.random_range(0..3)];
    let mut bytes = whole.to_vec();
    let mut lost = Vec::new();
    let mut last_kept = old.len();
    for (i, sector) in bytes.chunks_mut(SECTOR as usize).enumerate() {
        let at = i * SECTOR as usize;
        let mut before = vec![0; sector.len()];
        let held = old.get(at..).unwrap_or_default();
        let held = &held[..held.len().min(sector.len())];
        before[..held.len()].copy_from_slice(held);
        if before == sector {
            continue;
        }
        if run.rng.random_bool(share) {
            sector.copy_from_slice(&before);
            lost.push(at as u64..(at + sector.len()) as u64);
        } else {
            last_kept = last_kept.max(at + sector.len());
        }
    }
    // The length is an unsynced write as well.
    if run.rng.random() {
        bytes.truncate(last_kept);
    }
    let dir = crash.image(&bytes, Index::Before)?;
    run.tally.faults += 1;
    let expected = |place: &Place| match crash.is_early(place) {
        true => Expected::There,
        false if lost.iter().any(|sector| data::overlap(sector, &place.bytes)) => Expected::Gone,
        false => Expected::Perhaps,
    };
    crash
        .check(run, dir.path(), expected)
        .with_context(|| format!("{} sectors lost", lost.len()))
}
