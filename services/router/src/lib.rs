//! kvasir-router.
#![forbid(unsafe_code)]
