//! Positions that are not searched because the caller holds them itself.

use std::ops::Range;

/// Ranges of token positions that are neither searched nor counted.
///
/// Invariant: the ranges are not empty, rise, and neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Excluded {
    ranges: Vec<Range<u32>>,
}

impl Excluded {
    /// Nothing is excluded.
    pub fn none() -> Self {
        Self::default()
    }

    /// Excludes `ranges`, given in any order; they may overlap. Empty and reversed ranges exclude nothing.
    pub fn new(ranges: &[Range<u32>]) -> Self {
        let mut sorted: Vec<Range<u32>> = ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
        sorted.sort_unstable_by_key(|range| range.start);
        let mut merged: Vec<Range<u32>> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        Self { ranges: merged }
    }

    /// Whether `position` is excluded.
    pub fn contains(&self, position: u32) -> bool {
        let first = self.ranges.partition_point(|range| range.end <= position);
        self.ranges.get(first).is_some_and(|range| range.start <= position)
    }

    /// What is left of `positions`, rising; no part is empty.
    pub fn searched(&self, positions: Range<u32>) -> impl Iterator<Item = Range<u32>> {
        let first = self.ranges.partition_point(|range| range.end <= positions.start);
        let mut holes = self.ranges[first..].iter();
        let mut at = positions.start;
        std::iter::from_fn(move || {
            while at < positions.end {
                let start = at;
                let end = match holes.next() {
                    Some(hole) => {
                        at = hole.end;
                        hole.start.min(positions.end)
                    }
                    None => {
                        at = positions.end;
                        positions.end
                    }
                };
                if start < end {
                    return Some(start..end);
                }
            }
            None
        })
    }

    /// Whether none of `positions` is excluded.
    pub(crate) fn leaves_all(&self, positions: Range<u32>) -> bool {
        let first = self.ranges.partition_point(|range| range.end <= positions.start);
        let next = self.ranges.get(first).map_or(u32::MAX, |range| range.start);
        next.max(positions.start) >= positions.end
    }

    /// How many of the positions `0..tokens` are left.
    pub fn searched_count(&self, tokens: u32) -> u32 {
        self.searched(0..tokens).map(|part| part.end - part.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    #[expect(
        clippy::single_range_in_vec_init,
        reason = "one excluded range is a case like any other"
    )]
    fn what_is_left() {
        type Case<'a> = (&'a [Range<u32>], Range<u32>, &'a [Range<u32>]);
        let cases: [Case<'_>; 9] = [
            (&[], 0..10, &[0..10]),
            (&[], 5..5, &[]),
            (&[0..10], 0..10, &[]),
            (&[2..4], 0..10, &[0..2, 4..10]),
            (&[8..20, 0..2], 0..10, &[2..8]),
            (&[2..4, 3..6, 6..7], 0..10, &[0..2, 7..10]),
            (&[2..4], 4..10, &[4..10]),
            (&[2..2, 0..0], 0..3, &[0..3]),
            (&[0..u32::MAX], 3..9, &[]),
        ];
        for (ranges, positions, expected) in cases {
            let excluded = Excluded::new(ranges);
            let left: Vec<_> = excluded.searched(positions.clone()).collect();
            assert_eq!(left, expected, "{positions:?} without {ranges:?}");
        }
    }

    proptest! {
        /// As if every position were asked for itself.
        #[test]
        fn equals_a_test_of_every_position(ranges in prop::collection::vec((0..80u32, 0..20u32), 0..8), start in 0..80u32, len in 0..80u32) {
            let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| start..start + len).collect();
            let excluded = Excluded::new(&ranges);
            let expected: Vec<u32> = (start..start + len).filter(|at| !ranges.iter().any(|range| range.contains(at))).collect();
            prop_assert_eq!(excluded.leaves_all(start..start + len), expected.len() == len as usize);
            prop_assert_eq!(excluded.searched(start..start + len).flatten().collect::<Vec<_>>(), expected);
            prop_assert_eq!(excluded.contains(start), ranges.iter().any(|range| range.contains(&start)));
            prop_assert_eq!(excluded.searched_count(start), (0..start).filter(|at| !ranges.iter().any(|range| range.contains(at))).count() as u32);
        }
    }
}
