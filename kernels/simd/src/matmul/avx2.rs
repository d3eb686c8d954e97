//! The tile with 256-bit registers: eight rows a register, four bytes of a row a lane.
//!
//! `vpmaddubsw` adds two products of unsigned and signed bytes in 16 bits and saturates; with 4-bit weights two products
//! are at most 2 * 15 * 127 = 3810 in magnitude and eight such sums 30480, so a whole block is summed in 16 bits without
//! loss. 8-bit weights are taken as two 4-bit halves for the same reason.

use std::arch::x86_64::*;

use super::{Block, GROUP, GroupView};
use crate::weights::Format;

/// Rows of a register.
const HALF: usize = GROUP / 2;

/// `sums[t] = group . x[t]` for 1, 2 or 4 tokens.
///
/// # Safety
/// The processor has AVX2, FMA and F16C; `group` is whole ([`GroupView::is_whole`]) and `x` is
/// `[sums.len(), group.scales.len()]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn tile(group: GroupView<'_>, x: &[Block], sums: &mut [[f32; GROUP]]) {
    // One token is bound by memory: both halves at once read each line once. More are bound by registers.
    // SAFETY: this function's own contract; `sums` has as many elements as tokens are named, and the halves cover it.
    unsafe {
        match (group.format, sums.len()) {
            (Format::Affine4, 4) => (0..2).for_each(|half| affine4::<4, 1>(group, x, half, sums)),
            (Format::Affine4, 2) => (0..2).for_each(|half| affine4::<2, 1>(group, x, half, sums)),
            (Format::Affine4, _) => affine4::<1, 2>(group, x, 0, sums),
            (Format::Offset8, 4) => (0..2).for_each(|half| offset8::<4, 1>(group, x, half, sums)),
            (Format::Offset8, 2) => (0..2).for_each(|half| offset8::<2, 1>(group, x, half, sums)),
            (Format::Offset8, _) => offset8::<1, 2>(group, x, 0, sums),
        }
    }
}

/// `T` tokens by the `H` halves of the group from `half` on.
///
/// # Safety
/// As [`tile`], with `sums.len() >= T` and `half + H <= 2`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn affine4<const T: usize, const H: usize>(
    group: GroupView<'_>,
    x: &[Block],
    half: usize,
    sums: &mut [[f32; GROUP]],
) {
    let blocks = group.scales.len();
    let nibble = _mm256_set1_epi8(15);
    let ones = _mm256_set1_epi16(1);
    let mut totals = [[_mm256_setzero_ps(); T]; H];
    for block in 0..blocks {
        for (h, totals) in totals.iter_mut().enumerate() {
            let at = (half + h) * HALF;
            // SAFETY: `group` is whole: block `block` has 4 lines of 64 bytes, of which this half is 32, and 16 scales
            // and minima, of which it is 8; `x` has T rows of `blocks`.
            unsafe {
                let line = group.lines.as_ptr().add(block * 4).cast::<u8>().add(at * 4);
                let mut words = [_mm256_setzero_si256(); T];
                for j in 0..4 {
                    let raw = _mm256_load_si256(line.add(j * 64).cast());
                    let low = _mm256_and_si256(raw, nibble);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(raw), nibble);
                    for (t, words) in words.iter_mut().enumerate() {
                        let x = &*x.as_ptr().add(t * blocks + block);
                        *words = _mm256_add_epi16(*words, _mm256_maddubs_epi16(low, four(x, j)));
                        *words = _mm256_add_epi16(*words, _mm256_maddubs_epi16(high, four(x, 4 + j)));
                    }
                }
                let d = half_scales(group.scales.as_ptr().add(block).cast::<u8>().add(at * 2));
                let m = half_scales(group.minima.as_ptr().add(block).cast::<u8>().add(at * 2));
                for (t, (total, words)) in totals.iter_mut().zip(words).enumerate() {
                    let x = &*x.as_ptr().add(t * blocks + block);
                    let integers = _mm256_cvtepi32_ps(_mm256_madd_epi16(words, ones));
                    *total = _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(x.d)), integers, *total);
                    *total = _mm256_fmadd_ps(m, _mm256_set1_ps(x.sum), *total);
                }
            }
        }
    }
    // SAFETY: `sums` has T elements of two halves.
    unsafe { store(&totals, half, sums) }
}

/// As [`affine4`].
///
/// # Safety
/// As [`affine4`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn offset8<const T: usize, const H: usize>(
    group: GroupView<'_>,
    x: &[Block],
    half: usize,
    sums: &mut [[f32; GROUP]],
) {
    let blocks = group.scales.len();
    let nibble = _mm256_set1_epi8(15);
    let (ones, sixteens) = (_mm256_set1_epi16(1), _mm256_set1_epi16(16));
    let mut totals = [[_mm256_setzero_ps(); T]; H];
    for block in 0..blocks {
        for (h, totals) in totals.iter_mut().enumerate() {
            let at = (half + h) * HALF;
            // SAFETY: `group` is whole: block `block` has 8 lines of 64 bytes, of which this half is 32, and 16 scales, of
            // which it is 8; `x` has T rows of `blocks`.
            unsafe {
                let line = group.lines.as_ptr().add(block * 8).cast::<u8>().add(at * 4);
                let mut low = [_mm256_setzero_si256(); T];
                let mut high = [_mm256_setzero_si256(); T];
                for j in 0..8 {
                    let raw = _mm256_load_si256(line.add(j * 64).cast());
                    let w_low = _mm256_and_si256(raw, nibble);
                    let w_high = _mm256_and_si256(_mm256_srli_epi16::<4>(raw), nibble);
                    for t in 0..T {
                        let four = four(&*x.as_ptr().add(t * blocks + block), j);
                        low[t] = _mm256_add_epi16(low[t], _mm256_maddubs_epi16(w_low, four));
                        high[t] = _mm256_add_epi16(high[t], _mm256_maddubs_epi16(w_high, four));
                    }
                }
                let d = half_scales(group.scales.as_ptr().add(block).cast::<u8>().add(at * 2));
                for (t, total) in totals.iter_mut().enumerate() {
                    let x = &*x.as_ptr().add(t * blocks + block);
                    let unsigned =
                        _mm256_add_epi32(_mm256_madd_epi16(low[t], ones), _mm256_madd_epi16(high[t], sixteens));
                    let integers = _mm256_cvtepi32_ps(_mm256_sub_epi32(unsigned, _mm256_set1_epi32(x.offset)));
                    *total = _mm256_fmadd_ps(_mm256_mul_ps(d, _mm256_set1_ps(x.d)), integers, *total);
                }
            }
        }
    }
    // SAFETY: `sums` has T elements of two halves.
    unsafe { store(&totals, half, sums) }
}

/// Bytes 4j..4j+4 of a block in every lane.
#[inline]
#[target_feature(enable = "avx2")]
fn four(x: &Block, j: usize) -> __m256i {
    let q = &x.q;
    _mm256_set1_epi32(i32::from_le_bytes([
        q[4 * j] as u8,
        q[4 * j + 1] as u8,
        q[4 * j + 2] as u8,
        q[4 * j + 3] as u8,
    ]))
}

/// Eight f16 as f32.
///
/// # Safety
/// `at` points to 16 readable bytes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn half_scales(at: *const u8) -> __m256 {
    // SAFETY: this function's own contract.
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
}

/// # Safety
/// `sums.len() >= T` and `half + H <= 2`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store<const T: usize, const H: usize>(totals: &[[__m256; T]; H], half: usize, sums: &mut [[f32; GROUP]]) {
    for (h, totals) in totals.iter().enumerate() {
        for (total, sums) in totals.iter().zip(&mut *sums) {
            // SAFETY: eight f32 from `(half + h) * 8` on lie within the sixteen of a token.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add((half + h) * HALF), *total) }
        }
    }
}
