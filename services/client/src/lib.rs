//! kvasir-client.
#![forbid(unsafe_code)]
