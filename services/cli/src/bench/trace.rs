//! `kvasir bench trace`: replays a trace of block ids, in the format of Mooncake's published traces, against a store.
//!
//! Each line is a request: `hash_ids` names its prompt's blocks of 512 tokens, equal ids are equal prefixes. For each request
//! the store is asked how much it holds, what it holds is loaded, and what it does not hold is put, as a worker would after
//! computing it. What is loaded costs time; what is not computed saves it, at a stated prefill speed.
//!
//! Format: `{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [..]}` per line (Mooncake,
//! FAST '25 release).

use std::{
    collections::HashSet,
    io::{BufRead, Read},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, stream};
use kvasir_block::BlockHash;
use kvasir_client::{ClientConfig, ClientError, GetOutcome, Namespace, PutOutcome, StoreClient};
use kvasir_runtime::units::ByteSize;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::store::{Host, Payloads, hash, schema};
use crate::{
    args::{ConfigArgs, TraceArgs},
    measure::{Machine, median},
    output::{print, say},
    version::{PROFILE, VERSION},
};

/// Tokens of a block of the trace.
const BLOCK_TOKENS: u16 = 512;
/// How long a hit is kept for its reader.
const LEASE: Duration = Duration::from_secs(30);
/// Longest line of a trace; the published ones stay below 10 KiB.
const LINE_BYTES_MAX: u64 = 1 << 20;

#[derive(Debug, Deserialize)]
struct Request {
    input_length: u64,
    hash_ids: Vec<u64>,
}

impl Request {
    /// Ids of whole blocks; the last may be partial.
    fn whole(&self) -> &[u64] {
        let whole = (self.input_length / u64::from(BLOCK_TOKENS)) as usize;
        &self.hash_ids[..whole.min(self.hash_ids.len())]
    }
}

/// What the replay did, summed over requests.
#[derive(Clone, Debug, Default)]
struct Sums {
    tokens: u64,
    blocks: u64,
    host_hits: u64,
    disk_hits: u64,
    /// Said to be held, then not served.
    lost: u64,
    put: u64,
    put_refused: u64,
    loading: Duration,
    /// Seconds of loading, per request with a hit.
    loads: Vec<f64>,
}

/// The result of `--json`.
#[derive(Debug, Serialize)]
struct Report {
    requests: usize,
    input_tokens: u64,
    blocks: u64,
    /// Of all whole blocks.
    hit_share: f64,
    host_hit_share: f64,
    disk_hit_share: f64,
    /// Share that a store without bounds would hit.
    hit_share_unbounded: f64,
    lost_blocks: u64,
    put_blocks: u64,
    put_refused_blocks: u64,
    block_bytes: usize,
    gigabytes_loaded: f64,
    gigabytes_put: f64,
    load_seconds_p50: f64,
    load_gigabytes_per_second: f64,
    prefill_tokens_per_second: f64,
    /// Computing what was hit would have taken this long.
    recompute_seconds: f64,
    load_seconds: f64,
    saved_seconds: f64,
    in_flight: usize,
    host_bytes_max: u64,
    replay_seconds: f64,
    kvasir: &'static str,
    profile: &'static str,
    machine: Machine,
}

pub(crate) async fn run(args: &TraceArgs, config: &ConfigArgs) -> Result<()> {
    ensure!(
        args.prefill_speed > 0.0,
        "--prefill-speed {}: above 0",
        args.prefill_speed
    );
    let requests = read(&args.trace, args.requests)?;
    let block_bytes = args
        .bytes_per_token
        .as_usize()
        .saturating_mul(usize::from(BLOCK_TOKENS));
    let schema = schema(block_bytes, BLOCK_TOKENS).context("--bytes-per-token")?;
    let host = Host::start(args.store.as_deref(), &args.out, args.host, config).await?;
    let client = StoreClient::new(ClientConfig::to(host.url()))?;
    let namespace = client.open_namespace(&host.tenant()?, &schema).await?;
    let replay = Arc::new(Replay {
        client,
        namespace,
        payloads: Payloads::new(block_bytes, args.seed),
        run: host.next_run(),
        sums: Mutex::new(Sums::default()),
    });
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
    host.stop().await?;
    let sums = replay.sums.lock().clone();
    let (blocks, block) = (sums.blocks.max(1) as f64, block_bytes as f64);
    let hits = sums.host_hits + sums.disk_hits;
    let recompute = (hits * u64::from(BLOCK_TOKENS)) as f64 / args.prefill_speed;
    let loading = sums.loading.as_secs_f64();
    let report = Report {
        requests: count,
        input_tokens: sums.tokens,
        blocks: sums.blocks,
        hit_share: hits as f64 / blocks,
        host_hit_share: sums.host_hits as f64 / blocks,
        disk_hit_share: sums.disk_hits as f64 / blocks,
        hit_share_unbounded: unbounded(&requests) as f64 / blocks,
        lost_blocks: sums.lost,
        put_blocks: sums.put,
        put_refused_blocks: sums.put_refused,
        block_bytes,
        gigabytes_loaded: hits as f64 * block / 1e9,
        gigabytes_put: sums.put as f64 * block / 1e9,
        load_seconds_p50: median(sums.loads),
        load_gigabytes_per_second: if loading > 0.0 {
            hits as f64 * block / 1e9 / loading
        } else {
            0.0
        },
        prefill_tokens_per_second: args.prefill_speed,
        recompute_seconds: recompute,
        load_seconds: loading,
        saved_seconds: recompute - loading,
        in_flight: args.in_flight.into(),
        host_bytes_max: args.host.as_u64(),
        replay_seconds: elapsed.as_secs_f64(),
        kvasir: VERSION,
        profile: PROFILE,
        machine: Machine::here(),
    };
    say(format_args!(
        "{} requests, {} blocks: hit {:.1} % (host {:.1}, disk {:.1}; without bounds {:.1}), loaded {:.1} GB in {:.1} s against {:.1} s of \
         computing at {} tokens/s; put {:.1} GB, {} refused",
        report.requests,
        report.blocks,
        100.0 * report.hit_share,
        100.0 * report.host_hit_share,
        100.0 * report.disk_hit_share,
        100.0 * report.hit_share_unbounded,
        report.gigabytes_loaded,
        report.load_seconds,
        report.recompute_seconds,
        report.prefill_tokens_per_second,
        report.gigabytes_put,
        report.put_refused_blocks,
    ));
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
            sums.host_hits = found.host_blocks.min(loaded) as u64;
            sums.disk_hits = loaded as u64 - sums.host_hits;
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
        self.host_hits += other.host_hits;
        self.disk_hits += other.disk_hits;
        self.lost += other.lost;
        self.put += other.put;
        self.put_refused += other.put_refused;
        self.loading += other.loading;
        self.loads.extend(other.loads);
    }
}

fn read(path: &Path, most: Option<usize>) -> Result<Vec<Request>> {
    let file = std::fs::File::open(path).with_context(|| {
        format!(
            "cannot open {}: a trace is a file of JSON lines with input_length and hash_ids, as Mooncake publishes (FAST '25 release)",
            path.display()
        )
    })?;
    let mut reader = std::io::BufReader::new(file);
    let mut requests = Vec::new();
    let mut line = String::new();
    while most.is_none_or(|most| requests.len() < most) {
        line.clear();
        let read = (&mut reader).take(LINE_BYTES_MAX).read_line(&mut line);
        if read.with_context(|| format!("cannot read {}", path.display()))? == 0 {
            break;
        }
        let at = requests.len() + 1;
        if !line.ends_with('\n') && line.len() as u64 == LINE_BYTES_MAX {
            bail!(
                "{}: line {at} is longer than {}",
                path.display(),
                ByteSize::bytes(LINE_BYTES_MAX)
            );
        }
        requests
            .push(serde_json::from_str(&line).with_context(|| format!("{}: line {at} is no request", path.display()))?);
    }
    Ok(requests)
}

/// Whole blocks that were seen before, in an unbroken run from the first: hits of a store that never forgets.
fn unbounded(requests: &[Request]) -> u64 {
    let mut seen: HashSet<u64> = HashSet::new();
    let mut hits = 0;
    for request in requests {
        hits += request.whole().iter().take_while(|id| seen.contains(id)).count() as u64;
        seen.extend(request.whole());
    }
    hits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(input_length: u64, hash_ids: &[u64]) -> Request {
        Request {
            input_length,
            hash_ids: hash_ids.to_vec(),
        }
    }

    #[test]
    fn whole_blocks_and_hits_without_bounds() {
        assert_eq!(request(1025, &[1, 2, 3]).whole(), [1, 2]);
        assert_eq!(request(511, &[1]).whole(), [] as [u64; 0]);
        assert_eq!(request(u64::MAX, &[1]).whole(), [1]);
        let requests = [
            request(1536, &[1, 2, 3]),
            request(1536, &[1, 2, 4]),
            // The second block is new, so the third, though seen, is behind a gap.
            request(1536, &[1, 5, 3]),
        ];
        assert_eq!(unbounded(&requests), 2 + 1);
    }

    #[test]
    fn traces_are_read_or_refused_by_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("trace.jsonl");
        let good = "{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [0, 1]}\n";
        std::fs::write(&path, good.repeat(3)).expect("written");
        assert_eq!(read(&path, None).expect("a trace").len(), 3);
        assert_eq!(read(&path, Some(2)).expect("a trace").len(), 2);
        std::fs::write(&path, format!("{good}{{\"input_length\": -1}}\n")).expect("written");
        let error = format!("{:#}", read(&path, None).expect_err("refused"));
        assert!(error.contains("line 2"), "{error}");
        std::fs::write(&path, "x".repeat(LINE_BYTES_MAX as usize + 1)).expect("written");
        assert!(read(&path, None).is_err());
        let error = format!("{:#}", read(&folder.path().join("none"), None).expect_err("refused"));
        assert!(error.contains("Mooncake"), "{error}");
    }
}
