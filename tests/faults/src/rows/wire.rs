//! Row 7: bits flip on the wire, pieces come twice, are left out, or are the last thing that comes.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use kvasir_client::{ClientConfig, DataPath, PutOutcome};
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
const WEATHERS: [Weather; 6] = [
    // Of the pieces that have a get's table in them: few, and no flip at random would find two names that are both good.
    Weather::of(&[Damage::Table], 1.0),
    Weather::of(&[Damage::Flip], 0.05),
    Weather::of(&[Damage::Duplicate], 0.03),
    Weather::of(&[Damage::Omit], 0.03),
    Weather::of(&[Damage::Cut], 0.02),
    Weather::of(&[Damage::Flip, Damage::Duplicate, Damage::Omit, Damage::Cut], 0.1),
];

pub(super) fn inflict(run: &mut Run) -> Result<()> {
    run.rounds(|run, _| block_on(one_store(run)))
}

async fn one_store(run: &mut Run) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let bulk_port = free_port()?;
    let mut launch = Launch::in_folder(folder.path());
    launch.set.push(format!("store.bulk_listen={bulk_port}"));
    let mut store = launch.start()?;
    let target: SocketAddr = store
        .url
        .trim_start_matches("http://")
        .parse()
        .context("the store's address")?;
    let grpc = Proxy::start(target, run.plan.seed).await?;
    let bulk = Proxy::start(bulk_port, !run.plan.seed).await?;
    grpc.rewrite(bulk_port, bulk.addr)?;
    let mut corpus = Corpus::new("wire", &schema(LAYERS, LAYER_BLOCK_BYTES), run.plan.seed, 0);
    let past = ClientConfig {
        path: DataPath::Grpc,
        jitter_seed: run.plan.seed,
        ..ClientConfig::to(&store.url)
    };
    let direct = Remote::with(past, &corpus).await?;
    let before = run.tally.faults;
    for round in 0..ROUNDS {
        if !run.wants_more() {
            break;
        }
        corpus.chain = chain(run.rng.random(), BATCH);
        grpc.set(Weather::CLEAR);
        bulk.set(Weather::CLEAR);
        let path = if round % 2 == 0 { DataPath::Bulk } else { DataPath::Grpc };
        let config = ClientConfig {
            path,
            // A reply that was left out must not hold the run up.
            call_timeout: Duration::from_millis(500),
            attempts_max: 1,
            jitter_seed: run.plan.seed,
            ..ClientConfig::to(format!("http://{}", grpc.addr))
        };
        let remote = Remote::with(config, &corpus).await.context("through clear proxies")?;
        let proxy = if path == DataPath::Bulk { &bulk } else { &grpc };
        proxy.set(WEATHERS[round / 2 % WEATHERS.len()]);
        one_round(run, &remote, &direct, &corpus, path)
            .await
            .with_context(|| format!("round {round}, {path:?}"))?;
        run.tally.faults = before + grpc.damaged() + bulk.damaged();
        ensure!(
            store.child.ended()?.is_none(),
            "the store ended: {}",
            launch.last_words()
        );
    }
    run.tally.note("pieces damaged, grpc", grpc.damaged());
    run.tally.note("pieces damaged, bulk", bulk.damaged());
    run.tally.deaths += launch.panics();
    store.kill()?;
    Ok(())
}

/// A port that was free a moment ago.
fn free_port() -> Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

async fn one_round(run: &mut Run, remote: &Remote, direct: &Remote, corpus: &Corpus, path: DataPath) -> Result<()> {
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
            // Puts go block after block, a read comes layer after layer.
            let held: HashMap<_, _> = held.iter().map(|(key, read)| (*key, read)).collect();
            for (key, outcome) in &outcomes {
                let read = held.get(key).context("a block that was put and not read")?;
                let taken = matches!(outcome, PutOutcome::Stored | PutOutcome::Present);
                // The bulk path's tables have checksums; in gRPC's messages a name may flip, and is then another's.
                let lost = taken && (**read == Read::Corrupt || path == DataPath::Bulk && **read == Read::Miss);
                ensure!(!lost, "{key:?} was answered {outcome:?} and is {read:?}");
                run.tally.note(
                    "puts under a name that flipped",
                    u64::from(taken && **read == Read::Miss),
                );
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
