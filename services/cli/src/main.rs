//! The kvasir binary.
#![forbid(unsafe_code)]
fn main() {}
