//! Identity of KV blocks: what a block is called, what its bytes look like, and how a wrong byte is noticed.
//!
//! A *block* is `block_tokens` consecutive tokens; its name is a hash chained over the whole prefix, so equal names
//! mean equal prefixes. A *layer block* is the K and V of one block in one layer: the unit that is pushed, stored,
//! checksummed and loaded. A *namespace* is a tenant and a [`KvSchema`]; a block is found only under its namespace.
//!
//! This crate does no I/O, knows no wire format and holds no bytes. Meet first: [`KvSchema`], [`BlockHash`],
//! [`LayerBlockKey`].
//!
//! ```
//! use kvasir_block::{block_hashes, ExtraKeys};
//! let tokens: Vec<u32> = (1..=40).collect();
//! let hashes = block_hashes(&tokens, 16, &ExtraKeys::none());
//! assert_eq!(hashes.len(), 2); // whole blocks only; the open tail has no name yet
//! ```
#![forbid(unsafe_code)]

mod canonical;
mod checksum;
mod dtype;
mod hash_chain;
mod key;
mod layout;
pub mod planted;
mod schema;

pub use checksum::Checksum;
pub use dtype::{Dtype, UnknownDtype};
pub use hash_chain::{BlockHash, ExtraKeys, HashChain, block_hashes};
pub use key::{BlockKey, InvalidKey, LayerBlockKey};
pub use layout::LayerBlockLayout;
pub use schema::{InvalidSchema, KvSchema, NamespaceId, RopeStyle, Tenant};
