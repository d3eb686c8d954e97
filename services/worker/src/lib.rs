//! kvasir-worker.
#![forbid(unsafe_code)]
