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
