//! A worker for tests that says what a script tells it: a real gRPC server on loopback that speaks the real protocol, so
//! that refusals, silence and broken streams can be had on demand. It computes nothing.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt, stream};
use kvasir_block::{BlockHash, Dtype, KvSchema, NamespaceId, RopeStyle};
use kvasir_proto::{convert, v1};
use kvasir_runtime::{
    grpc::{GrpcRunning, GrpcServer},
    request_id::RequestId,
};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

/// What happens next in a generation.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Admitted, with so many tokens found in the device tier and in the store.
    Started(u32, u32),
    Text(&'static str),
    Wait(Duration),
    /// Nothing any more, and no end either.
    Hang,
    /// The stream breaks with this status.
    Break(Code, &'static str),
    Finish(v1::FinishReason, Box<v1::GenerateReport>),
}

/// What one call to `Generate` is answered with.
#[derive(Clone, Debug)]
pub(crate) enum Play {
    /// A status instead of a stream.
    Refuse(Code, &'static str),
    /// A stream that closes after the last step.
    Say(Vec<Step>),
}

impl Play {
    /// Admission, these texts, and an orderly end.
    pub(crate) fn answer(texts: &[&'static str]) -> Self {
        let texts = texts.iter().map(|text| Step::Text(text));
        let end = Step::Finish(v1::FinishReason::Stop, Box::default());
        Self::Say([Step::Started(0, 0)].into_iter().chain(texts).chain([end]).collect())
    }
}

/// A call to `Generate` as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) message: v1::GenerateRequest,
    /// From the metadata.
    pub(crate) request_id: String,
}

/// A scripted worker, serving until it is stopped.
pub(crate) struct ScriptedWorker {
    pub(crate) url: String,
    script: Arc<Script>,
    server: GrpcRunning,
    closing: CancellationToken,
}

struct Script {
    info: v1::WorkerInfoReply,
    plays: Mutex<VecDeque<Play>>,
    calls: Mutex<Vec<Call>>,
    /// Generations whose stream was dropped before its last step.
    cancelled: watch::Sender<usize>,
    open: AtomicUsize,
    load: watch::Sender<v1::WorkerLoad>,
    blocks: watch::Sender<Vec<v1::BlockEvent>>,
    closing: CancellationToken,
}

struct Service(Arc<Script>);

/// A schema that needs no model file.
pub(crate) fn schema() -> KvSchema {
    KvSchema {
        model: "scripted".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: 2,
        kv_heads: 1,
        head_dim: 8,
        block_tokens: 4,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 10_000.0,
        rope_dims: 8,
        rope_style: RopeStyle::Interleaved,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "test".to_owned(),
    }
}

/// The namespace of every scripted worker.
pub(crate) fn namespace() -> NamespaceId {
    NamespaceId::from_bytes([3; 32])
}

impl ScriptedWorker {
    /// A worker of `schema` that answers its calls with `plays`, one after the other, and then with one word.
    pub(crate) async fn start(schema: &KvSchema, plays: impl IntoIterator<Item = Play>) -> Self {
        let info = v1::WorkerInfoReply {
            model: schema.model.clone(),
            schema: Some(schema.into()),
            namespace: convert::namespace_bytes(namespace()),
            context_tokens_max: 1 << 20,
            epoch: 1,
        };
        Self::with_info(info, plays).await
    }

    /// A worker that says this of itself.
    pub(crate) async fn with_info(info: v1::WorkerInfoReply, plays: impl IntoIterator<Item = Play>) -> Self {
        let closing = CancellationToken::new();
        let script = Arc::new(Script {
            info,
            plays: Mutex::new(plays.into_iter().collect()),
            calls: Mutex::default(),
            cancelled: watch::Sender::new(0),
            open: AtomicUsize::new(0),
            load: watch::Sender::new(v1::WorkerLoad::default()),
            blocks: watch::Sender::new(vec![event(1, v1::block_event::Kind::SnapshotEnd, &[])]),
            closing: closing.clone(),
        });
        let service = v1::worker_server::WorkerServer::new(Service(Arc::clone(&script)));
        let server = GrpcServer::new().add_service(service);
        let server = server
            .serve(([127, 0, 0, 1], 0).into(), &CancellationToken::new())
            .await
            .expect("a free port");
        Self {
            url: format!("http://{}", server.addr()),
            script,
            server,
            closing,
        }
    }

    /// Calls so far.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.script.calls.lock().clone()
    }

    /// Generations that are being streamed now.
    pub(crate) fn open(&self) -> usize {
        self.script.open.load(Ordering::SeqCst)
    }

    /// Waits until so many generations were cancelled.
    pub(crate) async fn cancelled(&self, count: usize) {
        let mut cancelled = self.script.cancelled.subscribe();
        let reached = cancelled.wait_for(|so_far| *so_far >= count);
        tokio::time::timeout(Duration::from_secs(5), reached)
            .await
            .expect("a cancellation within 5 s")
            .expect("the script lives");
    }

    /// Reports this load.
    pub(crate) fn set_load(&self, load: v1::WorkerLoad) {
        self.script.load.send_replace(load);
    }

    /// Reports these blocks as held, in a new snapshot for whoever watches from now on.
    pub(crate) fn set_blocks(&self, hashes: &[BlockHash]) {
        let snapshot = event(1, v1::block_event::Kind::Snapshot, hashes);
        let end = event(1, v1::block_event::Kind::SnapshotEnd, &[]);
        self.script.blocks.send_replace(vec![snapshot, end]);
    }

    /// Ends the server and every stream, as a worker that leaves does.
    pub(crate) async fn stop(self) {
        self.closing.cancel();
        self.server.stop().await;
    }
}

fn event(sequence: u64, kind: v1::block_event::Kind, hashes: &[BlockHash]) -> v1::BlockEvent {
    v1::BlockEvent {
        epoch: 1,
        sequence,
        kind: kind.into(),
        namespace: convert::namespace_bytes(namespace()),
        hashes: convert::hash_bytes(hashes),
        tier: v1::Tier::Device.into(),
    }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Counts a stream that is dropped before its last step.
struct Running {
    script: Arc<Script>,
    steps: VecDeque<Step>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.script.open.fetch_sub(1, Ordering::SeqCst);
        if !self.steps.is_empty() {
            self.script.cancelled.send_modify(|count| *count += 1);
        }
    }
}

#[tonic::async_trait]
impl v1::worker_server::Worker for Service {
    type GenerateStream = Replies<v1::GenerateReply>;
    type WatchEventsStream = Replies<v1::BlockEvent>;
    type WatchLoadStream = Replies<v1::WorkerLoad>;

    async fn info(&self, _request: Request<v1::WorkerInfoRequest>) -> Result<Response<v1::WorkerInfoReply>, Status> {
        Ok(Response::new(self.0.info.clone()))
    }

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let request_id = RequestId::of(&request).to_string();
        let message = request.into_inner();
        let prompt_tokens = message.prompt.len() as u32;
        self.0.calls.lock().push(Call { message, request_id });
        let play = self.0.plays.lock().pop_front();
        let steps = match play.unwrap_or_else(|| Play::answer(&["word"])) {
            Play::Refuse(code, message) => return Err(Status::new(code, message)),
            Play::Say(steps) => VecDeque::from(steps),
        };
        self.0.open.fetch_add(1, Ordering::SeqCst);
        let running = Running {
            script: Arc::clone(&self.0),
            steps,
        };
        let texts = 0;
        let replies = stream::unfold((running, texts), move |(mut running, mut texts)| async move {
            loop {
                // The step that never ends is still to be done while it is being waited in.
                match running.steps.front()? {
                    Step::Hang => std::future::pending().await,
                    Step::Wait(time) => tokio::time::sleep(*time).await,
                    _ => {}
                }
                let reply = match running.steps.pop_front()? {
                    Step::Hang | Step::Wait(_) => continue,
                    Step::Break(code, message) => Err(Status::new(code, message)),
                    Step::Started(device, store) => Ok(v1::generate_reply::Event::Started(v1::Started {
                        prompt_tokens,
                        cached_tokens: device + store,
                        cached_tokens_device: device,
                        cached_tokens_store: store,
                    })),
                    Step::Text(text) => {
                        texts += 1;
                        Ok(v1::generate_reply::Event::Tokens(v1::Tokens {
                            text: text.to_owned(),
                            ids: vec![texts],
                        }))
                    }
                    Step::Finish(reason, report) => Ok(v1::generate_reply::Event::Finished(v1::Finished {
                        reason: reason.into(),
                        prompt_tokens,
                        completion_tokens: texts,
                        cached_tokens: 0,
                        report: Some(*report),
                    })),
                };
                let reply = reply.map(|event| v1::GenerateReply { event: Some(event) });
                return Some((reply, (running, texts)));
            }
        });
        Ok(Response::new(replies.boxed()))
    }

    async fn watch_events(
        &self,
        _request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let events = WatchStream::new(self.0.blocks.subscribe())
            .flat_map(stream::iter)
            .map(Ok);
        Ok(Response::new(
            events.take_until(self.0.closing.clone().cancelled_owned()).boxed(),
        ))
    }

    async fn watch_load(
        &self,
        _request: Request<v1::WatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        let reports = WatchStream::new(self.0.load.subscribe()).map(Ok);
        Ok(Response::new(
            reports.take_until(self.0.closing.clone().cancelled_owned()).boxed(),
        ))
    }
}
