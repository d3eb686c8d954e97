//! kvasir-prefix.
#![forbid(unsafe_code)]
