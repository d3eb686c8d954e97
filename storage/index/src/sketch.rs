//! The sketch of a block: 16 (or 32) bytes per key that say where it lies as queries see it, and the mean of its values.
//!
//! A pure function of the block's keys and values and of the [`HeadBasis`]: it can be made when a block arrives, is shared
//! by every prefix that shares the block, and never needs to be built again.
//!
//! Layout, version 3, little-endian; `g = ceil(keys / 16)`:
//!
//! | bytes | what |
//! |---|---|
//! | 2 | version, 3 |
//! | 2 | keys, 1 to 256 |
//! | 4 | step, f32: what a digit is worth |
//! | 2 per group, rounded up to 8 | mask: bit `i` of word `j` says that key `16j + i` is finite and can be searched |
//! | `g * 16 * (16 or 32)` | codes of 32 or 64 digits a key, as [`kvasir_simd::CodedKeys`] wants them |
//! | `ceil(keys / 64) * head_dim * 2` | mean value of every 64 keys, f16; absent if sketched without values |
//!
//! A digit of 4 bits holds one direction, in steps of .335 of the root mean square over the block, which is the best uniform
//! step for normal coordinates. The two leading directions, which decide most and are not normal, have steps twice as wide, and a
//! second digit that is worth a sixteenth. With 16 bytes a key there are 30 directions; the eight digits in a group's first line are
//! those of six directions and the two second ones, and each line after it has eight directions more. With 32 bytes there are 32
//! directions, each of two digits, the 32 upper ones first.

mod cluster;
mod column;
mod format;
mod index;
mod scan;
mod search;
mod slopes;

pub use self::{
    column::Column,
    format::{SketchFormat, Width, encode_block},
    index::Sketch,
    scan::{Attend, Parked, SketchAttended, SketchScan, distance},
};

#[cfg(test)]
mod tests;
