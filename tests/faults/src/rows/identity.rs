//! Whose bytes, and of what: reads that differ from what was put in one part of the identity only.

use anyhow::{Result, ensure};
use kvasir_block::{Checksum, KvSchema};
use kvasir_cache::PutOutcome;

use crate::{
    Run,
    corpus::{Corpus, schema},
    data::{self, Read},
};

const BLOCKS: usize = 10;
const LAYERS: u16 = 4;

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    run.rounds(|run, round| one_round(run, run.seed_of(round)))
}

fn one_round(run: &mut Run, seed: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let plain = schema(LAYERS, 2048);
    let held = Corpus::new("held", &plain, seed, BLOCKS);
    // The same names under another identity: none of them was ever put.
    let others = [
        Corpus::new("other", &plain, seed, BLOCKS),
        Corpus::new(
            "held",
            &KvSchema {
                weights_sha256: [9; 32],
                ..plain.clone()
            },
            seed,
            BLOCKS,
        ),
        Corpus::new(
            "held",
            &KvSchema {
                numerics: "faults/2".to_owned(),
                ..plain.clone()
            },
            seed,
            BLOCKS,
        ),
        Corpus::new(
            "held",
            &KvSchema {
                adapter_sha256: Some([9; 32]),
                ..plain.clone()
            },
            seed,
            BLOCKS,
        ),
    ];
    let all: Vec<&Corpus> = std::iter::once(&held).chain(&others).collect();
    let cache = data::open(data::config(dir.path()), &all)?;
    // Two of four layers: the others must stay a miss.
    let put: Vec<_> = held.keys().filter(|key| key.layer % 2 == 0).collect();
    data::put(&cache, &held, put.iter().copied())?;
    for &key in &put {
        let second = held.payload_of(key, 1);
        let outcome = cache.put(key, second.clone(), Checksum::of(&second))?;
        run.tally.faults += 1;
        ensure!(
            outcome == PutOutcome::Present,
            "a second put of {key:?} came to {outcome:?}"
        );
    }
    look(run, &cache, &held, &others)?;
    cache.close()?;
    let cache = data::open(data::config(dir.path()), &all)?;
    look(run, &cache, &held, &others)?;
    cache.close()?;
    // And once more from the records alone.
    data::remove_index(dir.path())?;
    let cache = data::open(data::config(dir.path()), &all)?;
    look(run, &cache, &held, &others)?;
    cache.close()?;
    Ok(())
}

fn look(run: &mut Run, cache: &kvasir_cache::BlockCache, held: &Corpus, others: &[Corpus]) -> Result<()> {
    for key in held.keys() {
        let got = data::read(&mut run.tally, cache, held, key)?;
        let there = key.layer % 2 == 0;
        ensure!(
            got == Read::Wrong || matches!(got, Read::Hit(_)) == there,
            "{key:?}: put {there}, and came to {got:?}"
        );
    }
    for other in others {
        for key in other.keys() {
            let got = data::read(&mut run.tally, cache, other, key)?;
            run.tally.faults += 1;
            ensure!(
                matches!(got, Read::Miss | Read::Wrong),
                "{key:?} was never put and came to {got:?}"
            );
        }
        let matched = cache.match_prefix(other.namespace, &other.chain, None)?;
        ensure!(matched.hit_blocks == 0, "a prefix of another identity matches");
    }
    Ok(())
}
