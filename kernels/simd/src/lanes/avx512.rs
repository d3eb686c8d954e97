//! One 512-bit register; AVX-512 F, BW, DQ, VL.

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, Lanes, sse};

/// Proof that the processor has AVX-512 F, BW, DQ, VL and VNNI, and all that [`super::Avx2`] proves.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// Safe to call only where the features are enabled, which is the proof.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

/// Nearest, ties to even.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

/// Calls an intrinsic on registers.
macro_rules! registers {
    ($call:expr) => {
        // SAFETY: `Avx512` is only made where its features are enabled; the intrinsics touch registers only.
        unsafe { $call }
    };
}

impl Lanes for Avx512 {
    type F = __m512;
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        registers!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: AVX-512 F is proven by `self`; the unaligned load covers the sixteen f32 of the reference.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        // SAFETY: AVX-512 F is proven by `self`; the unaligned store covers the sixteen f32 of the reference.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::F {
        // SAFETY: AVX-512 F is proven by `self`; the unaligned 256-bit load covers the sixteen f16 of the reference.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, x: Self::F, out: &mut [f16; LANES]) {
        // SAFETY: AVX-512 F is proven by `self`; the unaligned 256-bit store covers the sixteen f16 of the reference.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_cvtps_ph::<NEAREST>(x)) }
    }
    #[inline(always)]
    fn store_i8(self, x: Self::F, out: &mut [i8; LANES]) {
        // SAFETY: AVX-512 F is proven by `self`; the unaligned 128-bit store covers the sixteen bytes of the reference.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x))) }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        registers!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        registers!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        registers!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        registers!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        registers!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        registers!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        registers!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        registers!(_mm512_roundscale_ps::<NEAREST>(x))
    }
    #[inline(always)]
    fn power(self, n: Self::F) -> Self::F {
        registers!({
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        })
    }
    #[inline(always)]
    fn where_not_less(self, a: Self::F, b: Self::F, x: Self::F) -> Self::F {
        registers!(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b), x))
    }
    #[inline(always)]
    fn first(self, x: Self::F, count: usize, other: f32) -> Self::F {
        let kept = ((1_u32 << count.min(LANES)) - 1) as u16;
        registers!(_mm512_mask_blend_ps(kept, _mm512_set1_ps(other), x))
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        registers!({
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            sse::sum(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)))
        })
    }
    #[inline(always)]
    fn highest(self, x: Self::F) -> f32 {
        registers!({
            let x = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            sse::highest(_mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)))
        })
    }
    #[inline(always)]
    fn transpose(self, rows: [&[f16; 8]; 8], out: [&mut [f32; 8]; 8]) {
        // SAFETY: AVX and F16C are proven by `self`; each unaligned store fills the eight f32 of its reference.
        unsafe {
            for (x, out) in sse::transpose(rows).into_iter().zip(out) {
                _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(x));
            }
        }
    }
}
