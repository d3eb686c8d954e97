//! Two 256-bit registers; AVX2, FMA and F16C.

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, Lanes, sse};

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// Safe to call only where the features are enabled, which is the proof.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(crate) fn new() -> Self {
        Self(())
    }
}

/// Nearest, ties to even, without exceptions.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// Applies an intrinsic to both registers.
macro_rules! both {
    ($name:ident, $($arg:ident),+) => {
        // SAFETY: `Avx2` is only made where AVX2, FMA and F16C are enabled; the intrinsic touches registers only.
        unsafe { ($name($($arg.0),+), $name($($arg.1),+)) }
    };
}

impl Lanes for Avx2 {
    type F = (__m256, __m256);
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: `Avx2` is only made where AVX2 is enabled; registers only.
        let x = unsafe { _mm256_set1_ps(x) };
        (x, x)
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        let x = x.as_ptr();
        // SAFETY: AVX2 is proven by `self`; both unaligned loads lie within the sixteen f32 behind the reference.
        unsafe { (_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))) }
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        let out = out.as_mut_ptr();
        // SAFETY: AVX2 is proven by `self`; both unaligned stores lie within the sixteen f32 behind the reference.
        unsafe {
            _mm256_storeu_ps(out, x.0);
            _mm256_storeu_ps(out.add(8), x.1);
        }
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::F {
        let x = x.as_ptr().cast::<__m128i>();
        // SAFETY: F16C is proven by `self`; sixteen f16 are two unaligned 128-bit loads.
        unsafe {
            (
                _mm256_cvtph_ps(_mm_loadu_si128(x)),
                _mm256_cvtph_ps(_mm_loadu_si128(x.add(1))),
            )
        }
    }
    #[inline(always)]
    fn store_f16(self, x: Self::F, out: &mut [f16; LANES]) {
        let out = out.as_mut_ptr().cast::<__m128i>();
        // SAFETY: F16C is proven by `self`; sixteen f16 are two unaligned 128-bit stores.
        unsafe {
            _mm_storeu_si128(out, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x.0));
            _mm_storeu_si128(out.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x.1));
        }
    }
    #[inline(always)]
    fn store_i8(self, x: Self::F, out: &mut [i8; LANES]) {
        // SAFETY: AVX2 is proven by `self`; the one unaligned 128-bit store fills the sixteen bytes of the reference.
        unsafe {
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.0), _mm256_cvtps_epi32(x.1));
            // The pack works per 128-bit half: put the quarters back in order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        both!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        // SAFETY: AVX is proven by `self`; registers only.
        unsafe { (_mm256_round_ps::<NEAREST>(x.0), _mm256_round_ps::<NEAREST>(x.1)) }
    }
    #[inline(always)]
    fn power(self, n: Self::F) -> Self::F {
        // SAFETY: AVX2 is proven by `self`; registers only.
        let power = |n| unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        };
        (power(n.0), power(n.1))
    }
    #[inline(always)]
    fn where_not_less(self, a: Self::F, b: Self::F, x: Self::F) -> Self::F {
        // SAFETY: AVX is proven by `self`; registers only.
        let masked = |a, b, x| unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a, b), x) };
        (masked(a.0, b.0, x.0), masked(a.1, b.1, x.1))
    }
    #[inline(always)]
    fn first(self, x: Self::F, count: usize, other: f32) -> Self::F {
        let count = count.min(LANES) as i32;
        // SAFETY: AVX2 is proven by `self`; registers only.
        unsafe {
            let (count, other) = (_mm256_set1_epi32(count), _mm256_set1_ps(other));
            let low = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            let high = _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
            (
                _mm256_blendv_ps(other, x.0, _mm256_castsi256_ps(low)),
                _mm256_blendv_ps(other, x.1, _mm256_castsi256_ps(high)),
            )
        }
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        // SAFETY: AVX is proven by `self`; registers only.
        unsafe {
            let x = _mm256_add_ps(x.0, x.1);
            sse::sum(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)))
        }
    }
    #[inline(always)]
    fn highest(self, x: Self::F) -> f32 {
        // SAFETY: AVX is proven by `self`; registers only.
        unsafe {
            let x = _mm256_max_ps(x.0, x.1);
            sse::highest(_mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x)))
        }
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
