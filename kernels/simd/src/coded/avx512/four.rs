//! Four groups at a time: where they lie, levels of their products, sums of weights, and what is kept.

use std::arch::x86_64::*;

use super::super::{
    Call, GROUP, Places, RUN_GROUPS, SLOTS,
    queries::{AVERAGE, DOUBLED_MAX, HIGHEST, LOWEST, REACH_MAX, ROUNDS},
};

/// Iterations whose codes are asked for before they are needed.
const AHEAD: usize = 2;

/// Where four groups lie, the last again where there are fewer.
pub(super) struct Four {
    pub(super) at: [usize; RUN_GROUPS],
    /// Those a few iterations on.
    pub(super) next: [usize; RUN_GROUPS],
    /// Of each, its first key.
    pub(super) keys: [u32; RUN_GROUPS],
    pub(super) steps: __m128,
    /// Which keys are searched, of two groups each; none of a group that is there again.
    pub(super) words: [u32; 2],
}

impl Four {
    /// From the place `first` on, which is one.
    ///
    /// # Safety
    /// All places are groups of the keys.
    #[inline(always)]
    pub(super) unsafe fn new(call: &Call<'_>, places: impl Places, first: usize) -> Self {
        let (len, on) = (places.len(), first + AHEAD * RUN_GROUPS);
        let at: [usize; RUN_GROUPS] = if first + RUN_GROUPS <= len {
            std::array::from_fn(|i| places.group(first + i))
        } else {
            std::array::from_fn(|i| places.group((first + i).min(len - 1)))
        };
        let next = if on + RUN_GROUPS <= len {
            std::array::from_fn(|i| places.group(on + i))
        } else {
            at
        };
        let (steps, masks) = (call.keys.steps, call.keys.masks);
        // SAFETY: this function's own contract, and SSE is in every x86-64 processor.
        let (steps, mut words) = unsafe {
            let step = |i: usize| *steps.get_unchecked(at[i]);
            let word = |i: usize| u32::from(*masks.get_unchecked(at[i]));
            let words = [word(0) | word(1) << 16, word(2) | word(3) << 16];
            (_mm_setr_ps(step(0), step(1), step(2), step(3)), words)
        };
        if first + RUN_GROUPS > len {
            let there = u64::MAX >> (GROUP * (first + RUN_GROUPS - len));
            words = [words[0] & there as u32, words[1] & (there >> 32) as u32];
        }
        Self {
            at,
            next,
            keys: at.map(|at| (call.first + at * GROUP) as u32),
            steps,
            words,
        }
    }
}

/// What turns products of each head into levels, for the steps that the groups at hand have: a 32-bit lane per head and group.
pub(super) struct Maps {
    /// Of [`super::super::Weights`].
    units: __m512,
    rests: __m512,
    reaches: __m512i,
    steps: __m128,
    /// The groups have one step, as those of a block do.
    one: bool,
    /// As [`super::super::Map`]'s, of which they are lower halves.
    doubled: [i32; 16],
    factor: [i32; 16],
    offset: [i32; 16],
    /// Some level may lie beyond an end of the scale.
    wide: bool,
    /// Of two groups' products, the lower halves in the order of their keys. A value, since a compiler that knew it would make
    /// several instructions of the one that it takes.
    order: __m512i,
}

impl Maps {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(call: &Call<'_>) -> Self {
        let (mut units, mut rests, mut reaches) = ([0.0; 16], [0.0; 16], [0; 16]);
        for (head, weights) in call.heads.iter().enumerate() {
            let lanes = head * RUN_GROUPS..(head + 1) * RUN_GROUPS;
            units[lanes.clone()].fill(weights.unit);
            rests[lanes.clone()].fill(weights.rest);
            reaches[lanes].fill(weights.reach);
        }
        // SAFETY: each load covers the sixteen elements of its array.
        let (units, rests, reaches) = unsafe {
            (
                _mm512_loadu_ps(units.as_ptr()),
                _mm512_loadu_ps(rests.as_ptr()),
                _mm512_loadu_si512(reaches.as_ptr().cast()),
            )
        };
        Self {
            units,
            rests,
            reaches,
            steps: _mm_set1_ps(f32::NAN),
            one: false,
            doubled: [0; 16],
            factor: [0; 16],
            offset: [0; 16],
            wide: false,
            order: std::hint::black_box(order()),
        }
    }

    /// For groups of these steps. Blocks have steps of their own, so they may be new ones at each iteration.
    #[inline(always)]
    pub(super) unsafe fn follow(&mut self, steps: __m128) {
        // SAFETY: SSE is in every x86-64 processor; the rest is this function's own contract.
        unsafe {
            if _mm_movemask_ps(_mm_cmpeq_ps(steps, self.steps)) != 0b1111 {
                self.change(steps);
            }
        }
    }

    /// [`super::super::Map::new`] of each head and group.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,popcnt")]
    fn change(&mut self, steps: __m128) {
        self.steps = steps;
        self.one = _mm_movemask_ps(_mm_cmpeq_ps(steps, _mm_broadcastss_ps(steps))) == 0b1111;
        let round = |x: __m512| {
            let moved = _mm512_castps_si512(_mm512_add_ps(x, _mm512_set1_ps(ROUNDS)));
            _mm512_sub_epi32(moved, _mm512_set1_epi32(ROUNDS.to_bits() as i32))
        };
        let power = |exponent: __m512i| {
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
                exponent,
                _mm512_set1_epi32(127),
            )))
        };
        let unit = _mm512_mul_ps(self.units, _mm512_broadcast_f32x4(steps));
        let exponent = _mm512_srli_epi32::<23>(_mm512_castps_si512(unit));
        let doubled = _mm512_max_epi32(
            _mm512_sub_epi32(exponent, _mm512_set1_epi32(126)),
            _mm512_setzero_si512(),
        );
        let doubled = _mm512_min_epi32(doubled, _mm512_set1_epi32(DOUBLED_MAX));
        let share = power(_mm512_sub_epi32(_mm512_set1_epi32(15), doubled));
        let factor = _mm512_min_ps(_mm512_mul_ps(unit, share), _mm512_set1_ps(32767.0));
        let back = power(_mm512_sub_epi32(doubled, _mm512_set1_epi32(15)));
        let rest = round(_mm512_mul_ps(_mm512_mul_ps(self.rests, factor), back));
        let factor = round(factor);
        let moved = _mm512_sub_epi32(_mm512_set1_epi32(15), doubled);
        let reach = _mm512_srlv_epi32(_mm512_mullo_epi32(self.reaches, factor), moved);
        self.wide = _mm512_cmpgt_epi32_mask(reach, _mm512_set1_epi32(REACH_MAX)) != 0;
        let offset = _mm512_sub_epi32(_mm512_set1_epi32(AVERAGE), rest);
        for (lanes, out) in [
            (doubled, &mut self.doubled),
            (factor, &mut self.factor),
            (offset, &mut self.offset),
        ] {
            // SAFETY: the store covers the sixteen elements of the array.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), lanes) };
        }
        // From memory numbers get into whole registers with least work; a compiler would take them from registers if it could.
        std::hint::black_box(self);
    }

    /// Levels of each head's products in the order of the keys, two groups a register; 0 for keys that are not searched.
    #[inline(always)]
    pub(super) unsafe fn levels<const H: usize>(
        &self,
        products: &[[__m512i; RUN_GROUPS]; H],
        words: [u32; 2],
    ) -> [[__m512i; 2]; H] {
        // SAFETY: this function's own contract.
        unsafe {
            let mut levels = [[_mm512_setzero_si512(); 2]; H];
            if self.one && !self.wide && words == [u32::MAX; 2] {
                for (head, levels) in levels.iter_mut().enumerate() {
                    let lane = head * RUN_GROUPS;
                    let doubled = _mm_cvtsi32_si128(self.doubled[lane]);
                    let factor = _mm512_set1_epi16(self.factor[lane] as i16);
                    let offset = _mm512_set1_epi16(self.offset[lane] as i16);
                    for (pair, level) in levels.iter_mut().enumerate() {
                        let product = self.lower(&products[head], pair);
                        let scaled = _mm512_mulhrs_epi16(_mm512_sll_epi16(product, doubled), factor);
                        *level = _mm512_adds_epi16(scaled, offset);
                    }
                }
            } else {
                for (head, levels) in levels.iter_mut().enumerate() {
                    for (pair, level) in levels.iter_mut().enumerate() {
                        let lane = head * RUN_GROUPS + pair * 2;
                        let doubled = halves(&self.doubled, lane);
                        // What is clamped would have come out at the end of the scale.
                        let most = _mm512_srlv_epi16(_mm512_set1_epi16(i16::MAX), doubled);
                        let least = _mm512_xor_si512(most, _mm512_set1_epi16(-1));
                        let product = self.lower(&products[head], pair);
                        let product = _mm512_min_epi16(_mm512_max_epi16(product, least), most);
                        let scaled =
                            _mm512_mulhrs_epi16(_mm512_sllv_epi16(product, doubled), halves(&self.factor, lane));
                        let near = _mm512_adds_epi16(scaled, halves(&self.offset, lane));
                        let near = _mm512_max_epi16(near, _mm512_set1_epi16(LOWEST));
                        *level = _mm512_maskz_min_epi16(words[pair], near, _mm512_set1_epi16(HIGHEST));
                    }
                }
            }
            levels
        }
    }

    /// Of two groups' products the lower halves, which are all of them, in the order of the keys.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn lower(&self, products: &[__m512i; RUN_GROUPS], pair: usize) -> __m512i {
        _mm512_permutex2var_epi16(products[pair * 2], self.order, products[pair * 2 + 1])
    }
}

/// The number of a lane for a group, that of the next lane for the next group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn halves(lanes: &[i32; 16], lane: usize) -> __m512i {
    let first = _mm512_set1_epi16(lanes[lane] as i16);
    _mm512_mask_set1_epi16(first, 0xffff_0000, lanes[lane + 1] as i16)
}

/// Of two groups' products, the lower halves in the order of their keys.
#[inline]
#[target_feature(enable = "avx512f")]
fn order() -> __m512i {
    const ORDER: [i16; 2 * GROUP] = {
        let mut order = [0; 2 * GROUP];
        let mut key = 0;
        while key < GROUP {
            // Slots are to keys as keys are to slots.
            order[key] = 2 * SLOTS[key] as i16;
            order[GROUP + key] = 32 + 2 * SLOTS[key] as i16;
            key += 1;
        }
        order
    };
    // SAFETY: the load covers the 32 elements of the constant.
    unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) }
}

/// Weights of the even keys plus those of the odd.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn weigh(level: __m512i) -> __m512 {
    let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(level));
    let odd = _mm512_castsi512_ps(_mm512_and_si512(level, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
    _mm512_add_ps(even, odd)
}

/// Even groups and odd ones, then pair l + pair l+4, l + l+2, l + l+1.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx2")]
pub(super) fn sum(x: __m512) -> f32 {
    super::super::avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x)))
}

/// Of each group, pair l + pair l+4, then l + l+2, l + l+1.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
pub(super) fn sum_apart(pairs: [__m512; 2]) -> [f32; RUN_GROUPS] {
    let four = _mm512_add_ps(
        _mm512_shuffle_f32x4::<0b10_00_10_00>(pairs[0], pairs[1]),
        _mm512_shuffle_f32x4::<0b11_01_11_01>(pairs[0], pairs[1]),
    );
    let two = _mm512_add_ps(four, _mm512_permute_ps::<0b01_00_11_10>(four));
    let one = _mm512_add_ps(two, _mm512_permute_ps::<0b10_11_00_01>(two));
    let mut sums = [0.0; RUN_GROUPS];
    // SAFETY: the store covers the four elements of the array.
    unsafe {
        _mm_storeu_ps(
            sums.as_mut_ptr(),
            _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, one)),
        )
    };
    sums
}

/// Writes levels.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store(levels: [__m512i; 2], out: &mut [u16; RUN_GROUPS * GROUP]) {
    // SAFETY: both stores lie in the 64 levels of the reference.
    unsafe {
        _mm512_storeu_si512(out.as_mut_ptr().cast(), levels[0]);
        _mm512_storeu_si512(out.as_mut_ptr().add(2 * GROUP).cast(), levels[1]);
    }
}

/// Levels of four groups, and more, so that one behind the last may be read.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Near(pub(super) [u16; (RUN_GROUPS + 2) * GROUP]);

impl Near {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Self([0; (RUN_GROUPS + 2) * GROUP])
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn fill(&mut self, levels: [__m512i; 2]) {
        if let Some(own) = self.0.first_chunk_mut() {
            store(levels, own);
        }
    }
}

/// Writes what is `reached` of four groups whose first keys are `keys`, and answers where the next goes.
///
/// # Safety
/// There is room for as many as are reached, and for a register more.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi1,popcnt")]
pub(super) unsafe fn keep<P: Places>(
    near: &Near,
    reached: u64,
    keys: &[u32; RUN_GROUPS],
    mut to: *mut u32,
) -> *mut u32 {
    /// So many are written one by one, whether there are as many or not: that takes nothing from the products, which need
    /// other parts of the core, and branches are guessed right.
    const SOME: u32 = 4;
    let count = reached.count_ones();
    if count <= SOME {
        let mut left = reached;
        let levels = std::hint::black_box(near.0.as_ptr());
        for at in 0..SOME as usize {
            // Of none, one behind the last.
            let key = left.trailing_zeros() as usize;
            left &= left.wrapping_sub(1);
            let index = if P::APART {
                keys[key / GROUP % RUN_GROUPS] as u16 + (key % GROUP) as u16
            } else {
                (keys[0] as u16).wrapping_add(key as u16)
            };
            // SAFETY: this function's own contract; halves of a number, the lower one first.
            unsafe {
                let halves = to.add(at).cast::<u16>();
                *halves = index;
                *halves.add(1) = *levels.add(key);
            }
        }
        // SAFETY: this function's own contract.
        return unsafe { to.add(count as usize) };
    }
    let index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (at, (levels, first)) in near.0.as_chunks::<GROUP>().0.iter().zip(keys).enumerate() {
        let own = _mm512_add_epi32(index, _mm512_set1_epi32(*first as i32));
        let these = (reached >> (at * GROUP)) as u16;
        // SAFETY: the load covers sixteen levels, the rest is this function's own contract; compressed in a register, since to memory
        // it takes far longer.
        unsafe {
            let level = _mm512_cvtepu16_epi32(_mm256_loadu_si256(levels.as_ptr().cast()));
            let found = _mm512_or_si512(_mm512_slli_epi32::<16>(level), own);
            _mm512_storeu_si512(to.cast(), _mm512_maskz_compress_epi32(these, found));
            to = to.add(these.count_ones() as usize);
        }
    }
    to
}
