//! Row 4: bytes of records go wrong at rest, under an open cache and before its start.

use std::collections::HashSet;

use anyhow::{Result, ensure};

use crate::{
    Run,
    corpus::{Corpus, schema},
    data::{self, Damage, Place, Read},
};

/// Blocks of one round: 512 layer blocks of 8 KiB, a segment's worth.
const BLOCKS: usize = 128;
const LAYERS: u16 = 4;

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    run.rounds(one_round)
}

fn one_round(run: &mut Run, round: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let corpus = Corpus::new("flips", &schema(LAYERS, 8192), run.seed_of(round), BLOCKS);
    let cache = data::open(data::config(dir.path()), &[&corpus])?;
    data::put(&cache, &corpus, corpus.keys())?;
    cache.close()?;
    let places = data::locate(dir.path(), &corpus)?;
    ensure!(places.len() == corpus.keys().count(), "{} records found", places.len());

    // A new life, so that nothing is in memory. Every third record stays as it is.
    let cache = data::open(data::config(dir.path()), &[&corpus])?;
    let mut hurt = Vec::new();
    for (i, place) in places.iter().enumerate() {
        if i % 3 != 0 {
            let damage = Damage::ALL[(i + round as usize) % 3];
            hurt.push((
                damage.inflict(&mut run.rng, &place.file, &place.bytes)?,
                place.file.clone(),
            ));
            run.tally.faults += 1;
        }
    }
    let is_hurt = |place: &Place| {
        hurt.iter()
            .any(|(bytes, file)| *file == place.file && data::overlap(bytes, &place.bytes))
    };
    let expected: HashSet<_> = places.iter().filter(|place| is_hurt(place)).map(|p| p.key).collect();
    let mut beside = 0;
    for place in &places {
        let got = data::read(&mut run.tally, &cache, &corpus, place.key)?;
        if expected.contains(&place.key) {
            ensure!(
                matches!(got, Read::Corrupt | Read::Wrong),
                "{:?} has a wrong byte and came to {got:?}",
                place.key
            );
            let again = data::read(&mut run.tally, &cache, &corpus, place.key)?;
            ensure!(
                matches!(again, Read::Miss | Read::Wrong),
                "{:?} was found corrupt and then {again:?}",
                place.key
            );
        } else {
            beside += u64::from(!matches!(got, Read::Hit(_)));
        }
    }
    // A page that is zeroed may take a neighbour's header with it.
    ensure!(
        beside <= hurt.len() as u64 / 3,
        "{beside} records were lost beside the {} that were hurt",
        expected.len()
    );
    run.tally.note("lost beside", beside);
    let found = cache.stats().misses_corrupt;
    ensure!(found >= expected.len() as u64, "{found} of {} counted", expected.len());
    cache.close()?;
    again_from_segments(run, dir.path(), &corpus, &expected)
}

/// Without an index every record is read at the start, and the wrong ones are not even known.
fn again_from_segments(
    run: &mut Run,
    dir: &std::path::Path,
    corpus: &Corpus,
    lost: &HashSet<kvasir_block::LayerBlockKey>,
) -> Result<()> {
    data::remove_index(dir)?;
    let cache = data::open(data::config(dir), &[corpus])?;
    for key in corpus.keys() {
        let got = data::read(&mut run.tally, &cache, corpus, key)?;
        ensure!(
            !lost.contains(&key) || matches!(got, Read::Miss | Read::Wrong),
            "{key:?} came back as {got:?} from a scan"
        );
    }
    cache.close()?;
    Ok(())
}
