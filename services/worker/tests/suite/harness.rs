//! A worker on free ports, and what a router would say to it.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use kvasir_model::ModelFile;
use kvasir_proto::v1::{self, worker_client::WorkerClient};
use kvasir_runtime::Runtime;
use kvasir_worker::{Worker, WorkerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Status, Streaming, transport::Channel};

pub(crate) struct Running {
    worker: Worker,
    client: WorkerClient<Channel>,
    file: Arc<ModelFile>,
}

/// Everything a caller saw of one request.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) started: v1::Started,
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) finished: v1::Finished,
}

impl Answer {
    pub(crate) fn reason(&self) -> v1::FinishReason {
        self.finished.reason()
    }

    pub(crate) fn report(&self) -> &v1::GenerateReport {
        self.finished.report.as_ref().expect("a report")
    }
}

/// Where `make test` puts the model.
fn model_path() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .expect("a home folder");
    cache.join("kvasir/models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// The real model.
pub(crate) fn model_file() -> ModelFile {
    let path = model_path();
    ModelFile::open(&path).unwrap_or_else(|error| panic!("{}: {error}; run `make model`", path.display()))
}

/// A prompt of so many tokens, another for each seed.
pub(crate) fn prompt(tokens: usize, seed: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..tokens)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            1000 + state % 30_000
        })
        .collect()
}

/// A greedy request.
pub(crate) fn greedy(prompt: &[u32], max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        request_id: "test".to_owned(),
        prompt: prompt.to_vec(),
        max_tokens,
        ..v1::GenerateRequest::default()
    }
}

impl Running {
    /// Starts a worker without a store on free ports; the rest as in `config`.
    pub(crate) async fn start(config: WorkerConfig) -> Self {
        Self::with_store(config, String::new()).await
    }

    /// The same with the store at `store_url`.
    pub(crate) async fn with_store(config: WorkerConfig, store_url: String) -> Self {
        let file = Arc::new(model_file());
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let config = WorkerConfig {
            listen: any,
            admin_listen: any,
            store_url,
            ..config
        };
        let worker = Worker::start(&config, Arc::clone(&file), &Runtime::new())
            .await
            .expect("a worker");
        let client = WorkerClient::connect(format!("http://{}", worker.grpc_addr()))
            .await
            .expect("a connection");
        Self { worker, client, file }
    }

    /// Why a worker with this configuration does not start.
    pub(crate) async fn refused(config: WorkerConfig) -> String {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let config = WorkerConfig {
            listen: any,
            admin_listen: any,
            ..config
        };
        let error = Worker::start(&config, Arc::new(model_file()), &Runtime::new()).await;
        format!("{:#}", error.expect_err("a worker that does not start"))
    }

    pub(crate) async fn stop(self) {
        self.worker.stop().await.expect("an orderly end");
    }

    pub(crate) fn encode(&self, text: &str) -> Vec<u32> {
        self.file.tokenizer().encode(text, true).expect("text")
    }

    /// The first tokens of a page that a person wrote.
    pub(crate) fn page(&self, tokens: usize) -> Vec<u32> {
        let mut page = self.encode(include_str!("../../../../ARCHITECTURE.md"));
        page.truncate(tokens);
        page
    }

    pub(crate) async fn open(&self, request: v1::GenerateRequest) -> Result<Streaming<v1::GenerateReply>, Status> {
        Ok(self.client.clone().generate(request).await?.into_inner())
    }

    pub(crate) async fn generate(&self, request: v1::GenerateRequest) -> Result<Answer, Status> {
        let mut stream = self.open(request).await?;
        let (mut started, mut text, mut ids, mut finished) = (None, String::new(), Vec::new(), None);
        while let Some(reply) = stream.message().await? {
            match reply.event.expect("an event") {
                v1::generate_reply::Event::Started(event) => {
                    assert!(started.is_none() && ids.is_empty(), "started comes once and first");
                    started = Some(event);
                }
                v1::generate_reply::Event::Tokens(event) => {
                    text += &event.text;
                    ids.extend(event.ids);
                }
                v1::generate_reply::Event::Finished(event) => {
                    assert!(finished.is_none(), "finished comes once");
                    finished = Some(event);
                }
            }
        }
        Ok(Answer {
            started: started.expect("has started"),
            text,
            ids,
            finished: finished.expect("has finished"),
        })
    }

    pub(crate) async fn info(&self) -> v1::WorkerInfoReply {
        let reply = self.client.clone().info(v1::WorkerInfoRequest {}).await;
        reply.expect("info").into_inner()
    }

    pub(crate) async fn watch_load(&self) -> Streaming<v1::WorkerLoad> {
        let stream = self.client.clone().watch_load(v1::WatchLoadRequest {}).await;
        stream.expect("a watch").into_inner()
    }

    pub(crate) async fn watch_events(&self) -> Streaming<v1::BlockEvent> {
        let stream = self
            .client
            .clone()
            .watch_events(v1::WatchEventsRequest::default())
            .await;
        stream.expect("a watch").into_inner()
    }

    /// Reads loads until one is as wanted.
    pub(crate) async fn load_until(
        &self,
        loads: &mut Streaming<v1::WorkerLoad>,
        wanted: impl Fn(&v1::WorkerLoad) -> bool,
    ) {
        let mut last = None;
        let reading = async {
            loop {
                let load = loads.message().await.expect("a load").expect("open");
                let reached = wanted(&load);
                last = Some(load);
                if reached {
                    return;
                }
            }
        };
        let reached = tokio::time::timeout(Duration::from_secs(60), reading).await;
        assert!(reached.is_ok(), "the load stayed at {last:?}");
    }

    /// The whole answer of the admin side, head included.
    pub(crate) async fn admin(&self, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(self.worker.admin_addr())
            .await
            .expect("a connection");
        let request = format!("GET {path} HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        answer
    }
}
