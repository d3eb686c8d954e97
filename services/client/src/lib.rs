//! The only client of the store: streams, deadlines, retries, verification.
//!
//! [`StoreClient`] opens namespaces, matches prefixes, and opens the four streams: puts ([`PutStream`]), gets
//! ([`GetStream`]), retrieval ([`DecodeStream`]) and events ([`EventStream`]). Every wait has an end, every payload's
//! checksum is verified, every reply is compared with what was asked, and everything that is on its way is bounded. An
//! error has a kind that a caller acts on and words for a person; misses and the like are outcomes.
//!
//! It deliberately does not know what the blocks are for, keeps none, and makes no thread or task of its own: what is
//! dropped is cancelled. Blocks travel over gRPC, the store's bulk path or, on the same machine, its memory, with the same outcomes;
//! [`BulkConnection`] and [`LocalConnection`] are the second and the third for a thread of its own, and [`BulkDecode`] is retrieval for
//! one.
//!
//! Meet first: [`StoreClient`], [`Namespace`], [`ClientError`].
//!
//! ```no_run
//! use kvasir_block::{Checksum, KvSchema, Tenant, block_hashes, ExtraKeys};
//! use kvasir_client::{ClientConfig, ClientError, LayerBlock, StoreClient};
//!
//! # async fn example(schema: KvSchema, tokens: Vec<u32>, payload: bytes::Bytes) -> Result<(), ClientError> {
//! let client = StoreClient::new(ClientConfig::to("http://127.0.0.1:7401"))?;
//! let tenant = Tenant::new("default").expect("not empty");
//! let namespace = client.open_namespace(&tenant, &schema).await?;
//! let chain = block_hashes(&tokens, usize::from(schema.block_tokens), &ExtraKeys::none());
//!
//! let mut puts = client.put_blocks(&namespace).await?;
//! let checksum = Checksum::of(&payload);
//! puts.put(LayerBlock { hash: chain[0], layer: 0, checksum, payload }).await?;
//! let outcomes = puts.finish().await?;
//!
//! let mut gets = client.get_blocks(&namespace, &chain, 0..1, None, None).await?;
//! while let Some(block) = gets.next().await? {
//!     println!("{:?} of layer {}: {:?}", block.hash, block.layer, block.outcome);
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod bulk;
mod client;
mod config;
mod decode;
mod error;
mod events;
mod get;
mod indexes;
mod local;
mod namespace;
mod observe;
mod put;
mod retry;

pub use bulk::{BulkConnection, BulkOffer, PutBlock};
pub use client::StoreClient;
pub use config::{ClientConfig, DataPath};
pub use decode::{
    AttendOptions, BulkDecode, Certificate, DecodeStream, Form, Found, HeadRows, Hint, IndexChoice, OpenContext,
    Opened, Query, Reply, Report, Shortfall,
};
pub use error::{ClientError, ErrorKind};
pub use events::EventStream;
pub use get::{GetStream, GotBlock};
pub use indexes::{BlockQueries, BuildState, BuiltIndex};
pub use kvasir_proto::{BlockEvents, EventKind, GetOutcome, PutOutcome, convert::Tier};
pub use local::LocalConnection;
pub use namespace::{Namespace, PrefixMatch};
pub use put::{LayerBlock, PutStream};
