//! The small HTTP side of a service: `/metrics`, `/healthz`, `/readyz`.
//!
//! *Healthy* means the process answers. *Ready* means that every part that said it would be ready is: a store is ready
//! after recovery, a worker after its model is loaded. A cold cache is ready.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use axum::{Json, Router, extract::State, http::StatusCode, http::header, response::IntoResponse, routing::get};
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::metrics::MetricsHandle;

/// What the parts of a process have said about themselves. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, Reason>>>);

/// `None` is ready, else why not.
type Reason = Option<String>;

impl Readiness {
    /// Nothing announced yet; this counts as not ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// A part says that it is not ready, and why, in words for a person ("loading the model").
    pub fn not_ready(&self, part: &'static str, why: impl Into<String>) {
        self.0.lock().insert(part, Some(why.into()));
    }

    /// A part says that it is ready.
    pub fn ready(&self, part: &'static str) {
        self.0.lock().insert(part, None);
    }

    /// Whether there are parts and all are ready.
    pub fn is_ready(&self) -> bool {
        let parts = self.0.lock();
        !parts.is_empty() && parts.values().all(Option::is_none)
    }

    fn report(&self) -> BTreeMap<&'static str, String> {
        let parts = self.0.lock();
        parts
            .iter()
            .map(|(part, state)| (*part, state.clone().unwrap_or_else(|| "ready".to_owned())))
            .collect()
    }
}

#[derive(Clone)]
struct Admin {
    metrics: MetricsHandle,
    readiness: Readiness,
}

/// The three routes, to serve by themselves ([`serve`]) or to merge into a service's own HTTP routes.
pub fn router(metrics: MetricsHandle, readiness: Readiness) -> Router {
    Router::new()
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .with_state(Admin { metrics, readiness })
}

/// A running HTTP server; dropping it does not stop it, [`HttpRunning::stop`] does.
#[derive(Debug)]
pub struct HttpRunning {
    addr: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<std::io::Result<()>>,
}

/// Serves `routes` on `listen` (port 0 picks a free one) until stopped or until `shutdown` is cancelled.
pub async fn serve(listen: SocketAddr, routes: Router, shutdown: &CancellationToken) -> Result<HttpRunning, BindError> {
    let listener = bind(listen).await?;
    let addr = listener
        .local_addr()
        .map_err(|source| BindError { addr: listen, source })?;
    let stop = shutdown.child_token();
    let until = stop.clone().cancelled_owned();
    let task = tokio::spawn(async move { axum::serve(listener, routes).with_graceful_shutdown(until).await });
    Ok(HttpRunning { addr, stop, task })
}

impl HttpRunning {
    /// The bound address.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Stops accepting, lets answers in flight finish for at most [`crate::grpc::STOP_GRACE`], then returns.
    pub async fn stop(self) {
        self.stop.cancel();
        crate::grpc::join_within("http", self.addr, self.task, crate::grpc::STOP_GRACE).await;
    }
}

/// Could not listen.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {addr}: {source}{}", hint(.source))]
pub struct BindError {
    /// The address asked for.
    pub addr: SocketAddr,
    /// What the operating system said.
    #[source]
    pub source: std::io::Error,
}

fn hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "; another process (perhaps another kvasir) listens there, stop it or choose another port"
        }
        std::io::ErrorKind::AddrNotAvailable => "; this machine does not have that address",
        std::io::ErrorKind::PermissionDenied => "; ports below 1024 need privileges, choose a higher one",
        _ => "",
    }
}

/// A listener on `addr`, or an error that says what to do.
pub async fn bind(addr: SocketAddr) -> Result<tokio::net::TcpListener, BindError> {
    tokio::net::TcpListener::bind(addr)
        .await
        .map_err(|source| BindError { addr, source })
}

async fn metrics_text(State(admin): State<Admin>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        admin.metrics.render(),
    )
}

async fn readyz(State(admin): State<Admin>) -> impl IntoResponse {
    let status = if admin.readiness.is_ready() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(admin.readiness.report()))
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::Request};
    use tower::ServiceExt;

    use super::*;

    async fn ask(routes: &Router, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).body(Body::empty()).expect("a request");
        let response = routes.clone().oneshot(request).await.expect("an answer");
        let status = response.status();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20)
            .await
            .expect("a body");
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    #[tokio::test]
    async fn readiness_follows_the_parts() {
        let readiness = Readiness::new();
        let routes = router(crate::metrics::install(), readiness.clone());
        assert_eq!(
            ask(&routes, "/readyz").await.0,
            StatusCode::SERVICE_UNAVAILABLE,
            "nothing announced"
        );
        readiness.not_ready("worker", "loading the model");
        readiness.ready("store");
        let (status, body) = ask(&routes, "/readyz").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(body, r#"{"store":"ready","worker":"loading the model"}"#);
        assert_eq!(ask(&routes, "/healthz").await, (StatusCode::OK, "ok\n".to_owned()));
        readiness.ready("worker");
        assert_eq!(ask(&routes, "/readyz").await.0, StatusCode::OK);
        metrics::counter!("kvasir_admin_test_total").increment(1);
        let (status, body) = ask(&routes, "/metrics").await;
        assert_eq!(status, StatusCode::OK);
        assert!(body.contains("kvasir_admin_test_total 1"), "{body}");
    }

    #[tokio::test]
    async fn a_port_in_use_is_named_and_stop_frees_it() {
        let token = CancellationToken::new();
        let any = "127.0.0.1:0".parse().expect("an address");
        let first = serve(any, Router::new(), &token).await.expect("a free port");
        let addr = first.addr();
        let error = serve(addr, Router::new(), &token).await.expect_err("the port is taken");
        assert!(
            error.to_string().contains("another process (perhaps another kvasir)"),
            "{error}"
        );
        first.stop().await;
        serve(addr, Router::new(), &token)
            .await
            .expect("the port is free again")
            .stop()
            .await;
    }
}
