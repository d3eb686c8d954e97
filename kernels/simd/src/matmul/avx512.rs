//! The tile with 512-bit registers and VNNI: sixteen rows a register, four bytes of a row a lane. `vpdpbusd` adds the four
//! products of unsigned and signed bytes to 32 bits, exactly.

use std::arch::x86_64::*;

use super::{Block, GROUP, GroupView};
use crate::weights::Format;

/// `sums[t] = group . x[t]` for 1, 2, 4 or 8 tokens.
///
/// # Safety
/// The processor has AVX-512 F, BW, DQ, VL and VNNI; `group` is whole ([`GroupView::is_whole`]) and `x` is
/// `[sums.len(), group.scales.len()]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn tile(group: GroupView<'_>, x: &[Block], sums: &mut [[f32; GROUP]]) {
    // SAFETY: this function's own contract; as many tokens are named as `sums` has.
    unsafe {
        match (group.format, sums.len()) {
            (Format::Affine4, 8) => affine4::<8>(group, x, sums),
            (Format::Affine4, 4) => affine4::<4>(group, x, sums),
            (Format::Affine4, 2) => affine4::<2>(group, x, sums),
            (Format::Affine4, _) => affine4::<1>(group, x, sums),
            (Format::Offset8, 8) => offset8::<8>(group, x, sums),
            (Format::Offset8, 4) => offset8::<4>(group, x, sums),
            (Format::Offset8, 2) => offset8::<2>(group, x, sums),
            (Format::Offset8, _) => offset8::<1>(group, x, sums),
        }
    }
}

/// # Safety
/// As [`tile`], with `sums.len() >= T`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn affine4<const T: usize>(group: GroupView<'_>, x: &[Block], sums: &mut [[f32; GROUP]]) {
    let blocks = group.scales.len();
    let nibble = _mm512_set1_epi8(15);
    let mut totals = [_mm512_setzero_ps(); T];
    for block in 0..blocks {
        // SAFETY: `group` is whole: block `block` has 4 lines of 64 bytes, 16 scales and 16 minima; `x` has T rows of
        // `blocks`.
        unsafe {
            let line = group.lines.as_ptr().add(block * 4);
            let mut low = [_mm512_setzero_si512(); 4];
            let mut high = [_mm512_setzero_si512(); 4];
            for j in 0..4 {
                let raw = _mm512_load_si512(line.add(j).cast());
                low[j] = _mm512_and_si512(raw, nibble);
                high[j] = _mm512_and_si512(_mm512_srli_epi16::<4>(raw), nibble);
            }
            let d = scales(group.scales.as_ptr().add(block).cast());
            let m = scales(group.minima.as_ptr().add(block).cast());
            for (t, total) in totals.iter_mut().enumerate() {
                let x = &*x.as_ptr().add(t * blocks + block);
                // Two chains: the sum of a block need not wait for all eight steps.
                let mut even = _mm512_setzero_si512();
                let mut odd = _mm512_setzero_si512();
                for j in 0..4 {
                    even = _mm512_dpbusd_epi32(even, low[j], four(x, j));
                    odd = _mm512_dpbusd_epi32(odd, high[j], four(x, 4 + j));
                }
                let integers = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
                *total = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(x.d)), integers, *total);
                *total = _mm512_fmadd_ps(m, _mm512_set1_ps(x.sum), *total);
            }
        }
    }
    store(&totals, sums);
}

/// # Safety
/// As [`tile`], with `sums.len() >= T`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn offset8<const T: usize>(group: GroupView<'_>, x: &[Block], sums: &mut [[f32; GROUP]]) {
    let blocks = group.scales.len();
    let mut totals = [_mm512_setzero_ps(); T];
    for block in 0..blocks {
        // SAFETY: `group` is whole: block `block` has 8 lines of 64 bytes and 16 scales; `x` has T rows of `blocks`.
        unsafe {
            let line = group.lines.as_ptr().add(block * 8);
            let mut w = [_mm512_setzero_si512(); 8];
            for (j, w) in w.iter_mut().enumerate() {
                *w = _mm512_load_si512(line.add(j).cast());
            }
            let d = scales(group.scales.as_ptr().add(block).cast());
            for (t, total) in totals.iter_mut().enumerate() {
                let x = &*x.as_ptr().add(t * blocks + block);
                let mut even = _mm512_setzero_si512();
                let mut odd = _mm512_setzero_si512();
                for j in 0..4 {
                    even = _mm512_dpbusd_epi32(even, w[j], four(x, j));
                    odd = _mm512_dpbusd_epi32(odd, w[4 + j], four(x, 4 + j));
                }
                let unsigned = _mm512_add_epi32(even, odd);
                let integers = _mm512_cvtepi32_ps(_mm512_sub_epi32(unsigned, _mm512_set1_epi32(x.offset)));
                *total = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(x.d)), integers, *total);
            }
        }
    }
    store(&totals, sums);
}

/// Bytes 4j..4j+4 of a block in every lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn four(x: &Block, j: usize) -> __m512i {
    let q = &x.q;
    _mm512_set1_epi32(i32::from_le_bytes([
        q[4 * j] as u8,
        q[4 * j + 1] as u8,
        q[4 * j + 2] as u8,
        q[4 * j + 3] as u8,
    ]))
}

/// Sixteen f16 as f32.
///
/// # Safety
/// `at` points to 32 readable bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn scales(at: *const __m256i) -> __m512 {
    // SAFETY: this function's own contract.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at)) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store<const T: usize>(totals: &[__m512; T], sums: &mut [[f32; GROUP]]) {
    for (total, sums) in totals.iter().zip(sums) {
        // SAFETY: the unaligned store fills the sixteen f32 of a token.
        unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *total) }
    }
}
