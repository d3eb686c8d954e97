//! Row 1: `kill -9` at random times under load. What was synced before is there after, and right.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvasir_block::BlockHash;
use kvasir_client::{ClientError, PutOutcome};
use rand::{Rng, seq::IndexedRandom};

use crate::{
    Run, Tally,
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

/// What a client knows of the blocks that it put.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Answered `STORED`, and then the store said that all it took was synced.
    pub(super) synced: Vec<BlockHash>,
    /// Answered `STORED` in this life.
    taken: Vec<BlockHash>,
    /// May be there or not: no answer came, or a kill came after it.
    unsure: Vec<BlockHash>,
}

impl Ledger {
    /// The store is dead, and with it what it had only taken.
    pub(super) fn bury(&mut self) {
        self.unsure.append(&mut self.taken);
    }

    fn blocks(&self) -> usize {
        self.synced.len() + self.taken.len() + self.unsure.len()
    }
}

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    block_on(async {
        while run.wants_more() {
            one_folder(run).await?;
        }
        Ok(())
    })
}

async fn one_folder(run: &mut Run) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let launch = Launch::in_folder(folder.path());
    let seed = run.rng.random();
    let corpus = Corpus::new("kill", &schema(LAYERS, LAYER_BLOCK_BYTES), seed, 0);
    let mut ledger = Ledger::default();
    let mut lives = 0;
    while run.wants_more() && ledger.blocks() < BLOCKS_MAX {
        let store = launch.start()?;
        run.note_longest("longest start, ms", store.ready_after);
        let remote = Remote::connect(&store.url, &corpus).await?;
        check(run, &remote, &corpus, &ledger)
            .await
            .with_context(|| format!("life {lives}"))?;
        let lives_for = Duration::from_millis(run.rng.random_range(5..400));
        let alive = load_and_kill(run, store, &remote, &corpus, &mut ledger, lives_for).await?;
        ensure!(alive, "the store ended by itself: {}", launch.last_words());
        ledger.bury();
        run.tally.faults += 1;
        lives += 1;
    }
    // The last kill is looked at too.
    let store = launch.start()?;
    let remote = Remote::connect(&store.url, &corpus).await?;
    check(run, &remote, &corpus, &ledger).await.context("the last life")?;
    run.tally.deaths += launch.panics();
    store.kill()?;
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

async fn load_once(
    remote: &Remote,
    corpus: &Corpus,
    ledger: &mut Ledger,
    tally: &mut Tally,
    seed: u64,
) -> Result<(), ClientError> {
    let blocks = chain(seed, BATCH);
    ledger.unsure.extend(&blocks);
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
    // Just put: from memory.
    let (_, error) = remote.read(tally, corpus, &blocks[..BATCH / 4]).await;
    error.map_or(Ok(()), Err)?;
    if remote.client.stat().await?.flush_queue_blocks == 0 {
        ledger.synced.append(&mut ledger.taken);
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
