//! kvasir-worker.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "seam")]

use std::net::SocketAddr;
use kvasir_model::ModelFile;
use kvasir_runtime::Runtime;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {}

/// A running worker; dropping it does not stop it, [`Worker::stop`] does.
#[derive(Debug)]
pub struct Worker;
impl Worker {
    pub async fn start(_config: &WorkerConfig, _file: std::sync::Arc<ModelFile>, _runtime: &Runtime) -> anyhow::Result<Self> { unimplemented!() }
    pub fn grpc_addr(&self) -> SocketAddr { unimplemented!() }
    pub fn admin_addr(&self) -> SocketAddr { unimplemented!() }
    pub async fn stop(self) -> anyhow::Result<()> { unimplemented!() }
}
