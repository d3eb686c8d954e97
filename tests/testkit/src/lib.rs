//! What whole-system tests share: a cluster in this process, the model, seeded blocks, raw sockets.
//!
//! It starts real parts on free loopback ports and speaks to them as clients do; it has no mock of anything. It does not know
//! what a test wants to see: assertions stay in the tests, but for those that say that the machine is not set up.
//!
//! Meet first [`Cluster`]; then [`model`] (which a test may count on: `make test` installs it).
//!
//! ```no_run
//! # async fn run() -> anyhow::Result<()> {
//! use kvasir_testkit::{Cluster, Options};
//! use serde_json::json;
//!
//! let cluster = Cluster::start(Options::default()).await?;
//! let answer = cluster.chat(json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4})).await?;
//! assert_eq!(answer.status, 200);
//! cluster.stop().await
//! # }
//! ```
#![forbid(unsafe_code)]

mod blocks;
mod cluster;
mod environment;
mod generate;
mod http;
mod metrics;
mod raw;
mod wait;

pub use self::{
    blocks::{Blocks, small_schema},
    cluster::{Cluster, Options},
    environment::{model, model_path, openai_python},
    generate::{Generated, Generation, generate, request},
    http::Answer,
    metrics::Metrics,
    raw::{RawAnswer, send_raw},
    wait::{eventually, until_durable},
};
