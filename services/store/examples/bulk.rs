//! The bulk path against what bare TCP carries here: gigabytes and processor seconds, with verification and without.
//!
//! ```text
//! cargo run -p kvasir-store --example bulk
//! ```
//!
//! A store runs in a child process; the client is this process, one connection, one thread. Beside it in the child, a thread
//! answers 8-byte requests with that many bytes from memory: the ceiling of one blocking socket. All take turns in each round, and
//! the best round counts, since other work on the machine only slows.

#![expect(clippy::print_stdout, reason = "an example speaks to its caller")]

#[path = "common/fixture.rs"]
mod fixture;

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::Context;
use kvasir_block::{Checksum, KvSchema};
use kvasir_client::{BulkConnection, ClientConfig, DataPath, GetOutcome, Namespace, PutBlock, PutOutcome, StoreClient};
use kvasir_runtime::{Runtime, units::ByteSize};
use kvasir_store::Store;

use self::fixture::name;

/// Bytes moved per measurement.
const TOTAL: usize = 256 << 20;
const ROUNDS: usize = 7;
/// Bytes verified at a time by the ceiling with checksums.
const STEP: usize = 256 << 10;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    match std::env::args().nth(1).as_deref() {
        Some("serve") => runtime.block_on(serve()),
        _ => measure(&runtime),
    }
}

/// Layer blocks of `64 << n` KiB.
fn schema(n: u16) -> KvSchema {
    fixture::schema("bulk", 4, n)
}

/// The child: the store and the ceiling, until standard input ends.
async fn serve() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let config = fixture::config(dir.path(), ByteSize::gib(3));
    let store = Store::start(&config, &Runtime::new()).await?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let ceiling = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let memory = vec![7; 64 << 20];
        let mut request = [0; 8];
        while stream.read_exact(&mut request).is_ok() {
            stream.write_all(&memory[..u64::from_le_bytes(request) as usize])?;
        }
        Ok(())
    });
    fixture::serve_until_told(store.grpc_addr(), address).await?;
    drop(ceiling);
    store.stop().await
}

/// Processor seconds of a process so far, from the kernel's count in hundredths.
fn processor_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(") ").next().context("no fields")?.split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(ticks as f64 / 100.0)
}

#[derive(Clone, Copy)]
struct Best {
    gbps: f64,
    p50: Duration,
    client: f64,
    store: f64,
}

struct Bench {
    store_pid: u32,
}

impl Bench {
    /// Repeats `request`, which moves `bytes`, until [`TOTAL`] bytes are moved.
    fn take(
        &self,
        best: &mut Option<Best>,
        bytes: usize,
        mut request: impl FnMut(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let processor = || {
            Ok::<_, anyhow::Error>((
                processor_seconds(std::process::id())?,
                processor_seconds(self.store_pid)?,
            ))
        };
        let before = processor()?;
        let started = Instant::now();
        let mut times = Vec::new();
        for i in 0..(TOTAL / bytes).max(1) {
            let each = Instant::now();
            request(i)?;
            times.push(each.elapsed());
        }
        let gb = (bytes * times.len()) as f64 / 1e9;
        let gbps = gb / started.elapsed().as_secs_f64();
        let after = processor()?;
        times.sort_unstable();
        if best.is_none_or(|best| best.gbps < gbps) {
            *best = Some(Best {
                gbps,
                p50: times[times.len() / 2],
                client: (after.0 - before.0) / gb,
                store: (after.1 - before.1) / gb,
            });
        }
        Ok(())
    }
}

fn measure(runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
    let (child, grpc, ceiling) = fixture::start_child()?;
    let mut ceiling = TcpStream::connect(ceiling)?;
    ceiling.set_nodelay(true)?;
    let bench = Bench { store_pid: child.id() };
    println!("request | path | GB/s | p50 us | client, store processor s/GB   (best of {ROUNDS})");
    for (n, batch) in [(0, 1), (0, 16), (4, 1), (4, 16), (6, 1), (6, 16)] {
        let config = ClientConfig {
            path: DataPath::Bulk,
            ..ClientConfig::to(format!("http://{grpc}"))
        };
        let namespace = open(runtime, &config, n)?;
        let mut verified = BulkConnection::connect(&namespace, &config)?;
        let trusting = ClientConfig {
            verify: false,
            ..config
        };
        let mut unverified = BulkConnection::connect(&namespace, &trusting)?;
        let bytes = namespace.layer_block_bytes;
        let held = (128 << 20) / bytes;
        let payload = fixture::payload(bytes);
        let checksum = Checksum::of(&payload);
        let mut memory = vec![0; bytes * batch];
        let mut best = [None; 5];
        for round in 0..ROUNDS {
            let first = batch * 100 + round;
            let blocks: Vec<_> = (0..held)
                .map(|i| PutBlock {
                    hash: name(first, i),
                    layer: 0,
                    checksum,
                    payload: &payload,
                })
                .collect();
            let mut put = None;
            let started = (Instant::now(), processor_seconds(bench.store_pid)?);
            for part in blocks.chunks(batch) {
                let outcomes = verified.put_from(&namespace, part)?;
                anyhow::ensure!(
                    outcomes.iter().all(|outcome| *outcome == PutOutcome::Stored),
                    "{outcomes:?}"
                );
            }
            let gb = (held * bytes) as f64 / 1e9;
            let seconds = started.0.elapsed().as_secs_f64();
            put.get_or_insert(Best {
                gbps: gb / seconds,
                p50: Duration::from_secs_f64(seconds / (held / batch) as f64),
                client: 0.0,
                store: (processor_seconds(bench.store_pid)? - started.1) / gb,
            });
            if best[4].is_none_or(|best: Best| put.is_some_and(|put: Best| put.gbps > best.gbps)) {
                best[4] = put;
            }
            let keys: Vec<_> = (0..held).map(|i| (name(first, i), 0)).collect();
            let parts: Vec<_> = keys.chunks(batch).collect();
            for (slot, connection) in [(0, &mut verified), (1, &mut unverified)] {
                bench.take(&mut best[slot], memory.len(), |i| {
                    let outcomes = connection.get_into(&namespace, parts[i % parts.len()], &mut memory)?;
                    anyhow::ensure!(
                        outcomes.iter().all(|outcome| *outcome == GetOutcome::Hit),
                        "{outcomes:?}"
                    );
                    Ok(())
                })?;
            }
            for (slot, sum) in [(2, false), (3, true)] {
                bench.take(&mut best[slot], memory.len(), |_| {
                    receive(&mut ceiling, &mut memory, sum)
                })?;
            }
        }
        let labels = ["get", "get unverified", "bare TCP", "bare TCP, CRC", "put"];
        for (label, best) in labels.iter().zip(best) {
            let Best {
                gbps,
                p50,
                client,
                store,
            } = best.context("no round")?;
            let (kib, p50) = (bytes >> 10, p50.as_micros());
            println!("{kib:>5} KiB x {batch:<2} | {label:<14} | {gbps:.2} | {p50:>6} | {client:.2}, {store:.2}");
        }
        if (n, batch) == (0, 1) {
            let hashes: Vec<_> = (0..256).map(|i| name(batch * 100, i)).collect();
            let mut times = Vec::new();
            for _ in 0..2000 {
                let each = Instant::now();
                let held = verified.exists(&namespace, &hashes)?;
                times.push(each.elapsed());
                anyhow::ensure!(held.iter().all(|held| *held), "all were put");
            }
            times.sort_unstable();
            println!(
                "exists x 256 | p50 {} us, p99 {} us",
                times[1000].as_micros(),
                times[1980].as_micros()
            );
        }
    }
    fixture::end_child(child)
}

fn open(runtime: &tokio::runtime::Runtime, config: &ClientConfig, n: u16) -> anyhow::Result<Namespace> {
    let tenant = fixture::tenant()?;
    Ok(runtime.block_on(async {
        StoreClient::new(config.clone())?
            .open_namespace(&tenant, &schema(n))
            .await
    })?)
}

/// Asks the ceiling for as much as fits, and takes it as the client would.
fn receive(stream: &mut TcpStream, memory: &mut [u8], sum: bool) -> anyhow::Result<()> {
    stream.write_all(&(memory.len() as u64).to_le_bytes())?;
    let (mut done, mut checksum) = (0, Checksum::EMPTY);
    while done < memory.len() {
        let end = (done + STEP).min(memory.len());
        let read = stream.read(&mut memory[done..end])?;
        anyhow::ensure!(read > 0, "the ceiling ended");
        if sum {
            checksum = checksum.append(&memory[done..done + read]);
        }
        done += read;
    }
    std::hint::black_box(checksum);
    Ok(())
}
