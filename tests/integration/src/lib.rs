//! kvasir-integration.
#![forbid(unsafe_code)]
