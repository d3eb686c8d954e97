//! The OpenAI front of Kvasir: HTTP in, token ids out to a worker that is chosen by cached prefix and load.
//!
//! The router reads a request, renders the chat template, tokenises, and names the prompt's blocks. What workers and the
//! store have said about the blocks they hold tells it how much of the prompt each worker would find instead of
//! compute; a pure policy weighs that against load. The answer streams back as server-sent events or as one JSON object.
//!
//! It deliberately does not know bytes: no keys, no values, no tiers, no index. Everything it believes about caches is a
//! view made from events; a wrong belief costs time on some worker, never a wrong token. It keeps nothing on disk.
//!
//! Meet first [`RouterConfig`] and [`Router`]; inside, `policy` (who gets the request), `dispatch` (the attempt, and the
//! next attempt), and `http` (the shape that clients see).
//!
//! ```no_run
//! # async fn run() -> anyhow::Result<()> {
//! use std::{path::Path, sync::Arc};
//!
//! use kvasir_model::ModelFile;
//! use kvasir_router::{Router, RouterConfig};
//! use kvasir_runtime::Runtime;
//!
//! let file = Arc::new(ModelFile::open(Path::new("model.gguf"))?);
//! let config = RouterConfig {
//!     workers: vec!["http://127.0.0.1:7402".to_owned(), "http://127.0.0.1:7502".to_owned()],
//!     ..RouterConfig::default()
//! };
//! let router = Router::start(&config, file, &Runtime::new()).await?;
//! assert_ne!(router.http_addr().port(), 0);
//! router.stop().await?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod config;
mod router;

mod http;
mod prompt;

mod answer;
mod dispatch;
mod job;
mod policy;

mod backoff;
mod grpc;
mod holders;
mod workers;

mod admission;
mod metrics;

pub use self::{
    config::{ConfigError, PolicyConfig, RouterConfig},
    router::Router,
};
