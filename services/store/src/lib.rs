//! kvasir-store.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "seam")]

use std::net::SocketAddr;

use kvasir_runtime::Runtime;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {}

/// A running store; dropping it does not stop it, [`Store::stop`] does.
#[derive(Debug)]
pub struct Store;
impl Store {
    pub async fn start(_config: &StoreConfig, _runtime: &Runtime) -> anyhow::Result<Self> { unimplemented!() }
    pub fn grpc_addr(&self) -> SocketAddr { unimplemented!() }
    pub fn admin_addr(&self) -> SocketAddr { unimplemented!() }
    pub async fn stop(self) -> anyhow::Result<()> { unimplemented!() }
}
