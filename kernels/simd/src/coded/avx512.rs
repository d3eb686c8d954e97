//! The scan with 512-bit registers and VNNI: sixteen keys a register, four digits of a key a lane, products summed by
//! `vpdpbusd`; the rest on sixteen 16-bit lanes, as with 256 bits.

use std::arch::x86_64::*;

use super::{
    Call, GROUP, Map,
    avx2::{finish, searched, sum, weights},
};

/// # Safety
/// The processor has AVX-512 F, BW, DQ, VL and VNNI and AVX2; the rest as [`super::avx2::strip`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn strip(call: Call<'_>, levels: &mut [u16], stride: usize, sums: &mut [f32], sums_stride: usize) {
    // SAFETY: this function's own contract, for as many heads as are named.
    unsafe {
        match call.heads.len() {
            4 => heads::<4>(call, levels, stride, sums, sums_stride),
            3 => heads::<3>(call, levels, stride, sums, sums_stride),
            2 => heads::<2>(call, levels, stride, sums, sums_stride),
            _ => heads::<1>(call, levels, stride, sums, sums_stride),
        }
    }
}

/// # Safety
/// As [`strip`], with `H` heads.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn heads<const H: usize>(
    call: Call<'_>,
    levels: &mut [u16],
    stride: usize,
    sums: &mut [f32],
    sums_stride: usize,
) {
    let maps: [Map; H] = std::array::from_fn(|h| Map::new(call.heads[h], call.keys.step));
    let nibble = _mm512_set1_epi8(15);
    let mut group = 0;
    while group < call.groups {
        let first = group;
        let mut totals = [_mm256_setzero_ps(); H];
        while group < (first + call.run).min(call.groups) {
            // SAFETY: group `group` has `lines` lines of 64 bytes, each head has 2 * lines lanes, of which four bytes are
            // read, and sixteen levels of each head fit, all by this function's contract.
            unsafe {
                let codes = call.keys.codes.as_ptr().add(group * call.lines * 64);
                let mut products = [_mm512_setzero_si512(); H];
                for line in 0..call.lines {
                    let raw = _mm512_loadu_si512(codes.add(line * 64).cast());
                    let low = _mm512_and_si512(raw, nibble);
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(raw), nibble);
                    for (head, product) in products.iter_mut().enumerate() {
                        let lanes = call.lanes.as_ptr().add((head * call.lines + line) * 2).cast::<i32>();
                        *product = _mm512_dpbusd_epi32(*product, low, _mm512_set1_epi32(*lanes));
                        *product = _mm512_dpbusd_epi32(*product, high, _mm512_set1_epi32(*lanes.add(8)));
                    }
                }
                let mask = call.keys.mask.map(|mask| searched(mask[group]));
                for (head, product) in products.iter().enumerate() {
                    // Slots to keys: the middle quarters change places.
                    let product = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm512_cvtepi32_epi16(*product));
                    let level = finish(product, maps[head], mask);
                    let out = levels.as_mut_ptr().add(head * stride + group * GROUP);
                    _mm256_storeu_si256(out.cast(), level);
                    totals[head] = _mm256_add_ps(totals[head], weights(level));
                }
            }
            group += 1;
        }
        for (head, total) in totals.iter().enumerate() {
            sums[head * sums_stride + first / call.run] = sum(*total);
        }
    }
}
