//! Scattered rows: scored and weighed where they lie, the next ones on their way meanwhile; and keys projected for coding.

mod project;
mod score;
mod weigh;

use half::f16;

pub use self::{
    project::project,
    score::{score_rows, score_slots},
    weigh::{weigh_dense, weigh_rows, weigh_slots},
};

/// Rows whose bytes are asked for before they are needed.
const AHEAD: usize = 8;
/// As [`AHEAD`], where rows lie far apart.
const SLOTS_AHEAD: usize = 16;
/// Rows that stay in the nearest cache while every head takes them.
const NEAR: usize = 64;
/// Queries that share a converted row.
const HEADS: usize = 4;

/// Slots that may be in an order of their own.
pub const SEGMENT: usize = 1024;

/// Rows of equally long blocks that lie anywhere. Row `slot` is row `slot % each` of block `slot / each`, where `each` is the
/// slots of a block, whole groups of sixteen; blocks may have fewer rows than slots. The slots of a first few segments may be in
/// [another order](Self::ordered).
#[derive(Clone, Copy, Debug)]
pub struct Scattered<'a> {
    blocks: &'a [&'a [f16]],
    head_dim: usize,
    groups: u32,
    /// What a number of a group is multiplied with for its block, in 34 bits below the point.
    inverse: u64,
    /// Of the first slots, where in its segment the row is.
    order: &'a [u16],
}

impl<'a> Scattered<'a> {
    /// Rows of `head_dim` in `blocks` of `groups` times sixteen slots.
    ///
    /// # Panics
    /// If `head_dim` is 0, or `groups` is not 1 to 16.
    pub fn new(blocks: &'a [&'a [f16]], head_dim: usize, groups: usize) -> Self {
        assert!(
            head_dim > 0 && (1..=16).contains(&groups),
            "scattered: rows of at least 1 in blocks of 1 to 16 groups"
        );
        Self {
            blocks,
            head_dim,
            groups: groups as u32,
            // Rounded up: exact for fewer than 2^30 groups, since the excess times 16 stays below one.
            inverse: (1_u64 << 34).div_ceil(groups as u64),
            order: &[],
        }
    }

    /// With segments in an order of their own: what was row `order[slot]` of a segment is row `slot` of it.
    ///
    /// # Panics
    /// If these are not whole segments of [`SEGMENT`] slots, or those are not whole blocks.
    #[must_use]
    pub fn ordered(self, order: &'a [u16]) -> Self {
        assert!(
            order.is_empty()
                || order.len().is_multiple_of(SEGMENT) && SEGMENT.is_multiple_of(self.groups as usize * 16),
            "scattered: an order is of whole segments, which are whole blocks"
        );
        Self { order, ..self }
    }

    /// Block of a slot, and the row in it.
    #[inline(always)]
    pub fn place(&self, slot: u32) -> (usize, usize) {
        let slot = match self.order.get(slot as usize) {
            Some(row) => slot / SEGMENT as u32 * SEGMENT as u32 + u32::from(*row),
            None => slot,
        };
        let block = (u64::from(slot / 16) * self.inverse) >> 34;
        (block as usize, (slot - block as u32 * self.groups * 16) as usize)
    }

    /// The row of a slot.
    ///
    /// # Panics
    /// If there is none.
    #[inline(always)]
    pub fn row(&self, slot: u32) -> &'a [f16] {
        let (block, row) = self.place(slot);
        &self.blocks[block][row * self.head_dim..][..self.head_dim]
    }
}

/// Asks for a row's bytes; nothing else happens.
#[inline(always)]
fn prefetch(row: &[f16]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.chunks(32) {
        // SAFETY: a prefetch has no effect but on speed, and SSE is in every x86-64 processor.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

#[cfg(test)]
mod tests;
