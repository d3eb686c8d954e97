//! Row 2: the process ends at a named point between two steps: of publishing, of reclaim, of writing a pack to the bucket. A real
//! `kvasir store` is told by its environment where to abort; only a build with the feature `planted-bugs` has the points.

use std::{os::unix::process::ExitStatusExt, time::Duration};

use anyhow::{Context, Result, ensure};
use rand::Rng;

use super::kill::{Ledger, check, load, load_once};
use crate::{
    Run, Tally,
    corpus::{Corpus, schema},
    remote::{Remote, block_on},
    run::Skipped,
    store::Launch,
};

/// Every point that the storage code has.
const POINTS: [&str; 11] = [
    "segment: id used up",
    "segment: made of a spare",
    "segment: begun",
    "publish: written",
    "publish: synced",
    "publish: index told",
    "reclaim: written again",
    "reclaim: forgotten in memory",
    "reclaim: file to be removed",
    "pack: to be written",
    "pack: written",
];
/// How long a store may take to come to its point.
const PATIENCE: Duration = Duration::from_secs(30);
/// Of what was synced, the blocks that no reclaim can have come to: 2 MiB of a disk of 8.
const YOUNG: usize = 64;

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    if !cfg!(feature = "planted-bugs") {
        let reason = "only a build with the feature planted-bugs has points to abort at: make planted";
        return Err(Skipped(reason.to_owned()).into());
    }
    run.rounds(|run, round| {
        let round = round as usize;
        let point = POINTS[round % POINTS.len()];
        // Not always at the first time: what lies before it differs.
        let nth = 1 + (round / POINTS.len()) as u64 % 3;
        block_on(one_abort(run, point, nth)).with_context(|| format!("{point}, time {nth}"))?;
        run.tally.faults += 1;
        run.tally.note(point, 1);
        Ok(())
    })
}

async fn one_abort(run: &mut Run, point: &'static str, nth: u64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut launch = Launch::with_bucket(folder.path());
    let corpus = Corpus::new("points", &schema(2, 16 << 10), run.rng.random(), 0);
    let mut ledger = Ledger::default();
    let usual = launch.env.clone();
    launch
        .env
        .push(("KVASIR_ABORT_AT".to_owned(), format!("{point}:{nth}")));
    let mut store = launch.start()?;
    let remote = Remote::connect(&store.url, &corpus).await?;
    let seed = run.rng.random();
    let mut during = Tally::default();
    let met = tokio::time::timeout(PATIENCE, load(&remote, &corpus, &mut ledger, &mut during, seed)).await;
    run.tally.absorb(during);
    ensure!(met.is_ok(), "the store did not come to its point in {PATIENCE:?}");
    ledger.bury();
    // The call may have broken a moment before the process is gone.
    let mut status = store.child.ended()?;
    for _ in 0..200 {
        if status.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        status = store.child.ended()?;
    }
    let signal = status.and_then(|status| status.signal());
    ensure!(
        signal == Some(6),
        "the store was to abort and ended as {status:?}: {}",
        launch.last_words()
    );

    launch.env = usual;
    let store = launch.start()?;
    run.note_longest("longest start, ms", store.ready_after);
    let remote = Remote::connect(&store.url, &corpus).await?;
    ledger.keep_young(YOUNG);
    check(run, &remote, &corpus, &ledger).await.context("after the abort")?;
    // And it goes on: writes, reclaims, demotes.
    let mut ledger = Ledger::default();
    let mut during = Tally::default();
    for round in 0..8 {
        load_once(&remote, &corpus, &mut ledger, &mut during, !seed ^ round << 20).await?;
    }
    run.tally.absorb(during);
    run.tally.deaths += launch.panics();
    ensure!(store.kill()?, "the store ended by itself: {}", launch.last_words());
    Ok(())
}
