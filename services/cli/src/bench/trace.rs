//! `kvasir bench trace`: replays a trace of block ids, in the format of Mooncake's published traces, against a store.
//!
//! Each line is a request: `hash_ids` names its prompt's blocks of 512 tokens, equal ids are equal prefixes. For each request
//! the store is asked how much it holds, what it holds is loaded, and what it does not hold is put, as a worker would after
//! computing it. What is loaded costs time; what is not computed saves it, at a stated prefill speed.
//!
//! Format: `{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [..]}` per line (Mooncake,
//! FAST '25 release).

mod report;
mod requests;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures::{StreamExt, stream};
use kvasir_block::BlockHash;
use kvasir_client::{ClientConfig, ClientError, GetOutcome, Namespace, PutOutcome, StoreClient};
use parking_lot::Mutex;

use self::{
    report::{Moved, Report},
    requests::Request,
};
use super::store::{Host, Payloads, Wanted, hash, schema, settle};
use crate::{
    args::{ConfigArgs, TraceArgs},
    output::{print, say},
};

/// Tokens of a block of the trace.
const BLOCK_TOKENS: u16 = 512;
/// How long a hit is kept for its reader.
const LEASE: Duration = Duration::from_secs(30);
/// What the replay did, summed over requests.
#[derive(Clone, Debug, Default)]
struct Sums {
    tokens: u64,
    blocks: u64,
    hits: u64,
    /// Of what was matched, by the tier that it was in then.
    matched_host: u64,
    matched_object: u64,
    /// Said to be held, then not served.
    lost: u64,
    put: u64,
    put_refused: u64,
    loading: Duration,
    /// Seconds of loading, per request with a hit.
    loads: Vec<f64>,
}

pub(crate) async fn run(args: &TraceArgs, config: &ConfigArgs) -> Result<()> {
    let requests = requests::read(&args.trace, args.requests)?;
    let block_bytes = args
        .bytes_per_token
        .as_usize()
        .saturating_mul(usize::from(BLOCK_TOKENS));
    let schema = schema(block_bytes, BLOCK_TOKENS).context("--bytes-per-token")?;
    let wanted = Wanted {
        running: args.store.as_deref(),
        running_pid: None,
        out: &args.out,
        host_bytes: args.host,
        disk_bytes: args.disk,
        objects: false,
        context_bytes: None,
    };
    let host = Host::start(wanted, config).await?;
    let client = StoreClient::new(ClientConfig::to(host.url()))?;
    let namespace = client.open_namespace(&host.tenant()?, &schema).await?;
    let replay = Arc::new(Replay {
        client,
        namespace,
        payloads: Payloads::new(block_bytes, args.seed),
        run: host.next_run(),
        sums: Mutex::new(Sums::default()),
    });
    let written = host.written_bytes();
    let begun = Instant::now();
    let count = requests.len();
    // In the order of the trace, some at a time; as fast as they go.
    let mut replies =
        stream::iter(requests.iter().map(|request| replay.request(request))).buffered(args.in_flight.into());
    let mut done = 0;
    while let Some(reply) = replies.next().await {
        reply?;
        done += 1;
        if done % 1000 == 0 {
            say(format_args!("{done} of {count} requests"));
        }
    }
    drop(replies);
    let elapsed = begun.elapsed();
    settle(&replay.client).await?;
    // Metrics are published once a second.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let moved = Moved {
        metrics: host.metrics().await?,
        disk_bytes_written: host.written_bytes().zip(written).map(|(after, before)| after - before),
    };
    host.stop().await?;
    let sums = replay.sums.lock().clone();
    let report = Report::new(args, config, &requests, sums, &moved, elapsed);
    report.show();
    if args.json {
        print(serde_json::to_string_pretty(&report).context("the result cannot be written as JSON")?);
    }
    Ok(())
}

struct Replay {
    client: StoreClient,
    namespace: Namespace,
    payloads: Payloads,
    run: u64,
    sums: Mutex<Sums>,
}

impl Replay {
    /// One request: match, load the hit, put the rest.
    async fn request(&self, request: &Request) -> Result<(), ClientError> {
        let chain: Vec<BlockHash> = request.whole().iter().map(|&id| hash(self.run, id, 0)).collect();
        let mut sums = Sums {
            tokens: request.input_length,
            blocks: chain.len() as u64,
            ..Sums::default()
        };
        if !chain.is_empty() {
            let begun = Instant::now();
            let found = self.client.match_prefix(self.namespace.id, &chain, Some(LEASE)).await?;
            let loaded = self.load(&chain[..found.hit_blocks], found.lease).await?;
            if loaded > 0 {
                sums.loading = begun.elapsed();
                sums.loads.push(begun.elapsed().as_secs_f64());
            }
            sums.hits = loaded as u64;
            sums.matched_host = found.host_blocks.min(loaded) as u64;
            sums.matched_object = found.object_blocks.min(loaded - found.host_blocks.min(loaded)) as u64;
            sums.lost = (found.hit_blocks - loaded) as u64;
            if let Some(lease) = found.lease {
                self.client.release(lease).await?;
            }
            (sums.put, sums.put_refused) = self.put(&chain[loaded..]).await?;
        }
        self.sums.lock().add(sums);
        Ok(())
    }

    /// Gets `chain` up to the first block that does not come; returns how many came.
    async fn load(&self, chain: &[BlockHash], lease: Option<u64>) -> Result<usize, ClientError> {
        if chain.is_empty() {
            return Ok(0);
        }
        let mut gets = self
            .client
            .get_blocks(&self.namespace, chain, 0..1, lease, None)
            .await?;
        let mut loaded = 0;
        while let Some(block) = gets.next().await? {
            if block.outcome != GetOutcome::Hit {
                break;
            }
            loaded += 1;
        }
        Ok(loaded)
    }

    /// Puts `chain`; returns how many are held now and how many were refused.
    async fn put(&self, chain: &[BlockHash]) -> Result<(u64, u64), ClientError> {
        if chain.is_empty() {
            return Ok((0, 0));
        }
        let mut puts = self.client.put_blocks(&self.namespace).await?;
        for &name in chain {
            puts.put(self.payloads.block(name)).await?;
        }
        let outcomes = puts.finish().await?;
        let stored = outcomes
            .iter()
            .filter(|(_, _, outcome)| matches!(outcome, PutOutcome::Stored | PutOutcome::Present))
            .count();
        Ok((stored as u64, (outcomes.len() - stored) as u64))
    }
}

impl Sums {
    fn add(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.blocks += other.blocks;
        self.hits += other.hits;
        self.matched_host += other.matched_host;
        self.matched_object += other.matched_object;
        self.lost += other.lost;
        self.put += other.put;
        self.put_refused += other.put_refused;
        self.loading += other.loading;
        self.loads.extend(other.loads);
    }
}
