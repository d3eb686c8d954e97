//! Planners: from the queries and keys of a head to the mask that its attention is computed under.
//!
//! Every planner is a pure function of the chunk, with the same bits on every processor (no libm, no order that depends on
//! threads): the KV of later layers depends on the mask, and bytes that are cached under one name must be the same wherever
//! they were made.

mod block_sparse;
mod flex_prefill;
mod select;
mod vertical_slash;
mod x_attention;

pub use vertical_slash::{Sums, estimate};

use crate::{HeadChunk, HeadMask, Pattern};

impl Pattern {
    /// The mask of a head with this pattern, over row blocks of `rows`. Each query's own tile and the first keys are always in
    /// it; nothing else of it is the same for two chunks.
    ///
    /// # Panics
    /// If `rows` is 0.
    pub fn plan(&self, chunk: &HeadChunk<'_>, rows: usize) -> HeadMask {
        assert!(rows > 0, "row blocks have at least one row");
        match *self {
            Self::Dense => HeadMask::Dense,
            Self::AShape { initial, local } => {
                let [initial, local] = [initial, local].map(|count| (count as usize).min(chunk.tokens()));
                HeadMask::a_shape(rows, initial, local)
            }
            Self::VerticalSlash {
                verticals,
                slashes,
                sink,
                near,
            } => {
                let mut sums = estimate(chunk, vertical_slash::LAST_QUERIES);
                sums.favour(sink as usize, near as usize);
                let [verticals, slashes] = [verticals.max(sink), slashes.max(near)].map(|count| count as usize);
                sums.mask(rows, verticals, slashes)
            }
            Self::BlockSparse { blocks } => block_sparse::plan(chunk, rows, blocks as usize),
            Self::FlexPrefill { gamma, tau, budget_min } => {
                flex_prefill::plan(chunk, rows, gamma, tau, budget_min as usize)
            }
            Self::XAttention { stride, threshold } => x_attention::plan(chunk, rows, stride as usize, threshold),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
