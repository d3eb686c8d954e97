//! What a query and its reply take beside the search, over gRPC and over a bulk connection, in turns.
//!
//! `cargo run -p kvasir-store --example decode_ping [queries] [microseconds of work between two queries]`
//!
//! Store and caller in one process over loopback TCP: SmolLM2's shape (9 query heads of 64), a context of 192 random tokens, so that there
//! is little to search. The caller waits as a worker's compute thread does and works between two queries as a layer does. Times are
//! from before the query is sent until the reply is read, less what the store says that it needed.
#![expect(clippy::print_stdout, reason = "an example's output is its purpose")]

#[path = "common/fixture.rs"]
#[expect(dead_code, reason = "shared with examples that run two processes")]
mod fixture;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use half::f16;
use kvasir_block::{BlockHash, Checksum};
use kvasir_client::{
    AttendOptions, BulkDecode, ClientConfig, DecodeStream, Form, IndexChoice, LayerBlock, Namespace, OpenContext,
    Query, Reply, StoreClient,
};
use kvasir_runtime::{Runtime, units::ByteSize};
use kvasir_store::Store;
use rand::{Rng, SeedableRng, rngs::SmallRng};

const Q_HEADS: usize = 9;
const BLOCKS: usize = 3;
/// Queries of one path before it is the other's turn.
const TURN: usize = 50;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (queries, work) = (number(4000)?, Duration::from_micros(number(500)? as u64));
    let runtime = tokio::runtime::Runtime::new()?;
    let dir = tempfile::tempdir()?;
    let config = fixture::config(dir.path(), ByteSize::gib(1));
    let store = runtime.block_on(Store::start(&config, &Runtime::new()))?;
    let (mut grpc, mut bulk) = runtime.block_on(open(&store))?;
    let mut q = Vec::with_capacity(Q_HEADS * 64);
    let mut rng = SmallRng::seed_from_u64(3);
    q.extend((0..Q_HEADS * 64).map(|_| rng.random_range(-1.0..1.0_f32)));
    let mut wires = [Vec::new(), Vec::new()];
    let mut sequence = 0;
    for turn in 0..(2 * queries).div_ceil(TURN) {
        for _ in 0..TURN {
            let until = Instant::now() + work;
            while Instant::now() < until {
                black_box(q.iter().sum::<f32>());
            }
            sequence += 1;
            let query = query(sequence, &q);
            let begun = Instant::now();
            let reply = match turn % 2 {
                0 => runtime.block_on(async {
                    grpc.send(query).await?;
                    grpc.receive().await
                })?,
                _ => {
                    bulk.send(query)?;
                    bulk.receive(Duration::from_secs(5))?.context("no reply in time")?
                }
            };
            wires[turn % 2].push(wire(&reply, begun.elapsed()));
        }
    }
    for (path, wire) in ["grpc", "bulk"].into_iter().zip(&mut wires) {
        wire.sort_unstable();
        let at = |share: f64| wire[((wire.len() - 1) as f64 * share) as usize].as_micros();
        println!(
            "{path}: {} queries, p50 {} us, p90 {} us, p99 {} us",
            wire.len(),
            at(0.5),
            at(0.9),
            at(0.99)
        );
    }
    drop((grpc, bulk));
    runtime.block_on(store.stop())
}

/// What of a reply's time is not the store's.
fn wire(reply: &Reply, whole: Duration) -> Duration {
    let report = &reply.report;
    whole.saturating_sub(report.search.saturating_sub(report.hidden) + report.queued)
}

fn query(sequence: u64, q: &[f32]) -> Query {
    Query {
        sequence,
        layer: 0,
        q: q.to_vec(),
        form: Form::Attend {
            target_mass: 0.99,
            k_max: 0,
            options: AttendOptions::default(),
        },
        excluded: vec![],
        deadline: Some(Duration::from_millis(500)),
        local_lse: vec![],
    }
}

/// A context over random blocks, by both ways.
async fn open(store: &Store) -> anyhow::Result<(DecodeStream, BulkDecode)> {
    let client = StoreClient::new(ClientConfig::to(format!("http://{}", store.grpc_addr())))?;
    let namespace = client
        .open_namespace(&fixture::tenant()?, &fixture::schema("decode_ping", 3, 0))
        .await?;
    let chain: Vec<BlockHash> = (0..BLOCKS).map(|at| fixture::name(0, at)).collect();
    put(&client, &namespace, &chain).await?;
    let context = OpenContext {
        chain,
        q_heads: Q_HEADS,
        softmax_scale: 0.125,
        index: IndexChoice::Best,
        row_cache_rows: 0,
    };
    let grpc = client.decode(&namespace, context.clone()).await?;
    let bulk = tokio::task::spawn_blocking(move || client.decode_by_bulk(&namespace, &context)).await??;
    Ok((grpc, bulk))
}

async fn put(client: &StoreClient, namespace: &Namespace, chain: &[BlockHash]) -> anyhow::Result<()> {
    let mut stream = client.put_blocks(namespace).await?;
    let mut rng = SmallRng::seed_from_u64(2);
    for &hash in chain {
        let halves = (0..namespace.layer_block_bytes / 2).map(|_| f16::from_f32(rng.random_range(-1.0..1.0)));
        let payload: Bytes = halves.flat_map(f16::to_le_bytes).collect();
        let checksum = Checksum::of(&payload);
        stream
            .put(LayerBlock {
                hash,
                layer: 0,
                checksum,
                payload,
            })
            .await?;
    }
    let outcomes = stream.finish().await?;
    ensure!(outcomes.len() == chain.len(), "{outcomes:?}");
    Ok(())
}
