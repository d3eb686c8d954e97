//! kvasir-proto.
#![forbid(unsafe_code)]
