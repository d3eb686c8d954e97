//! kvasir-model.
#![forbid(unsafe_code)]
