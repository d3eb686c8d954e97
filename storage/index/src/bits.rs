//! A set of small integers that is read in rising order: selections become sorted and unions counted without a sort.

#[derive(Clone, Debug, Default)]
pub(crate) struct Bits {
    words: Vec<u64>,
}

impl Bits {
    /// Empties the set and makes room for `0..len`.
    pub(crate) fn reset(&mut self, len: usize) {
        self.words.clear();
        self.words.resize(len.div_ceil(64), 0);
    }

    /// Adds `index`, which is below the `len` of the last reset.
    pub(crate) fn insert(&mut self, index: u32) {
        self.words[index as usize / 64] |= 1 << (index % 64);
    }

    /// Whether `index`, which is below the `len` of the last reset, is in the set.
    pub(crate) fn contains(&self, index: u32) -> bool {
        (self.words[index as usize / 64] >> (index % 64)) & 1 == 1
    }

    /// How many are in the set.
    pub(crate) fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// What is in the set, rising.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        self.words.iter().enumerate().flat_map(|(at, &word)| {
            std::iter::successors((word != 0).then_some(word), |rest| {
                Some(rest & (rest - 1)).filter(|rest| *rest != 0)
            })
            .map(move |rest| at as u32 * 64 + rest.trailing_zeros())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_and_counts_each_once() {
        let mut bits = Bits::default();
        for (len, given, expected) in [
            (0, &[][..], &[][..]),
            (1, &[0], &[0]),
            (200, &[199, 64, 63, 0, 64, 127, 128], &[0, 63, 64, 127, 128, 199]),
            (64, &[63, 63], &[63]),
        ] {
            bits.reset(len);
            given.iter().for_each(|&index| bits.insert(index));
            assert_eq!(bits.iter().collect::<Vec<_>>(), expected);
            assert_eq!(bits.count(), expected.len());
            assert!((0..len as u32).all(|index| bits.contains(index) == expected.contains(&index)));
        }
    }
}
