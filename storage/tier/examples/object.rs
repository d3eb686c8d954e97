//! What the object tier costs beside a plain client, and what reading neighbours together saves:
//! `cargo run -p kvasir-tier --example object`.
//!
//! A real S3 server (s3s over a folder) in this process, on loopback: its work is in the clock, but not in the processor
//! time, which is that of the client's threads alone. The plain client knows the objects' names, reads and writes them
//! whole and verifies nothing. Rounds alternate between the two; medians.
#![expect(clippy::print_stdout, reason = "an example's output is its purpose")]

use std::{
    error::Error,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder as Connections,
};
use kvasir_block::{BlockHash, Checksum, LayerBlockKey, NamespaceId};
use kvasir_tier::{Credentials, ObjectConfig, ObjectRead, ObjectTier, Offer, StoreId};
use object_store::{ObjectStore, ObjectStoreExt as _, PutPayload, aws::AmazonS3Builder, path::Path as ObjectPath};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tokio::{net::TcpListener, sync::oneshot};

const KEY_ID: &str = "EXAMPLE";
const SECRET: &str = "a secret that guards nothing";
const BUCKET: &str = "blocks";

const LAYERS: u16 = 32;
const PAYLOAD_BYTES: usize = 64 << 10;
const BLOCKS: u32 = 48;
const OBJECT_BYTES: usize = 32 << 20;
const TOTAL_BYTES: usize = BLOCKS as usize * LAYERS as usize * PAYLOAD_BYTES;
const ROUNDS: usize = 5;
/// The tier's default, for both.
const PUTS: usize = 2;

/// Threads whose processor time is the client's: the one that asks (named after the program), and its runtime's.
const TIER_THREADS: &str = "kv-object";
const PLAIN_THREADS: &str = "plain-client";
const CALLER_THREAD: &str = "object";

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let server = Server::start()?;
    let payloads = payloads();
    println!(
        "{} MiB: {BLOCKS} blocks of {LAYERS} layer blocks of {} KiB; medians of {ROUNDS}",
        TOTAL_BYTES >> 20,
        PAYLOAD_BYTES >> 10
    );
    writes_and_reads(&server, &payloads)?;
    coalescing(&server)
}

/// The tier and a plain client, in turns.
fn writes_and_reads(server: &Server, payloads: &[(Bytes, Checksum)]) -> Result<(), Failure> {
    let plain = Plain::new(server.address)?;
    let writer = ObjectTier::open(config(server.address, 1))?;
    let mut rows = [const { Vec::new() }; 4];
    for round in 0..ROUNDS {
        let namespace = NamespaceId::from_bytes([round as u8; 32]);
        let objects: Vec<(ObjectPath, PutPayload)> = payloads
            .chunks(OBJECT_BYTES / PAYLOAD_BYTES)
            .enumerate()
            .map(|(i, some)| {
                let path = ObjectPath::from(format!("plain/{round}/{i}"));
                (path, some.iter().map(|(payload, _)| payload.clone()).collect())
            })
            .collect();
        let paths: Vec<_> = objects.iter().map(|(path, _)| path.clone()).collect();
        rows[0].push(measure(PLAIN_THREADS, || plain.put(objects))?);
        rows[1].push(measure(TIER_THREADS, || {
            writer.open_namespace(namespace);
            for (key, (payload, checksum)) in keys(namespace, 1).zip(payloads) {
                if writer.offer(key, payload.clone(), *checksum) != Offer::Queued {
                    return Err("the queue holds less than one round".into());
                }
            }
            Ok(writer.flush(soon())?)
        })?);
        rows[2].push(measure(PLAIN_THREADS, || plain.get(paths))?);
        let reader = ObjectTier::open(config(server.address, 2))?;
        known(&reader, namespace)?;
        let keys: Vec<_> = keys(namespace, 1).collect();
        rows[3].push(measure(TIER_THREADS, || all_hits(&reader.get_many(&keys, soon())))?);
    }
    println!("| | MiB/s | client's CPU seconds per GB |\n|---|---|---|");
    let names = [
        "plain PUT of whole objects",
        "offer and flush",
        "plain GET of whole objects",
        "get_many, verified",
    ];
    let medians: Vec<_> = rows.into_iter().map(median).collect();
    for (name, (wall, cpu)) in names.into_iter().zip(&medians) {
        let per_gb = cpu / (TOTAL_BYTES as f64 / 1e9);
        println!("| {name} | {:.0} | {per_gb:.2} |", mib_per_second(TOTAL_BYTES, *wall));
    }
    println!(
        "tier beside plain client: writes {:.2}, reads {:.2} of its throughput",
        medians[0].0 / medians[1].0,
        medians[2].0 / medians[3].0
    );
    writer.stop(soon())?;
    Ok(())
}

/// Requests and bytes for the same blocks, read together and one by one.
fn coalescing(server: &Server) -> Result<(), Failure> {
    println!(
        "\n| read | ranges | requests per layer block | bytes read per byte wanted | MiB/s wanted |\n|---|---|---|---|---|"
    );
    let namespace = NamespaceId::from_bytes([0; 32]);
    for (what, every) in [("all", 1), ("every 2nd layer block", 2), ("every 8th layer block", 8)] {
        for (ranges, range_bytes_max) in [("together", None), ("one by one", Some(1))] {
            let mut config = config(server.address, 3);
            config.range_bytes_max = range_bytes_max.unwrap_or(config.range_bytes_max);
            let tier = ObjectTier::open(config)?;
            known(&tier, namespace)?;
            let keys: Vec<_> = keys(namespace, every).collect();
            let before = tier.stats();
            let mut rounds = Vec::new();
            for _ in 0..ROUNDS {
                rounds.push(measure(TIER_THREADS, || all_hits(&tier.get_many(&keys, soon())))?);
            }
            let stats = tier.stats();
            let asked = (ROUNDS * keys.len()) as f64;
            println!(
                "| {what} | {ranges} | {:.3} | {:.2} | {:.0} |",
                (stats.gets - before.gets) as f64 / asked,
                (stats.read_bytes - before.read_bytes) as f64 / (asked * PAYLOAD_BYTES as f64),
                mib_per_second(keys.len() * PAYLOAD_BYTES, median(rounds).0)
            );
        }
    }
    Ok(())
}

fn config(address: SocketAddr, store: u64) -> ObjectConfig {
    let mut config = ObjectConfig::new(format!("s3://{BUCKET}/tier"), StoreId::from_u64(store));
    config.endpoint = Some(format!("http://{address}"));
    (config.allow_http, config.path_style) = (true, true);
    config.credentials = Credentials::Key {
        id: KEY_ID.to_owned(),
        secret: SECRET.to_owned(),
        token: None,
    };
    config.puts_max = PUTS;
    config.object_bytes = OBJECT_BYTES as u64;
    config
}

fn keys(namespace: NamespaceId, every: usize) -> impl Iterator<Item = LayerBlockKey> {
    let blocks = (0..BLOCKS).map(move |i| {
        let mut hash = [0; 32];
        hash[..4].copy_from_slice(&i.to_le_bytes());
        namespace.block(BlockHash::from_bytes(hash))
    });
    blocks
        .flat_map(|block| (0..LAYERS).map(move |layer| block.layer(layer)))
        .step_by(every)
}

fn payloads() -> Vec<(Bytes, Checksum)> {
    let mut rng = StdRng::seed_from_u64(18);
    let mut payload = || {
        let mut bytes = vec![0; PAYLOAD_BYTES];
        rng.fill(&mut bytes[..]);
        let checksum = Checksum::of(&bytes);
        (Bytes::from(bytes), checksum)
    };
    (0..BLOCKS as usize * LAYERS as usize).map(|_| payload()).collect()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn known(tier: &ObjectTier, namespace: NamespaceId) -> Result<(), Failure> {
    if tier.refresh(namespace, soon()) {
        Ok(())
    } else {
        Err(format!("the bucket cannot be listed: {:?}", tier.stats().degraded).into())
    }
}

fn all_hits(reads: &[ObjectRead]) -> Result<(), Failure> {
    match reads.iter().find(|read| !matches!(read, ObjectRead::Hit { .. })) {
        Some(other) => Err(format!("a read came to {other:?}").into()),
        None => Ok(()),
    }
}

/// Seconds on the clock, and of the processor in the caller's thread and those whose name begins with `threads`.
fn measure(threads: &str, work: impl FnOnce() -> Result<(), Failure>) -> Result<(f64, f64), Failure> {
    let (cpu, start) = (cpu_seconds(threads)?, Instant::now());
    work()?;
    Ok((start.elapsed().as_secs_f64(), cpu_seconds(threads)? - cpu))
}

fn cpu_seconds(threads: &str) -> Result<f64, Failure> {
    let mut nanos = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        let read = |file: &str| std::fs::read_to_string(task.join(Path::new(file)));
        // A thread may end while we look.
        let (Ok(name), Ok(times)) = (read("comm"), read("schedstat")) else {
            continue;
        };
        if name.trim() == CALLER_THREAD || name.starts_with(threads) {
            let running = times.split(' ').next().unwrap_or_default();
            nanos += running.parse::<u64>()?;
        }
    }
    Ok(nanos as f64 / 1e9)
}

fn median(mut rounds: Vec<(f64, f64)>) -> (f64, f64) {
    rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
    let wall = rounds[rounds.len() / 2].0;
    rounds.sort_by(|a, b| a.1.total_cmp(&b.1));
    (wall, rounds[rounds.len() / 2].1)
}

fn mib_per_second(bytes: usize, seconds: f64) -> f64 {
    bytes as f64 / f64::from(1 << 20) / seconds
}

/// The client library by itself, on two threads as in the tier.
struct Plain {
    store: Arc<dyn ObjectStore>,
    runtime: tokio::runtime::Runtime,
}

impl Plain {
    fn new(address: SocketAddr) -> Result<Self, Failure> {
        let s3 = AmazonS3Builder::new()
            .with_endpoint(format!("http://{address}"))
            .with_allow_http(true)
            .with_bucket_name(BUCKET)
            .with_region("us-east-1")
            .with_access_key_id(KEY_ID)
            .with_secret_access_key(SECRET)
            .build()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name(PLAIN_THREADS)
            .enable_all()
            .build()?;
        let store = Arc::new(s3);
        Ok(Self { store, runtime })
    }

    fn put(&self, objects: Vec<(ObjectPath, PutPayload)>) -> Result<(), Failure> {
        let store = Arc::clone(&self.store);
        let put = async move {
            let puts = futures::stream::iter(objects).map(|(path, payload)| {
                let store = Arc::clone(&store);
                async move { store.put(&path, payload).await }
            });
            puts.buffer_unordered(PUTS).try_collect::<Vec<_>>().await
        };
        self.runtime.block_on(self.runtime.spawn(put))??;
        Ok(())
    }

    fn get(&self, paths: Vec<ObjectPath>) -> Result<(), Failure> {
        let store = Arc::clone(&self.store);
        let get = async move {
            let gets = paths.iter().map(|path| async { store.get(path).await?.bytes().await });
            let bodies = futures::future::try_join_all(gets).await?;
            Ok::<_, object_store::Error>(bodies.iter().map(Bytes::len).sum::<usize>())
        };
        match self.runtime.block_on(self.runtime.spawn(get))?? {
            TOTAL_BYTES => Ok(()),
            bytes => Err(format!("the plain client read {bytes} bytes").into()),
        }
    }
}

/// A real S3 server that checks signatures, on threads of its own.
struct Server {
    address: SocketAddr,
    _folder: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start() -> Result<Self, Failure> {
        let folder = tempfile::tempdir()?;
        std::fs::create_dir(folder.path().join(BUCKET))?;
        let files = s3s_fs::FileSystem::new(folder.path())
            .map_err(|error| format!("cannot serve {}: {error:?}", folder.path().display()))?;
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(KEY_ID, SECRET));
        let service = service.build();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("s3-server")
            .enable_all()
            .build()?;
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        let (stop, mut stopped) = oneshot::channel();
        let serve = move || {
            runtime.block_on(async {
                let mut connections = tokio::task::JoinSet::new();
                loop {
                    let socket = tokio::select! {
                        Ok((socket, _)) = listener.accept() => socket,
                        _ = &mut stopped => return,
                    };
                    let service = service.clone();
                    connections.spawn(async move {
                        // Clients close their connections when they end.
                        let _ = Connections::new(TokioExecutor::new())
                            .serve_connection(TokioIo::new(socket), service)
                            .await;
                    });
                }
            });
        };
        let thread = std::thread::Builder::new().name("s3-accept".to_owned()).spawn(serve)?;
        Ok(Self {
            address,
            _folder: folder,
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
