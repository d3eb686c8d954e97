//! Start and stop: which parts there are, in which order they come and go.

use std::{
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use kvasir_block::{KvSchema, NamespaceId, Tenant};
use kvasir_client::{ClientConfig, StoreClient};
use kvasir_model::{Device, Model, ModelFile, PagePool, SparsePrefill};
use kvasir_proto::{FILE_DESCRIPTOR_SET, v1::worker_server::WorkerServer};
use kvasir_runtime::{
    Runtime,
    admin::{self, HttpRunning, Readiness},
    grpc::{GrpcRunning, GrpcServer},
};
use tokio::{runtime::Handle, sync::oneshot, sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    basis,
    compute::{self, Command, Compute, ComputeHandle, Settings, Store, Surroundings},
    config::{InvalidConfig, WorkerConfig},
    events::EventHub,
    grpc::WorkerService,
    load::{Door, Load},
    metrics::{ComputeMetrics, OffloadMetrics, StoreMetrics},
    offload::{self, Offload},
    request::Limits,
    sparse::{self, Blocks},
    store_session::StoreSession,
};

/// Name under which the worker reports readiness.
const PART: &str = "worker";
/// Connecting is tried again by itself; a store that does not answer this long is away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Deadline of calls that are not worth a key of their own: opening the namespace, giving back a lease.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// A running worker; dropping it does not stop it, [`Worker::stop`] does.
#[derive(Debug)]
pub struct Worker {
    grpc: GrpcRunning,
    admin: HttpRunning,
    compute: ComputeHandle,
    thread: JoinHandle<()>,
    store: Option<Store>,
    tasks: TaskTracker,
    /// Ends everything at once.
    stop: CancellationToken,
    /// Ends watches.
    closing: CancellationToken,
    readiness: Readiness,
    drain_grace: Duration,
}

impl Worker {
    /// Starts a worker: serves readiness, loads the weights of `file`, and then takes requests.
    ///
    /// # Errors
    /// A configuration that does not hold together (the error names the key), an address that cannot be bound, weights
    /// that cannot be loaded. A store that is away is no error.
    pub async fn start(config: &WorkerConfig, file: Arc<ModelFile>, runtime: &Runtime) -> anyhow::Result<Self> {
        config.validate()?;
        let device = {
            let config = config.clone();
            tokio::task::spawn_blocking(move || config.open_device())
                .await
                .context("opening the device")?
                .context("worker.device")?
        };
        let sparse = match config.sparse_prefill_file() {
            Some(path) => Some(sparse::read(path, &file, &device, config)?),
            None => None,
        };
        let schema = device.schema(&file, config.block_tokens);
        let schema = match &sparse {
            Some(sparse) => sparse.schema(&schema),
            None => schema,
        };
        let plan = Plan::new(config, &schema, sparse.as_ref())?;
        let stop = runtime.shutdown.child_token();
        // Whatever fails below ends what was begun before it.
        let on_error = stop.clone().drop_guard();
        runtime.readiness.not_ready(PART, "loading the model");
        let routes = admin::router(runtime.metrics.clone(), runtime.readiness.clone());
        let admin = admin::serve(config.admin_listen, routes, &stop)
            .await
            .context("worker.admin_listen")?;

        let tasks = TaskTracker::new();
        let basis = match config.store_url.as_str() {
            "" => Bytes::new(),
            _ => basis::find(&config.basis, &file)?,
        };
        let store = connect(config, &schema, basis, &tasks, &stop)?;
        let hub = Arc::new(EventHub::new(random(), NamespaceId::new(&plan.tenant, &schema)));
        let (load_sender, load) = watch::channel(Load::default());
        let (compute, commands) = compute::channel();
        let around = Surroundings {
            settings: plan.settings,
            tokenizer: Arc::clone(file.tokenizer()),
            store: store.clone(),
            hub: Arc::clone(&hub),
            load: load_sender,
            metrics: ComputeMetrics::new(file.name()),
            handle: compute.clone(),
            runtime: Handle::current(),
        };
        let (block_tokens, step_tokens) = (config.block_tokens, config.step_tokens_max);
        let (loaded, on_loaded) = oneshot::channel();
        let readiness = runtime.readiness.clone();
        let model_file = Arc::clone(&file);
        let thread = std::thread::Builder::new()
            .name("kvasir-compute".to_owned())
            .spawn(move || {
                let began = std::time::Instant::now();
                match load_model(&model_file, &device, block_tokens, sparse, plan.pages, step_tokens) {
                    Ok((model, pool)) => {
                        tracing::info!(pages = pool.pages(), device = %described(&device), elapsed = ?began.elapsed(), "model loaded");
                        if loaded.send(Ok(())).is_ok() {
                            // Said by the guard even when the thread ends by a panic.
                            let _ended = EndOfCompute(readiness);
                            Compute::new(model, pool, commands, around).run();
                        }
                    }
                    // Nobody waits any more only where starting was given up.
                    Err(error) => drop(loaded.send(Err(error))),
                }
            })
            .context("starting the compute thread")?;
        on_loaded
            .await
            .context("the compute thread ended while loading the model")??;

        let closing = stop.child_token();
        let service = WorkerService {
            model: file.name().to_owned(),
            limits: plan.limits(config, &file),
            schema,
            door: Door::new(config.waiting_max),
            compute: compute.clone(),
            hub,
            load,
            closing: closing.clone(),
        };
        let grpc = GrpcServer::new()
            .add_service(WorkerServer::new(service))
            .reflection(FILE_DESCRIPTOR_SET)?
            .serve(config.listen, &stop)
            .await
            .context("worker.listen")?;
        // A shutdown of the process ends the compute thread too.
        let (ending, stopped) = (compute.clone(), stop.clone());
        tasks.spawn(async move {
            stopped.cancelled().await;
            ending.send(Command::Stop).await;
        });
        runtime.readiness.ready(PART);
        tracing::info!(grpc = %grpc.addr(), admin = %admin.addr(), model = file.name(), store = config.store_url, "worker ready");
        let stop = on_error.disarm();
        Ok(Self {
            grpc,
            admin,
            compute,
            thread,
            store,
            tasks,
            stop,
            closing,
            readiness: runtime.readiness.clone(),
            drain_grace: config.drain_grace.get(),
        })
    }

    /// Address of the gRPC service.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc.addr()
    }

    /// Address of the HTTP side.
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin.addr()
    }

    /// Takes no new requests, lets running ones finish within the grace and cancels the rest, pushes what is queued to
    /// the store within the same grace again, and joins everything.
    ///
    /// # Errors
    /// When the compute thread had panicked.
    pub async fn stop(self) -> anyhow::Result<()> {
        let Self {
            grpc,
            admin,
            compute,
            thread,
            store,
            tasks,
            stop,
            closing,
            readiness,
            drain_grace,
        } = self;
        readiness.not_ready(PART, "stopping");
        grpc.set_serving(false).await;
        compute.send(Command::Drain).await;
        let mut ended = tokio::task::spawn_blocking(move || thread.join());
        let ended = match timeout(drain_grace, &mut ended).await {
            Ok(ended) => ended,
            Err(_) => {
                tracing::warn!(grace = ?drain_grace, "requests still run after the grace, cancelling them");
                compute.send(Command::Stop).await;
                ended.await
            }
        };
        closing.cancel();
        grpc.stop().await;
        tasks.close();
        // A process that ends at once has ended the task that pushes.
        if let Some(store) = store.filter(|_| !stop.is_cancelled()) {
            push_the_rest(&store, drain_grace).await;
        }
        stop.cancel();
        tasks.wait().await;
        admin.stop().await;
        match ended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => anyhow::bail!("the compute thread had panicked: its message is in the log"),
        }
    }
}

/// Waits until the offload queue is empty and answered, at most `grace`.
async fn push_the_rest(store: &Store, grace: Duration) {
    store.offload.close();
    if store.session.namespace().is_none() {
        let blocks = store.offload.queued();
        tracing::warn!(
            layer_blocks = blocks,
            "the store is away, what was queued for it is lost"
        );
    } else if timeout(grace, store.offload.idle()).await.is_err() {
        let blocks = store.offload.queued();
        tracing::warn!(
            layer_blocks = blocks,
            ?grace,
            "not everything was pushed within the grace"
        );
    }
}

/// What follows from configuration and model.
struct Plan {
    tenant: Tenant,
    pages: usize,
    settings: Settings,
}

impl Plan {
    fn new(config: &WorkerConfig, schema: &KvSchema, sparse: Option<&SparsePrefill>) -> anyhow::Result<Self> {
        schema.validate().context("the model's schema")?;
        let tenant = Tenant::new(config.tenant.as_str())
            .ok_or_else(|| InvalidConfig::new("worker.tenant", "is not a tenant's name"))?;
        let block_bytes = schema.block_bytes();
        let pages = config.kv_bytes_max.as_usize() / block_bytes;
        if pages < 2 {
            let problem = format!(
                "{} holds {pages} blocks of {block_bytes} bytes: at least two are needed, and some hundreds are useful",
                config.kv_bytes_max
            );
            return Err(InvalidConfig::new("worker.kv_bytes_max", problem).into());
        }
        let queue = config.offload_queue_bytes_max;
        if !config.store_url.is_empty() && queue.as_usize() < block_bytes {
            let problem = format!("{queue} does not hold one block of {block_bytes} bytes: nothing would be pushed");
            return Err(InvalidConfig::new("worker.offload_queue_bytes_max", problem).into());
        }
        let settings = Settings {
            block_tokens: usize::from(config.block_tokens),
            step_tokens_max: config.step_tokens_max,
            sequences_max: config.sequences_max,
            onboard_timeout: config.onboard_timeout.get(),
            context_timeout: config.context_timeout.get(),
            retrieval_timeout: config.retrieval_timeout.get(),
            lease: config.lease.get(),
            hint_from_layer: config.attention.hint_from_layer as usize,
            row_cache_bytes: config.attention.row_cache_bytes.as_usize(),
            query_sample_bytes: config.attention.query_sample_bytes.as_usize(),
            sparse: sparse.map(|sparse| Blocks {
                from: sparse.from(),
                block_tokens: usize::from(config.block_tokens),
            }),
        };
        Ok(Self {
            tenant,
            pages,
            settings,
        })
    }

    fn limits(&self, config: &WorkerConfig, file: &ModelFile) -> Limits {
        Limits {
            vocab: file.shape().vocab,
            context_tokens_max: file.shape().context_tokens_max,
            block_tokens: usize::from(config.block_tokens),
            pages: self.pages,
            max_tokens: config.max_tokens as usize,
            attention: config.attention,
        }
    }
}

/// The parts that speak to the store, where one is configured; they connect by themselves.
pub(crate) fn connect(
    config: &WorkerConfig,
    schema: &KvSchema,
    basis: Bytes,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<Option<Store>> {
    if config.store_url.is_empty() {
        return Ok(None);
    }
    let tenant = Tenant::new(config.tenant.as_str())
        .ok_or_else(|| InvalidConfig::new("worker.tenant", "is not a tenant's name"))?;
    let client = StoreClient::new(ClientConfig {
        connect_timeout: CONNECT_TIMEOUT,
        call_timeout: CALL_TIMEOUT,
        decode_poll: config.attention.reply_poll.get(),
        ..ClientConfig::to(config.store_url.as_str())
    })
    .context("worker.store_url")?;
    let metrics = StoreMetrics::new();
    let session = StoreSession::new(client, tenant, schema.clone(), basis, tasks.clone(), metrics.clone());
    let offload = Offload::new(
        usize::from(schema.layers),
        schema.layer_block_bytes(),
        config.offload_queue_bytes_max.as_usize(),
        OffloadMetrics::new(),
    );
    let (session, offload) = (Arc::new(session), Arc::new(offload));
    tasks.spawn(Arc::clone(&session).keep(Arc::clone(&offload), stop.clone()));
    for _ in 0..config.offload_streams {
        tasks.spawn(offload::drain(Arc::clone(&offload), Arc::clone(&session), stop.clone()));
    }
    Ok(Some(Store {
        session,
        offload,
        metrics,
        experience: Arc::default(),
    }))
}

fn load_model(
    file: &ModelFile,
    device: &Device,
    block_tokens: u16,
    sparse: Option<SparsePrefill>,
    pages: usize,
    step_tokens: usize,
) -> anyhow::Result<(Model, PagePool)> {
    let mut model = Model::load_on(file, device, block_tokens).context("loading the model")?;
    if let Some(sparse) = sparse {
        model = model.with_sparse_prefill(sparse).context("worker.sparse_prefill")?;
    }
    let mut pool = model.pool(pages).context("worker.kv_bytes_max")?;
    model.warm_up(&mut pool, step_tokens).context("warming the device up")?;
    Ok((model, pool))
}

fn described(device: &Device) -> String {
    match device {
        Device::Cpu { threads } => format!("{threads} threads"),
        Device::Gpu(gpu) => gpu.name().to_owned(),
    }
}

/// Reports the end of the compute thread.
struct EndOfCompute(Readiness);

impl Drop for EndOfCompute {
    fn drop(&mut self) {
        self.0.not_ready(PART, "the compute thread has ended");
    }
}

/// A number that another start will not have.
fn random() -> u64 {
    RandomState::new().hash_one(0)
}
