//! `kvasir bench`: measurements beside peers and ceilings, in one run on one machine.

pub(crate) mod dump;
pub(crate) mod engine;
pub(crate) mod gpu;
pub(crate) mod index;
pub(crate) mod store;
pub(crate) mod trace;
