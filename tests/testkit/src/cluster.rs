//! Store, workers and router in this process, on free loopback ports.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
};

use anyhow::{Context, Result};
use kvasir_model::ModelFile;
use kvasir_router::{Router, RouterConfig};
use kvasir_runtime::{Runtime, units::ByteSize};
use kvasir_store::{Store, StoreConfig};
use kvasir_worker::{Worker, WorkerConfig};
use tempfile::TempDir;

use crate::environment::model;

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// What a cluster is made of. Addresses and folders in the configurations are replaced by the cluster's own.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many workers; each loads the model, about 200 MB.
    pub workers: usize,
    /// Whether there is a store.
    pub store: bool,
    /// Settings of the store.
    pub store_config: StoreConfig,
    /// Settings of each worker.
    pub worker_config: WorkerConfig,
    /// Settings of the router.
    pub router_config: RouterConfig,
}

impl Default for Options {
    /// A store, a worker with 256 MiB of pages, a router.
    fn default() -> Self {
        Self {
            workers: 1,
            store: true,
            store_config: StoreConfig::default(),
            worker_config: WorkerConfig {
                kv_bytes_max: ByteSize::mib(256),
                ..WorkerConfig::default()
            },
            router_config: RouterConfig::default(),
        }
    }
}

/// A running cluster. [`Cluster::stop`] ends it in order; dropping it leaves its tasks to the end of the process.
pub struct Cluster {
    folder: TempDir,
    file: Arc<ModelFile>,
    options: Options,
    store: Option<Store>,
    workers: Vec<Worker>,
    router: Option<Router>,
    pub(crate) client: reqwest::Client,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = (self.store.is_some(), self.workers.len(), self.router.is_some());
        write!(
            f,
            "Cluster {{ store, workers, router: {parts:?}, folder: {:?} }}",
            self.folder.path()
        )
    }
}

impl Cluster {
    /// Starts all parts; they are ready when this returns.
    ///
    /// # Errors
    /// Whatever a part says that could not be started.
    pub async fn start(options: Options) -> Result<Self> {
        let mut cluster = Self {
            folder: tempfile::tempdir().context("cannot make a temporary folder")?,
            file: model(),
            options,
            store: None,
            workers: Vec::new(),
            router: None,
            client: reqwest::Client::new(),
        };
        if cluster.options.store {
            cluster.start_store().await?;
        }
        for _ in 0..cluster.options.workers {
            cluster.start_worker().await?;
        }
        cluster.start_router().await?;
        Ok(cluster)
    }

    /// Starts the store again, on the same folder and a new port. Workers and router keep the address they were given.
    ///
    /// # Errors
    /// Whatever the store says.
    pub async fn start_store(&mut self) -> Result<()> {
        let config = StoreConfig {
            listen: ANY_PORT,
            admin_listen: ANY_PORT,
            data_dir: self.folder.path().join("store"),
            ..self.options.store_config.clone()
        };
        self.store = Some(Store::start(&config, &Runtime::new()).await?);
        Ok(())
    }

    /// Starts one more worker on the cluster's store; returns its index. A running router does not know it.
    ///
    /// # Errors
    /// Whatever the worker says.
    pub async fn start_worker(&mut self) -> Result<usize> {
        let config = WorkerConfig {
            listen: ANY_PORT,
            admin_listen: ANY_PORT,
            store_url: self
                .store
                .as_ref()
                .map(|store| url(store.grpc_addr()))
                .unwrap_or_default(),
            ..self.options.worker_config.clone()
        };
        self.workers
            .push(Worker::start(&config, Arc::clone(&self.file), &Runtime::new()).await?);
        Ok(self.workers.len() - 1)
    }

    /// Starts the router in front of the workers that run now.
    ///
    /// # Errors
    /// Whatever the router says.
    pub async fn start_router(&mut self) -> Result<()> {
        let config = RouterConfig {
            listen: ANY_PORT,
            workers: self.workers.iter().map(|worker| url(worker.grpc_addr())).collect(),
            store_url: self
                .store
                .as_ref()
                .map(|store| url(store.grpc_addr()))
                .unwrap_or_default(),
            block_tokens: self.options.worker_config.block_tokens,
            ..self.options.router_config.clone()
        };
        self.router = Some(Router::start(&config, Arc::clone(&self.file), &Runtime::new()).await?);
        Ok(())
    }

    /// Stops the store and leaves the rest running.
    ///
    /// # Errors
    /// Whatever the store says.
    pub async fn stop_store(&mut self) -> Result<()> {
        match self.store.take() {
            Some(store) => store.stop().await,
            None => Ok(()),
        }
    }

    /// Stops the worker that was started last.
    ///
    /// # Errors
    /// Whatever the worker says.
    pub async fn stop_last_worker(&mut self) -> Result<()> {
        match self.workers.pop() {
            Some(worker) => worker.stop().await,
            None => Ok(()),
        }
    }

    /// Stops router, workers and store, in this order.
    ///
    /// # Errors
    /// What the first part says that did not stop in good order; the rest is stopped all the same.
    pub async fn stop(self) -> Result<()> {
        let mut result = Ok(());
        if let Some(router) = self.router {
            result = result.and(router.stop().await.context("router"));
        }
        for worker in self.workers {
            result = result.and(worker.stop().await.context("worker"));
        }
        if let Some(store) = self.store {
            result = result.and(store.stop().await.context("store"));
        }
        result
    }

    /// The model that is served.
    pub fn file(&self) -> &Arc<ModelFile> {
        &self.file
    }

    /// The cluster's folder; the store's lies in it under `store`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Base URL of the OpenAI API, of `/metrics` and of health.
    ///
    /// # Panics
    /// When the router does not run.
    pub fn router_url(&self) -> String {
        url(self.router.as_ref().expect("the router runs").http_addr())
    }

    /// gRPC address of a worker.
    pub fn worker_url(&self, index: usize) -> String {
        url(self.workers[index].grpc_addr())
    }

    /// Base URL of a worker's `/metrics`.
    pub fn worker_admin_url(&self, index: usize) -> String {
        url(self.workers[index].admin_addr())
    }

    /// gRPC address of the store.
    ///
    /// # Panics
    /// When the store does not run.
    pub fn store_addr(&self) -> SocketAddr {
        self.store.as_ref().expect("the store runs").grpc_addr()
    }

    /// The same as a URL.
    pub fn store_url(&self) -> String {
        url(self.store_addr())
    }

    /// Base URL of the store's `/metrics`.
    ///
    /// # Panics
    /// When the store does not run.
    pub fn store_admin_url(&self) -> String {
        url(self.store.as_ref().expect("the store runs").admin_addr())
    }
}

fn url(addr: SocketAddr) -> String {
    format!("http://{addr}")
}
