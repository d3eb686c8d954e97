//! Scalar functions with bits of our own: the same on every machine, whatever its libm.

/// Coefficients of `2^f` on [-1/2, 1/2] after the constant 1, lowest power first; least squares in relative error,
/// which stays below 2e-8 before rounding.
pub(crate) const EXP2: [f32; 6] = [
    std::f32::consts::LN_2,
    0.240_226_48,
    0.055_503_29,
    0.009_618_374,
    0.001_339_984_8,
    0.000_153_707_05,
];

/// Below this, [`exp2`] is zero: what would follow is subnormal.
pub(crate) const EXP2_MIN: f32 = -126.0;
/// Above this, [`exp2`] stays at its largest power.
pub(crate) const EXP2_MAX: f32 = 127.0;

/// `2^x` within 2 units in the last place; 0 below -126 and for NaN, `2^127` above 127. Lane for lane what
/// [`crate::lanes::exp2`] computes.
pub(crate) fn exp2(x: f32) -> f32 {
    let clamped = if x < EXP2_MAX { x } else { EXP2_MAX };
    let clamped = if clamped > EXP2_MIN { clamped } else { EXP2_MIN };
    let whole = clamped.round_ties_even();
    let f = clamped - whole;
    let mut p = EXP2[5];
    for c in EXP2[..5].iter().rev() {
        p = p.mul_add(f, *c);
    }
    let p = p.mul_add(f, 1.0);
    // In [-126, 127], so the biased exponent is that of a normal number.
    let power = f32::from_bits(((whole as i32 + 127) as u32) << 23);
    if x >= EXP2_MIN { p * power } else { 0.0 }
}

/// `log2(x)` of a positive normal number, correct to about one unit in the last place of f32.
pub(crate) fn log2(x: f32) -> f32 {
    let bits = f64::from(x).to_bits();
    let mut exponent = ((bits >> 52) as i64 - 1023) as f64;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1.0;
    }
    // log(m) = 2 atanh((m - 1) / (m + 1)), |t| < 0.172: eight terms leave 1e-14.
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let square = t * t;
    let mut sum = 0.0;
    for k in (0..8).rev() {
        sum = sum * square + 1.0 / f64::from(2 * k + 1);
    }
    (exponent + 2.0 * t * sum * std::f64::consts::LOG2_E) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        isa::{Isa, dispatched},
        lanes::{self, Lanes},
    };

    dispatched!(fn exp2_on(x: &mut [[f32; 16]]) = exp2_in);
    #[inline(always)]
    fn exp2_in<L: Lanes>(l: L, x: &mut [[f32; 16]]) {
        for x in x {
            l.store(lanes::exp2(l, l.load(x)), x);
        }
    }

    fn points() -> Vec<f32> {
        let fine = (-260_000..=260_000).map(|i| i as f32 / 2000.0);
        let odd = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            -0.0,
            0.0,
            -126.0,
            -126.00001,
            127.0,
            1e30,
            -1e30,
            1e-40,
        ];
        let mut points: Vec<f32> = fine.chain(odd).collect();
        points.resize(points.len().next_multiple_of(16), 0.5);
        points
    }

    #[test]
    fn exp2_is_close_and_the_same_in_lanes() {
        let points = points();
        for isa in Isa::available() {
            let mut lanes = points.clone();
            exp2_on(isa, lanes.as_chunks_mut().0);
            for (x, found) in points.iter().zip(lanes) {
                assert_eq!(found.to_bits(), exp2(*x).to_bits(), "{isa:?} exp2({x})");
            }
        }
        for x in points.into_iter().filter(|x| (-126.0..127.0).contains(x)) {
            let truth = f64::from(x).exp2();
            assert!((f64::from(exp2(x)) / truth - 1.0).abs() < 1.5e-7, "exp2({x})");
        }
        assert_eq!(
            [exp2(0.0), exp2(-3.0), exp2(f32::NEG_INFINITY), exp2(f32::NAN)],
            [1.0, 0.125, 0.0, 0.0]
        );
    }

    #[test]
    fn log2_is_close() {
        for i in 1..200_000 {
            let x = i as f32 * 0.37;
            assert!((f64::from(log2(x)) - f64::from(x).log2()).abs() <= 1e-6, "log2({x})");
        }
        assert_eq!(
            [log2(1.0), log2(2.0), log2(0.125), log2(1.0e-38)],
            [0.0, 1.0, -3.0, 1.0e-38_f32.log2()]
        );
    }
}
