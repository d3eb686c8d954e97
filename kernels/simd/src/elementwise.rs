//! The small steps between matrix products.

use crate::{
    isa::{Isa, dispatched},
    lanes::{Lanes, exp2, load_some, store_some},
};

/// Root-mean-square norm (Zhang & Sennrich 2019) of each row of `x[rows, weight.len()]`:
/// `out = x / sqrt(mean(x^2) + epsilon) * weight`.
///
/// # Panics
/// If `x` is not whole rows or `out` has another length.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "rms_norm: out has the shape of x");
    assert!(
        !weight.is_empty() && x.len().is_multiple_of(weight.len()),
        "rms_norm: x is rows of weight's length"
    );
    rms_norm_on(Isa::active(), x, weight, epsilon, out);
}

/// `out = silu(gate) * up` with `silu(g) = g / (1 + exp(-g))`.
///
/// # Panics
/// If the lengths differ.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(
        gate.len() == up.len() && gate.len() == out.len(),
        "silu_mul: three slices of one length"
    );
    silu_mul_on(Isa::active(), gate, up, out);
}

/// `out = gelu(gate) * up`, GELU in its tanh form (Hendrycks & Gimpel 2016): `g / (1 + exp(-2 u))` with
/// `u = sqrt(2 / pi) (g + 0.044715 g^3)`.
///
/// # Panics
/// If the lengths differ.
pub fn gelu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(
        gate.len() == up.len() && gate.len() == out.len(),
        "gelu_mul: three slices of one length"
    );
    gelu_mul_on(Isa::active(), gate, up, out);
}

/// `x += y`.
///
/// # Panics
/// If the lengths differ.
pub fn add_assign(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "add_assign: two slices of one length");
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

dispatched!(fn rms_norm_on(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) = rms_norm_in);
#[inline(always)]
fn rms_norm_in<L: Lanes>(l: L, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    let (weight, weight_tail) = weight.as_chunks();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let (x, x_tail) = x.as_chunks();
        let (out, out_tail) = out.as_chunks_mut();
        let mut squares = l.splat(0.0);
        for x in x {
            let x = l.load(x);
            squares = l.fma(x, x, squares);
        }
        let last = load_some(l, x_tail, 0.0);
        squares = l.fma(last, last, squares);
        let inverse = l.splat(1.0 / (l.sum(squares) / width as f32 + epsilon).sqrt());
        for ((x, weight), out) in x.iter().zip(weight).zip(out) {
            l.store(l.mul(l.mul(l.load(x), inverse), l.load(weight)), out);
        }
        store_some(l, l.mul(l.mul(last, inverse), load_some(l, weight_tail, 0.0)), out_tail);
    }
}

dispatched!(fn silu_mul_on(gate: &[f32], up: &[f32], out: &mut [f32]) = silu_mul_in);
#[inline(always)]
fn silu_mul_in<L: Lanes>(l: L, gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated::<L, false>(l, gate, up, out);
}

dispatched!(fn gelu_mul_on(gate: &[f32], up: &[f32], out: &mut [f32]) = gelu_mul_in);
#[inline(always)]
fn gelu_mul_in<L: Lanes>(l: L, gate: &[f32], up: &[f32], out: &mut [f32]) {
    gated::<L, true>(l, gate, up, out);
}

#[inline(always)]
fn gated<L: Lanes, const GELU: bool>(l: L, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gate, gate_tail) = gate.as_chunks();
    let (up, up_tail) = up.as_chunks();
    let (out, out_tail) = out.as_chunks_mut();
    for ((gate, up), out) in gate.iter().zip(up).zip(out) {
        l.store(gated_one::<L, GELU>(l, l.load(gate), l.load(up)), out);
    }
    let (gate, up) = (load_some(l, gate_tail, 0.0), load_some(l, up_tail, 0.0));
    store_some(l, gated_one::<L, GELU>(l, gate, up), out_tail);
}

/// `gate / (1 + exp(-inner)) * up`; inner is the gate itself, or 2 u of [`gelu_mul`].
#[inline(always)]
fn gated_one<L: Lanes, const GELU: bool>(l: L, gate: L::F, up: L::F) -> L::F {
    /// `2 sqrt(2 / pi)`.
    const TWICE_ROOT: f32 = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::SQRT_2;
    let inner = if GELU {
        let cubic = l.fma(l.mul(gate, gate), l.splat(0.044_715), l.splat(1.0));
        l.mul(l.mul(gate, l.splat(TWICE_ROOT)), cubic)
    } else {
        gate
    };
    let e = exp2(l, l.mul(inner, l.splat(-std::f32::consts::LOG2_E)));
    l.mul(l.div(gate, l.add(l.splat(1.0), e)), up)
}

#[cfg(test)]
mod tests {
    use kvasir_reference as reference;

    use super::*;
    use crate::testing::{bits, error, values};

    #[test]
    fn truth_and_equal_bits_at_any_width() {
        for width in [1, 7, 16, 33, 576] {
            let (x, up, weight) = (values(1, 3 * width), values(2, 3 * width), values(3, width));
            let run = |isa| {
                let mut out = [(); 3].map(|()| vec![0.0; 3 * width]);
                rms_norm_on(isa, &x, &weight, 1e-5, &mut out[0]);
                silu_mul_on(isa, &x, &up, &mut out[1]);
                gelu_mul_on(isa, &x, &up, &mut out[2]);
                out
            };
            let scalar = run(Isa::Scalar);
            for isa in Isa::available() {
                let found = run(isa);
                assert_eq!(
                    found.each_ref().map(|out| bits(out)),
                    scalar.each_ref().map(|out| bits(out)),
                    "{isa:?} {width}"
                );
            }
            let norm: Vec<f64> = x
                .chunks(width)
                .flat_map(|x| reference::rms_norm(x, &weight, 1e-5))
                .collect();
            assert!(error(&scalar[0], &norm) < 5e-7);
            assert!(error(&scalar[1], &reference::silu_mul(&x, &up)) < 5e-7);
            assert!(error(&scalar[2], &reference::gelu_mul(&x, &up)) < 5e-7);
        }
    }

    #[test]
    fn gates_at_the_ends() {
        for gate in [silu_mul, gelu_mul] {
            let mut out = [9.0; 3];
            gate(&[-1000.0, 1000.0, 0.0], &[1.0; 3], &mut out);
            assert!(out[0].abs() < 1e-30 && out[1] == 1000.0 && out[2] == 0.0, "{out:?}");
        }
    }
}
