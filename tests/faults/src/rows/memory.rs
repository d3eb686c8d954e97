//! Row 6: bits of the host tier's memory flip. Written through `/proc/self/mem`, as a debugger would: behind the program's back.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
};

use anyhow::{Context, Result, ensure};
use kvasir_cache::GetOutcome;
use rand::Rng;

use crate::{
    Run,
    corpus::{Corpus, schema},
    data::{self, Read},
};

/// 100 layer blocks of 4 KiB: they all fit into memory.
const BLOCKS: usize = 50;
const LAYERS: u16 = 2;

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    let memory = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/self/mem")
        .context("this process's memory")?;
    run.rounds(|run, round| one_round(run, &memory, round))
}

fn one_round(run: &mut Run, memory: &File, round: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let corpus = Corpus::new("memory", &schema(LAYERS, 4096), run.seed_of(round), BLOCKS);
    let cache = data::open(data::config(dir.path()), &[&corpus])?;
    data::put(&cache, &corpus, corpus.keys())?;
    // The disk's copies go: what is wrong in memory must not be served, and cannot be replaced.
    for segment in data::segments(dir.path())? {
        OpenOptions::new().write(true).open(segment)?.set_len(0)?;
    }
    let mut flipped = 0;
    for (i, key) in corpus.keys().enumerate() {
        if i % 4 == 0 {
            let got = data::read(&mut run.tally, &cache, &corpus, key)?;
            ensure!(
                matches!(got, Read::Hit(_) | Read::Wrong),
                "{key:?} is untouched and came to {got:?}"
            );
            continue;
        }
        let GetOutcome::Hit { payload, .. } = cache.get(key)? else {
            anyhow::bail!("{key:?} was put and is not there");
        };
        // The cache shares its own bytes with its readers: where these lie, the tier's lie.
        let at = payload.as_ptr() as u64 + run.rng.random_range(0..payload.len()) as u64;
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at)?;
        memory.write_all_at(&[byte[0] ^ 1 << run.rng.random_range(0..8)], at)?;
        drop(payload);
        run.tally.faults += 1;
        flipped += 1;
        let got = data::read(&mut run.tally, &cache, &corpus, key)?;
        ensure!(!matches!(got, Read::Hit(_)), "{key:?}: the flip did not reach the tier");
    }
    let counted = cache.stats().host_corrupt;
    ensure!(
        counted == flipped || run.tally.wrong > 0,
        "{counted} of {flipped} flips counted"
    );
    cache.close()?;
    Ok(())
}
