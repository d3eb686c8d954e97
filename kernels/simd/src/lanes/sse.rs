//! Steps on 128-bit registers, which every x86-64 processor has.

use std::arch::x86_64::*;

use half::f16;

/// Lane l + lane l+2, then l + l+1.
#[inline]
#[target_feature(enable = "sse2")]
pub(super) fn sum(x: __m128) -> f32 {
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
}

#[inline]
#[target_feature(enable = "sse2")]
pub(super) fn highest(x: __m128) -> f32 {
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
}

/// Columns of eight rows of eight halves.
#[inline]
#[target_feature(enable = "sse2")]
pub(super) fn transpose(rows: [&[f16; 8]; 8]) -> [__m128i; 8] {
    // SAFETY: each unaligned 128-bit load lies within the eight halves of its reference.
    let [a, b, c, d, e, f, g, h] = rows.map(|row| unsafe { _mm_loadu_si128(row.as_ptr().cast()) });
    // Pairs of rows, then fours, then eights.
    let (ab, cd, ef, gh) = (
        _mm_unpacklo_epi16(a, b),
        _mm_unpacklo_epi16(c, d),
        _mm_unpacklo_epi16(e, f),
        _mm_unpacklo_epi16(g, h),
    );
    let (ab_, cd_, ef_, gh_) = (
        _mm_unpackhi_epi16(a, b),
        _mm_unpackhi_epi16(c, d),
        _mm_unpackhi_epi16(e, f),
        _mm_unpackhi_epi16(g, h),
    );
    let (a01, a23) = (_mm_unpacklo_epi32(ab, cd), _mm_unpackhi_epi32(ab, cd));
    let (a45, a67) = (_mm_unpacklo_epi32(ab_, cd_), _mm_unpackhi_epi32(ab_, cd_));
    let (e01, e23) = (_mm_unpacklo_epi32(ef, gh), _mm_unpackhi_epi32(ef, gh));
    let (e45, e67) = (_mm_unpacklo_epi32(ef_, gh_), _mm_unpackhi_epi32(ef_, gh_));
    [
        _mm_unpacklo_epi64(a01, e01),
        _mm_unpackhi_epi64(a01, e01),
        _mm_unpacklo_epi64(a23, e23),
        _mm_unpackhi_epi64(a23, e23),
        _mm_unpacklo_epi64(a45, e45),
        _mm_unpackhi_epi64(a45, e45),
        _mm_unpacklo_epi64(a67, e67),
        _mm_unpackhi_epi64(a67, e67),
    ]
}
