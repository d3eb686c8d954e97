//! kvasir-store.
#![forbid(unsafe_code)]
