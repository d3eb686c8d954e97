//! kvasir-testkit.
#![forbid(unsafe_code)]
