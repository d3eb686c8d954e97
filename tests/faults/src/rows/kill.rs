//! Row 1: `kill -9` at random times under load. What was synced before is there after, and right. Every other folder has a small
//! disk and a bucket behind it, so that it is also killed while it reclaims, demotes and writes packs.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvasir_block::BlockHash;
use kvasir_client::{ClientError, PutOutcome};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use crate::{
    Plan, Run, Tally,
    corpus::{Corpus, chain, schema},
    data::Read,
    remote::{Remote, block_on},
    store::{Launch, StoreProcess},
};

/// Two layers of 16 KiB.
const LAYERS: u16 = 2;
const LAYER_BLOCK_BYTES: usize = 16 << 10;
/// Blocks of one put stream: 512 KiB.
const BATCH: usize = 16;
/// Blocks after which a life begins in an empty folder: 192 MiB, so that nothing was evicted from the disk.
const BLOCKS_MAX: usize = 6_000;
/// Blocks that are read after a start, at most.
const CHECKED: usize = 256;
/// Folders at a time. A life is mostly waiting: for a start, for a sync.
const LANES: u64 = 3;
/// Of a disk of 8 MiB with a bucket behind it, the blocks that no reclaim can have come to: 2 MiB.
const YOUNG: usize = 64;

/// How they are counted.
const FROM_BUCKET: &str = "of them hit, from the bucket";

/// What a client knows of the blocks that it put.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Answered `STORED`, and then the store said that all it took was synced.
    pub(super) synced: Vec<BlockHash>,
    /// Answered `STORED` in this life.
    taken: Vec<BlockHash>,
    /// May be there or not: no answer came, or a kill came after it.
    unsure: Vec<BlockHash>,
    /// Blocks put since the last time that all was synced: they may be on the disk too, and what is older has moved on.
    after: usize,
}

impl Ledger {
    /// Forgets all but the youngest of what was synced, of `count` blocks that were put last: the rest may have gone to the bucket, or on its way there with the store.
    pub(super) fn keep_young(&mut self, count: usize) -> Vec<BlockHash> {
        let young = self.synced.len().saturating_sub(count.saturating_sub(self.after));
        let kept = self.synced.split_off(young);
        std::mem::replace(&mut self.synced, kept)
    }

    /// The store is dead, and with it what it had only taken.
    pub(super) fn bury(&mut self) {
        self.unsure.append(&mut self.taken);
    }

    fn blocks(&self) -> usize {
        self.synced.len() + self.taken.len() + self.unsure.len()
    }
}

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    let lanes = LANES.min(run.plan.count).max(1);
    let runs: Vec<Run> = (0..lanes)
        .map(|lane| Run {
            plan: Plan {
                seed: run.rng.random(),
                count: (run.plan.count + lane) / lanes,
            },
            rng: StdRng::seed_from_u64(run.rng.random()),
            tally: Tally::default(),
        })
        .collect();
    let ended: Vec<(Tally, Result<()>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = runs
            .into_iter()
            .map(|mut run| {
                scope.spawn(move || {
                    let lived = block_on(lives(&mut run));
                    (run.tally, lived)
                })
            })
            .collect();
        let panicked = |_| (Tally::default(), Err(anyhow::anyhow!("a lane panicked")));
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(panicked))
            .collect()
    });
    let mut outcome = Ok(());
    for (tally, lived) in ended {
        run.tally.absorb(tally);
        outcome = outcome.and(lived);
    }
    outcome?;
    let demoted = run.tally.notes.get(FROM_BUCKET).copied();
    ensure!(
        run.plan.count < 200 || demoted.is_some_and(|hits| hits > 0),
        "nothing came back from the bucket"
    );
    Ok(())
}

async fn lives(run: &mut Run) -> Result<()> {
    let mut with_bucket = run.rng.random();
    while run.wants_more() {
        one_folder(run, with_bucket).await?;
        with_bucket = !with_bucket;
    }
    Ok(())
}

async fn one_folder(run: &mut Run, with_bucket: bool) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let launch = if with_bucket {
        Launch::with_bucket(folder.path())
    } else {
        Launch::in_folder(folder.path())
    };
    let seed = run.rng.random();
    let corpus = Corpus::new("kill", &schema(LAYERS, LAYER_BLOCK_BYTES), seed, 0);
    let mut ledger = Ledger::default();
    let mut older: Vec<BlockHash> = Vec::new();
    let mut lives = 0;
    loop {
        // The last kill is looked at too.
        let last = !run.wants_more() || ledger.blocks() + older.len() >= BLOCKS_MAX;
        let store = launch.start()?;
        run.note_longest("longest start, ms", store.ready_after);
        let remote = Remote::connect(&store.url, &corpus).await?;
        if with_bucket {
            older.extend(ledger.keep_young(YOUNG));
            look_for(run, &remote, &corpus, &older).await?;
        }
        check(run, &remote, &corpus, &ledger)
            .await
            .with_context(|| format!("life {lives}, with a bucket: {with_bucket}"))?;
        if last {
            run.tally.deaths += launch.panics();
            store.kill()?;
            return Ok(());
        }
        let lives_for = Duration::from_millis(run.rng.random_range(5..400));
        let alive = load_and_kill(run, store, &remote, &corpus, &mut ledger, lives_for).await?;
        ensure!(alive, "the store ended by itself: {}", launch.last_words());
        ledger.bury();
        run.tally.faults += 1;
        lives += 1;
    }
}

/// Reads some of what has left the disk, but for what was kept because it was asked for: right, or not there.
async fn look_for(run: &mut Run, remote: &Remote, corpus: &Corpus, older: &[BlockHash]) -> Result<()> {
    let on_disk = Launch::DISK_WITH_BUCKET / (usize::from(LAYERS) * LAYER_BLOCK_BYTES);
    let gone = &older[..older.len().saturating_sub(on_disk)];
    let some: Vec<BlockHash> = gone.choose_multiple(&mut run.rng, CHECKED / 4).copied().collect();
    if some.is_empty() {
        return Ok(());
    }
    let (got, error) = remote.read(&mut run.tally, corpus, &some).await;
    ensure!(error.is_none(), "reading after the start: {error:?}");
    let hits = got.iter().filter(|(_, read)| matches!(read, Read::Hit(_))).count();
    run.tally.note("layer blocks read that left the disk", got.len() as u64);
    run.tally.note(FROM_BUCKET, hits as u64);
    Ok(())
}

/// Puts and reads until `lives_for` is over, then kills in the middle of it; true if the store lived until then.
async fn load_and_kill(
    run: &mut Run,
    store: StoreProcess,
    remote: &Remote,
    corpus: &Corpus,
    ledger: &mut Ledger,
    lives_for: Duration,
) -> Result<bool> {
    let seed = run.rng.random();
    let mut during = Tally::default();
    let alive = tokio::select! {
        biased;
        () = tokio::time::sleep(lives_for) => store.kill()?,
        error = load(remote, corpus, ledger, &mut during, seed) => {
            anyhow::bail!("a call failed while the store was well: {error:?}")
        }
    };
    run.tally.absorb(during);
    Ok(alive)
}

/// Puts, reads and asks what is synced, until an error ends it.
pub(super) async fn load(
    remote: &Remote,
    corpus: &Corpus,
    ledger: &mut Ledger,
    tally: &mut Tally,
    seed: u64,
) -> ClientError {
    let mut round = 0_u64;
    loop {
        if let Err(error) = load_once(remote, corpus, ledger, tally, seed ^ round << 20).await {
            return error;
        }
        round += 1;
    }
}

pub(super) async fn load_once(
    remote: &Remote,
    corpus: &Corpus,
    ledger: &mut Ledger,
    tally: &mut Tally,
    seed: u64,
) -> Result<(), ClientError> {
    let blocks = chain(seed, BATCH);
    ledger.unsure.extend(&blocks);
    ledger.after += BATCH;
    let outcomes = remote.put(corpus, &blocks).await?;
    ledger.unsure.truncate(ledger.unsure.len() - BATCH);
    for (i, hash) in blocks.iter().enumerate() {
        let layers = &outcomes[i * usize::from(LAYERS)..(i + 1) * usize::from(LAYERS)];
        if layers
            .iter()
            .all(|(_, outcome)| matches!(outcome, PutOutcome::Stored | PutOutcome::Present))
        {
            ledger.taken.push(*hash);
        } else {
            ledger.unsure.push(*hash);
        }
    }
    // Some are asked for more than once, so that reclaim has something to keep.
    for _ in 0..2 {
        let warm = &blocks[..BATCH / 8];
        remote.client.match_prefix(corpus.namespace, warm, None).await?;
    }
    // Just put: from memory.
    let (_, error) = remote.read(tally, corpus, &blocks[..BATCH / 4]).await;
    error.map_or(Ok(()), Err)?;
    if remote.client.stat().await?.flush_queue_blocks == 0 {
        ledger.synced.append(&mut ledger.taken);
        ledger.after = 0;
    }
    Ok(())
}

/// Reads what the ledger knows, the youngest in any case; at least 99 % of what was synced must be there.
pub(super) async fn check(run: &mut Run, remote: &Remote, corpus: &Corpus, ledger: &Ledger) -> Result<()> {
    let young = ledger.synced.len().saturating_sub(CHECKED / 2);
    let mut synced: Vec<BlockHash> = ledger.synced[young..].to_vec();
    synced.extend(ledger.synced[..young].choose_multiple(&mut run.rng, CHECKED / 2));
    if !synced.is_empty() {
        let (got, error) = remote.read(&mut run.tally, corpus, &synced).await;
        ensure!(error.is_none(), "reading after the start: {error:?}");
        let hits = got
            .iter()
            .filter(|(_, read)| matches!(read, Read::Hit(_) | Read::Wrong))
            .count();
        run.tally.note("synced layer blocks read", got.len() as u64);
        run.tally.note("synced layer blocks hit", hits as u64);
        ensure!(
            hits * 100 >= got.len() * 99,
            "{hits} of {} synced layer blocks are there",
            got.len()
        );
    }
    let others: Vec<BlockHash> = ledger
        .taken
        .iter()
        .chain(&ledger.unsure)
        .rev()
        .take(CHECKED)
        .copied()
        .collect();
    if !others.is_empty() {
        let (_, error) = remote.read(&mut run.tally, corpus, &others).await;
        ensure!(error.is_none(), "reading after the start: {error:?}");
    }
    Ok(())
}
