//! The worker's standing relation with one store: connected with a namespace, or away and tried again.
//!
//! Everyone asks [`StoreSession::namespace`] first. While the store is away that is `None` at once, so a lost store
//! costs no request more than the one that found out.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use kvasir_block::{KvSchema, Tenant};
use kvasir_client::{ClientError, ErrorKind, Namespace, StoreClient};
use kvasir_runtime::request_id::RequestId;
use tokio::{runtime::Handle, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{metrics::StoreMetrics, offload::Offload};

/// Wait before the second try; doubled up to the longest.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// A client, and the namespace while the store is there.
#[derive(Debug)]
pub(crate) struct StoreSession {
    client: StoreClient,
    tenant: Tenant,
    schema: KvSchema,
    /// Basis of the sketches of this model's keys, as a file; empty without one.
    basis: Bytes,
    namespace: watch::Sender<Option<Namespace>>,
    tasks: TaskTracker,
    runtime: Handle,
    metrics: StoreMetrics,
}

/// A lease that is given back when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    id: u64,
    session: Arc<StoreSession>,
}

impl StoreSession {
    /// A session that is not connected yet; [`StoreSession::keep`] connects it. `tasks` owns what it spawns. Must be
    /// called on a tokio runtime.
    pub(crate) fn new(
        client: StoreClient,
        tenant: Tenant,
        schema: KvSchema,
        basis: Bytes,
        tasks: TaskTracker,
        metrics: StoreMetrics,
    ) -> Self {
        metrics.connected.set(0.0);
        Self {
            client,
            tenant,
            schema,
            basis,
            namespace: watch::Sender::new(None),
            tasks,
            runtime: Handle::current(),
            metrics,
        }
    }

    /// Runs a task of this session; the worker joins it when it stops. May be called from any thread.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn_on(task, &self.runtime);
    }

    pub(crate) fn client(&self) -> &StoreClient {
        &self.client
    }

    /// A client whose calls carry a request's id.
    pub(crate) fn client_for(&self, id: &RequestId) -> StoreClient {
        self.client.with_request_id(id.clone())
    }

    /// The namespace, or `None` while the store is away.
    pub(crate) fn namespace(&self) -> Option<Namespace> {
        self.namespace.borrow().clone()
    }

    /// The namespace, as soon as the store is there.
    pub(crate) async fn connected(&self) -> Namespace {
        let mut namespace = self.namespace.subscribe();
        loop {
            if let Some(namespace) = namespace.borrow_and_update().clone() {
                return namespace;
            }
            if namespace.changed().await.is_err() {
                // The sender is a field of `self`.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Tells what a call ended with; what shows that the store is gone or new sends everyone to wait for a connection.
    pub(crate) fn lost(&self, error: &ClientError) {
        if matches!(error.kind, ErrorKind::Unavailable | ErrorKind::NotFound) {
            self.metrics.connected.set(0.0);
            self.namespace.send_if_modified(|namespace| namespace.take().is_some());
        }
    }

    /// A lease on matched blocks.
    pub(crate) fn lease(self: &Arc<Self>, id: u64) -> Lease {
        Lease {
            id,
            session: Arc::clone(self),
        }
    }

    /// Opens the namespace with the basis. A store that has another one for it is taken as it is: its sketches are as good
    /// as their basis, and blocks are the same.
    async fn open(&self) -> Result<Namespace, ClientError> {
        let (tenant, schema) = (&self.tenant, &self.schema);
        match self
            .client
            .open_namespace_with(tenant, schema, self.basis.clone())
            .await
        {
            Err(error) if !self.basis.is_empty() && error.kind == ErrorKind::Invalid => {
                tracing::warn!(%error, "the store did not take this worker's basis, going on with what it has");
                self.client.open_namespace(tenant, schema).await
            }
            opened => opened,
        }
    }

    /// Connects, waits until the connection is lost, and connects again, until `stop` is cancelled.
    pub(crate) async fn keep(self: Arc<Self>, offload: Arc<Offload>, stop: CancellationToken) {
        let mut lost = self.namespace.subscribe();
        let mut epoch = None;
        let mut backoff = BACKOFF_FIRST;
        let mut told = false;
        loop {
            let opened = tokio::select! {
                () = stop.cancelled() => return,
                opened = self.open() => opened,
            };
            match opened {
                Ok(namespace) => {
                    let sketched = namespace.basis.is_some();
                    tracing::info!(namespace = ?namespace.id, epoch = namespace.epoch, sketched, "connected to the store");
                    if epoch.replace(namespace.epoch) != Some(namespace.epoch) {
                        // A store that started anew may have lost what the last one held.
                        offload.forget_all();
                    }
                    self.metrics.connected.set(1.0);
                    self.namespace.send_replace(Some(namespace));
                    (backoff, told) = (BACKOFF_FIRST, false);
                    tokio::select! {
                        () = stop.cancelled() => return,
                        _ = lost.wait_for(Option::is_none) => {}
                    }
                    tracing::warn!("the store is away, working without it");
                }
                Err(error) => {
                    // Said once per outage: the tries that follow fail for the same reason.
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(%error, "cannot connect to the store, working without it and trying again");
                    }
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(backoff) => {}
                    }
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                }
            }
        }
    }
}

impl Lease {
    pub(crate) fn id(&self) -> u64 {
        self.id
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Given back early so that the store may evict; if that fails the lease ends by itself.
        let (session, id) = (Arc::clone(&self.session), self.id);
        self.session.spawn(async move {
            if let Err(error) = session.client.release(id).await {
                tracing::debug!(%error, "a lease was not given back, it will expire");
            }
        });
    }
}
