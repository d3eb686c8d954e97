//! `kvasir bench store`: what a client of one store sees: throughput, latency percentiles, processor time per byte.
//!
//! The store is a child process on a folder of its own, or one that runs already. A closed loop asks again when the answer is
//! there; an open loop asks at a rate, and a latency then counts from when the request was due, so that waiting in line is
//! part of it. Payloads are noise; each is verified by its checksum as every get is, and after each measurement a sample is
//! compared byte for byte with what was put.

mod blocks;
mod churn;
mod host;
mod lane;
mod load;
mod metrics;
mod process;
mod report;

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use kvasir_block::BlockHash;
use kvasir_client::{ClientConfig, DataPath, Namespace, PutOutcome, StoreClient};
use kvasir_runtime::units::ByteSize;
use parking_lot::Mutex;

pub(super) use self::{
    blocks::{Payloads, Zipf, hash, schema},
    host::{Host, Wanted},
    metrics::Metrics,
};
use self::{
    lane::Lane,
    load::{Load, Operation},
    report::{Case, Report},
};
use crate::{
    args::{ConfigArgs, StoreBenchArgs, StoreOperation, StorePath, StoreTier, Switch},
    measure::Machine,
    output::{print, say},
    version::{PROFILE, VERSION},
};

/// Tokens of a block; only what a name stands for.
const BLOCK_TOKENS: u16 = 64;
/// Blocks of a `match` and an `exists`: the size at which peers state their lookups.
const MATCH_BLOCKS: usize = 256;
const MATCH_BLOCK_BYTES: usize = 16 << 10;
/// Disk of a store whose data is to lie in objects.
const OBJECT_DISK: ByteSize = ByteSize::mib(256);
/// Memory of a store under churn.
const CHURN_HOST: ByteSize = ByteSize::gib(2);
/// Longest wait for a store that is busy while the data set is put.
const BUSY_MAX: Duration = Duration::from_secs(120);

/// Blocks that a measurement reads: `contexts` chains of `blocks` each.
#[derive(Clone, Debug)]
struct DataSet {
    /// Apart from any other data set, but for one that `--data-set` names again.
    run: u64,
    /// Of the blocks that puts make, never seen before.
    put_run: u64,
    contexts: usize,
    blocks: usize,
    payloads: Arc<Payloads>,
}

impl DataSet {
    /// The names of context `context`.
    fn chain(&self, context: u64) -> Vec<BlockHash> {
        (0..self.blocks as u64).map(|at| hash(self.run, context, at)).collect()
    }

    /// The names of the `context`th context that puts make.
    fn new_chain(&self, context: u64) -> Vec<BlockHash> {
        (0..self.blocks as u64)
            .map(|at| hash(self.put_run, context, at))
            .collect()
    }
}

pub(crate) async fn run(args: &StoreBenchArgs, config: &ConfigArgs) -> Result<()> {
    ensure!(
        args.connections > 0 && args.depth > 0,
        "--connections and --depth are at least 1"
    );
    ensure!(
        args.threads == 0 || (args.rate.is_none() && args.path != StorePath::Grpc),
        "--threads are blocking connections in a closed loop: take --path bulk or local, and no --rate"
    );
    ensure!(
        args.zipf >= 0.0 && args.zipf.is_finite(),
        "--zipf {}: 0 or more",
        args.zipf
    );
    if let Some(bytes) = args.churn {
        return churn::run(args, bytes, config).await;
    }
    let largest = args.sizes.iter().map(|size| size.as_usize()).max().unwrap_or(0);
    let host_bytes = match (args.host, args.tier) {
        (Some(bytes), _) => bytes,
        // Everything fits, and what is put meanwhile too.
        (None, StoreTier::Host) => ByteSize::bytes(4 * args.data.as_u64() + (1 << 30)),
        (None, StoreTier::Disk | StoreTier::Object) => {
            ByteSize::bytes((args.data.as_u64() / 16).max(4 * largest as u64))
        }
    };
    ensure!(
        args.tier != StoreTier::Object || args.data.as_u64() >= 4 * OBJECT_DISK.as_u64(),
        "--tier object with --data {}: take at least {}, or the disk holds most of it",
        args.data,
        ByteSize::bytes(4 * OBJECT_DISK.as_u64())
    );
    let wanted = Wanted {
        disk_bytes: (args.tier == StoreTier::Object).then_some(OBJECT_DISK),
        objects: args.tier == StoreTier::Object,
        ..wanted(args, host_bytes, None)
    };
    let host = Host::start(wanted, config).await?;
    let mut cases = Vec::new();
    for operation in &args.operations {
        let (sizes, batches) = match operation {
            StoreOperation::Match | StoreOperation::Exists => (vec![MATCH_BLOCK_BYTES], vec![MATCH_BLOCKS]),
            _ => (
                args.sizes.iter().map(|size| size.as_usize()).collect(),
                args.batches.clone(),
            ),
        };
        for &bytes in &sizes {
            for &batch in &batches {
                if bytes.saturating_mul(batch) > args.operation_bytes_max.as_usize() {
                    continue;
                }
                let case = Case {
                    operation: *operation,
                    block_bytes: bytes,
                    batch,
                };
                cases.push(measure(&host, args, case).await?);
            }
        }
    }
    host.stop().await?;
    let report = Report {
        schema: report::SCHEMA,
        cases,
        path: args.path,
        tier: args.tier,
        verify: args.verify == Switch::On,
        threads: args.threads,
        connections: args.connections,
        depth: args.depth,
        rate: args.rate,
        seconds: args.seconds,
        zipf: args.zipf,
        read_share: args.read_share,
        kvasir: VERSION,
        profile: PROFILE,
        machine: Machine::here(),
    };
    report.show();
    if args.json {
        print(serde_json::to_string_pretty(&report).context("the result cannot be written as JSON")?);
    }
    Ok(())
}

fn wanted(args: &StoreBenchArgs, host_bytes: ByteSize, disk_bytes: Option<ByteSize>) -> Wanted<'_> {
    Wanted {
        running: args.store.as_deref(),
        running_pid: args.store_pid,
        out: &args.out,
        host_bytes,
        disk_bytes,
        objects: false,
        context_bytes: None,
    }
}

/// A client of `host` that takes the wanted path.
fn client(host: &Host, args: &StoreBenchArgs) -> Result<StoreClient> {
    Ok(StoreClient::new(client_config(host, args))?)
}

fn client_config(host: &Host, args: &StoreBenchArgs) -> ClientConfig {
    ClientConfig {
        path: match args.path {
            StorePath::Auto => DataPath::Auto,
            StorePath::Grpc => DataPath::Grpc,
            StorePath::Bulk => DataPath::Bulk,
            StorePath::Local => DataPath::Local,
        },
        verify: args.verify == Switch::On,
        ..ClientConfig::to(host.url())
    }
}

/// Puts the data set, applies the load, and compares a sample.
async fn measure(host: &Host, args: &StoreBenchArgs, case: Case) -> Result<report::Measured> {
    say(format_args!("{case}"));
    let schema = schema(case.block_bytes, BLOCK_TOKENS)?;
    let first = client(host, args)?;
    let namespace = first.open_namespace(&host.tenant()?, &schema).await?;
    let context_bytes = case.block_bytes * case.batch;
    let data = DataSet {
        run: args.data_set.unwrap_or_else(|| host.next_run()),
        put_run: host.next_run(),
        contexts: (args.data.as_usize() / context_bytes).max(1),
        blocks: case.batch,
        payloads: Arc::new(Payloads::new(case.block_bytes, args.seed)),
    };
    if case.operation != StoreOperation::Put {
        fill(&first, &namespace, &data).await?;
    }
    settle(&first).await?;
    let operation = match case.operation {
        StoreOperation::Get => Operation::Get,
        StoreOperation::Put => Operation::Put,
        StoreOperation::Match => Operation::Match,
        StoreOperation::Exists => Operation::Exists,
        StoreOperation::Mix => Operation::Mix {
            read_share: args.read_share,
        },
    };
    let clients = (0..args.connections)
        .map(|_| client(host, args))
        .collect::<Result<Vec<_>>>()?;
    let config = client_config(host, args);
    let lanes = (0..args.threads)
        .map(|_| Lane::new(&namespace, &config, &data))
        .collect::<Result<Vec<_>>>()?;
    let load = Load {
        clients,
        lanes: Mutex::new(lanes),
        namespace: namespace.clone(),
        data: data.clone(),
        operation,
        depth: args.depth,
        rate: args.rate,
        time: Duration::from_secs_f64(args.seconds),
        zipf: args.zipf,
        seed: args.seed,
        next_new: Arc::default(),
    };
    // Connections, caches and the allocator; not counted.
    load.apply(Duration::from_secs_f64(args.seconds.min(0.5))).await?;
    let before = host.processor_times();
    let tally = load.apply(load.time).await?;
    let after = host.processor_times();
    settle(&first).await?;
    let mut compared = 0;
    if case.operation != StoreOperation::Put {
        compared = compare(&first, &namespace, &data).await?;
        ensure!(
            compared > 0,
            "nothing of the data set is held any more: give the store more room or take less --data"
        );
    }
    Ok(report::Measured::new(case, &tally, compared, before, after))
}

/// Puts every block of `data`, as often as a busy store wants.
async fn fill(client: &StoreClient, namespace: &Namespace, data: &DataSet) -> Result<()> {
    let begun = std::time::Instant::now();
    for context in 0..data.contexts as u64 {
        let mut missing = data.chain(context);
        let held = client.match_prefix(namespace.id, &missing, None).await?.hit_blocks;
        missing.drain(..held);
        while !missing.is_empty() {
            let mut puts = client.put_blocks(namespace).await?;
            for &name in &missing {
                puts.put(data.payloads.block(name)).await?;
            }
            let outcomes = puts.finish().await?;
            missing.clear();
            for (name, _, outcome) in outcomes {
                match outcome {
                    PutOutcome::Stored | PutOutcome::Present => {}
                    PutOutcome::Busy => missing.push(name),
                    other => bail!("a block of the data set was not taken: {other:?}"),
                }
            }
            if !missing.is_empty() {
                ensure!(
                    begun.elapsed() < BUSY_MAX,
                    "the store is busy for {BUSY_MAX:?} while its data is put"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    Ok(())
}

/// Waits until what was put is durable, so that no measurement pays for the one before.
pub(super) async fn settle(client: &StoreClient) -> Result<()> {
    let begun = std::time::Instant::now();
    while client.stat().await?.flush_queue_blocks > 0 {
        ensure!(
            begun.elapsed() < BUSY_MAX,
            "the store is not done with its disk after {BUSY_MAX:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Gets a sample of contexts and compares every byte; returns how many blocks were held.
async fn compare(client: &StoreClient, namespace: &Namespace, data: &DataSet) -> Result<usize> {
    let mut held = 0;
    for context in (0..data.contexts as u64).step_by(data.contexts.div_ceil(8)) {
        let chain = data.chain(context);
        let mut gets = client.get_blocks(namespace, &chain, 0..1, None, None).await?;
        while let Some(block) = gets.next().await? {
            if let Some(payload) = block.payload {
                ensure!(
                    payload == data.payloads.block(block.hash).payload,
                    "the store served other bytes than were put under {}",
                    block.hash
                );
                held += 1;
            }
        }
    }
    Ok(held)
}
