//! The frame that every Kvasir process starts in: configuration, logs, metrics, the gRPC server, health, shutdown.
//!
//! It knows nothing of KV blocks, models or requests: a service hands it a `Config` type and tonic services, and gets
//! back a checked configuration and a server that reports its health and stops when told to.
//!
//! Meet first [`Runtime`] (what a service's `start` receives), [`config::Loader`] (one tree, four layers, every mistake
//! named with its place) and [`grpc::GrpcServer`].
//!
//! ```
//! use kvasir_runtime::{config::Loader, units::ByteSize};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Debug, Default, Serialize, Deserialize)]
//! #[serde(default, deny_unknown_fields)]
//! struct Tree {
//!     store: Store,
//! }
//! #[derive(Debug, Serialize, Deserialize)]
//! #[serde(default, deny_unknown_fields)]
//! struct Store {
//!     host_bytes_max: ByteSize,
//! }
//! impl Default for Store {
//!     fn default() -> Self {
//!         Self { host_bytes_max: ByteSize::mib(256) }
//!     }
//! }
//!
//! let loaded = Loader::new().set("store.host_bytes_max=1GiB").load(Tree::default()).expect("a valid value");
//! assert_eq!(loaded.tree.store.host_bytes_max, ByteSize::gib(1));
//!
//! let refused = Loader::new().set("store.host_byte_max=1GiB").load(Tree::default()).expect_err("a typo");
//! assert!(refused.to_string().contains("did you mean `store.host_bytes_max`?"));
//! ```
#![forbid(unsafe_code)]

pub mod address;
pub mod admin;
pub mod config;
pub mod grpc;
pub mod metrics;
pub mod request_id;
pub mod signals;
pub mod telemetry;
pub mod units;

use tokio_util::sync::CancellationToken;

use crate::{admin::Readiness, metrics::MetricsHandle};

/// What a service needs from the process it runs in. Cheap to clone; tests make their own with [`Runtime::new`].
#[derive(Debug, Clone)]
pub struct Runtime {
    /// Cancelled when the service must stop at once. An orderly end goes through the service's own `stop`.
    pub shutdown: CancellationToken,
    /// Renders what the `metrics` facade has recorded in this process.
    pub metrics: MetricsHandle,
    /// What `/readyz` reports.
    pub readiness: Readiness,
}

impl Runtime {
    /// A fresh token and readiness; the metrics recorder is shared by the whole process.
    pub fn new() -> Self {
        Self {
            shutdown: CancellationToken::new(),
            metrics: metrics::install(),
            readiness: Readiness::new(),
        }
    }
}

impl Default for Runtime {
    fn default() -> Self {
        Self::new()
    }
}
