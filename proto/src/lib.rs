//! The wire: `kvasir.v1` as Rust, and checked conversions to domain types.
//!
//! [`v1`] is generated from `kvasir/v1/*.proto` and committed (`cargo run -p kvasir-proto --example generate` rewrites
//! it, a test notices drift). What arrives is checked once, by the conversions in [`convert`], whose errors name the
//! field; behind them the domain types of `kvasir-block` are trusted. [`frame`] carries the two bulk calls without the
//! codec's copies; [`bulk`] is the way around gRPC for the same blocks, over a plain connection.
//!
//! This crate opens no connection and knows no store. Meet first: [`v1`], [`InvalidMessage`], [`frame::BulkMessage`].
//!
//! ```
//! use kvasir_block::BlockHash;
//! use kvasir_proto::convert;
//! let error = convert::hash("hashes[3]", &[0; 31]).unwrap_err();
//! assert_eq!(error.to_string(), "hashes[3]: a block hash has 32 bytes, this has 31");
//! assert_eq!(convert::hash("hashes[3]", &[7; 32]), Ok(BlockHash::from_bytes([7; 32])));
//! ```
#![forbid(unsafe_code)]

/// The generated messages, clients and servers of `kvasir.v1`.
pub mod v1 {
    #![expect(
        missing_docs,
        clippy::allow_attributes,
        reason = "generated: the prose lives in the .proto files"
    )]
    include!("gen/kvasir.v1.rs");
}

pub mod bulk;
pub mod convert;
pub mod frame;

pub use convert::{BlockEvents, EntryHead, EventKind, GetOutcome, InvalidMessage, PutOutcome};

/// The descriptor set of `kvasir.v1`, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/kvasir.v1.bin");
