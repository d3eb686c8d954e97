//! The scan with 256-bit registers: eight keys a register, four digits of a key a lane, products summed in 16 bits, where
//! they fit because the queries were scaled to.

use std::arch::x86_64::*;

use super::{Call, Found, GROUP, HIGHEST, LOWEST, Level, Map, Places, RUN_GROUPS};

/// Groups whose codes are asked for before they are needed, where they do not lie one behind another.
const AHEAD: usize = 8;

/// # Safety
/// The processor has AVX2, FMA and F16C. There are `stride` lines of codes per group, at least `lines`, as many groups as masks and steps, room
/// for what may be found of each head of the call, and `lines * 2` lanes per head. All places are groups of the keys.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn scan<P: Places>(call: Call<'_>, places: P, out: &mut Found<'_>) {
    // SAFETY: this function's own contract, for as many heads and lines as are named.
    unsafe {
        match (call.heads.len(), call.lines) {
            (4, 4) => heads::<P, 4, 4>(call, places, out),
            (3, 4) => heads::<P, 3, 4>(call, places, out),
            (2, 4) => heads::<P, 2, 4>(call, places, out),
            (1, 4) => heads::<P, 1, 4>(call, places, out),
            (4, 8) => heads::<P, 4, 8>(call, places, out),
            (3, 8) => heads::<P, 3, 8>(call, places, out),
            (2, 8) => heads::<P, 2, 8>(call, places, out),
            _ => heads::<P, 1, 8>(call, places, out),
        }
    }
}

/// Levels of the call's heads, `[heads][stride]`.
///
/// # Safety
/// As [`scan`]; `out` has room for the levels of all groups of each head.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn levels(call: Call<'_>, out: &mut [u16], stride: usize) {
    let lanes = call.lines * 2;
    for (head, out) in out.chunks_mut(stride).take(call.heads.len()).enumerate() {
        let call = Call {
            lanes: &call.lanes[head * lanes..][..lanes],
            heads: &call.heads[head..=head],
            ..call
        };
        // SAFETY: this function's own contract.
        unsafe {
            match call.lines {
                1 => levels_of::<1>(call, out),
                2 => levels_of::<2>(call, out),
                4 => levels_of::<4>(call, out),
                _ => levels_of::<8>(call, out),
            }
        }
    }
}

/// Levels of the call's one head.
///
/// # Safety
/// As [`levels`], with `LINES` lines.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn levels_of<const LINES: usize>(call: Call<'_>, out: &mut [u16]) {
    let groups = out.as_chunks_mut::<GROUP>().0.iter_mut().take(call.keys.masks.len());
    for (at, out) in groups.enumerate() {
        let maps = [Map::new(call.heads[0], call.keys.steps[at])];
        // SAFETY: this function's own contract; the store covers the sixteen levels of the reference.
        unsafe {
            let [level] = group::<1, LINES>(&call, at, &maps);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), level);
        }
    }
}

/// Levels of one group.
///
/// # Safety
/// As [`scan`], with `H` heads and `LINES` lines; `at` is one of the groups.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn group<const H: usize, const LINES: usize>(call: &Call<'_>, at: usize, maps: &[Map; H]) -> [__m256i; H] {
    let nibble = _mm256_set1_epi8(15);
    let mut products = [[_mm256_setzero_si256(); 2]; H];
    for (products, weights) in products.iter_mut().zip(call.heads) {
        // In one of the two lanes of 16 bits that a key's sum is in until they are added.
        *products = [_mm256_set1_epi32(weights.start & 0xffff); 2];
    }
    for line in 0..LINES {
        for half in 0..2 {
            // SAFETY: each group has at least LINES lines of 64 bytes and each head 2 * LINES lanes of 32, by this function's contract.
            unsafe {
                let codes = call.keys.codes.as_ptr().add(at * call.stride + line).cast::<__m256i>();
                let lanes = call.lanes.as_ptr().cast::<__m256i>();
                let raw = _mm256_load_si256(codes.add(half));
                let low = _mm256_and_si256(raw, nibble);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(raw), nibble);
                for (head, products) in products.iter_mut().enumerate() {
                    let lanes = lanes.add(head * LINES * 2 + line * 2);
                    let product = &mut products[half];
                    *product = _mm256_add_epi16(*product, _mm256_maddubs_epi16(low, _mm256_load_si256(lanes)));
                    *product = _mm256_add_epi16(*product, _mm256_maddubs_epi16(high, _mm256_load_si256(lanes.add(1))));
                }
            }
        }
    }
    let mask = searched(call.keys.masks[at]);
    let mut levels = [_mm256_setzero_si256(); H];
    for ((level, products), map) in levels.iter_mut().zip(&products).zip(maps) {
        *level = finish(_mm256_hadd_epi16(products[0], products[1]), *map, mask);
    }
    levels
}

/// # Safety
/// As [`scan`], with `H` heads and `LINES` lines.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn heads<P: Places, const H: usize, const LINES: usize>(call: Call<'_>, places: P, out: &mut Found<'_>) {
    let mut maps = [Map::default(); H];
    let mut step = f32::NAN;
    for (run, first) in (0..places.len()).step_by(RUN_GROUPS).enumerate() {
        let mut totals = [[_mm256_setzero_ps(); 2]; H];
        for place in first..(first + RUN_GROUPS).min(places.len()) {
            let at = places.group(place);
            if call.keys.steps[at] != step {
                step = call.keys.steps[at];
                maps = std::array::from_fn(|head| Map::new(call.heads[head], step));
            }
            if P::APART && place + AHEAD < places.len() {
                let next = places.group(place + AHEAD) * call.stride;
                for line in &call.keys.codes[next..next + LINES] {
                    _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(line).cast());
                }
            }
            // SAFETY: this function's own contract.
            let levels = unsafe { group::<H, LINES>(&call, at, &maps) };
            for (head, level) in levels.into_iter().enumerate() {
                let weights = weights(keep(level, head, call.first + at * GROUP, out));
                if P::APART {
                    out.sums[head * out.sums_stride + place] = sum(weights);
                }
                let total = &mut totals[head][place % 2];
                *total = _mm256_add_ps(*total, weights);
            }
        }
        if !P::APART {
            for (head, totals) in totals.iter().enumerate() {
                out.sums[head * out.sums_stride + run] = sum(_mm256_add_ps(totals[0], totals[1]));
            }
        }
    }
}

/// Keeps what reaches the floor of `head`; answers what is below it.
#[inline]
#[target_feature(enable = "avx2")]
fn keep(level: __m256i, head: usize, first: usize, out: &mut Found<'_>) -> __m256i {
    let floor = _mm256_set1_epi16(out.floors[head].0.max(Level::LOWEST.0) as i16);
    // Unsigned: the larger of both is the level itself where it is at least the floor.
    let reached = _mm256_cmpeq_epi16(_mm256_max_epu16(level, floor), level);
    let mut bits = _mm256_movemask_epi8(reached) as u32 & 0x5555_5555;
    if bits != 0 {
        let mut levels = [0_u16; GROUP];
        // SAFETY: the store covers the sixteen levels of the array.
        unsafe { _mm256_storeu_si256(levels.as_mut_ptr().cast(), level) };
        while bits != 0 {
            let key = bits.trailing_zeros() as usize / 2;
            out.kept[head * out.stride + out.counts[head]] = u32::from(levels[key]) << 16 | (first + key) as u32;
            out.counts[head] += 1;
            bits &= bits - 1;
        }
    }
    _mm256_andnot_si256(reached, level)
}

/// All ones in the lanes of the keys whose bit is set.
#[inline]
#[target_feature(enable = "avx2")]
fn searched(word: u16) -> __m256i {
    let bits = _mm256_setr_epi16(
        1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768,
    );
    _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(word as i16), bits), bits)
}

/// Levels of sixteen products in the order of the keys.
#[inline]
#[target_feature(enable = "avx2")]
fn finish(mut product: __m256i, map: Map, mask: __m256i) -> __m256i {
    for _ in 0..map.doubled {
        product = _mm256_adds_epi16(product, product);
    }
    let scaled = _mm256_mulhrs_epi16(product, _mm256_set1_epi16(map.factor));
    let level = _mm256_adds_epi16(scaled, _mm256_set1_epi16(map.offset));
    let level = _mm256_max_epi16(level, _mm256_set1_epi16(LOWEST));
    let level = _mm256_min_epi16(level, _mm256_set1_epi16(HIGHEST));
    _mm256_and_si256(level, mask)
}

/// Weights of the even keys plus those of the odd.
#[inline]
#[target_feature(enable = "avx2")]
fn weights(level: __m256i) -> __m256 {
    let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(level));
    let odd = _mm256_castsi256_ps(_mm256_and_si256(level, _mm256_set1_epi32(0xffff_0000_u32 as i32)));
    _mm256_add_ps(even, odd)
}

/// Lane l + lane l+4, then l + l+2, then l + l+1.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
}
