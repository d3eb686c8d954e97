//! The bulk path: blocks over a plain connection.
//!
//! [`BulkConnection`] is for a thread of its own: it blocks, and payloads are received where the caller wants them. The
//! streams of [`crate::StoreClient`] take the same path by themselves where the store offers it.

pub(crate) mod check;
pub(crate) mod connection;
pub(crate) mod gets;
mod offer;
pub(crate) mod pool;
pub(crate) mod puts;
pub(crate) mod socket;
pub(crate) mod stream;

pub use connection::{BulkConnection, PutBlock};
pub use offer::BulkOffer;
