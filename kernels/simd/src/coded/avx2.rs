//! The scan with 256-bit registers: eight keys a register, four digits of a key a lane, products summed in 16 bits, where
//! they fit because the queries were scaled to.

use std::arch::x86_64::*;

use super::{Call, GROUP, HIGHEST, LOWEST, Map};

/// # Safety
/// The processor has AVX2, FMA and F16C. `levels` and `sums` have room for each head of the call at their strides, codes are
/// `groups * lines * 64` bytes, a mask has `groups` words, and there are `lines * 2` lanes per head.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn strip(call: Call<'_>, levels: &mut [u16], stride: usize, sums: &mut [f32], sums_stride: usize) {
    // SAFETY: this function's own contract, for as many heads as are named.
    unsafe {
        match (call.heads.len(), call.lines) {
            (4, 4) => heads::<4, 4>(call, levels, stride, sums, sums_stride),
            (3, 4) => heads::<3, 4>(call, levels, stride, sums, sums_stride),
            (2, 4) => heads::<2, 4>(call, levels, stride, sums, sums_stride),
            (1, 4) => heads::<1, 4>(call, levels, stride, sums, sums_stride),
            (4, 8) => heads::<4, 8>(call, levels, stride, sums, sums_stride),
            (3, 8) => heads::<3, 8>(call, levels, stride, sums, sums_stride),
            (2, 8) => heads::<2, 8>(call, levels, stride, sums, sums_stride),
            _ => heads::<1, 8>(call, levels, stride, sums, sums_stride),
        }
    }
}

/// # Safety
/// As [`strip`], with `H` heads and `LINES` lines.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn heads<const H: usize, const LINES: usize>(
    call: Call<'_>,
    levels: &mut [u16],
    stride: usize,
    sums: &mut [f32],
    sums_stride: usize,
) {
    let maps: [Map; H] = std::array::from_fn(|h| Map::new(call.heads[h], call.keys.step));
    let nibble = _mm256_set1_epi8(15);
    let mut group = 0;
    while group < call.groups {
        let first = group;
        let mut totals = [_mm256_setzero_ps(); H];
        while group < (first + call.run).min(call.groups) {
            // SAFETY: group `group` has LINES lines of 64 bytes, each head has 2 * LINES lanes of 32, and sixteen levels of
            // each head fit, all by this function's contract.
            unsafe {
                let codes = call.keys.codes.as_ptr().add(group * LINES * 64);
                let lanes = call.lanes.as_ptr().cast::<__m256i>();
                let mut products = [[_mm256_setzero_si256(); 2]; H];
                for line in 0..LINES {
                    for half in 0..2 {
                        let raw = _mm256_loadu_si256(codes.add(line * 64 + half * 32).cast());
                        let low = _mm256_and_si256(raw, nibble);
                        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(raw), nibble);
                        for (head, products) in products.iter_mut().enumerate() {
                            let lanes = lanes.add(head * LINES * 2 + line * 2);
                            let product = &mut products[half];
                            *product = _mm256_add_epi16(*product, _mm256_maddubs_epi16(low, *lanes));
                            *product = _mm256_add_epi16(*product, _mm256_maddubs_epi16(high, *lanes.add(1)));
                        }
                    }
                }
                let mask = call.keys.mask.map(|mask| searched(mask[group]));
                for (head, products) in products.iter().enumerate() {
                    let product = _mm256_hadd_epi16(products[0], products[1]);
                    let level = finish(product, maps[head], mask);
                    let out = levels.as_mut_ptr().add(head * stride + group * GROUP);
                    _mm256_storeu_si256(out.cast(), level);
                    totals[head] = _mm256_add_ps(totals[head], weights(level));
                }
            }
            group += 1;
        }
        for (head, total) in totals.iter().enumerate() {
            sums[head * sums_stride + first / call.run] = sum(*total);
        }
    }
}

/// All ones in the lanes of the keys whose bit is set.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn searched(word: u16) -> __m256i {
    let bits = _mm256_setr_epi16(
        1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768,
    );
    _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(word as i16), bits), bits)
}

/// Levels of sixteen products in the order of the keys.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn finish(product: __m256i, map: Map, mask: Option<__m256i>) -> __m256i {
    let scaled = _mm256_mulhrs_epi16(product, _mm256_set1_epi16(map.factor));
    let level = _mm256_adds_epi16(scaled, _mm256_set1_epi16(map.offset));
    let level = _mm256_max_epi16(level, _mm256_set1_epi16(LOWEST));
    let level = _mm256_min_epi16(level, _mm256_set1_epi16(HIGHEST));
    match mask {
        Some(mask) => _mm256_and_si256(level, mask),
        None => level,
    }
}

/// Weights of the even keys plus those of the odd.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn weights(level: __m256i) -> __m256 {
    let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(level));
    let odd = _mm256_castsi256_ps(_mm256_and_si256(level, _mm256_set1_epi32(0xffff_0000_u32 as i32)));
    _mm256_add_ps(even, odd)
}

/// Lane l + lane l+4, then l + l+2, then l + l+1.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
}
