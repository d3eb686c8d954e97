//! The scan with 512-bit registers and VNNI: four groups at a time, sixteen keys a register, four digits of a key a lane, products
//! summed by `vpdpbusd`; then two groups a register in 16 bits, in the order of the keys.
//!
//! A core can begin one `vpdpbusd` a cycle and about one other instruction on such registers beside it, so what follows the
//! products is kept as short as they are: levels are clamped and products doubled only where a head's can need it.

mod four;

use std::arch::x86_64::*;

use self::four::{Four, Maps, Near};
use super::{All, Call, Found, GROUP, Level, Places, RUN_GROUPS};

/// # Safety
/// The processor has AVX-512 F, BW, DQ, VL and VNNI, AVX2, FMA, F16C, BMI1 and POPCNT; the rest as [`super::avx2::scan`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,popcnt")]
pub(super) unsafe fn scan<P: Places>(call: Call<'_>, places: P, out: &mut Found<'_>) {
    // SAFETY: this function's own contract, for as many heads and lines as are named.
    unsafe {
        match (call.heads.len(), call.lines) {
            (4, 4) => scan_heads::<P, 4, 4>(call, places, out),
            (3, 4) => scan_heads::<P, 3, 4>(call, places, out),
            (2, 4) => scan_heads::<P, 2, 4>(call, places, out),
            (1, 4) => scan_heads::<P, 1, 4>(call, places, out),
            (4, 8) => scan_heads::<P, 4, 8>(call, places, out),
            (3, 8) => scan_heads::<P, 3, 8>(call, places, out),
            (2, 8) => scan_heads::<P, 2, 8>(call, places, out),
            _ => scan_heads::<P, 1, 8>(call, places, out),
        }
    }
}

/// Levels of the call's heads, `[heads][stride]`.
///
/// # Safety
/// As [`scan`]; `out` has room for the levels of all groups of each head.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,popcnt")]
pub(super) unsafe fn levels(call: Call<'_>, out: &mut [u16], stride: usize) {
    // SAFETY: this function's own contract, for as many lines as are named.
    unsafe {
        match call.lines {
            1 => levels_of_lines::<1>(call, out, stride),
            2 => levels_of_lines::<2>(call, out, stride),
            4 => levels_of_lines::<4>(call, out, stride),
            _ => levels_of_lines::<8>(call, out, stride),
        }
    }
}

/// # Safety
/// As [`levels`], with `LINES` lines.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,popcnt")]
unsafe fn levels_of_lines<const LINES: usize>(call: Call<'_>, out: &mut [u16], stride: usize) {
    // SAFETY: this function's own contract, for as many heads as are named.
    unsafe {
        match call.heads.len() {
            4 => levels_of_heads::<4, LINES>(call, out, stride),
            3 => levels_of_heads::<3, LINES>(call, out, stride),
            2 => levels_of_heads::<2, LINES>(call, out, stride),
            _ => levels_of_heads::<1, LINES>(call, out, stride),
        }
    }
}

/// Takes the levels of all heads, of four groups after four.
trait Take<const H: usize> {
    /// # Safety
    /// As [`scan`]; `four` are its groups from place `first` on.
    unsafe fn take(&mut self, first: usize, four: &Four, levels: [[__m512i; 2]; H]);
}

/// Levels of all places for `H` heads, from `LINES` lines. One function with all that it calls: sixteen registers of products
/// are not to be returned through memory.
///
/// # Safety
/// As [`scan`], with `H` heads and `LINES` lines; `take` is as it promises.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,popcnt")]
unsafe fn each<P: Places, T: Take<H>, const H: usize, const LINES: usize>(call: &Call<'_>, places: P, take: &mut T) {
    let zero = _mm512_setzero_si512();
    let nibble = _mm512_set1_epi8(15);
    let mut maps = Maps::new(call);
    for first in (0..places.len()).step_by(RUN_GROUPS) {
        // SAFETY: this function's own contract.
        let four = unsafe {
            let four = Four::new(call, places, first);
            maps.follow(four.steps);
            four
        };
        let mut products = [[zero; RUN_GROUPS]; H];
        for (products, weights) in products.iter_mut().zip(call.heads) {
            *products = [_mm512_set1_epi32(weights.start); RUN_GROUPS];
        }
        // No closures over registers here: they would be compiled apart, without these instructions.
        for line in 0..LINES {
            // SAFETY: groups of `call.stride` lines, at least LINES, and 2 * LINES lanes of each head, of which four bytes are read, are
            // there by this function's contract.
            unsafe {
                let codes = call.keys.codes.as_ptr().add(line);
                let (mut low, mut high) = ([zero; RUN_GROUPS], [zero; RUN_GROUPS]);
                for (at, (low, high)) in low.iter_mut().zip(&mut high).enumerate() {
                    if P::APART {
                        _mm_prefetch::<_MM_HINT_T0>(codes.add(four.next[at] * call.stride).cast());
                    }
                    let raw = _mm512_load_si512(codes.add(four.at[at] * call.stride).cast());
                    *low = _mm512_and_si512(raw, nibble);
                    *high = _mm512_and_si512(_mm512_srli_epi16::<4>(raw), nibble);
                }
                for (head, products) in products.iter_mut().enumerate() {
                    let lanes = call.lanes.as_ptr().add((head * LINES + line) * 2).cast::<i32>();
                    let (to_low, to_high) = (_mm512_set1_epi32(*lanes), _mm512_set1_epi32(*lanes.add(8)));
                    for ((product, low), high) in products.iter_mut().zip(&low).zip(&high) {
                        *product = _mm512_dpbusd_epi32(*product, *low, to_low);
                        *product = _mm512_dpbusd_epi32(*product, *high, to_high);
                    }
                }
            }
        }
        // SAFETY: this function's own contract.
        unsafe {
            let levels = maps.levels(&products, four.words);
            take.take(first, &four, levels);
        }
    }
}

/// What a scan does with levels: in pointers, since indices and the checks of them would cost as much as the rest of it.
struct Keep<P, const H: usize> {
    places: P,
    floors: [u16; H],
    /// Where each head's next key goes, and where its sums begin.
    to: [*mut u32; H],
    sums: [*mut f32; H],
    /// Levels of the four groups before, which of their keys reach the floors, and their first keys: these are stored while the
    /// products of the next four are on their way, since what was just written is not read back at once.
    near: [Near; H],
    reached: [u64; H],
    keys: [u32; RUN_GROUPS],
}

impl<P: Places, const H: usize> Keep<P, H> {
    /// Stores what reached the floors.
    ///
    /// # Safety
    /// As [`Take::take`].
    #[inline(always)]
    unsafe fn store(&mut self) {
        for head in 0..H {
            // SAFETY: room for a register more than is kept was asserted by the caller.
            self.to[head] = unsafe { four::keep::<P>(&self.near[head], self.reached[head], &self.keys, self.to[head]) };
        }
    }
}

impl<P: Places, const H: usize> Take<H> for Keep<P, H> {
    /// # Safety
    /// As [`Take::take`].
    #[inline(always)]
    unsafe fn take(&mut self, first: usize, four: &Four, levels: [[__m512i; 2]; H]) {
        // SAFETY: this function's own contract; room for the sums, and for a register more than is kept, was asserted by the caller.
        unsafe {
            self.store();
            self.keys = four.keys;
            for (head, levels) in levels.into_iter().enumerate() {
                self.near[head].fill(levels);
                let floor = _mm512_set1_epi16(self.floors[head] as i16);
                let below = [
                    _mm512_cmplt_epu16_mask(levels[0], floor),
                    _mm512_cmplt_epu16_mask(levels[1], floor),
                ];
                self.reached[head] = !(u64::from(below[0]) | u64::from(below[1]) << 32);
                let weights = [
                    four::weigh(_mm512_maskz_mov_epi16(below[0], levels[0])),
                    four::weigh(_mm512_maskz_mov_epi16(below[1], levels[1])),
                ];
                if P::APART {
                    let (sums, to) = (four::sum_apart(weights), self.sums[head].add(first));
                    if first + RUN_GROUPS <= self.places.len() {
                        to.cast::<[f32; RUN_GROUPS]>().write(sums);
                    } else {
                        for (at, sum) in sums.into_iter().take(self.places.len() - first).enumerate() {
                            *to.add(at) = sum;
                        }
                    }
                } else {
                    let sum = four::sum(_mm512_add_ps(weights[0], weights[1]));
                    *self.sums[head].add(first / RUN_GROUPS) = sum;
                }
            }
        }
    }
}

/// # Safety
/// As [`scan`], with `H` heads and `LINES` lines.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,popcnt")]
unsafe fn scan_heads<P: Places, const H: usize, const LINES: usize>(call: Call<'_>, places: P, out: &mut Found<'_>) {
    // Cut as they are used, so that what lies beyond a head's own is never reached.
    let mut kept = out.kept.chunks_mut(out.stride.max(1)).take(H);
    let mut sums = out.sums.chunks_mut(out.sums_stride.max(1)).take(H);
    let mut keep = Keep {
        places,
        floors: std::array::from_fn(|head| out.floors[head].0.max(Level::LOWEST.0)),
        to: std::array::from_fn(|head| {
            kept.next()
                .map_or(std::ptr::null_mut(), |kept| kept[out.counts[head]..].as_mut_ptr())
        }),
        near: [Near::new(); H],
        reached: [0; H],
        keys: [0; RUN_GROUPS],
        sums: std::array::from_fn(|_| sums.next().map_or(std::ptr::null_mut(), <[f32]>::as_mut_ptr)),
    };
    let begun = keep.to;
    // SAFETY: this function's own contract.
    unsafe {
        each::<P, Keep<P, H>, H, LINES>(&call, places, &mut keep);
        keep.store();
    }
    for (head, count) in out.counts.iter_mut().enumerate() {
        // SAFETY: both point into what the head keeps.
        *count += unsafe { keep.to[head].offset_from_unsigned(begun[head]) };
    }
}

/// Levels as they are.
struct Write<'a> {
    out: &'a mut [u16],
    stride: usize,
    keys: usize,
}

impl<const H: usize> Take<H> for Write<'_> {
    /// # Safety
    /// As [`Take::take`].
    #[inline(always)]
    unsafe fn take(&mut self, first: usize, _: &Four, levels: [[__m512i; 2]; H]) {
        // SAFETY: this function's own contract.
        unsafe {
            for (head, levels) in levels.into_iter().enumerate() {
                let own = &mut self.out[head * self.stride..][first * GROUP..self.keys];
                if let Some(own) = own.first_chunk_mut() {
                    four::store(levels, own);
                } else {
                    let mut near = Near::new();
                    near.fill(levels);
                    own.copy_from_slice(&near.0[..own.len()]);
                }
            }
        }
    }
}

/// # Safety
/// As [`levels`], with `H` heads and `LINES` lines.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,popcnt")]
unsafe fn levels_of_heads<const H: usize, const LINES: usize>(call: Call<'_>, out: &mut [u16], stride: usize) {
    let groups = call.keys.masks.len();
    let mut write = Write {
        out,
        stride,
        keys: groups * GROUP,
    };
    // SAFETY: this function's own contract.
    unsafe { each::<All, Write<'_>, H, LINES>(&call, All(groups), &mut write) };
}
