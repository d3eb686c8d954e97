//! kvasir-tier.
#![forbid(unsafe_code)]
