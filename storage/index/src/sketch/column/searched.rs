//! Which keys of a column a query searches.

use kvasir_simd::GROUP;

use super::Column;
use crate::{Excluded, sketch::cluster::SEGMENT_GROUPS};

impl Column {
    /// Appends to `masks` which keys of blocks from `first` on are searched, where block `i` lies at `position(i)`, none of it if that is
    /// `None`; answers how many. `first` is not in a clustered segment, or 0.
    pub(in crate::sketch) fn searched(
        &self,
        first: usize,
        excluded: &Excluded,
        position: impl Fn(usize) -> Option<u32>,
        masks: &mut Vec<u16>,
    ) -> usize {
        let each = self.block_groups();
        let start = masks.len();
        masks.extend_from_slice(&self.masks[first * each..]);
        let words = &mut masks[start..];
        let keys = |block: usize| self.block_keys.min(self.keys - block * self.block_keys) as u32;
        // A block, or a clustered segment of them, is looked at key by key where not all of it is searched.
        let segment = SEGMENT_GROUPS / each.min(SEGMENT_GROUPS);
        let mut from = first;
        while from < self.blocks {
            let clustered = from * each < self.clustered_groups();
            let own = from..from + if clustered { segment } else { 1 };
            from = own.end;
            let whole = |block: usize| {
                let at = position(block);
                at.is_some_and(|at| excluded.leaves_all(at..at + keys(block)))
            };
            if own.clone().all(whole) {
                continue;
            }
            let groups = own.start * each..self.groups().min(own.end * each);
            let words = &mut words[groups.start - first * each..groups.end - first * each];
            words.fill(0);
            for (block, words) in own.zip(words.chunks_mut(each)) {
                let Some(at) = position(block) else { continue };
                for part in excluded.searched(at..at + keys(block)) {
                    set(words, (part.start - at) as usize, (part.end - at) as usize);
                }
            }
            if clustered {
                reorder(words, &self.order[groups.start * GROUP..groups.end * GROUP]);
            }
            words
                .iter_mut()
                .zip(&self.masks[groups])
                .for_each(|(word, own)| *word &= own);
        }
        words.iter().map(|word| word.count_ones() as usize).sum()
    }
}

/// Puts the bits of a segment in its order.
fn reorder(words: &mut [u16], order: &[u16]) {
    let before: [u16; SEGMENT_GROUPS] = std::array::from_fn(|group| words[group]);
    for (word, rows) in words.iter_mut().zip(order.chunks_exact(GROUP)) {
        let bit = |row: u16| (before[usize::from(row) / GROUP] >> (usize::from(row) % GROUP)) & 1;
        *word = rows.iter().rev().fold(0, |word, row| word << 1 | bit(*row));
    }
}

/// Sets the bits `from..to`.
fn set(words: &mut [u16], from: usize, to: usize) {
    for (group, word) in words[..to.div_ceil(GROUP)].iter_mut().enumerate().skip(from / GROUP) {
        let (low, high) = (from.max(group * GROUP), to.min((group + 1) * GROUP));
        *word |= (((1_u32 << (high - low)) - 1) << (low % GROUP)) as u16;
    }
}
