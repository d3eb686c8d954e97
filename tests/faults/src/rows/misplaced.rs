//! Row 5: whole and valid records where they do not belong: swapped, left over from another life of the file, from another folder.

use std::{
    fs::OpenOptions,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use kvasir_block::{Checksum, LayerBlockKey};
use kvasir_cache::PutOutcome;
use rand::Rng;
use tempfile::TempDir;

use crate::{
    Run,
    corpus::{Corpus, schema},
    data::{self, Place, Read},
};

/// 256 layer blocks of 8 KiB, put in one batch, so that records of one size lie in a row.
const BLOCKS: usize = 128;
const LAYERS: u16 = 2;

/// What a disk does to a write, or to a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Two records changed places.
    Swapped,
    /// One record lies where another was, and where it was itself too.
    Copied,
    /// The payload went to another record's place, the header did not.
    PayloadOnly,
    /// The record of the same key that another folder has at this place: valid there, with other bytes.
    Stale,
    /// The record that was written to this place before, and whose place was then given to another: the later write was lost.
    Lost,
}

const KINDS: [Kind; 5] = [Kind::Swapped, Kind::Copied, Kind::PayloadOnly, Kind::Stale, Kind::Lost];

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    run.rounds(one_round)
}

fn one_round(run: &mut Run, round: u64) -> Result<()> {
    let worlds = Worlds {
        dir: tempfile::tempdir()?,
        stale: tempfile::tempdir()?,
        lost: tempfile::tempdir()?,
    };
    let dir = &worlds.dir;
    let corpus = Corpus::new("misplaced", &schema(LAYERS, 8192), run.seed_of(round), BLOCKS);
    let keys: Vec<_> = corpus.keys().collect();
    let (early, late) = keys.split_at(keys.len() / 2);
    fill(worlds.stale.path(), &corpus, early, 1)?;
    fill(dir.path(), &corpus, early, 0)?;
    // From here on the same folder lived on twice.
    data::copy_dir(dir.path(), worlds.lost.path())?;
    let backwards: Vec<_> = late.iter().rev().copied().collect();
    fill(worlds.lost.path(), &corpus, &backwards, 0)?;
    fill(dir.path(), &corpus, late, 0)?;

    let places = data::locate(dir.path(), &corpus)?;
    ensure!(places.len() == keys.len(), "{} records found", places.len());
    let header = header_bytes(&places).context("records do not lie in a row")?;
    let indexed = round.is_multiple_of(2);
    if !indexed {
        data::remove_index(dir.path())?;
    }
    // Before the start where it scans, under it where it does not.
    let cache = if indexed {
        Some(data::open(data::config(dir.path()), &[&corpus])?)
    } else {
        None
    };
    let mut hurt: Vec<LayerBlockKey> = Vec::new();
    for pair in places.chunks_exact(2).step_by(2) {
        let kind = KINDS[run.rng.random_range(0..KINDS.len())];
        hurt.extend(misplace(kind, pair, header, &worlds)?);
        run.tally.faults += 1;
    }
    let cache = match cache {
        Some(cache) => cache,
        None => data::open(data::config(dir.path()), &[&corpus])?,
    };
    for place in &places {
        let got = data::read(&mut run.tally, &cache, &corpus, place.key)?;
        // Whatever lies beside it, and whether the index or a scan knows it: what is whole and in its place is found.
        let right = match hurt.contains(&place.key) {
            true => matches!(got, Read::Miss | Read::Corrupt),
            false => matches!(got, Read::Hit(_)),
        };
        ensure!(
            right || got == Read::Wrong,
            "{:?}, misplaced {}, index {indexed}, came to {got:?}",
            place.key,
            hurt.contains(&place.key)
        );
    }
    run.tally.note("records hurt", hurt.len() as u64);
    run.tally
        .note("records intact, all of them hit", (places.len() - hurt.len()) as u64);
    cache.close()?;
    Ok(())
}

/// A folder, and others that lived another life.
struct Worlds {
    dir: TempDir,
    /// The same keys in the same order, with other bytes.
    stale: TempDir,
    /// The same folder up to half of it; then the rest in another order.
    lost: TempDir,
}

fn fill(dir: &Path, corpus: &Corpus, keys: &[LayerBlockKey], generation: u32) -> Result<()> {
    let cache = data::open(data::config(dir), &[corpus])?;
    for &key in keys {
        let payload = corpus.payload_of(key, generation);
        let checksum = Checksum::of(&payload);
        ensure!(
            cache.put(key, payload, checksum)? == PutOutcome::Stored,
            "{key:?} was not taken"
        );
    }
    cache.flush()?;
    cache.close()?;
    Ok(())
}

/// Bytes in front of each payload that belong to its record, padding included: what lies between two payloads that follow each
/// other.
fn header_bytes(places: &[Place]) -> Option<u64> {
    let gaps = places
        .windows(2)
        .filter(|pair| pair[0].file == pair[1].file)
        .map(|pair| pair[1].bytes.start - pair[0].bytes.end);
    gaps.min().filter(|gap| *gap > 0)
}

/// Does it to the two records of `pair`; the keys that must not be found any more.
fn misplace(kind: Kind, pair: &[Place], header: u64, worlds: &Worlds) -> Result<Vec<LayerBlockKey>> {
    let (a, b) = (&pair[0], &pair[1]);
    let record = |place: &Place| place.bytes.start - header..place.bytes.end;
    let both = vec![a.key, b.key];
    match kind {
        Kind::Swapped => {
            let (left, right) = (read(&a.file, &record(a))?, read(&b.file, &record(b))?);
            write(&a.file, &record(a), &right)?;
            write(&b.file, &record(b), &left)?;
            Ok(both)
        }
        Kind::Copied => {
            write(&b.file, &record(b), &read(&a.file, &record(a))?)?;
            Ok(vec![b.key])
        }
        Kind::PayloadOnly => {
            write(&b.file, &b.bytes, &read(&a.file, &a.bytes)?)?;
            Ok(vec![b.key])
        }
        Kind::Stale | Kind::Lost => {
            let other = if kind == Kind::Stale {
                &worlds.stale
            } else {
                &worlds.lost
            };
            let file: PathBuf = other.path().join(a.file.strip_prefix(worlds.dir.path())?);
            // Nothing was there: then nothing is put there.
            let Ok(old) = read(&file, &record(a)) else {
                return Ok(Vec::new());
            };
            if old == read(&a.file, &record(a))? {
                return Ok(Vec::new());
            }
            write(&a.file, &record(a), &old)?;
            Ok(vec![a.key])
        }
    }
}

fn read(file: &Path, bytes: &Range<u64>) -> Result<Vec<u8>> {
    let mut out = vec![0; (bytes.end - bytes.start) as usize];
    OpenOptions::new()
        .read(true)
        .open(file)?
        .read_exact_at(&mut out, bytes.start)?;
    Ok(out)
}

fn write(file: &Path, bytes: &Range<u64>, with: &[u8]) -> Result<()> {
    Ok(OpenOptions::new()
        .write(true)
        .open(file)?
        .write_all_at(with, bytes.start)?)
}
