//! Row 19: the clock. The wall clock stands wherever it likes between two lives, and the monotonic one begins anywhere.

use std::{collections::HashSet, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use rand::Rng;

use crate::{
    Run,
    corpus::{Corpus, schema},
    data::{self, Read},
    remote::{Remote, block_on},
    store::Launch,
};

const YEAR_MS: i64 = 365 * 24 * 3600 * 1000;

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    // One process in ten lives: they cost more.
    let lives = run.plan.count * 9 / 10;
    wall_clock(run, lives.max(1))?;
    if run.wants_more() {
        block_on(async { monotonic_clock(run).await })?;
    }
    Ok(())
}

/// What was written down in an earlier life is all that the store knows of the clock then: a number far ahead of ours is a clock
/// that went back, one far behind is a clock that leapt.
fn wall_clock(run: &mut Run, lives: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let epoch_file = dir.path().join("epoch");
    let corpus = Corpus::new("clock", &schema(2, 1024), run.plan.seed, 4);
    let cache = data::open(data::config(dir.path()), &[&corpus])?;
    data::put(&cache, &corpus, corpus.keys())?;
    let (mut epochs, mut leases) = (HashSet::from([cache.epoch()]), HashSet::new());
    cache.close()?;
    for _ in 0..lives {
        let written: i64 = fs::read_to_string(&epoch_file)?
            .trim()
            .parse()
            .context("the epoch file")?;
        let offset = match run.rng.random_range(0..4) {
            0 => 0,
            1 => run.rng.random_range(0..3_600_000),
            2 => run.rng.random_range(-10 * YEAR_MS..0),
            _ => run.rng.random_range(0..YEAR_MS / 20),
        };
        if offset != 0 {
            fs::write(&epoch_file, format!("{}\n", (written + offset).max(0)))?;
        }
        run.tally.faults += 1;
        let cache = data::open(data::config(dir.path()), &[&corpus])?;
        ensure!(epochs.insert(cache.epoch()), "epoch {} was there before", cache.epoch());
        for _ in 0..3 {
            let matched = cache.match_prefix(corpus.namespace, &corpus.chain, Some(Duration::from_secs(60)))?;
            let lease = matched.lease.context("a lease on what was put")?;
            ensure!(leases.insert(lease), "lease {lease:?} was granted before");
        }
        ensure!(cache.stats().leases == 3, "a lease of a minute is gone at once");
        for key in corpus.keys() {
            let got = data::read(&mut run.tally, &cache, &corpus, key)?;
            ensure!(matches!(got, Read::Hit(_) | Read::Wrong), "{key:?} came to {got:?}");
        }
        cache.close()?;
    }
    Ok(())
}

/// The same folder under monotonic clocks that differ by up to ten years.
async fn monotonic_clock(run: &mut Run) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let corpus = Corpus::new("clock", &schema(2, 16 << 10), run.plan.seed, 16);
    let mut leases = HashSet::new();
    let mut put = false;
    while run.wants_more() {
        let offset = run.rng.random_range(0..10 * YEAR_MS / 1000);
        let mut launch = Launch::in_folder(folder.path());
        let namespace = [
            "unshare",
            "--time",
            "--monotonic",
            &offset.to_string(),
            "--boottime",
            &offset.to_string(),
        ];
        launch.wrapper = namespace.iter().map(|word| (*word).to_owned()).collect();
        let store = match launch.start() {
            Ok(store) => store,
            Err(error) if launch.last_words().contains("unshare") => {
                return Err(crate::run::Skipped(format!("time namespaces are refused here: {error}")).into());
            }
            Err(error) => return Err(error),
        };
        run.tally.faults += 1;
        let remote = Remote::connect(&store.url, &corpus).await?;
        if !put {
            remote.put(&corpus, &corpus.chain).await?;
            put = true;
        }
        let matched = remote
            .client
            .match_prefix(corpus.namespace, &corpus.chain, Some(Duration::from_secs(30)))
            .await?;
        ensure!(
            matched.hit_blocks == corpus.chain.len(),
            "{} blocks match",
            matched.hit_blocks
        );
        let lease = matched.lease.context("a lease on what was put")?;
        ensure!(leases.insert(lease), "lease {lease} was granted before");
        let (got, error) = remote.read(&mut run.tally, &corpus, &corpus.chain).await;
        ensure!(error.is_none(), "{error:?}");
        ensure!(
            got.iter().all(|(_, read)| matches!(read, Read::Hit(_) | Read::Wrong)),
            "not everything is there under a clock of {offset} s"
        );
        ensure!(
            remote.client.stat().await?.leases >= 1,
            "a lease of 30 s is gone at once"
        );
        while remote.client.stat().await?.flush_queue_blocks > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        run.tally.deaths += launch.panics();
        ensure!(store.kill()?, "the store ended by itself: {}", launch.last_words());
    }
    Ok(())
}
