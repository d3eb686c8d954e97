//! How often blocks were wanted, roughly and in bounded memory: what promotion, admission and reclaim decide by.
//!
//! A count-min sketch with 4-bit counters that halves itself now and then (TinyLFU: Einziger, Friedman, Manes, ACM TOS 2017):
//! an answer is never too low since the last halving, and seldom too high. Names are SHA-256 hashes, so a part of them is the
//! hash; a caller who makes names up can spoil the estimate and nothing else.

use kvasir_block::{BlockKey, LayerBlockKey};

/// Counters that each name has; the smallest is the answer.
const ROWS: usize = 4;
/// Largest count.
const COUNT_MAX: u64 = 15;
/// Notes per counter of a row until all counts are halved.
const NOTES_PER_COUNTER: u64 = 8;

/// What was asked for and what was read.
#[derive(Debug)]
pub(crate) struct Reuse {
    asked: Sketch,
    read: Sketch,
}

impl Reuse {
    /// Keeps apart about `entries` blocks, and as many layer blocks; 4 bytes for each.
    pub(crate) fn new(entries: usize) -> Self {
        Self {
            asked: Sketch::new(entries),
            read: Sketch::new(entries),
        }
    }

    /// A match asked for `block`; how often that was so, this time included.
    pub(crate) fn note_asked(&mut self, block: &BlockKey) -> u32 {
        self.asked.note(block_bits(block))
    }

    /// How often matches asked for `block`.
    pub(crate) fn asked(&self, block: &BlockKey) -> u32 {
        self.asked.count(block_bits(block))
    }

    /// `key` was read from a slower tier; how often that was so, this time included.
    pub(crate) fn note_read(&mut self, key: LayerBlockKey) -> u32 {
        self.read.note(layer_bits(key))
    }
}

fn block_bits(block: &BlockKey) -> u64 {
    let word = |bytes: &[u8; 32]| u64::from_le_bytes(std::array::from_fn(|i| bytes[i]));
    word(block.namespace.as_bytes()).rotate_left(17) ^ word(block.hash.as_bytes())
}

fn layer_bits(key: LayerBlockKey) -> u64 {
    block_bits(&key.block()) ^ (u64::from(key.layer) + 1).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

/// 4-bit counters, sixteen to a word.
#[derive(Debug)]
struct Sketch {
    words: Vec<u64>,
    /// Bits of a counter's index inside its row.
    width_log2: u32,
    notes: u64,
}

impl Sketch {
    fn new(entries: usize) -> Self {
        let width = entries.clamp(64, 1 << 28).next_power_of_two();
        Self {
            words: vec![0; ROWS * width / 16],
            width_log2: width.trailing_zeros(),
            notes: 0,
        }
    }

    fn note(&mut self, bits: u64) -> u32 {
        if self.notes >= NOTES_PER_COUNTER << self.width_log2 {
            self.halve();
        }
        self.notes += 1;
        let count = self.count(bits);
        // Only the smallest counters are raised: the others hold more names than this one.
        for row in 0..ROWS {
            let (word, shift) = self.place(row, bits);
            let old = self.words[word] >> shift & COUNT_MAX;
            if old == u64::from(count) && old < COUNT_MAX {
                self.words[word] += 1 << shift;
            }
        }
        (count + 1).min(COUNT_MAX as u32)
    }

    fn count(&self, bits: u64) -> u32 {
        let counter = |row| {
            let (word, shift) = self.place(row, bits);
            (self.words[word] >> shift & COUNT_MAX) as u32
        };
        (0..ROWS).map(counter).min().unwrap_or_default()
    }

    /// Word and bit of a name's counter in `row`.
    fn place(&self, row: usize, bits: u64) -> (usize, u32) {
        /// Odd numbers without a pattern.
        const FACTORS: [u64; ROWS] = [
            0x9E37_79B9_7F4A_7C15,
            0xC2B2_AE3D_27D4_EB4F,
            0x1656_67B1_9E37_79F9,
            0xD1B5_4A32_D192_ED03,
        ];
        let mixed = (bits ^ bits >> 32).wrapping_mul(FACTORS[row]);
        let column = (mixed >> (64 - self.width_log2)) as usize;
        let at = (row << self.width_log2) + column;
        (at / 16, (at % 16 * 4) as u32)
    }

    fn halve(&mut self) {
        for word in &mut self.words {
            *word = *word >> 1 & 0x7777_7777_7777_7777;
        }
        self.notes /= 2;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use kvasir_block::{BlockHash, NamespaceId};
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    fn block(rng: &mut StdRng) -> BlockKey {
        NamespaceId::from_bytes([3; 32]).block(BlockHash::from_bytes(rng.random()))
    }

    #[test]
    fn never_too_low_and_seldom_too_high() {
        let mut rng = StdRng::seed_from_u64(1);
        let (mut reuse, mut truth) = (Reuse::new(4096), HashMap::<BlockKey, u32>::new());
        let blocks: Vec<_> = (0..4000).map(|_| block(&mut rng)).collect();
        for _ in 0..12_000 {
            let one = blocks[rng.random_range(0..blocks.len())];
            *truth.entry(one).or_default() += 1;
            reuse.note_asked(&one);
        }
        let count = |one: &BlockKey| truth.get(one).copied().unwrap_or(0).min(15);
        assert!(blocks.iter().all(|one| reuse.asked(one) >= count(one)));
        let high = blocks.iter().filter(|one| reuse.asked(one) > count(one)).count();
        assert!(high < 400, "{high} of 4000 are too high");
        let strangers = (0..4000).filter(|_| reuse.asked(&block(&mut rng)) >= 2).count();
        assert!(strangers < 400, "{strangers} of 4000 strangers pass for known");
    }

    #[test]
    fn what_was_wanted_long_ago_fades() {
        let mut rng = StdRng::seed_from_u64(2);
        let mut reuse = Reuse::new(64);
        let hot = block(&mut rng);
        let counts: Vec<u32> = (0..20).map(|_| reuse.note_asked(&hot)).collect();
        assert_eq!((counts[0], counts[1], counts[19]), (1, 2, 15));
        // The counts halve often enough for what is no longer asked for, whatever else is.
        for _ in 0..8 {
            reuse.asked.halve();
        }
        assert_eq!(reuse.asked(&hot), 0);
    }

    #[test]
    fn layers_are_counted_apart_from_each_other_and_from_their_block() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut reuse = Reuse::new(1024);
        let one = block(&mut rng);
        assert_eq!((reuse.note_read(one.layer(0)), reuse.note_read(one.layer(0))), (1, 2));
        assert_eq!((reuse.note_read(one.layer(1)), reuse.asked(&one)), (1, 0));
    }
}
