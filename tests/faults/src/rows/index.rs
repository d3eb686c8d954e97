//! Row 12: flips and cuts in everything that is no segment: RocksDB's files, namespaces, the epoch.

use std::fs::{self, OpenOptions};

use anyhow::{Context, Result};
use rand::Rng;

use crate::{
    Run,
    corpus::{Corpus, schema},
    data::{self, Damage},
};

/// 128 layer blocks of 2 KiB.
const BLOCKS: usize = 64;
const LAYERS: u16 = 2;

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    let origin = tempfile::tempdir()?;
    let corpus = Corpus::new("index", &schema(LAYERS, 2048), run.plan.seed, BLOCKS);
    // Several lives, so that the index has tables as well as a log.
    for part in 0..4 {
        let cache = data::open(data::config(origin.path()), &[&corpus])?;
        data::put(&cache, &corpus, corpus.keys().skip(part).step_by(4))?;
        cache.close()?;
    }
    while run.wants_more() {
        one_image(run, origin.path(), &corpus).with_context(|| format!("fault {}", run.tally.faults))?;
    }
    Ok(())
}

fn one_image(run: &mut Run, origin: &std::path::Path, corpus: &Corpus) -> Result<()> {
    let dir = tempfile::tempdir()?;
    data::copy_dir(origin, dir.path())?;
    let targets = data::files(dir.path(), |path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // The log for people is not read by anyone here.
        !name.ends_with(".seg") && !name.starts_with("LOG") && name != "LOCK"
    })?;
    let target = &targets[run.rng.random_range(0..targets.len())];
    let bytes = fs::metadata(target)?.len();
    if bytes == 0 {
        return Ok(());
    }
    match run.rng.random_range(0..5) {
        0 => {
            let cut = run.rng.random_range(0..bytes);
            OpenOptions::new().write(true).open(target)?.set_len(cut)?;
        }
        1 => fs::remove_file(target)?,
        kind => {
            Damage::ALL[kind as usize - 2].inflict(&mut run.rng, target, &(0..bytes))?;
        }
    }
    run.tally.faults += 1;
    let what = || format!("damaged {}", target.display());
    let cache = data::open(data::config(dir.path()), &[corpus]).with_context(what)?;
    let mut hits = 0;
    for key in corpus.keys() {
        let got = data::read(&mut run.tally, &cache, corpus, key).with_context(what)?;
        hits += u64::from(matches!(got, data::Read::Hit(_)));
    }
    run.tally.note("images", 1);
    run.tally.note(
        "images with every block",
        u64::from(hits == corpus.keys().count() as u64),
    );
    // It takes blocks again, and keeps them.
    data::put(&cache, corpus, corpus.keys()).with_context(what)?;
    cache.close()?;
    let cache = data::open(data::config(dir.path()), &[corpus]).with_context(what)?;
    for key in corpus.keys() {
        let got = data::read(&mut run.tally, &cache, corpus, key)?;
        anyhow::ensure!(
            matches!(got, data::Read::Hit(_) | data::Read::Wrong),
            "{}: {key:?} was put again and came to {got:?}",
            what()
        );
    }
    cache.close()?;
    Ok(())
}
