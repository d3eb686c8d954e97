//! Row 7: bits flip on the wire, pieces come twice, are left out, or are the last thing that comes.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use kvasir_client::{ClientConfig, PutOutcome};
use rand::Rng;

use crate::{
    Run,
    corpus::{Corpus, chain, schema},
    data::Read,
    proxy::{Damage, Proxy, Weather},
    remote::{Remote, block_on},
    store::Launch,
};

const LAYERS: u16 = 2;
const LAYER_BLOCK_BYTES: usize = 16 << 10;
/// Blocks of one round: 1 MiB, 64 pieces of the proxy.
const BATCH: usize = 32;
/// Rounds before a store in an empty folder: its disk must not evict.
const ROUNDS: usize = 200;

/// One kind at a time finds what it can find, all together what only a mixture can.
const WEATHERS: [Weather; 5] = [
    Weather::of(&[Damage::Flip], 0.05),
    Weather::of(&[Damage::Duplicate], 0.03),
    Weather::of(&[Damage::Omit], 0.03),
    Weather::of(&[Damage::Cut], 0.02),
    Weather::of(&[Damage::Flip, Damage::Duplicate, Damage::Omit, Damage::Cut], 0.1),
];

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    block_on(async {
        while run.wants_more() {
            one_store(run).await?;
        }
        Ok(())
    })
}

async fn one_store(run: &mut Run) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let launch = Launch::in_folder(folder.path());
    let mut store = launch.start()?;
    let target: SocketAddr = store
        .url
        .trim_start_matches("http://")
        .parse()
        .context("the store's address")?;
    let proxy = Proxy::start(target, run.plan.seed).await?;
    let mut corpus = Corpus::new("wire", &schema(LAYERS, LAYER_BLOCK_BYTES), run.plan.seed, 0);
    let direct = Remote::connect(&store.url, &corpus).await?;
    let before = run.tally.faults;
    for round in 0..ROUNDS {
        if !run.wants_more() {
            break;
        }
        corpus.chain = chain(run.rng.random(), BATCH);
        proxy.set(Weather::CLEAR);
        let config = ClientConfig {
            // A reply that was left out must not hold the run up.
            call_timeout: Duration::from_millis(500),
            attempts_max: 1,
            jitter_seed: run.plan.seed,
            ..ClientConfig::to(format!("http://{}", proxy.addr))
        };
        let remote = Remote::with(config, &corpus).await.context("through a clear proxy")?;
        proxy.set(WEATHERS[round % WEATHERS.len()]);
        one_round(run, &remote, &direct, &corpus).await?;
        run.tally.faults = before + proxy.damaged();
        ensure!(
            store.child.ended()?.is_none(),
            "the store ended: {}",
            launch.last_words()
        );
    }
    run.tally.deaths += launch.panics();
    store.kill()?;
    Ok(())
}

async fn one_round(run: &mut Run, remote: &Remote, direct: &Remote, corpus: &Corpus) -> Result<()> {
    let put = remote.put(corpus, &corpus.chain).await;
    // Past the proxy: what the store believes that it was sent.
    let (held, error) = direct.read(&mut run.tally, corpus, &corpus.chain).await;
    ensure!(error.is_none(), "reading past the proxy: {error:?}");
    match put {
        Ok(outcomes) => {
            let refused = outcomes
                .iter()
                .filter(|(_, outcome)| *outcome == PutOutcome::ChecksumMismatch);
            run.tally
                .note("puts refused for their checksum", refused.count() as u64);
            for ((key, outcome), (_, read)) in outcomes.iter().zip(&held) {
                let taken = matches!(outcome, PutOutcome::Stored | PutOutcome::Present);
                let wrong = taken && matches!(read, Read::Corrupt);
                ensure!(!wrong, "{key:?} was answered {outcome:?} and is {read:?}");
            }
        }
        Err(_) => broken(run),
    }
    // Right ones into the store, and then out of it through the proxy.
    let put = direct.put(corpus, &corpus.chain).await?;
    ensure!(
        put.iter()
            .all(|(_, outcome)| matches!(outcome, PutOutcome::Stored | PutOutcome::Present)),
        "puts past the proxy came to {put:?}"
    );
    for part in corpus.chain.chunks(BATCH / 4) {
        let (_, error) = remote.read(&mut run.tally, corpus, part).await;
        if error.is_some() {
            broken(run);
        }
    }
    Ok(())
}

/// A call that broke is what such a network is for.
fn broken(run: &mut Run) {
    run.tally.shed += 1;
    run.tally.note("calls that broke", 1);
}
