//! kvasir-index.
#![forbid(unsafe_code)]
