//! gRPC over the block cache: the process that keeps blocks and finds keys in them.
//!
//! [`Store::start`] opens a `kvasir_cache::BlockCache` and serves `kvasir.v1.BlockStore` and `kvasir.v1.Retrieval` over it,
//! with health, reflection and an HTTP side for metrics. The two bulk calls are framed by hand (`kvasir_proto::frame`): a
//! put is cut into layer blocks without copying, a get sends the host tier's own buffers. Work that may wait for the disk
//! or takes the processor leaves the async threads through two bounded doors. Every limit is a key of [`StoreConfig`].
//!
//! The same blocks move faster over the bulk path, plain connections with frames of their own (`kvasir_proto::bulk`): a thread
//! each, from the host tier's memory to the socket and from the socket to where a block rests. A process on this machine gets places in the store's own memory instead of bytes.
//!
//! It deliberately does not know how blocks are kept (that is `kvasir-cache`), nor what they are for.
//!
//! Meet first: [`Store`], [`StoreConfig`].
//!
//! ```no_run
//! use kvasir_runtime::Runtime;
//! use kvasir_store::{Store, StoreConfig};
//!
//! # async fn example() -> anyhow::Result<()> {
//! let config = StoreConfig { data_dir: "/var/lib/kvasir/store".into(), ..StoreConfig::default() };
//! let store = Store::start(&config, &Runtime::new()).await?;
//! println!("http://{}", store.grpc_addr());
//! store.stop().await
//! # }
//! ```
#![forbid(unsafe_code)]

mod ahead;
mod bulk;
mod config;
mod door;
mod grpc;
mod local;
mod metrics;
mod row_cache;
mod searches;
mod served;
mod store;

pub use config::{DiskAdmission, DiskPlace, StoreConfig};
pub use store::Store;
