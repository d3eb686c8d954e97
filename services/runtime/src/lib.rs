//! kvasir-runtime.
#![forbid(unsafe_code)]
