//! The fault matrix: what a store is put through before it may be trusted, as suites that count.
//!
//! A [`Row`] is one kind of fault (a kill, a torn tail, a flipped bit, a full disk, ...) and the code that inflicts it, a chosen
//! number of times from a seed, on the real cache or on a real `kvasir store` process. Every payload is made from its key
//! ([`corpus`]), so a reader knows each byte without having kept it. What a run did is a [`Tally`]: faults, hits by tier, misses,
//! wrong bytes, deaths. A run passes when no byte was wrong, nothing died that was not killed, and every tier that the row is
//! about did serve: a cache that forgets everything would pass otherwise.
//!
//! It deliberately knows no internals: files are found by what is in them, blocks by their keys. What must be known of a
//! record's layout is in the tier's `FORMAT.md`.
//!
//! Meet first: [`ROWS`], [`Plan`], [`Outcome`].
//!
//! ```
//! let row = kvasir_faults::row("identity").expect("a row");
//! let outcome = row.run(kvasir_faults::Plan { seed: 1, count: 2 });
//! assert_eq!(outcome.failure, None);
//! assert!(outcome.tally.hits() > 0);
//! ```
#![forbid(unsafe_code)]

mod bucket;
pub mod corpus;
mod data;
#[cfg(feature = "planted-bugs")]
pub mod planted;
mod proxy;
mod remote;
mod rows;
mod run;
mod store;
mod tally;
mod tier;
mod witness;

pub use self::{
    rows::{ROWS, row},
    run::{Outcome, Plan, Row, Run},
    tally::{Tally, Tier},
};
