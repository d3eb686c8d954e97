//! f16 to f32 and back, rounding to nearest with ties to even.

use half::f16;

use crate::{
    isa::{Isa, dispatched},
    lanes::{Lanes, load_some, load_some_f16, store_some},
};

/// `out[i] = x[i]` rounded to f16, ties to even; too large becomes infinite.
///
/// # Panics
/// If the lengths differ.
pub fn to_f16(x: &[f32], out: &mut [f16]) {
    assert_eq!(x.len(), out.len(), "to_f16: one half per value");
    narrow(Isa::active(), x, out);
}

/// `out[i] = x[i]`, exactly.
///
/// # Panics
/// If the lengths differ.
pub fn to_f32(x: &[f16], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "to_f32: one value per half");
    widen(Isa::active(), x, out);
}

dispatched!(fn narrow(x: &[f32], out: &mut [f16]) = narrow_in);
#[inline(always)]
fn narrow_in<L: Lanes>(l: L, x: &[f32], out: &mut [f16]) {
    let (whole, tail) = x.as_chunks();
    let (out, out_tail) = out.as_chunks_mut();
    for (x, out) in whole.iter().zip(out) {
        l.store_f16(l.load(x), out);
    }
    let mut last = [f16::ZERO; 16];
    l.store_f16(load_some(l, tail, 0.0), &mut last);
    out_tail.copy_from_slice(&last[..tail.len()]);
}

dispatched!(fn widen(x: &[f16], out: &mut [f32]) = widen_in);
#[inline(always)]
fn widen_in<L: Lanes>(l: L, x: &[f16], out: &mut [f32]) {
    let (whole, tail) = x.as_chunks();
    let (out, out_tail) = out.as_chunks_mut();
    for (x, out) in whole.iter().zip(out) {
        l.store(l.load_f16(x), out);
    }
    store_some(l, load_some_f16(l, tail), out_tail);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{bits, values};

    #[test]
    fn every_half_widens_as_in_half() {
        let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|x| !x.is_nan()).collect();
        for isa in Isa::available() {
            let mut found = vec![0.0; all.len()];
            widen(isa, &all, &mut found);
            assert_eq!(
                bits(&found),
                bits(&all.iter().map(|x| x.to_f32()).collect::<Vec<_>>()),
                "{isa:?}"
            );
        }
    }

    #[test]
    fn values_narrow_as_in_half() {
        // Ties, the largest finite, what rounds up to infinity, subnormals; at every length around a vector.
        let mut x = vec![
            1.0 + 1.0 / 2048.0,
            1.0 + 3.0 / 2048.0,
            65504.0,
            65519.9,
            65520.0,
            -1e9,
            6e-8,
            2.9e-8,
            1e-30,
        ];
        x.extend(values(3, 40).iter().map(|x| x * 1e-4));
        for isa in Isa::available() {
            for len in 0..x.len() {
                let mut found = vec![f16::ONE; len];
                narrow(isa, &x[..len], &mut found);
                let truth: Vec<f16> = x[..len].iter().map(|&x| f16::from_f32(x)).collect();
                assert!(
                    found.iter().zip(&truth).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{isa:?} {len}"
                );
            }
        }
    }
}
