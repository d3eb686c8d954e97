//! The sketch of a block: 16 (or 32) bytes per key that say where it lies as queries see it, and the mean of its values.
//!
//! A pure function of the block's keys and values and of the [`HeadBasis`]: it can be made when a block arrives, is shared
//! by every prefix that shares the block, and never needs to be built again.
//!
//! Layout, version 1, little-endian; `g = ceil(keys / 16)`:
//!
//! | bytes | what |
//! |---|---|
//! | 2 | version, 1 |
//! | 2 | keys, 1 to 256 |
//! | 4 | step, f32: what a digit is worth |
//! | 2 per group, rounded up to 8 | mask: bit `i` of word `j` says that key `16j + i` is finite and can be searched |
//! | `g * 16 * (16 or 32)` | codes of 32 or 64 digits a key, as [`kvasir_simd::CodedKeys`] wants them |
//! | `ceil(keys / 64) * head_dim * 2` | mean value of every 64 keys, f16; absent if sketched without values |
//!
//! A digit of 4 bits holds one of 32 directions, in steps of .335 of the root mean square over the block, which is the best
//! uniform step for normal coordinates. With 8 bits the lower digits follow the 32 upper ones, worth a sixteenth.

mod column;
mod format;
mod index;
mod scan;
mod search;

pub use self::{
    column::Column,
    format::{SketchFormat, Width, encode_block},
    index::Sketch,
    scan::{Attend, Parked, SketchAttended, SketchScan},
};

#[cfg(test)]
mod tests;
