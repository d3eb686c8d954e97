//! [`Store`]: start and stop.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use kvasir_cache::{BlockCache, StoreId};
use kvasir_runtime::{
    Runtime,
    admin::{self, HttpRunning, Readiness},
    grpc::{GrpcRunning, GrpcServer},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    StoreConfig,
    bulk::{self, BulkServer},
    grpc, metrics,
    served::{BulkPlaces, Served},
};

/// What `/readyz` calls this part.
const PART: &str = "store";

/// How long replies may take to leave when the store stops; what makes them is waited for before that.
const LEAVE: Duration = Duration::from_secs(1);

/// A running store; dropping it does not stop it, [`Store::stop`] does.
#[derive(Debug)]
pub struct Store {
    served: Arc<Served>,
    grpc: GrpcRunning,
    bulk: BulkServer,
    admin: HttpRunning,
    metrics: JoinHandle<()>,
    stopping: CancellationToken,
    readiness: Readiness,
}

impl Store {
    /// Opens the data folder, recovers what it holds, and serves. It is ready when this returns.
    ///
    /// # Errors
    /// A limit or address that cannot work, a data folder that cannot be opened or is in use, an address that is taken;
    /// each says what to do.
    pub async fn start(config: &StoreConfig, runtime: &Runtime) -> anyhow::Result<Self> {
        config.validate()?;
        runtime.readiness.not_ready(PART, "recovering the data folder");
        let mut cache_config = config.cache();
        if !config.object_url.is_empty() {
            cache_config.object = config.object(store_id(&config.data_dir)?)?;
        }
        let cache = tokio::task::spawn_blocking(move || BlockCache::open(cache_config))
            .await?
            .with_context(|| format!("cannot open the store in {}", config.data_dir.display()))?;
        let stopping = runtime.shutdown.child_token();
        let served = Arc::new(Served::new(config.clone(), cache, bulk::new_token()?, stopping.clone()));
        let bound = bind(&served, runtime, &stopping).await;
        let (bulk, grpc, admin) = match bound {
            Ok(bound) => bound,
            Err(error) => {
                served.close().await.context("closing the store again")?;
                return Err(error);
            }
        };
        let metrics = tokio::spawn(metrics::publish(Arc::clone(&served)));
        runtime.readiness.ready(PART);
        tracing::info!(grpc = %grpc.addr(), bulk = %bulk.addr(), local = bulk.local_socket(), admin = %admin.addr(), data_dir = %config.data_dir.display(), "store is serving");
        Ok(Self {
            served,
            grpc,
            bulk,
            admin,
            metrics,
            stopping,
            readiness: runtime.readiness.clone(),
        })
    }

    /// Where the gRPC services are.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc.addr()
    }

    /// Where the bulk path is.
    pub fn bulk_addr(&self) -> SocketAddr {
        self.bulk.addr()
    }

    /// Where the Unix socket is that passes the store's memory to processes of this machine; `None` where it is turned off or its
    /// path is too long for one.
    pub fn local_socket(&self) -> Option<&str> {
        self.bulk.local_socket()
    }

    /// Where `/metrics`, `/healthz` and `/readyz` are.
    pub fn admin_addr(&self) -> SocketAddr {
        self.admin.addr()
    }

    /// Stops accepting, ends streams and watches, waits for what is being stored, flushes, syncs and closes. Nothing that
    /// was answered `STORED` is lost.
    ///
    /// # Errors
    /// When not everything accepted could be written.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.readiness.not_ready(PART, "stopping");
        self.grpc.set_serving(false).await;
        self.stopping.cancel();
        let (bulk, grpc, served) = (self.bulk, self.grpc, Arc::clone(&self.served));
        // A reader that takes nothing holds up either for a second.
        let (kept, ()) = tokio::join!(tokio::task::spawn_blocking(move || bulk.stop()), async move {
            served.drain().await;
            grpc.stop_within(LEAVE).await;
        });
        let kept = kept?;
        let closed = self.served.close().await;
        // From here on nothing is written into memory that readers on this machine may still look at.
        drop(kept);
        if let Err(error) = self.metrics.await {
            tracing::error!(%error, "the metrics task failed");
        }
        self.admin.stop().await;
        closed.context("not everything that was accepted could be written")?;
        tracing::info!("store has stopped, everything accepted is on disk");
        Ok(())
    }
}

/// Number of this store among those that share a bucket: made once, and kept in the data folder. Where the file is lost, another
/// one is made, and the objects written under the old one are no longer removed by this store.
fn store_id(data_dir: &Path) -> anyhow::Result<StoreId> {
    let path = data_dir.join("store-id");
    if let Ok(text) = std::fs::read_to_string(&path)
        && let Ok(id) = text.trim().parse()
    {
        return Ok(StoreId::from_u64(id));
    }
    // Two stores would have to be made in the same nanosecond by processes of the same number.
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos() as u64;
    let id = clock ^ u64::from(std::process::id()) << 40;
    std::fs::create_dir_all(data_dir)
        .and_then(|()| std::fs::write(&path, format!("{id}\n")))
        .with_context(|| format!("cannot keep the store's id in {}", path.display()))?;
    Ok(StoreId::from_u64(id))
}

async fn bind(
    served: &Arc<Served>,
    runtime: &Runtime,
    stopping: &CancellationToken,
) -> anyhow::Result<(BulkServer, GrpcRunning, HttpRunning)> {
    let config = &served.config;
    let server = grpc::add_to(GrpcServer::new(), served).reflection(kvasir_proto::FILE_DESCRIPTOR_SET)?;
    // Until the end, so that a long flush can be watched.
    let routes = admin::router(runtime.metrics.clone(), runtime.readiness.clone());
    let admin = admin::serve(config.admin_listen, routes, &CancellationToken::new()).await?;
    // Before gRPC, which tells where it is.
    let bulk = match BulkServer::start(served) {
        Ok(bulk) => bulk,
        Err(error) => {
            admin.stop().await;
            return Err(error);
        }
    };
    // Set once: there is one server.
    let _ = served.bulk_offer.set(BulkPlaces {
        addr: bulk.addr(),
        local_socket: bulk.local_socket().map(str::to_owned),
    });
    match server.serve(config.listen, stopping).await {
        Ok(grpc) => Ok((bulk, grpc, admin)),
        Err(error) => {
            tokio::task::spawn_blocking(move || drop(bulk.stop())).await?;
            admin.stop().await;
            Err(error.into())
        }
    }
}
