//! Which rows a caller has from earlier replies: positions only.
//!
//! Store and caller follow one rule, per layer and KV head and in the order of the replies:
//! positions that were kept before a reply need not travel in it; then all its positions count as used, in rising order, new ones
//! being added; then the least recently used go until no more than `rows_max` are left.

use std::collections::{BTreeMap, HashMap};

/// The row caches of a stream.
#[derive(Debug)]
pub(crate) struct SentRows {
    rows_max: usize,
    kv_heads: usize,
    /// `[layers, kv_heads]`
    heads: Vec<Kept>,
}

/// What the caller keeps of one layer and KV head.
#[derive(Debug, Default)]
struct Kept {
    /// When each position was used last.
    used: HashMap<u32, u64>,
    /// The same by time.
    by_use: BTreeMap<u64, u32>,
    now: u64,
}

impl SentRows {
    /// Bytes that a kept row takes here at most, in both maps.
    pub(crate) const ROW_BYTES: usize = 64;

    /// Of at most `rows_max` rows of each of `layers x kv_heads`; takes memory as they come.
    pub(crate) fn new(rows_max: usize, layers: usize, kv_heads: usize) -> Self {
        Self {
            rows_max,
            kv_heads,
            heads: std::iter::repeat_with(Kept::default).take(layers * kv_heads).collect(),
        }
    }

    /// Indices into the `positions` of a reply of the rows that must travel; the caller has the others. `positions` rise.
    pub(crate) fn missing(&mut self, layer: u16, kv_head: usize, positions: &[u32]) -> Vec<u32> {
        let kept = &mut self.heads[usize::from(layer) * self.kv_heads + kv_head];
        let absent = |(at, position): (usize, &u32)| (!kept.used.contains_key(position)).then_some(at as u32);
        let missing = positions.iter().enumerate().filter_map(absent).collect();
        for &position in positions {
            kept.now += 1;
            kept.by_use.insert(kept.now, position);
            if let Some(before) = kept.used.insert(position, kept.now) {
                kept.by_use.remove(&before);
            }
        }
        while kept.used.len() > self.rows_max
            && let Some((_, oldest)) = kept.by_use.pop_first()
        {
            kept.used.remove(&oldest);
        }
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_longest_ago_is_sent_again() {
        let mut sent = SentRows::new(3, 2, 2);
        let table: [(&[u32], &[u32]); 8] = [
            (&[], &[]),
            (&[1, 5], &[0, 1]),
            (&[1, 5], &[]),
            (&[5, 9], &[1]),
            // 1 goes.
            (&[2], &[0]),
            (&[1, 5], &[0]),
            // More than are kept: the last of them stay, 3, 7 and 8.
            (&[1, 3, 7, 8], &[1, 2, 3]),
            (&[1, 3, 8], &[0]),
        ];
        for (positions, missing) in table {
            assert_eq!(sent.missing(1, 0, positions), missing, "{positions:?}");
        }
        assert_eq!(sent.missing(1, 1, &[8]), [0], "each head has its own");
        assert_eq!(sent.missing(0, 0, &[8]), [0], "and each layer");
        let mut none = SentRows::new(0, 1, 1);
        assert_eq!((none.missing(0, 0, &[4]), none.missing(0, 0, &[4])), (vec![0], vec![0]));
    }
}
