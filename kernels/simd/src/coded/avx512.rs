//! The scan with 512-bit registers and VNNI: a run of 64 keys at a time, sixteen a register, four digits of a key a lane, products
//! summed by `vpdpbusd`; then 32 keys a register in 16 bits. Nothing branches on what is found, unless
//! that is little.
//!
//! Registers of 32 levels hold their fours of keys in the order 0 4 1 5 2 6 3 7, so that unpacking them with their indices gives
//! 32-bit lanes in the order of the keys.

use std::arch::x86_64::*;

use super::{
    Call, Found, GROUP, HIGHEST, LOWEST, Level, Map, RUN_GROUPS,
    avx2::{group, keep, sum, weights},
};

/// # Safety
/// The processor has AVX-512 F, BW, DQ, VL and VNNI, AVX2 and POPCNT; the rest as [`super::avx2::scan`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,popcnt")]
pub(super) unsafe fn scan(call: Call<'_>, out: &mut Found<'_>) {
    // SAFETY: this function's own contract, for as many heads and lines as are named.
    unsafe {
        match (call.heads.len(), call.lines, out.few) {
            (4, 4, false) => heads::<4, 4, false>(call, out),
            (4, 4, true) => heads::<4, 4, true>(call, out),
            (3, 4, false) => heads::<3, 4, false>(call, out),
            (3, 4, true) => heads::<3, 4, true>(call, out),
            (2, 4, false) => heads::<2, 4, false>(call, out),
            (2, 4, true) => heads::<2, 4, true>(call, out),
            (1, 4, _) => heads::<1, 4, false>(call, out),
            (4, 8, _) => heads::<4, 8, false>(call, out),
            (3, 8, _) => heads::<3, 8, false>(call, out),
            (2, 8, _) => heads::<2, 8, false>(call, out),
            _ => heads::<1, 8, false>(call, out),
        }
    }
}

/// Runs whose codes are asked for before they are needed.
const AHEAD: usize = 2;

/// Products to levels of two groups.
#[derive(Clone, Copy)]
struct Pair {
    doubled: [__m512i; 2],
    factor: __m512i,
    offset: __m512i,
}

/// # Safety
/// As [`scan`], with `H` heads and `LINES` lines. With `FEW` it branches on whether any of 32 keys reaches the floor.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,popcnt")]
unsafe fn heads<const H: usize, const LINES: usize, const FEW: bool>(call: Call<'_>, out: &mut Found<'_>) {
    let groups = call.keys.masks.len();
    let runs = groups / RUN_GROUPS;
    let nibble = _mm512_set1_epi8(15);
    // Fours of two packed registers: those of the first are the even ones, in the order of their slots.
    let order = _mm512_setr_epi64(0, 1, 4, 5, 2, 3, 6, 7);
    let indices = spread(_mm512_set_epi16(
        31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2,
        1, 0,
    ));
    let (lowest, highest) = (_mm512_set1_epi16(LOWEST), _mm512_set1_epi16(HIGHEST));
    let floors: [u16; H] = std::array::from_fn(|head| out.floors[head].0.max(Level::LOWEST.0));
    let zero = _mm512_setzero_si512();
    let mut maps = [[Pair {
        doubled: [zero; 2],
        factor: zero,
        offset: zero,
    }; 2]; H];
    let mut steps = [f32::NAN; RUN_GROUPS];
    // Of their own: what is stored does not change them.
    let (kept, stride) = (out.kept.as_mut_ptr(), out.stride);
    let mut counts: [usize; H] = std::array::from_fn(|head| out.counts[head]);
    for run in 0..runs {
        let first = run * RUN_GROUPS;
        let own: [f32; RUN_GROUPS] = std::array::from_fn(|at| call.keys.steps[first + at]);
        // No closures over registers here: they would be compiled apart, without these instructions.
        if own != steps {
            steps = own;
            // Groups of one block, which a run mostly is, have one step.
            let one = own == [own[0]; RUN_GROUPS];
            for (maps, weights) in maps.iter_mut().zip(call.heads) {
                let map = Map::new(*weights, own[0]);
                let (factor, offset) = (_mm512_set1_epi16(map.factor), _mm512_set1_epi16(map.offset));
                let doubled = [_mm512_set1_epi32(map.doubled); 2];
                *maps = [Pair {
                    doubled,
                    factor,
                    offset,
                }; 2];
                if !one {
                    for (pair, map) in maps.iter_mut().enumerate() {
                        let (even, odd) = (Map::new(*weights, own[pair * 2]), Map::new(*weights, own[pair * 2 + 1]));
                        map.doubled = [_mm512_set1_epi32(even.doubled), _mm512_set1_epi32(odd.doubled)];
                        map.factor = alternate(even.factor, odd.factor);
                        map.offset = alternate(even.offset, odd.offset);
                    }
                }
            }
        }
        let mut products = [[zero; RUN_GROUPS]; H];
        for (products, weights) in products.iter_mut().zip(call.heads) {
            *products = [_mm512_set1_epi32(weights.start); RUN_GROUPS];
        }
        for line in 0..LINES {
            // SAFETY: each group has LINES lines and each head 2 * LINES lanes, of which four bytes are read, by this function's
            // contract.
            unsafe {
                let codes = call.keys.codes.as_ptr().add(first * LINES + line);
                let (mut low, mut high) = ([zero; RUN_GROUPS], [zero; RUN_GROUPS]);
                for (at, (low, high)) in low.iter_mut().zip(&mut high).enumerate() {
                    // Two or four kilobytes on: a core's own prefetchers do not keep up. It need not be there.
                    _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add((RUN_GROUPS * AHEAD + at) * LINES).cast());
                    let raw = _mm512_load_si512(codes.add(at * LINES).cast());
                    *low = _mm512_and_si512(raw, nibble);
                    *high = _mm512_and_si512(_mm512_srli_epi16::<4>(raw), nibble);
                }
                for (head, products) in products.iter_mut().enumerate() {
                    let lanes = call.lanes.as_ptr().add((head * LINES + line) * 2).cast::<i32>();
                    let (to_low, to_high) = (_mm512_set1_epi32(*lanes), _mm512_set1_epi32(*lanes.add(8)));
                    for ((product, low), high) in products.iter_mut().zip(&low).zip(&high) {
                        *product = _mm512_dpbusd_epi32(*product, *low, to_low);
                        *product = _mm512_dpbusd_epi32(*product, *high, to_high);
                    }
                }
            }
        }
        let word = |at: usize| u32::from(call.keys.masks[at]) | u32::from(call.keys.masks[at + 1]) << 16;
        let words = [word(first), word(first + 2)];
        let all = words == [u32::MAX; 2];
        for (head, products) in products.iter().enumerate() {
            let mut total = _mm512_setzero_ps();
            for pair in 0..2 {
                let Pair {
                    doubled,
                    factor,
                    offset,
                } = maps[head][pair];
                let packed = _mm512_packs_epi32(
                    _mm512_sllv_epi32(products[pair * 2], doubled[0]),
                    _mm512_sllv_epi32(products[pair * 2 + 1], doubled[1]),
                );
                let scaled = _mm512_mulhrs_epi16(packed, factor);
                let level = _mm512_adds_epi16(scaled, offset);
                let level = _mm512_min_epi16(_mm512_max_epi16(level, lowest), highest);
                // Pairs of fours to the order of the module's head.
                let mut level = _mm512_permutexvar_epi64(order, level);
                if !all {
                    level = _mm512_maskz_mov_epi16(spread_bits(words[pair]), level);
                }
                let below = _mm512_cmplt_epu16_mask(level, _mm512_set1_epi16(floors[head] as i16));
                total = _mm512_add_ps(total, weigh(_mm512_maskz_mov_epi16(below, level)));
                if FEW && below == u32::MAX {
                    continue;
                }
                let base = (call.first + (first + pair * 2) * GROUP) as u16;
                let own = _mm512_add_epi16(indices, _mm512_set1_epi16(base as i16));
                let floor = _mm512_set1_epi32((u32::from(floors[head]) << 16) as i32);
                for keys in [_mm512_unpacklo_epi16(own, level), _mm512_unpackhi_epi16(own, level)] {
                    let reached = _mm512_cmpge_epu32_mask(keys, floor);
                    // SAFETY: room for a register more than is kept was asserted by the caller.
                    unsafe {
                        let to = kept.add(head * stride + counts[head]);
                        _mm512_storeu_si512(to.cast(), _mm512_maskz_compress_epi32(reached, keys));
                    }
                    counts[head] += reached.count_ones() as usize;
                }
            }
            out.sums[head * out.sums_stride + run] = sum_of(total);
        }
    }
    out.counts.copy_from_slice(&counts);
    // Groups of a last run that is not whole.
    let mut totals = [[_mm256_setzero_ps(); 2]; H];
    for at in runs * RUN_GROUPS..groups {
        let maps: [Map; H] = std::array::from_fn(|head| Map::new(call.heads[head], call.keys.steps[at]));
        // SAFETY: this function's own contract.
        let levels = unsafe { group::<H, LINES>(&call, at, &maps) };
        for (head, level) in levels.into_iter().enumerate() {
            let below = keep(level, head, call.first + at * GROUP, out);
            let total = &mut totals[head][at % 2];
            *total = _mm256_add_ps(*total, weights(below));
        }
    }
    if groups > runs * RUN_GROUPS {
        for (head, totals) in totals.iter().enumerate() {
            out.sums[head * out.sums_stride + runs] = sum(_mm256_add_ps(totals[0], totals[1]));
        }
    }
}

/// For two groups, whose fours alternate before levels are put in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn alternate(even: i16, odd: i16) -> __m512i {
    _mm512_mask_blend_epi64(0b1010_1010, _mm512_set1_epi16(even), _mm512_set1_epi16(odd))
}

/// 32 elements in the order of keys to the order of the module's head.
#[inline]
#[target_feature(enable = "avx512f")]
fn spread(x: __m512i) -> __m512i {
    _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), x)
}

/// As [`spread`], of bits: fours of them are nibbles.
#[inline]
fn spread_bits(word: u32) -> u32 {
    (0..8).fold(0, |bits, four| {
        let to = if four < 4 { 2 * four } else { 2 * (four - 4) + 1 };
        bits | (word >> (4 * four) & 15) << (4 * to)
    })
}

/// Weights of the even keys plus those of the odd.
#[inline]
#[target_feature(enable = "avx512f")]
fn weigh(level: __m512i) -> __m512 {
    let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(level));
    let odd = _mm512_castsi512_ps(_mm512_and_si512(level, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
    _mm512_add_ps(even, odd)
}

/// Even groups and odd ones, then pair l + pair l+4, l + l+2, l + l+1.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2")]
fn sum_of(x: __m512) -> f32 {
    let x = _mm512_add_ps(x, _mm512_permute_ps::<0b01_00_11_10>(x));
    let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
}
