//! kvasir-cache.
#![forbid(unsafe_code)]
