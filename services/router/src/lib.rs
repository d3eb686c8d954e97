//! kvasir-router.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "seam")]

use std::net::SocketAddr;
use kvasir_model::ModelFile;
use kvasir_runtime::Runtime;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterConfig {}

/// A running router; dropping it does not stop it, [`Router::stop`] does.
#[derive(Debug)]
pub struct Router;
impl Router {
    pub async fn start(_config: &RouterConfig, _file: std::sync::Arc<ModelFile>, _runtime: &Runtime) -> anyhow::Result<Self> { unimplemented!() }
    /// Where HTTP is served: the OpenAI API, /metrics, /healthz, /readyz.
    pub fn http_addr(&self) -> SocketAddr { unimplemented!() }
    pub async fn stop(self) -> anyhow::Result<()> { unimplemented!() }
}
