//! kvasir-tidy.
#![forbid(unsafe_code)]
