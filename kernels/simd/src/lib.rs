//! kvasir-simd.
#![allow(unsafe_code)]
