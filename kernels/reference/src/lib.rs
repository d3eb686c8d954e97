//! kvasir-reference.
#![forbid(unsafe_code)]
