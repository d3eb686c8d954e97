//! Row 11: someone cuts segment files short while they are served from.

use std::{
    fs::OpenOptions,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Result, ensure};
use rand::Rng;

use crate::{
    Run, Tally,
    corpus::{Corpus, schema},
    data::{self, Read},
};

/// 800 layer blocks of 16 KiB, in three or four segments.
const BLOCKS: usize = 400;
const LAYERS: u16 = 2;
/// Cuts before the folder is made anew.
const CUTS: u64 = 10;

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    run.rounds(|run, round| one_round(run, run.seed_of(round)))
}

fn one_round(run: &mut Run, seed: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let corpus = Corpus::new("truncate", &schema(LAYERS, 16 << 10), seed, BLOCKS);
    let cache = data::open(data::config(dir.path()), &[&corpus])?;
    data::put(&cache, &corpus, corpus.keys())?;
    cache.close()?;
    let cache = data::open(data::config(dir.path()), &[&corpus])?;
    let stop = AtomicBool::new(false);
    // One reads all the time, so that files are cut in the middle of reads too.
    let (mut read_beside, cut) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<Tally> {
            let mut tally = Tally::default();
            while !stop.load(Ordering::Relaxed) {
                for key in corpus.keys() {
                    data::read(&mut tally, &cache, &corpus, key)?;
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            }
            Ok(tally)
        });
        let cut = (|| -> Result<()> {
            for _ in 0..CUTS {
                let segments = data::segments(dir.path())?;
                let segment = &segments[run.rng.random_range(0..segments.len())];
                let file = OpenOptions::new().write(true).open(segment)?;
                let bytes = file.metadata()?.len();
                file.set_len(run.rng.random_range(0..=bytes))?;
                run.tally.faults += 1;
                for key in corpus.keys().skip(run.rng.random_range(0..4)).step_by(16) {
                    data::read(&mut run.tally, &cache, &corpus, key)?;
                }
            }
            Ok(())
        })();
        stop.store(true, Ordering::Relaxed);
        (reader.join(), cut)
    });
    cut?;
    if let Ok(tally) = &mut read_beside {
        let tally = tally.as_mut().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        run.tally.absorb(std::mem::take(tally));
    }
    // It still takes blocks, and those come back.
    let after = Corpus::new("truncate", &corpus.schema, !seed, 20);
    data::put(&cache, &after, after.keys())?;
    cache.close()?;
    let cache = data::open(data::config(dir.path()), &[&corpus, &after])?;
    for key in after.keys() {
        let got = data::read(&mut run.tally, &cache, &after, key)?;
        ensure!(
            matches!(got, Read::Hit(_) | Read::Wrong),
            "{key:?} was synced after the cuts and came to {got:?}"
        );
    }
    for key in corpus.keys() {
        data::read(&mut run.tally, &cache, &corpus, key)?;
    }
    cache.close()?;
    Ok(())
}
