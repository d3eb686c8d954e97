//! Which keys have a level or more.

use super::GROUP;
use crate::isa::Isa;

/// Appends to `out` the indices (plus `base`) of the levels that are at least `lowest`, rising. The last few levels beyond
/// whole groups of sixteen are left out: scans write whole groups.
pub fn at_least(levels: &[u16], lowest: u16, base: u32, out: &mut Vec<u32>) {
    at_least_on(Isa::active(), levels, lowest, base, out);
}

fn at_least_on(isa: Isa, levels: &[u16], lowest: u16, base: u32, out: &mut Vec<u32>) {
    let groups = levels.as_chunks::<GROUP>().0;
    match isa {
        // SAFETY: an `Isa` that reaches a kernel was detected, and AVX-512 implies AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => unsafe { avx2(groups, lowest, base, out) },
        _ => {
            for (group, levels) in groups.iter().enumerate() {
                for (i, _) in levels.iter().enumerate().filter(|(_, level)| **level >= lowest) {
                    out.push(base + (group * GROUP + i) as u32);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(groups: &[[u16; GROUP]], lowest: u16, base: u32, out: &mut Vec<u32>) {
    use std::arch::x86_64::*;
    let lowest = _mm256_set1_epi16(lowest as i16);
    // Unsigned: the larger of both is the level itself where it is at least the lowest.
    let reached = |levels: &[u16; GROUP]| {
        // SAFETY: the unaligned load covers the sixteen levels of the reference.
        let levels = unsafe { _mm256_loadu_si256(levels.as_ptr().cast()) };
        _mm256_cmpeq_epi16(_mm256_max_epu16(levels, lowest), levels)
    };
    // A bit per level of two groups; packing leaves the middle quarters swapped.
    let pair = |a: __m256i, b: __m256i| {
        _mm256_movemask_epi8(_mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(a, b))) as u32
    };
    let (fours, rest) = groups.as_chunks::<4>();
    let mut push = |mut bits: u64, from: usize| {
        while bits != 0 {
            out.push(base + from as u32 + bits.trailing_zeros());
            bits &= bits - 1;
        }
    };
    for (at, [a, b, c, d]) in fours.iter().enumerate() {
        let (low, high) = (pair(reached(a), reached(b)), pair(reached(c), reached(d)));
        push(u64::from(low) | u64::from(high) << 32, at * 4 * GROUP);
    }
    for (at, group) in rest.iter().enumerate() {
        let bits = pair(reached(group), _mm256_setzero_si256());
        push(bits.into(), (fours.len() * 4 + at) * GROUP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::bytes;

    #[test]
    fn as_a_test_of_each() {
        for len in [0, 15, 16, 17, 400] {
            let levels: Vec<u16> = bytes(7, len * 2)
                .chunks(2)
                .map(|b| u16::from_le_bytes([b[0], b[1]]))
                .collect();
            for lowest in [0, 1, 30_000, 40_000, 65_535] {
                let whole = len / GROUP * GROUP;
                let truth: Vec<u32> = (0..whole as u32)
                    .filter(|i| levels[*i as usize] >= lowest)
                    .map(|i| i + 5)
                    .collect();
                for isa in Isa::available() {
                    let mut found = Vec::new();
                    at_least_on(isa, &levels, lowest, 5, &mut found);
                    assert_eq!(found, truth, "{isa:?} {len} {lowest}");
                }
            }
        }
    }
}
