//! Gigabytes per second between client and store over loopback, framed by hand and through the generated codec.
//!
//! ```text
//! cargo run -p kvasir-store --example loopback
//! ```
//!
//! A store runs in a child process of its own; the client is this process. "generated" is tonic's own client and server
//! over the same block cache, with the same transport settings, in the same child. Rounds alternate between the two.

#![expect(clippy::print_stdout, reason = "an example speaks to its caller")]

#[path = "common/fixture.rs"]
mod fixture;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt, stream, stream::BoxStream};
use kvasir_block::{BlockHash, Checksum, KvSchema, LayerBlockKey};
use kvasir_cache::{BlockCache, CacheConfig, GetOutcome};
use kvasir_client::{ClientConfig, DataPath, LayerBlock, StoreClient};
use kvasir_proto::{
    EntryHead, convert,
    v1::{self, block_store_client::BlockStoreClient, block_store_server as server},
};
use kvasir_runtime::{Runtime, grpc, units::ByteSize};
use kvasir_store::Store;
use tonic::{Request, Response, Status, Streaming, transport::Channel};

/// Bytes moved per measurement.
const TOTAL: usize = 64 << 20;
/// Measurements of each kind; the best counts, since other work on the machine only slows.
const ROUNDS: u8 = 5;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    match std::env::args().nth(1).as_deref() {
        Some("serve") => runtime.block_on(serve()),
        _ => runtime.block_on(measure()),
    }
}

/// Layer blocks of `48 << n` KiB.
fn schema(n: u16) -> KvSchema {
    fixture::schema("loopback", 3, n)
}

fn chain(round: u8, blocks: usize) -> Vec<BlockHash> {
    (0..blocks).map(|i| fixture::name(round.into(), i)).collect()
}

/// The child: both servers until standard input ends.
async fn serve() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let config = fixture::config(dir.path(), ByteSize::gib(4));
    let store = Store::start(&config, &Runtime::new()).await?;
    let cache = BlockCache::open(CacheConfig {
        host_bytes_max: 4 << 30,
        flush_queue_bytes_max: 4 << 30,
        ..CacheConfig::in_dir(dir.path().join("generated"))
    })?;
    for n in 0..=5 {
        cache.open_namespace(&fixture::tenant()?, &schema(n))?;
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let service = server::BlockStoreServer::new(Generated(Arc::new(cache))).max_decoding_message_size(8 << 20);
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let generated = tokio::spawn(grpc::transport().add_service(service).serve_with_incoming(incoming));
    fixture::serve_until_told(store.grpc_addr(), address).await?;
    generated.abort();
    store.stop().await
}

async fn measure() -> anyhow::Result<()> {
    let (child, framed, generated) = fixture::start_child()?;
    let client = StoreClient::new(ClientConfig {
        path: DataPath::Grpc,
        ..ClientConfig::to(format!("http://{framed}"))
    })?;
    let stock = channel(generated.parse()?).await?;
    println!("layer block | put framed | put generated | get framed | get generated   (GB/s, best of {ROUNDS})");
    for n in 0..=5 {
        let mut best = [Duration::MAX; 4];
        for round in 0..ROUNDS {
            let measured = [
                put_framed(&client, n, round).await?,
                put_generated(&stock, n, round).await?,
                get_framed(&client, n, round).await?,
                get_generated(&stock, n, round).await?,
            ];
            best = std::array::from_fn(|i| best[i].min(measured[i]));
        }
        let speed = best.map(|time| TOTAL as f64 / time.as_secs_f64() / 1e9);
        let [put_framed, put_generated, get_framed, get_generated] = speed;
        println!(
            "{:>7} KiB | {put_framed:>10.2} | {put_generated:>13.2} | {get_framed:>10.2} | {get_generated:>13.2}",
            schema(n).layer_block_bytes() >> 10
        );
    }
    fixture::end_child(child)
}

async fn channel(address: SocketAddr) -> anyhow::Result<Channel> {
    let endpoint = Channel::from_shared(format!("http://{address}"))?
        .initial_stream_window_size(grpc::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(grpc::CONNECTION_WINDOW_BYTES)
        .max_frame_size(grpc::FRAME_BYTES_MAX)
        .tcp_nodelay(true);
    Ok(endpoint.connect().await?)
}

/// The blocks of a round: names, and one payload that all of them share.
fn blocks(n: u16, round: u8) -> (KvSchema, Vec<BlockHash>, Bytes, Checksum) {
    let schema = schema(n);
    let bytes = schema.layer_block_bytes();
    let payload = Bytes::from(fixture::payload(bytes));
    let checksum = Checksum::of(&payload);
    (schema, chain(round, TOTAL / bytes), payload, checksum)
}

async fn put_framed(client: &StoreClient, n: u16, round: u8) -> anyhow::Result<Duration> {
    let (schema, chain, payload, checksum) = blocks(n, round);
    let namespace = client.open_namespace(&fixture::tenant()?, &schema).await?;
    let started = Instant::now();
    let mut stream = client.put_blocks(&namespace).await?;
    for hash in &chain {
        let (hash, payload) = (*hash, payload.clone());
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
    anyhow::ensure!(outcomes.len() == chain.len(), "outcomes are missing");
    Ok(started.elapsed())
}

async fn get_framed(client: &StoreClient, n: u16, round: u8) -> anyhow::Result<Duration> {
    let (schema, chain, _, _) = blocks(n, round);
    let namespace = client.open_namespace(&fixture::tenant()?, &schema).await?;
    let started = Instant::now();
    let mut stream = client.get_blocks(&namespace, &chain, 0..1, None, None).await?;
    let mut bytes = 0;
    while let Some(block) = stream.next().await? {
        bytes += block.payload.map_or(0, |payload| payload.len());
    }
    anyhow::ensure!(bytes == chain.len() * schema.layer_block_bytes(), "blocks are missing");
    Ok(started.elapsed())
}

async fn put_generated(channel: &Channel, n: u16, round: u8) -> anyhow::Result<Duration> {
    let (schema, chain, payload, checksum) = blocks(n, round);
    let namespace = kvasir_block::NamespaceId::new(&fixture::tenant()?, &schema);
    let per_message = ((1 << 20) / payload.len()).max(1);
    let messages: Vec<Vec<BlockHash>> = chain.chunks(per_message).map(<[_]>::to_vec).collect();
    let started = Instant::now();
    let requests = stream::iter(messages).map(move |hashes| {
        let head = |hash: &BlockHash| EntryHead {
            hash: *hash,
            layer: 0,
            length: payload.len(),
            checksum,
        };
        v1::PutBlocksRequest {
            header: Some(v1::BlockBatch {
                namespace: convert::namespace_bytes(namespace),
                entries: hashes
                    .iter()
                    .map(|hash| head(hash).to_wire(v1::BlockOutcome::Unspecified))
                    .collect(),
            }),
            payload: if hashes.len() == 1 {
                payload.clone()
            } else {
                payload.repeat(hashes.len()).into()
            },
        }
    });
    let mut stub = BlockStoreClient::new(channel.clone());
    let mut replies = stub.put_blocks(requests).await?.into_inner();
    let mut outcomes = 0;
    while let Some(reply) = replies.message().await? {
        outcomes += reply.outcomes.len();
    }
    anyhow::ensure!(outcomes == chain.len(), "outcomes are missing");
    Ok(started.elapsed())
}

async fn get_generated(channel: &Channel, n: u16, round: u8) -> anyhow::Result<Duration> {
    let (schema, chain, _, _) = blocks(n, round);
    let request = v1::GetBlocksRequest {
        namespace: convert::namespace_bytes(kvasir_block::NamespaceId::new(&fixture::tenant()?, &schema)),
        hashes: convert::hash_bytes(&chain),
        layer_start: 0,
        layer_end: 1,
        ..v1::GetBlocksRequest::default()
    };
    let started = Instant::now();
    let mut stub = BlockStoreClient::new(channel.clone()).max_decoding_message_size(8 << 20);
    let mut replies = stub.get_blocks(request).await?.into_inner();
    let mut bytes = 0;
    while let Some(mut reply) = replies.message().await? {
        let heads = convert::heads(&reply.header.unwrap_or_default(), reply.payload.len())?;
        for head in heads {
            let payload = reply.payload.split_to(head.length);
            anyhow::ensure!(head.checksum.verifies(&payload), "wrong bytes");
            bytes += payload.len();
        }
    }
    anyhow::ensure!(bytes == chain.len() * schema.layer_block_bytes(), "blocks are missing");
    Ok(started.elapsed())
}

/// The two bulk calls as the generated code would have them.
#[derive(Clone)]
struct Generated(Arc<BlockCache>);

type Answer<T> = Result<Response<T>, Status>;

fn failed(error: impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}

#[tonic::async_trait]
impl server::BlockStore for Generated {
    type PutBlocksStream = BoxStream<'static, Result<v1::PutBlocksReply, Status>>;
    type GetBlocksStream = BoxStream<'static, Result<v1::GetBlocksReply, Status>>;
    type WatchEventsStream = BoxStream<'static, Result<v1::BlockEvent, Status>>;

    async fn put_blocks(&self, request: Request<Streaming<v1::PutBlocksRequest>>) -> Answer<Self::PutBlocksStream> {
        let cache = Arc::clone(&self.0);
        let replies = request.into_inner().then(move |message| {
            let cache = Arc::clone(&cache);
            async move {
                let mut message = message?;
                let header = message.header.unwrap_or_default();
                let namespace = convert::namespace(&header.namespace).map_err(failed)?;
                let heads = convert::heads(&header, message.payload.len()).map_err(failed)?;
                let put = move || {
                    let put = |head: &EntryHead| {
                        let payload = message.payload.split_to(head.length);
                        cache
                            .put(head.key(namespace), payload, head.checksum)
                            .map(|_| v1::BlockOutcome::Stored.into())
                    };
                    heads.iter().map(put).collect::<Result<Vec<i32>, _>>()
                };
                let outcomes = tokio::task::spawn_blocking(put)
                    .await
                    .map_err(failed)?
                    .map_err(failed)?;
                Ok(v1::PutBlocksReply { outcomes })
            }
        });
        Ok(Response::new(replies.boxed()))
    }

    async fn get_blocks(&self, request: Request<v1::GetBlocksRequest>) -> Answer<Self::GetBlocksStream> {
        let request = request.into_inner();
        let namespace = convert::namespace(&request.namespace).map_err(failed)?;
        let hashes = convert::hashes("hashes", &request.hashes, usize::MAX).map_err(failed)?;
        let bytes = self
            .0
            .schema(namespace)
            .ok_or_else(|| failed("unknown"))?
            .layer_block_bytes();
        let cache = Arc::clone(&self.0);
        let parts: Vec<Vec<BlockHash>> = hashes.chunks(((1 << 20) / bytes).max(1)).map(<[_]>::to_vec).collect();
        let messages = stream::iter(parts).map(move |hashes| {
            let cache = Arc::clone(&cache);
            async move {
                let read = move || {
                    let mut header = v1::BlockBatch {
                        namespace: convert::namespace_bytes(namespace),
                        entries: Vec::new(),
                    };
                    let mut packed = Vec::with_capacity(hashes.len() * bytes);
                    for hash in hashes {
                        let key = LayerBlockKey {
                            namespace,
                            hash,
                            layer: 0,
                        };
                        let GetOutcome::Hit { payload, checksum, .. } = cache.get(key).map_err(failed)? else {
                            return Err(failed("a miss"));
                        };
                        let head = EntryHead {
                            hash,
                            layer: 0,
                            length: payload.len(),
                            checksum,
                        };
                        header.entries.push(head.to_wire(v1::BlockOutcome::Hit));
                        packed.extend_from_slice(&payload);
                    }
                    Ok(v1::GetBlocksReply {
                        header: Some(header),
                        payload: packed.into(),
                    })
                };
                tokio::task::spawn_blocking(read).await.map_err(failed)?
            }
        });
        Ok(Response::new(messages.buffered(2).boxed()))
    }

    async fn open_namespace(&self, _: Request<v1::OpenNamespaceRequest>) -> Answer<v1::OpenNamespaceReply> {
        Err(Status::unimplemented("not measured"))
    }

    async fn match_prefix(&self, _: Request<v1::MatchPrefixRequest>) -> Answer<v1::MatchPrefixReply> {
        Err(Status::unimplemented("not measured"))
    }

    async fn release_lease(&self, _: Request<v1::ReleaseLeaseRequest>) -> Answer<v1::ReleaseLeaseReply> {
        Err(Status::unimplemented("not measured"))
    }

    async fn watch_events(&self, _: Request<v1::WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        Err(Status::unimplemented("not measured"))
    }

    async fn stat(&self, _: Request<v1::StatRequest>) -> Answer<v1::StatReply> {
        Err(Status::unimplemented("not measured"))
    }
}
