//! Keys coded in nibbles: scores of every query against every key from 16 or 32 bytes a key.
//!
//! A key is `nibbles` (32 or 64) unsigned 4-bit digits, a query as many signed 8-bit weights; their product is a 16-bit whole
//! number. Queries are scaled so that no sum can leave 16 bits, whatever the digits: the sum of the weights' magnitudes is
//! at most 2133. So the scan is whole numbers until the very end, and has equal bits on every instruction set.
//!
//! **Layout.** Sixteen keys are a *group* of `nibbles / 8` lines of 64 bytes. A line has 16 slots of 4 bytes; slot `s` belongs
//! to key [`SLOTS`]`[s]`, which is the order that 256-bit horizontal adds undo. Byte `i` of a slot of line `j` holds digit
//! `4j + i` in its low half and digit `nibbles/2 + 4j + i` in its high half.
//!
//! **Scores** are whole numbers of 1/128 of a power of two: [`Level`] says what they mean. They are the upper halves of f32
//! bit patterns as well, so that reading them as f32 gives `2^score` within 3 % or so (Schraudolph 1999), with the error
//! centred: sums of weights cost two adds per sixteen keys.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;
mod select;

pub use self::select::at_least;
use crate::isa::Isa;

/// Keys of a group.
pub const GROUP: usize = 16;
/// Key of each slot of a line.
pub const SLOTS: [usize; GROUP] = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15];
/// A query's weights may sum up to this in magnitude: times 15 it stays below 2^15.
const MAGNITUDE_MAX: f32 = 2133.0;
/// Level of the average key, whose product is `middle`: 60 powers of two below weight 1, less the centre of the error.
const AVERAGE: i32 = (127 - 60) * 128 - 7;
/// Levels are at most this: a weight of 2^100, 160 powers of two above the average key. Sums of thousands stay finite.
const HIGHEST: i16 = (127 + 100) * 128;
/// Levels are at least this (a weight of 2^-126) where a key is searched, and 0 where it is not.
const LOWEST: i16 = 128;
/// Query rows that share unpacked digits.
const STRIP: usize = 4;

/// A score as the scan writes it: `128 * (score - average) + c`, where `average` is that of a key whose coordinates are all 0;
/// 0 for a key that is not searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(pub u16);

impl Level {
    /// Base-2 score above the average key's.
    pub fn above_average(self) -> f32 {
        (i32::from(self.0) - AVERAGE) as f32 / 128.0
    }

    /// The lowest level whose score is `above` or higher, and searched at all.
    pub fn at_least(above: f32) -> Self {
        let level = (above.clamp(-1000.0, 1000.0) * 128.0).ceil() as i32 + AVERAGE;
        Self(level.clamp(i32::from(LOWEST), i32::from(HIGHEST)) as u16)
    }

    /// About `2^(score - average)`, times [`Level::UNIT`].
    pub fn weight(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    /// Base-2 logarithm of the weight of the average key.
    pub const UNIT: f32 = -60.0;
}

/// Queries as the scan wants them.
#[derive(Clone, Debug, Default)]
pub struct CodedQueries {
    nibbles: usize,
    /// Four weights, eight times over, `[heads, nibbles / 4]`: low halves of line 0, high halves of line 0, and so on.
    lanes: Vec<Lane>,
    heads: Vec<Weights>,
}

#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
struct Lane([i8; 32]);

#[derive(Clone, Copy, Debug)]
struct Weights {
    /// Powers of two (times 128) that one unit of the product is worth where the step is 1.
    unit: f32,
    /// Half of 15 times the sum of the weights: the product of the average key.
    middle: f32,
}

impl CodedQueries {
    /// Starts anew for keys of `nibbles` digits.
    ///
    /// # Panics
    /// If `nibbles` is neither 32 nor 64.
    pub fn begin(&mut self, nibbles: usize) {
        assert!(nibbles == 32 || nibbles == 64, "coded: 32 or 64 digits a key");
        self.nibbles = nibbles;
        self.lanes.clear();
        self.heads.clear();
    }

    /// Adds a query: a digit `c` of a key stands for `(c - 7.5) * step`, and what is sought is the sum of `weights[i]` times
    /// that, a base-2 score. Weights that are not finite count as 0.
    ///
    /// # Panics
    /// If there are not as many weights as digits.
    pub fn push(&mut self, weights: &[f32]) {
        assert_eq!(weights.len(), self.nibbles, "coded: as many weights as digits");
        let finite = |weight: f32| if weight.is_finite() { weight } else { 0.0 };
        let highest = weights.iter().fold(0.0, |high: f32, w| high.max(finite(*w).abs()));
        let magnitude: f32 = weights.iter().map(|w| finite(*w).abs()).sum();
        // Rounding adds at most half per weight.
        let room = MAGNITUDE_MAX - self.nibbles as f32 / 2.0;
        let unit = (highest / 127.0).max(magnitude / room);
        let usable = unit.is_normal();
        let whole = |weight: f32| {
            if usable {
                (finite(weight) / unit).round_ties_even() as i8
            } else {
                0
            }
        };
        let sum: i32 = weights.iter().map(|w| i32::from(whole(*w))).sum();
        for line in 0..self.nibbles / 8 {
            for first in [4 * line, self.nibbles / 2 + 4 * line] {
                self.lanes
                    .push(Lane(std::array::from_fn(|i| whole(weights[first + i % 4]))));
            }
        }
        self.heads.push(Weights {
            unit: if usable { unit * 128.0 } else { 0.0 },
            middle: 7.5 * sum as f32,
        });
    }

    /// Queries added.
    pub fn len(&self) -> usize {
        self.heads.len()
    }

    /// No queries.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// Whether scores of keys with this step are within what levels can tell apart: a span of 512 powers of two.
    pub fn fits(&self, head: usize, step: f32) -> bool {
        self.heads[head].unit * step * 32768.0 <= 32767.0
    }
}

/// Coded keys of one block.
#[derive(Clone, Copy, Debug)]
pub struct CodedKeys<'a> {
    /// Whole groups; see the module.
    pub codes: &'a [u8],
    /// What a digit is worth, at least 0 and finite.
    pub step: f32,
    /// A bit per key, a word per group: whether it is searched. `None` if all are.
    pub mask: Option<&'a [u16]>,
}

/// Where a block's scores go.
#[derive(Debug)]
pub struct Levels<'a> {
    /// [`Level`]s, `[heads][stride]`; the block's are the first `groups * 16` of each row.
    pub levels: &'a mut [u16],
    /// Elements from one head's levels to the next's.
    pub stride: usize,
    /// Sums of [`Level::weight`] over runs of `run` groups, `[heads][sums_stride]`; the block's are the first of each row.
    pub sums: &'a mut [f32],
    /// Elements from one head's sums to the next's.
    pub sums_stride: usize,
    /// Groups per sum.
    pub run: usize,
}

/// What a strip of queries does to a block; shapes are checked.
#[derive(Clone, Copy)]
struct Call<'a> {
    keys: CodedKeys<'a>,
    lines: usize,
    groups: usize,
    run: usize,
    lanes: &'a [Lane],
    heads: &'a [Weights],
}

/// Multiplier and offset that turn a product into a level.
#[derive(Clone, Copy)]
struct Map {
    factor: i16,
    offset: i16,
}

impl Map {
    fn new(weights: Weights, step: f32) -> Self {
        // Rounds to nearest without a call: both stay far below 2^22.
        let round = |x: f32| (x + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
        let unit = weights.unit * step;
        let factor = (unit * 32768.0).min(32767.0);
        Self {
            factor: round(factor) as i16,
            offset: (AVERAGE - round(weights.middle * (factor / 32768.0))) as i16,
        }
    }
}

/// Scores the queries `heads` against a block.
///
/// # Panics
/// If codes are not whole groups, the mask is not a word per group, the step is negative or not finite, or the room for
/// levels and sums is too small.
pub fn coded_scores(queries: &CodedQueries, heads: std::ops::Range<usize>, keys: CodedKeys<'_>, out: &mut Levels<'_>) {
    coded_scores_on(Isa::active(), queries, heads, keys, out);
}

fn coded_scores_on(
    isa: Isa,
    queries: &CodedQueries,
    heads: std::ops::Range<usize>,
    keys: CodedKeys<'_>,
    out: &mut Levels<'_>,
) {
    let group_bytes = queries.nibbles / 2 * GROUP;
    assert!(
        group_bytes > 0 && keys.codes.len().is_multiple_of(group_bytes),
        "coded: codes are whole groups"
    );
    assert!(
        keys.step >= 0.0 && keys.step.is_finite(),
        "coded: a step is finite and at least 0"
    );
    let groups = keys.codes.len() / group_bytes;
    assert!(
        out.run > 0 && keys.mask.is_none_or(|mask| mask.len() == groups),
        "coded: a word of the mask per group"
    );
    let sums = groups.div_ceil(out.run);
    let room = |len: usize, stride: usize, each: usize| heads.is_empty() || (heads.len() - 1) * stride + each <= len;
    assert!(
        room(out.levels.len(), out.stride, groups * GROUP) && room(out.sums.len(), out.sums_stride, sums),
        "coded: room for levels and sums of each head"
    );
    let lanes = queries.nibbles / 4;
    for (strip, first) in heads.clone().step_by(STRIP).enumerate() {
        let last = (first + STRIP).min(heads.end);
        let call = Call {
            keys,
            lines: queries.nibbles / 8,
            groups,
            run: out.run,
            lanes: &queries.lanes[first * lanes..last * lanes],
            heads: &queries.heads[first..last],
        };
        let levels = &mut out.levels[strip * STRIP * out.stride..];
        let totals = &mut out.sums[strip * STRIP * out.sums_stride..];
        match isa {
            // SAFETY: an `Isa` that reaches a kernel was detected; room for each head was asserted above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::strip(call, levels, out.stride, totals, out.sums_stride) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::strip(call, levels, out.stride, totals, out.sums_stride) },
            _ => scalar::strip(call, levels, out.stride, totals, out.sums_stride),
        }
    }
}

#[cfg(test)]
mod tests;
