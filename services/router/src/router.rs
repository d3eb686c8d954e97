//! The life of a router: start, serve, stop.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use kvasir_client::{ClientConfig, StoreClient};
use kvasir_model::ModelFile;
use kvasir_runtime::{Runtime, admin};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admission::Admission,
    backoff::Backoff,
    config::RouterConfig,
    dispatch::Dispatcher,
    holders::Holders,
    http::{self, App},
    metrics,
    prompt::Served,
    workers::{Expected, READINESS, Workers, follow_store},
};

/// How long a cut connection gets to read why.
const FAREWELL: Duration = Duration::from_secs(1);

/// A running router; dropping it does not stop it, [`Router::stop`] does.
#[derive(Debug)]
pub struct Router {
    http_addr: SocketAddr,
    runtime: Runtime,
    drain_grace: Duration,
    /// Stops accepting.
    close: CancellationToken,
    /// Ends what is in flight, and the watches.
    cut: CancellationToken,
    server: JoinHandle<std::io::Result<()>>,
    /// Tasks of streams.
    streams: TaskTracker,
    /// Tasks that watch workers and the store.
    watches: TaskTracker,
}

impl Router {
    /// Serves the model in `file` on `config.listen`, through `config.workers`.
    ///
    /// Workers that are away may come later: until the first one does, requests are answered 503 and `/readyz` says so.
    ///
    /// # Errors
    /// When the configuration cannot be served with, the address cannot be listened on, or a worker that answers does not
    /// serve the same model with the same block size; the error names the field.
    pub async fn start(config: &RouterConfig, file: Arc<ModelFile>, runtime: &Runtime) -> anyhow::Result<Self> {
        config.check()?;
        metrics::describe();
        runtime
            .readiness
            .not_ready(READINESS, "asking the workers who they are");
        let served = Arc::new(Served::new(file, config.block_tokens));
        let holders = Arc::new(Holders::new(config.prefix_map_blocks_max));
        let expected = Expected {
            schema: served.schema.clone(),
            context_tokens_max: served.context_tokens_max,
        };
        let workers = Workers::new(
            &config.workers,
            config.connect_timeout.get(),
            expected,
            Arc::clone(&holders),
            runtime.readiness.clone(),
        )
        .context("router.workers: not an address that can be called")?;
        // Before the workers: an address that is taken is the likelier mistake, and found at once.
        let listener = admin::bind(config.listen).await.context("router.listen")?;
        let http_addr = listener.local_addr().context("router.listen")?;
        workers.greet().await?;

        let cut = runtime.shutdown.child_token();
        let close = cut.child_token();
        let watches = TaskTracker::new();
        // Differs between routers, so that they do not knock in step; nothing else depends on it.
        let seed = uuid::Uuid::new_v4().as_u64_pair().0;
        workers.supervise(&watches, &cut, seed);
        if !config.store_url.is_empty() {
            watch_store(config, &workers, &holders, &watches, &cut, seed)?;
        }
        let admission = Admission::new(config.in_flight_max);
        let dispatcher = Dispatcher::new(config, workers, holders, Arc::clone(&admission), cut.clone());
        let streams = TaskTracker::new();
        let app = App {
            served,
            dispatcher,
            admission,
            tasks: streams.clone(),
            body_bytes_max: config.body_bytes_max.as_usize(),
            body_timeout: config.body_timeout.get(),
            stall_timeout: config.stall_timeout.get(),
            // A request that could never have all its places is refused rather than told to come back.
            prompts_max: config.prompts_max.min(config.in_flight_max),
        };
        let routes = http::routes(app).merge(admin::router(runtime.metrics.clone(), runtime.readiness.clone()));
        let until = close.clone().cancelled_owned();
        let server = tokio::spawn(async move { axum::serve(listener, routes).with_graceful_shutdown(until).await });
        tracing::info!(%http_addr, workers = config.workers.len(), "router is serving");
        Ok(Self {
            http_addr,
            runtime: runtime.clone(),
            drain_grace: config.drain_grace.get(),
            close,
            cut,
            server,
            streams,
            watches,
        })
    }

    /// Where HTTP is served: the OpenAI API, `/metrics`, `/healthz`, `/readyz`.
    pub fn http_addr(&self) -> SocketAddr {
        self.http_addr
    }

    /// Stops accepting, lets answers in flight finish within `drain_grace`, then ends them with an error that says so.
    ///
    /// # Errors
    /// When the server had ended before, and why.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.runtime.readiness.not_ready(READINESS, "stopping");
        self.close.cancel();
        self.streams.close();
        self.watches.close();
        let ended = timeout(self.drain_grace, async {
            let ended = (&mut self.server).await;
            self.streams.wait().await;
            ended
        })
        .await;
        self.cut.cancel();
        let ended = match ended {
            Ok(ended) => Some(ended),
            Err(_) => {
                tracing::warn!(grace = ?self.drain_grace, "answers still in flight after the grace, cutting them");
                timeout(FAREWELL, &mut self.server).await.ok()
            }
        };
        if ended.is_none() {
            self.server.abort();
        }
        self.streams.wait().await;
        self.watches.wait().await;
        // A connection that does not close after all that (a half-sent request) is left to the end of the process.
        match ended {
            Some(ended) => ended
                .context("the router's HTTP server failed")?
                .context("the router's HTTP server"),
            None => Ok(()),
        }
    }
}

fn watch_store(
    config: &RouterConfig,
    workers: &Workers,
    holders: &Arc<Holders>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
    seed: u64,
) -> anyhow::Result<()> {
    let client = StoreClient::new(ClientConfig {
        connect_timeout: config.connect_timeout.get(),
        ..ClientConfig::to(config.store_url.clone())
    })
    .context("router.store_url")?;
    let (holders, stop) = (Arc::clone(holders), stop.clone());
    let (url, namespace) = (config.store_url.clone(), workers.watch_namespace());
    tasks.spawn(async move {
        let following = follow_store(client, url, &holders, namespace, Backoff::new(!seed));
        stop.run_until_cancelled(following).await;
    });
    Ok(())
}
