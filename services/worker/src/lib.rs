//! The inference worker: takes token ids, gives back text, and keeps the KV of what it computes where others find it.
//!
//! One compute thread owns the model, the page pool and the scheduler; everything that waits for a network lives on
//! tokio and speaks to it through bounded channels. A worker can always compute what it cannot load, so a store that is
//! slow, full or gone costs time and never a wrong token.
//!
//! It deliberately does not know HTTP, chat templates, other workers, or how a store keeps bytes.
//!
//! Meet first [`Worker`] (start and stop) and [`WorkerConfig`]. To change it, begin at `compute.rs` (the loop) and
//! `sequence.rs` (one request); `ARCHITECTURE.md` follows the four data paths through this crate: put is `offload.rs`,
//! match and get are `onboard.rs`, retrieve is `retrieval.rs`.
//!
//! ```no_run
//! use std::{path::Path, sync::Arc};
//!
//! use kvasir_model::ModelFile;
//! use kvasir_runtime::Runtime;
//! use kvasir_worker::{Worker, WorkerConfig};
//!
//! # async fn run() -> anyhow::Result<()> {
//! let file = Arc::new(ModelFile::open(Path::new("SmolLM2-135M-Instruct.Q4_1.gguf"))?);
//! let worker = Worker::start(&WorkerConfig::default(), file, &Runtime::new()).await?;
//! assert_eq!(worker.grpc_addr().port(), 7402);
//! worker.stop().await
//! # }
//! ```
#![forbid(unsafe_code)]

mod basis;
mod compute;
mod config;
mod device_tier;
mod events;
mod grpc;
mod load;
mod metrics;
mod offload;
mod onboard;
mod outbox;
mod pusher;
mod report;
mod request;
mod retrieval;
mod scheduler;
mod sequence;
mod sparse;
mod store_session;
mod text;
mod worker;

pub use config::{
    AttentionConfig, AttentionMode, Certificate, DeviceKind, GpuConfig, IndexWanted, InvalidConfig, WorkerConfig,
};
pub use offload::PushStep;
pub use pusher::{Pushed, Pusher};
pub use retrieval::Hints;
pub use worker::Worker;
