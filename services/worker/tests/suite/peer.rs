//! A store as the worker sees it, over stock gRPC, that keeps what it is given and goes wrong when it is told to.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    ops::Range,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use half::f16;
use kvasir_block::{KvSchema, NamespaceId, Tenant};
use kvasir_proto::{
    convert::{float_bytes, float_values, namespace_bytes},
    v1::{
        self, BlockOutcome, block_store_server::BlockStoreServer, decode_reply, decode_request, query,
        retrieval_report::Shortfall, retrieval_server::RetrievalServer,
    },
};
use kvasir_runtime::grpc::{GrpcRunning, GrpcServer};
use kvasir_simd::{Partial, Segment, attend};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// What goes wrong, and when.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Fault {
    #[default]
    None,
    /// A match is never answered.
    MatchStalls,
    /// Gets are refused.
    GetRefused,
    /// The get's layer block with this place in the order is missing.
    GetMisses(usize),
    /// One bit of it is flipped.
    GetCorrupts(usize),
    /// The get ends before it.
    GetEnds(usize),
    /// The get stops before it and stays open.
    GetStalls(usize),
    /// This many layer blocks are answered busy.
    PutsBusy(usize),
    /// This many contexts are not found.
    OpensNotFound(usize),
    /// The query with this number is never answered.
    QueryStalls(usize),
    /// The stream ends with an error at it.
    QueryFails(usize),
    /// Its answer falls short.
    QueryShort(usize, Shortfall),
}

#[derive(Debug, Default)]
struct State {
    fault: Fault,
    schema: Option<KvSchema>,
    /// Payload and checksum by hash and layer.
    held: HashMap<(Bytes, u32), (Bytes, u32)>,
    /// Query samples, and indexes that were asked for, in the order in which they came.
    queries: Vec<v1::BlockQueries>,
    builds: Vec<v1::BuildIndexRequest>,
}

/// An open context.
#[derive(Debug, Default)]
struct Context {
    open: v1::OpenContext,
    /// Layers that a hint has come for.
    hints: HashSet<u32>,
    /// Positions that the worker keeps, by layer and KV head, most recently used last.
    kept: HashMap<(u32, usize), Vec<u32>>,
}

/// Handle of the peer; clones are one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer(Arc<Mutex<State>>);

impl Peer {
    /// Starts it on a free port.
    pub(crate) async fn start() -> (Self, GrpcRunning) {
        let peer = Self::default();
        let running = GrpcServer::new()
            .add_service(BlockStoreServer::new(peer.clone()).max_decoding_message_size(8 << 20))
            .add_service(RetrievalServer::new(peer.clone()))
            .serve(SocketAddr::from(([127, 0, 0, 1], 0)), &CancellationToken::new())
            .await
            .expect("a free port");
        (peer, running)
    }

    /// What goes wrong from now on.
    pub(crate) fn set(&self, fault: Fault) {
        self.0.lock().fault = fault;
    }

    /// Waits until an index was asked for; gives the question and the samples that came before it.
    pub(crate) async fn until_asked_to_build(&self) -> (v1::BuildIndexRequest, Vec<v1::BlockQueries>) {
        for _ in 0..3000 {
            {
                let mut state = self.0.lock();
                if let Some(asked) = state.builds.pop() {
                    return (asked, std::mem::take(&mut state.queries));
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no index was asked for");
    }

    /// Layer blocks held.
    pub(crate) fn held(&self) -> usize {
        self.0.lock().held.len()
    }

    /// Waits until so many layer blocks are held.
    pub(crate) async fn until_held(&self, layer_blocks: usize) {
        for _ in 0..3000 {
            if self.held() >= layer_blocks {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} of {layer_blocks} layer blocks came", self.held());
    }

    fn fault(&self) -> Fault {
        self.0.lock().fault
    }

    /// Counts a fault down; true while it lasts.
    fn count_down(&self, pick: impl Fn(Fault) -> Option<usize>, make: impl Fn(usize) -> Fault) -> bool {
        let mut state = self.0.lock();
        match pick(state.fault) {
            Some(left) if left > 0 => {
                state.fault = make(left - 1);
                true
            }
            _ => false,
        }
    }

    fn schema(&self) -> KvSchema {
        self.0.lock().schema.clone().expect("the namespace was opened")
    }

    fn is_whole(&self, hash: &Bytes) -> bool {
        let layers = u32::from(self.schema().layers);
        let state = self.0.lock();
        (0..layers).all(|layer| state.held.contains_key(&(hash.clone(), layer)))
    }

    fn put(&self, request: v1::PutBlocksRequest) -> v1::PutBlocksReply {
        let mut at = 0;
        let entries = request.header.expect("a header").entries;
        let outcomes = entries.into_iter().map(|entry| {
            let payload = request.payload.slice(at..at + entry.length as usize);
            at += entry.length as usize;
            let busy = |fault| match fault {
                Fault::PutsBusy(n) => Some(n),
                _ => None,
            };
            if self.count_down(busy, Fault::PutsBusy) {
                return BlockOutcome::Busy.into();
            }
            let before = self
                .0
                .lock()
                .held
                .insert((entry.hash, entry.layer), (payload, entry.crc32c));
            let outcome = if before.is_some() {
                BlockOutcome::Present
            } else {
                BlockOutcome::Stored
            };
            outcome.into()
        });
        v1::PutBlocksReply {
            outcomes: outcomes.collect(),
        }
    }

    /// One layer block per message: how messages are cut is the client's business.
    fn get(&self, place: usize, hash: &Bytes, layer: u32) -> v1::GetBlocksReply {
        let held = self.0.lock().held.get(&(hash.clone(), layer)).cloned();
        let held = held.filter(|_| self.fault() != Fault::GetMisses(place));
        let outcome = if held.is_some() {
            BlockOutcome::Hit
        } else {
            BlockOutcome::Miss
        };
        let (mut payload, crc32c) = held.unwrap_or_default();
        if self.fault() == Fault::GetCorrupts(place) {
            let mut flipped = payload.to_vec();
            flipped[17] ^= 4;
            payload = flipped.into();
        }
        let entry = v1::BlockEntry {
            hash: hash.clone(),
            layer,
            length: payload.len() as u32,
            crc32c,
            outcome: outcome.into(),
        };
        v1::GetBlocksReply {
            header: Some(v1::BlockBatch {
                namespace: self.namespace(),
                entries: vec![entry],
            }),
            payload,
        }
    }

    fn namespace(&self) -> Bytes {
        let tenant = Tenant::new("default").expect("a name");
        namespace_bytes(NamespaceId::new(&tenant, &self.schema()))
    }

    /// The answer that covers everything, from the definition.
    fn answer(&self, context: &mut Context, query: &v1::Query) -> v1::DecodeReply {
        let hinted = context.hints.remove(&query.layer);
        let Context { open, kept, .. } = context;
        let context = open;
        let schema = self.schema();
        let layout = schema.layout();
        let (head_dim, kv_heads, block_tokens) = (layout.head_dim, layout.kv_heads, layout.block_tokens);
        let blocks: Vec<Vec<f16>> = {
            let state = self.0.lock();
            let block = |hash: &Bytes| halves(&state.held[&(hash.clone(), query.layer)].0);
            context.hashes.iter().map(block).collect()
        };
        let tokens = blocks.len() * block_tokens;
        let excluded: Vec<Range<usize>> = query
            .excluded
            .iter()
            .map(|r| r.start as usize..r.end as usize)
            .collect();
        let searched: Vec<usize> = (0..tokens)
            .filter(|position| !excluded.iter().any(|range| range.contains(position)))
            .collect();
        let rows = |range: Range<usize>, block: &Vec<f16>, row: usize| {
            block[range][row * head_dim..(row + 1) * head_dim].to_vec()
        };
        let heads: Vec<(Vec<f16>, Vec<f16>)> = (0..kv_heads)
            .map(|head| {
                let pick = |range: Range<usize>| {
                    let row = |p: &usize| rows(range.clone(), &blocks[p / block_tokens], p % block_tokens);
                    searched.iter().flat_map(row).collect::<Vec<f16>>()
                };
                (pick(layout.keys(head)), pick(layout.values(head)))
            })
            .collect();
        let q_heads = context.q_heads as usize;
        let result = match query.form {
            Some(query::Form::Rows(_)) => {
                let to_bytes =
                    |halves: &Vec<f16>| halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<u8>>();
                let positions: Vec<u32> = searched.iter().map(|p| *p as u32).collect();
                let rows_max = context.row_cache_rows as usize;
                let heads = heads.iter().enumerate().map(|(head, (keys, values))| {
                    let kept = kept.entry((query.layer, head)).or_default();
                    let is_sent = |at: &u32| rows_max == 0 || !kept.contains(&positions[*at as usize]);
                    let sent: Vec<u32> = (0..positions.len() as u32).filter(is_sent).collect();
                    kept.retain(|position| !positions.contains(position));
                    kept.extend(&positions);
                    kept.drain(..kept.len().saturating_sub(rows_max));
                    let pick = |rows: &Vec<f16>| {
                        let row = |at: &u32| &rows[*at as usize * head_dim..][..head_dim];
                        to_bytes(&sent.iter().flat_map(row).copied().collect())
                    };
                    v1::HeadRows {
                        keys: pick(keys).into(),
                        values: pick(values).into(),
                        positions: positions.clone(),
                        sent: if rows_max == 0 { Vec::new() } else { sent },
                        partial: rows_max > 0,
                    }
                });
                decode_reply::Result::Rows(v1::RowsResult { heads: heads.collect() })
            }
            _ => {
                let q = float_values(&query.q);
                let group = q_heads / kv_heads * head_dim;
                let (mut all, mut one) = (Partial::default(), Partial::default());
                for (head, (keys, values)) in heads.iter().enumerate() {
                    let segment = Segment {
                        keys,
                        values,
                        position: 0,
                    };
                    let q = &q[head * group..(head + 1) * group];
                    let visible = vec![searched.len(); group / head_dim];
                    attend(q, &visible, head_dim, context.softmax_scale, &[segment], &mut one);
                    all.o.extend_from_slice(&one.o);
                    all.lse.extend_from_slice(&one.lse);
                }
                decode_reply::Result::Attend(v1::AttendResult {
                    o: float_bytes(&all.o),
                    lse: float_bytes(&all.lse),
                })
            }
        };
        let keys = (searched.len() * kv_heads) as u64;
        v1::DecodeReply {
            sequence: query.sequence,
            layer: query.layer,
            result: Some(result),
            report: Some(v1::RetrievalReport {
                keys_scanned: keys,
                keys_total: keys,
                keys_attended: (searched.len() * q_heads) as u64,
                mass_covered: vec![1.0; q_heads],
                hinted,
                ..v1::RetrievalReport::default()
            }),
        }
    }
}

fn halves(bytes: &[u8]) -> Vec<f16> {
    bytes
        .chunks_exact(2)
        .map(|two| f16::from_le_bytes([two[0], two[1]]))
        .collect()
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl v1::block_store_server::BlockStore for Peer {
    type PutBlocksStream = Replies<v1::PutBlocksReply>;
    type GetBlocksStream = Replies<v1::GetBlocksReply>;
    type WatchEventsStream = Replies<v1::BlockEvent>;

    async fn open_namespace(
        &self,
        request: Request<v1::OpenNamespaceRequest>,
    ) -> Result<Response<v1::OpenNamespaceReply>, Status> {
        let schema = request.into_inner().schema.expect("a schema");
        let schema = KvSchema::try_from(schema).expect("a good schema");
        let layer_block_bytes = schema.layer_block_bytes() as u64;
        self.0.lock().schema = Some(schema);
        Ok(Response::new(v1::OpenNamespaceReply {
            namespace: self.namespace(),
            layer_block_bytes,
            limits: Some(v1::Limits {
                message_bytes_max: 4 << 20,
                hashes_max: 1024,
                lease_ms_max: 60_000,
            }),
            segment_format: 1,
            index_format: 1,
            epoch: 1,
            basis_id: Bytes::new(),
            bulk: None,
        }))
    }

    async fn match_prefix(
        &self,
        request: Request<v1::MatchPrefixRequest>,
    ) -> Result<Response<v1::MatchPrefixReply>, Status> {
        if self.fault() == Fault::MatchStalls {
            std::future::pending::<()>().await;
        }
        let hashes = request.into_inner().hashes;
        let hit_blocks = hashes.iter().take_while(|hash| self.is_whole(hash)).count() as u32;
        Ok(Response::new(v1::MatchPrefixReply {
            hit_blocks,
            host_blocks: hit_blocks,
            lease: u64::from(hit_blocks > 0),
            lease_ms: 1000 * u32::from(hit_blocks > 0),
            ..v1::MatchPrefixReply::default()
        }))
    }

    async fn release_lease(
        &self,
        _request: Request<v1::ReleaseLeaseRequest>,
    ) -> Result<Response<v1::ReleaseLeaseReply>, Status> {
        Ok(Response::new(v1::ReleaseLeaseReply {}))
    }

    async fn put_blocks(
        &self,
        request: Request<Streaming<v1::PutBlocksRequest>>,
    ) -> Result<Response<Self::PutBlocksStream>, Status> {
        let peer = self.clone();
        let replies = request.into_inner().map(move |message| Ok(peer.put(message?)));
        Ok(Response::new(Box::pin(replies)))
    }

    async fn get_blocks(
        &self,
        request: Request<v1::GetBlocksRequest>,
    ) -> Result<Response<Self::GetBlocksStream>, Status> {
        if self.fault() == Fault::GetRefused {
            return Err(Status::resource_exhausted("too many streams"));
        }
        let request = request.into_inner();
        let peer = self.clone();
        let order: Vec<(u32, Bytes)> = (request.layer_start..request.layer_end)
            .flat_map(|layer| request.hashes.iter().map(move |hash| (layer, hash.clone())))
            .collect();
        let replies = stream::unfold(0, move |place| {
            let (peer, turn) = (peer.clone(), order.get(place).cloned());
            async move {
                let (layer, hash) = turn?;
                match peer.fault() {
                    Fault::GetEnds(at) if at == place => return None,
                    Fault::GetStalls(at) if at == place => std::future::pending().await,
                    _ => {}
                }
                Some((Ok(peer.get(place, &hash, layer)), place + 1))
            }
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn watch_events(
        &self,
        _request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        Ok(Response::new(Box::pin(stream::empty())))
    }

    async fn stat(&self, _request: Request<v1::StatRequest>) -> Result<Response<v1::StatReply>, Status> {
        Ok(Response::new(v1::StatReply::default()))
    }
}

#[tonic::async_trait]
impl v1::retrieval_server::Retrieval for Peer {
    type DecodeStream = Replies<v1::DecodeReply>;

    async fn decode(
        &self,
        request: Request<Streaming<v1::DecodeRequest>>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let not_found = |fault| match fault {
            Fault::OpensNotFound(n) => Some(n),
            _ => None,
        };
        if self.count_down(not_found, Fault::OpensNotFound) {
            return Err(Status::not_found("hashes[0] is not held"));
        }
        let peer = self.clone();
        let state = (request.into_inner(), None::<Context>, 0);
        let replies = stream::unfold(state, move |(mut requests, mut context, number)| {
            let peer = peer.clone();
            async move {
                let request = loop {
                    match requests.message().await.ok()??.request? {
                        decode_request::Request::Hint(hint) => context.as_mut()?.hints.insert(hint.layer),
                        request => break request,
                    };
                };
                match request {
                    decode_request::Request::Hint(_) => None,
                    decode_request::Request::Open(open) => {
                        if !open.hashes.iter().all(|hash| peer.is_whole(hash)) {
                            return Some((Err(Status::not_found("a block is not held")), (requests, None, number)));
                        }
                        let opened = v1::Opened {
                            tokens: open.hashes.len() as u32 * u32::from(peer.schema().block_tokens),
                            index: "sketch".to_owned(),
                            ..v1::Opened::default()
                        };
                        let reply = v1::DecodeReply {
                            result: Some(decode_reply::Result::Opened(opened)),
                            ..v1::DecodeReply::default()
                        };
                        let context = Context {
                            open,
                            ..Context::default()
                        };
                        Some((Ok(reply), (requests, Some(context), number)))
                    }
                    decode_request::Request::Query(query) => {
                        let mut reply = peer.answer(context.as_mut()?, &query);
                        match peer.fault() {
                            Fault::QueryStalls(at) if at == number => std::future::pending().await,
                            Fault::QueryFails(at) if at == number => {
                                return Some((Err(Status::internal("broken")), (requests, context, number + 1)));
                            }
                            Fault::QueryShort(at, shortfall) if at == number => {
                                reply.report.as_mut()?.shortfall = shortfall.into();
                            }
                            _ => {}
                        }
                        Some((Ok(reply), (requests, context, number + 1)))
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn put_queries(
        &self,
        request: Request<v1::PutQueriesRequest>,
    ) -> Result<Response<v1::PutQueriesReply>, Status> {
        let request = request.into_inner();
        let new_samples = request.blocks.iter().map(|block| block.tokens.len() as u32).sum();
        self.0.lock().queries.extend(request.blocks);
        Ok(Response::new(v1::PutQueriesReply { new_samples }))
    }

    async fn build_index(
        &self,
        request: Request<v1::BuildIndexRequest>,
    ) -> Result<Response<v1::BuildIndexReply>, Status> {
        self.0.lock().builds.push(request.into_inner());
        let state = v1::build_index_reply::State::Queued.into();
        Ok(Response::new(v1::BuildIndexReply {
            state,
            ..v1::BuildIndexReply::default()
        }))
    }
}
