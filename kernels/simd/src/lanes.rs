//! Sixteen f32 lanes as one value: the kernels are written once over [`Lanes`], and each instruction set says how its
//! registers do it. Every operation is exactly rounded IEEE or pure data movement, and [`Lanes::sum`] has a fixed tree,
//! so all implementations agree in every bit.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod sse;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use scalar::Scalar;

use half::f16;

use crate::numeric::{EXP2, EXP2_MAX, EXP2_MIN};

/// Lanes in a vector.
pub(crate) const LANES: usize = 16;

/// The operations of one instruction set; holding a value of the type proves that the processor has it.
pub(crate) trait Lanes: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// Whether there are registers for a strip of four rows by four vectors.
    const WIDE: bool;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; LANES]);
    fn load_f16(self, x: &[f16; LANES]) -> Self::F;
    /// Rounds to nearest, ties to even.
    fn store_f16(self, x: Self::F, out: &mut [f16; LANES]);
    /// Whole numbers in [-128, 127] as bytes.
    fn store_i8(self, x: Self::F, out: &mut [i8; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Per lane `a` where `a > b`, else `b`: `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Per lane `a` where `a < b`, else `b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Rounds to a whole number, ties to even.
    fn round(self, x: Self::F) -> Self::F;
    /// `2^n` of whole numbers in [-126, 127].
    fn power(self, n: Self::F) -> Self::F;
    /// Per lane `x` where `a >= b`, else 0.
    fn where_not_less(self, a: Self::F, b: Self::F, x: Self::F) -> Self::F;
    /// The first `count` lanes of `x`, then `other`.
    fn first(self, x: Self::F, count: usize, other: f32) -> Self::F;
    /// Lane l + lane l+8, of those l + l+4, then l + l+2, then l + l+1.
    fn sum(self, x: Self::F) -> f32;
    /// The largest lane (of none that is NaN).
    fn highest(self, x: Self::F) -> f32;
    /// `out[c][r] = rows[r][c]`, in f32.
    fn transpose(self, rows: [&[f16; 8]; 8], out: [&mut [f32; 8]; 8]);
}

/// `2^x` per lane, bit for bit [`crate::numeric::exp2`].
#[inline(always)]
pub(crate) fn exp2<L: Lanes>(l: L, x: L::F) -> L::F {
    let floor = l.splat(EXP2_MIN);
    let clamped = l.max(l.min(x, l.splat(EXP2_MAX)), floor);
    let whole = l.round(clamped);
    let f = l.sub(clamped, whole);
    let mut p = l.splat(EXP2[5]);
    p = l.fma(p, f, l.splat(EXP2[4]));
    p = l.fma(p, f, l.splat(EXP2[3]));
    p = l.fma(p, f, l.splat(EXP2[2]));
    p = l.fma(p, f, l.splat(EXP2[1]));
    p = l.fma(p, f, l.splat(EXP2[0]));
    p = l.fma(p, f, l.splat(1.0));
    l.where_not_less(x, floor, l.mul(p, l.power(whole)))
}

/// Up to sixteen values, the rest `other`.
#[inline(always)]
pub(crate) fn load_some<L: Lanes>(l: L, x: &[f32], other: f32) -> L::F {
    let mut all = [other; LANES];
    all[..x.len()].copy_from_slice(x);
    l.load(&all)
}

/// Up to sixteen halves, the rest 0.
#[inline(always)]
pub(crate) fn load_some_f16<L: Lanes>(l: L, x: &[f16]) -> L::F {
    let mut all = [f16::ZERO; LANES];
    all[..x.len()].copy_from_slice(x);
    l.load_f16(&all)
}

/// The first `out.len()` lanes, at most sixteen.
#[inline(always)]
pub(crate) fn store_some<L: Lanes>(l: L, x: L::F, out: &mut [f32]) {
    let mut all = [0.0; LANES];
    l.store(x, &mut all);
    out.copy_from_slice(&all[..out.len()]);
}
