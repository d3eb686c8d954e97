//! `--churn`: much more than memory holds goes through a store, with gets beside it.
//!
//! One loop puts contexts that nobody saw before, as fast as they are taken. Beside it gets are due at a fixed rate, half of
//! contexts put a moment ago, half of any that were put since the beginning: from memory, from disk, and some that reclaim has
//! taken since. A latency counts from when the get was due, so that a store which stands still shows in every get of that
//! time. Each payload is compared byte for byte with what was put. Four times a second the store's resident memory is noted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use kvasir_client::{GetOutcome, Namespace, PutOutcome, StoreClient};
use kvasir_runtime::units::ByteSize;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde::Serialize;
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};

use super::{
    BLOCK_TOKENS, BUSY_MAX, CHURN_HOST, DataSet, Host, Payloads, client, process::Resident, report::Latency, schema,
    settle, wanted,
};
use crate::{
    args::{ConfigArgs, StoreBenchArgs},
    measure::{Machine, median},
    output::{print, say},
    version::{PROFILE, VERSION},
};

/// Version of the JSON.
const SCHEMA: u32 = 1;
/// Gets per second if `--rate` says nothing.
const RATE: f64 = 20.0;
/// Gets under way at a time; beyond it a due get is not sent and counted as such.
const UNDER_WAY_MAX: usize = 256;
/// Contexts that count as put a moment ago.
const RECENT: u64 = 16;
/// How often memory is noted.
const SAMPLE: Duration = Duration::from_millis(250);
/// What a store has resident beside its tiers: code, stacks, the index's caches, messages on their way.
const BESIDE: ByteSize = ByteSize::mib(512);

/// The result of `--json`.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    churn_bytes: u64,
    block_bytes: usize,
    batch: usize,
    host_bytes_max: u64,
    disk_bytes_max: u64,
    seconds: f64,
    put_gigabytes_per_second: f64,
    /// Blocks that the store was too busy to take at once, and that were put again.
    put_busy: u64,
    gets: u64,
    get_rate: f64,
    /// Gets that were due and not sent.
    not_sent: u64,
    hit_blocks: u64,
    absent_blocks: u64,
    busy_blocks: u64,
    /// Blocks of every other outcome.
    other_blocks: u64,
    /// Since the get was due.
    get_latency_us: Latency,
    /// Of the gets of which every block was held.
    hit_latency_us: Latency,
    resident_bytes_max: Option<u64>,
    /// Most that it should have: memory of the host tier, the flush queue and what is beside.
    resident_bytes_bound: u64,
    inside_bound: Option<bool>,
    /// Median of the last quarter less that of the quarter before.
    growth_bytes: Option<i64>,
    segments_reclaimed: Option<u64>,
    /// Of the store's process, for all reasons.
    disk_bytes_written: Option<u64>,
    disk_bytes_per_payload_byte: Option<f64>,
    samples: Vec<Sample>,
    kvasir: &'static str,
    profile: &'static str,
    machine: Machine,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Sample {
    seconds: f64,
    put_bytes: u64,
    resident: Resident,
}

/// What putter, getters and sampler share.
struct Churn {
    namespace: Namespace,
    data: DataSet,
    /// Contexts that are wholly put.
    put: AtomicU64,
    done: AtomicBool,
}

/// What one get, or all of them, came to.
#[derive(Clone, Debug)]
struct Gets {
    count: u64,
    not_sent: u64,
    hits: u64,
    absent: u64,
    busy: u64,
    other: u64,
    latency: Histogram<u64>,
    hit_latency: Histogram<u64>,
}

pub(super) async fn run(args: &StoreBenchArgs, bytes: ByteSize, config: &ConfigArgs) -> Result<()> {
    let (&[size], &[batch]) = (&args.sizes[..], &args.batches[..]) else {
        anyhow::bail!("--churn takes one of --sizes and one of --batches, as in --sizes 1MiB --batches 16");
    };
    let context_bytes = size.as_u64().saturating_mul(batch as u64);
    ensure!(
        batch > 0 && bytes.as_u64() >= context_bytes,
        "--churn {bytes}: at least one context of {batch} blocks"
    );
    let host_bytes = args.host.unwrap_or(CHURN_HOST);
    // A third of what comes: every segment is reclaimed about twice.
    let disk_bytes = ByteSize::bytes((bytes.as_u64() / 3).max(4 * host_bytes.as_u64().min(1 << 30)));
    let host = Host::start(wanted(args, host_bytes, Some(disk_bytes)), config).await?;
    let first = client(&host, args)?;
    let schema = schema(size.as_usize(), BLOCK_TOKENS)?;
    let churn = Arc::new(Churn {
        namespace: first.open_namespace(&host.tenant()?, &schema).await?,
        data: DataSet {
            run: host.next_run(),
            put_run: host.next_run(),
            contexts: bytes.as_u64().div_ceil(context_bytes) as usize,
            blocks: batch,
            payloads: Arc::new(Payloads::new(size.as_usize(), args.seed)),
        },
        put: AtomicU64::new(0),
        done: AtomicBool::new(false),
    });
    let rate = args.rate.unwrap_or(RATE);
    say(format_args!(
        "{bytes} in contexts of {batch} x {size} through {host_bytes} of memory and {disk_bytes} of disk, {rate} gets per second"
    ));
    let written = host.written_bytes();
    let begun = Instant::now();
    let putting = async {
        let busy = churn.put_all(&first).await;
        churn.done.store(true, Ordering::Release);
        busy.map(|busy| (busy, begun.elapsed()))
    };
    let getter = client(&host, args)?;
    let ((busy, elapsed), gets, samples) = tokio::try_join!(
        putting,
        churn.get_all(&getter, rate, args.seed),
        churn.watch(&host, context_bytes)
    )?;
    settle(&first).await?;
    // Published once a second.
    sleep(Duration::from_millis(1500)).await;
    let metrics = host.metrics().await?;
    let written = host.written_bytes().zip(written).map(|(after, before)| after - before);
    host.stop().await?;
    let queue = metrics
        .as_ref()
        .and_then(|page| page.sum("kvasir_store_flush_queue_bytes_max", &[]));
    let bound = host_bytes.as_u64() + queue.unwrap_or(0.0) as u64 + BESIDE.as_u64();
    let resident_max = samples.iter().map(|sample| sample.resident.bytes).max();
    let put_bytes = churn.data.contexts as u64 * context_bytes;
    let report = Report {
        schema: SCHEMA,
        churn_bytes: put_bytes,
        block_bytes: size.as_usize(),
        batch,
        host_bytes_max: host_bytes.as_u64(),
        disk_bytes_max: disk_bytes.as_u64(),
        seconds: elapsed.as_secs_f64(),
        put_gigabytes_per_second: put_bytes as f64 / 1e9 / elapsed.as_secs_f64(),
        put_busy: busy,
        gets: gets.count,
        get_rate: rate,
        not_sent: gets.not_sent,
        hit_blocks: gets.hits,
        absent_blocks: gets.absent,
        busy_blocks: gets.busy,
        other_blocks: gets.other,
        get_latency_us: Latency::of(&gets.latency),
        hit_latency_us: Latency::of(&gets.hit_latency),
        resident_bytes_max: resident_max,
        resident_bytes_bound: bound,
        inside_bound: resident_max.map(|most| most <= bound),
        growth_bytes: growth(&samples),
        segments_reclaimed: metrics
            .and_then(|page| page.sum("kvasir_store_reclaimed_segments_total", &[]))
            .map(|segments| segments as u64),
        disk_bytes_written: written,
        disk_bytes_per_payload_byte: written.map(|written| written as f64 / put_bytes as f64),
        samples,
        kvasir: VERSION,
        profile: PROFILE,
        machine: Machine::here(),
    };
    report.show();
    if args.json {
        print(serde_json::to_string_pretty(&report).context("the result cannot be written as JSON")?);
    }
    ensure!(
        report.inside_bound != Some(false),
        "the store had {} resident and its bound is {}",
        ByteSize::bytes(report.resident_bytes_max.unwrap_or(0)),
        ByteSize::bytes(bound)
    );
    Ok(())
}

impl Churn {
    /// Puts every context; returns how many blocks were put more than once because the store was busy.
    async fn put_all(&self, client: &StoreClient) -> Result<u64> {
        let mut busy = 0;
        for context in 0..self.data.contexts as u64 {
            let begun = Instant::now();
            let mut missing = self.data.chain(context);
            while !missing.is_empty() {
                let mut puts = client.put_blocks(&self.namespace).await?;
                for &name in &missing {
                    puts.put(self.data.payloads.block(name)).await?;
                }
                missing.clear();
                for (name, _, outcome) in puts.finish().await? {
                    match outcome {
                        PutOutcome::Stored | PutOutcome::Present => {}
                        PutOutcome::Busy => missing.push(name),
                        other => anyhow::bail!("a block was not taken: {other:?}"),
                    }
                }
                if !missing.is_empty() {
                    busy += missing.len() as u64;
                    ensure!(begun.elapsed() < BUSY_MAX, "the store is busy for {BUSY_MAX:?}");
                    sleep(Duration::from_millis(5)).await;
                }
            }
            self.put.store(context + 1, Ordering::Release);
        }
        Ok(busy)
    }

    /// Gets at `rate` until all is put.
    async fn get_all(self: &Arc<Self>, client: &StoreClient, rate: f64, seed: u64) -> Result<Gets> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (mut all, mut under_way) = (Gets::new()?, JoinSet::new());
        let mut due = Instant::now();
        while !self.done.load(Ordering::Acquire) {
            due += Duration::from_secs_f64(1.0 / rate);
            sleep_until(due).await;
            while let Some(gets) = under_way.try_join_next() {
                all.add(&gets.context("a get broke")??);
            }
            let put = self.put.load(Ordering::Acquire);
            if put == 0 {
                continue;
            }
            if under_way.len() >= UNDER_WAY_MAX {
                all.not_sent += 1;
                continue;
            }
            let context = if rng.random::<bool>() {
                rng.random_range(put.saturating_sub(RECENT)..put)
            } else {
                rng.random_range(0..put)
            };
            let (churn, client) = (Arc::clone(self), client.clone());
            under_way.spawn(async move { churn.get(&client, context, due).await });
        }
        while let Some(gets) = under_way.join_next().await {
            all.add(&gets.context("a get broke")??);
        }
        Ok(all)
    }

    async fn get(&self, client: &StoreClient, context: u64, due: Instant) -> Result<Gets> {
        let chain = self.data.chain(context);
        let mut gets = Gets::new()?;
        let mut stream = client.get_blocks(&self.namespace, &chain, 0..1, None, None).await?;
        while let Some(block) = stream.next().await? {
            match (block.outcome, block.payload) {
                (GetOutcome::Hit, Some(payload)) => {
                    ensure!(
                        payload == self.data.payloads.block(block.hash).payload,
                        "the store served other bytes than were put under {}",
                        block.hash
                    );
                    gets.hits += 1;
                }
                (GetOutcome::Miss, _) => gets.absent += 1,
                (GetOutcome::Busy, _) => gets.busy += 1,
                _ => gets.other += 1,
            }
        }
        let nanoseconds = due.elapsed().as_nanos() as u64;
        gets.count = 1;
        gets.latency.saturating_record(nanoseconds);
        if gets.hits == chain.len() as u64 {
            gets.hit_latency.saturating_record(nanoseconds);
        }
        Ok(gets)
    }

    /// Notes the store's memory until all is put.
    async fn watch(&self, host: &Host, context_bytes: u64) -> Result<Vec<Sample>> {
        let begun = Instant::now();
        let mut samples = Vec::new();
        let mut tick = interval(SAMPLE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !self.done.load(Ordering::Acquire) {
            tick.tick().await;
            let put_bytes = self.put.load(Ordering::Acquire) * context_bytes;
            if let Some(resident) = host.resident() {
                samples.push(Sample {
                    seconds: begun.elapsed().as_secs_f64(),
                    put_bytes,
                    resident,
                });
            }
        }
        Ok(samples)
    }
}

/// Median resident bytes of the last quarter less those of the quarter before.
fn growth(samples: &[Sample]) -> Option<i64> {
    let quarter = samples.len() / 4;
    let middle = |range: &[Sample]| median(range.iter().map(|sample| sample.resident.bytes as f64).collect()) as i64;
    let last = samples.len() - quarter;
    (quarter > 0).then(|| middle(&samples[last..]) - middle(&samples[last - quarter..last]))
}

impl Gets {
    fn new() -> Result<Self> {
        // 1 us to 100 s at three digits.
        let histogram = || Histogram::new_with_bounds(1_000, 100_000_000_000, 3).context("a histogram of these bounds");
        Ok(Self {
            count: 0,
            not_sent: 0,
            hits: 0,
            absent: 0,
            busy: 0,
            other: 0,
            latency: histogram()?,
            hit_latency: histogram()?,
        })
    }

    fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.not_sent += other.not_sent;
        self.hits += other.hits;
        self.absent += other.absent;
        self.busy += other.busy;
        self.other += other.other;
        // All have the same bounds, so nothing can fall outside.
        let _same_bounds = (
            self.latency.add(&other.latency),
            self.hit_latency.add(&other.hit_latency),
        );
    }
}

impl Report {
    /// In words, on standard error.
    fn show(&self) {
        let mib = |bytes: u64| bytes >> 20;
        let latency = |name: &str, latency: &Latency| {
            say(format_args!(
                "{name}: p50 {:.1} ms, p99 {:.1} ms, p99.9 {:.1} ms, longest {:.1} ms",
                latency.p50 / 1e3,
                latency.p99 / 1e3,
                latency.p999 / 1e3,
                latency.max / 1e3
            ));
        };
        say(format_args!(
            "put {} MiB in {:.0} s, {:.2} GB/s, {} put again after busy; {} gets at {} per second, {} not sent",
            mib(self.churn_bytes),
            self.seconds,
            self.put_gigabytes_per_second,
            self.put_busy,
            self.gets,
            self.get_rate,
            self.not_sent
        ));
        say(format_args!(
            "blocks got: {} held, {} absent, {} busy, {} otherwise",
            self.hit_blocks, self.absent_blocks, self.busy_blocks, self.other_blocks
        ));
        latency("gets since due", &self.get_latency_us);
        latency("gets of which all was held", &self.hit_latency_us);
        if let (Some(most), Some(inside)) = (self.resident_bytes_max, self.inside_bound) {
            say(format_args!(
                "resident at most {} MiB, bound {} MiB ({}); last quarter against the one before {:+} MiB",
                mib(most),
                mib(self.resident_bytes_bound),
                if inside { "inside" } else { "BROKEN" },
                self.growth_bytes.unwrap_or(0) >> 20
            ));
        }
        if let (Some(segments), Some(ratio)) = (self.segments_reclaimed, self.disk_bytes_per_payload_byte) {
            say(format_args!(
                "{segments} segments reclaimed; {ratio:.2} bytes written to disk per byte put"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_compares_the_last_two_quarters() {
        let sample = |bytes| Sample {
            seconds: 0.0,
            put_bytes: 0,
            resident: Resident { bytes, shared_bytes: 0 },
        };
        let samples = |bytes: &[u64]| bytes.iter().copied().map(sample).collect::<Vec<_>>();
        for (bytes, expected) in [
            (&[1, 2, 3][..], None),
            (&[100, 5, 7, 9], Some(2)),
            (&[0, 0, 0, 0, 10, 20, 12, 14], Some(-2)),
        ] {
            assert_eq!(growth(&samples(bytes)), expected, "{bytes:?}");
        }
    }
}
