//! Keys coded in nibbles: scores of every query against every key from 16 or 32 bytes a key.
//!
//! A key is `nibbles` (32 or 64) unsigned 4-bit digits, a query as many signed 8-bit weights; their product, less that of the
//! average key, is a 16-bit whole number. Queries are scaled so that no sum can leave 16 bits, whatever the digits: the sum of the
//! weights' magnitudes is at most 2133. So the scan is whole numbers until the very end, and has equal bits on every instruction set.
//!
//! A unit of the product may be worth less than a level or, where a digit of a key moves a score by several powers of two, more:
//! the product is then doubled so many times that a multiplier below 1 makes it levels. What that takes out of 16 bits is
//! further above the average key than [`Level::HIGHEST`] and stays there, or below [`Level::LOWEST`].
//!
//! **Layout.** Sixteen keys are a *group* of `nibbles / 8` lines of 64 bytes. A line has 16 slots of 4 bytes; slot `s` belongs
//! to key [`SLOTS`]`[s]`, which is the order that 256-bit horizontal adds undo. Byte `i` of a slot of line `j` holds digit
//! `4j + i` in its low half and digit `nibbles/2 + 4j + i` in its high half.
//!
//! **Leading lines.** A query of fewer digits, 8 a line, is scored by the first lines of each group, and the others are not read:
//! half of its digits are a key's first ones, the others those from `nibbles/2` on.
//!
//! **Scores** are whole numbers of 1/128 of a power of two: [`Level`] says what they mean. They are the upper halves of f32
//! bit patterns as well, so that reading them as f32 gives `2^score` within 3 % or so (Schraudolph 1999), with the error
//! centred: sums of weights cost two adds per sixteen keys.
//!
//! **A scan** is given a floor per query and keeps, of keys at or above it, what they are; of those below it, the sum of their
//! weights per run of four groups. Levels of all keys are never written: for many queries they would be more bytes than the
//! codes.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use crate::isa::Isa;

/// Keys of a group.
pub const GROUP: usize = 16;
/// Groups that share a sum of weights.
pub const RUN_GROUPS: usize = 4;
/// Key of each slot of a line.
pub const SLOTS: [usize; GROUP] = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15];
/// A query's weights may sum up to this in magnitude: times 15 it stays below 2^15.
const MAGNITUDE_MAX: f32 = 2133.0;
/// Level of the average key, whose product is `middle`: 60 powers of two below weight 1, less the centre of the error.
const AVERAGE: i32 = (127 - 60) * 128 - 7;
/// Levels are at most this: 127 powers of two above the average key. A product that leaves 16 bits is above it.
const HIGHEST: i16 = (127 - 60 + 127) * 128;
/// Levels are at least this (a weight of 2^-126) where a key is searched, and 0 where it is not.
const LOWEST: i16 = 128;
/// A product is doubled up to so many times.
const DOUBLED_MAX: i32 = 5;
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

    /// Of a key that is searched, the lowest.
    pub const LOWEST: Self = Self(LOWEST as u16);

    /// Of a key that is searched, the highest; its score may be any above.
    pub const HIGHEST: Self = Self(HIGHEST as u16);

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
    /// The product of the average key is half of 15 times the sum of the weights: less the whole part of that, sums begin here.
    start: i32,
    /// The other part, 0 or a half.
    rest: f32,
}

impl CodedQueries {
    /// Starts anew for keys of `nibbles` digits, or for the leading lines of keys of more.
    ///
    /// # Panics
    /// If `nibbles` is not 8, 16, 32 or 64.
    pub fn begin(&mut self, nibbles: usize) {
        assert!(matches!(nibbles, 8 | 16 | 32 | 64), "coded: 8 to 64 digits a query");
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
            start: -((15 * sum) >> 1),
            rest: if sum % 2 == 0 { 0.0 } else { 0.5 },
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

    /// Whether levels of keys with this step are right: a digit moves a score by up to some 30 powers of two. Such scores may still
    /// lie beyond [`Level::HIGHEST`].
    pub fn fits(&self, head: usize, step: f32) -> bool {
        self.heads[head].unit * step < (1 << DOUBLED_MAX) as f32
    }
}

/// A line of codes; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Line(pub [u8; 64]);

/// Coded keys, of one block or of many.
#[derive(Clone, Copy, Debug)]
pub struct CodedKeys<'a> {
    /// Whole groups.
    pub codes: &'a [Line],
    /// What a digit is worth, per group; at least 0 and finite.
    pub steps: &'a [f32],
    /// A bit per key, a word per group: whether it is searched.
    pub masks: &'a [u16],
}

/// What a scan finds.
#[derive(Debug)]
pub struct Found<'a> {
    /// Lowest level that is kept, per head.
    pub floors: &'a [Level],
    /// Keys at or above it, rising: level in the upper half, index in the lower. `[heads][stride]`
    pub kept: &'a mut [u32],
    /// Elements from one head's to the next's.
    pub stride: usize,
    /// How many of each head's are there already; counted on.
    pub counts: &'a mut [usize],
    /// Sums of [`Level::weight`] of the searched keys below the floor, per run. `[heads][sums_stride]`
    pub sums: &'a mut [f32],
    /// Elements from one head's sums to the next's.
    pub sums_stride: usize,
    /// Few keys are expected to reach a floor, one in a hundred or less: looking whether any does is then faster than storing what
    /// does. Nothing else depends on it.
    pub few: bool,
}

/// Room that a scan wants in [`Found::kept`] of each head behind what is there, for keys of so many groups.
pub const fn room_for(groups: usize) -> usize {
    (groups + 1) * GROUP
}

/// What a strip of queries does to keys; shapes are checked.
#[derive(Clone, Copy)]
struct Call<'a> {
    keys: CodedKeys<'a>,
    /// Lines of a group that are read.
    lines: usize,
    /// Lines of a group.
    stride: usize,
    lanes: &'a [Lane],
    heads: &'a [Weights],
    /// Index of the first key.
    first: usize,
}

/// What turns a product into a level: it is doubled, multiplied by a share of 2^15, and moved.
#[derive(Clone, Copy, Default)]
struct Map {
    doubled: i32,
    factor: i16,
    offset: i16,
}

impl Map {
    #[inline(always)]
    fn new(weights: Weights, step: f32) -> Self {
        // Rounds to nearest without a call: both stay far below 2^22.
        let round = |x: f32| (x + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
        let unit = weights.unit * step;
        // By the exponent: a share of at least a half wherever it is doubled at all.
        let doubled = ((unit.to_bits() >> 23) as i32 - 126).clamp(0, DOUBLED_MAX);
        let power = |exponent: i32| f32::from_bits(((127 + exponent) as u32) << 23);
        let factor = (unit * power(15 - doubled)).min(32767.0);
        Self {
            doubled,
            factor: round(factor) as i16,
            offset: (AVERAGE - round(weights.rest * factor * power(doubled - 15))) as i16,
        }
    }
}

/// Scans keys for the queries `heads`. `first` is the index of the first key, of which [`Found::kept`] says where in its unit
/// of 65,536 keys a key is.
///
/// Of sums the order is: per run, of even groups and of odd ones apart, the pairs of neighbours; both; then pair `l` and
/// `l + 4`, `l + 2`, `l + 1`.
///
/// # Panics
/// If codes are not whole groups of as many digits as queries have, steps and masks are not one per group, keys do not lie in one
/// unit, or the room for what is found is too small ([`room_for`]).
pub fn coded_scan(
    queries: &CodedQueries,
    heads: std::ops::Range<usize>,
    keys: CodedKeys<'_>,
    first: usize,
    out: &mut Found<'_>,
) {
    coded_scan_on(Isa::active(), queries, heads, keys, first, out);
}

/// As [`coded_scan`], of the groups of `list` alone, which rise. Their sums are one per listed group: `[heads][sums_stride]`.
///
/// Of sums the order is: the pairs of neighbours; then pair `l` and `l + 4`, `l + 2`, `l + 1`.
///
/// # Panics
/// As [`coded_scan`], and if a group that is listed is none of the keys.
pub fn coded_scan_listed(
    queries: &CodedQueries,
    heads: std::ops::Range<usize>,
    keys: CodedKeys<'_>,
    first: usize,
    list: &[u32],
    out: &mut Found<'_>,
) {
    coded_scan_listed_on(Isa::active(), queries, heads, keys, (first, list), out);
}

fn coded_scan_listed_on(
    isa: Isa,
    queries: &CodedQueries,
    heads: std::ops::Range<usize>,
    keys: CodedKeys<'_>,
    (first, list): (usize, &[u32]),
    out: &mut Found<'_>,
) {
    let (groups, lines) = check(queries, &keys);
    assert!(
        list.iter().all(|group| (*group as usize) < groups),
        "coded: groups of the keys are listed"
    );
    check_scan(queries, lines, first % UNIT + groups * GROUP);
    check_room(heads.len(), (list.len(), list.len()), out);
    let _ = isa;
    each_strip(queries, heads, keys, first, out, |call, found| {
        scalar::scan_listed(call, list, found);
    });
}

fn coded_scan_on(
    isa: Isa,
    queries: &CodedQueries,
    heads: std::ops::Range<usize>,
    keys: CodedKeys<'_>,
    first: usize,
    out: &mut Found<'_>,
) {
    let (groups, lines) = check(queries, &keys);
    check_scan(queries, lines, first % UNIT + groups * GROUP);
    check_room(heads.len(), (groups, groups.div_ceil(RUN_GROUPS)), out);
    each_strip(queries, heads, keys, first, out, |call, found| match isa {
        // SAFETY: an `Isa` that reaches a kernel was detected; shapes and room were asserted above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::scan(call, found) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::scan(call, found) },
        _ => scalar::scan(call, found),
    });
}

/// # Panics
/// If queries are not for whole keys of so many lines, or the last key lies beyond the unit.
fn check_scan(queries: &CodedQueries, lines: usize, end: usize) {
    assert!(
        lines * 8 == queries.nibbles && lines >= 4,
        "coded: a scan reads whole keys"
    );
    assert!(end <= UNIT, "coded: keys of one unit of {UNIT}");
}

/// # Panics
/// If there is no room for what `count` heads may find in so many groups, and so many sums of each.
fn check_room(count: usize, (groups, sums): (usize, usize), out: &Found<'_>) {
    assert!(
        out.floors.len() == count && out.counts.len() == count,
        "coded: a floor and a count per head"
    );
    assert!(
        count == 0
            || (out.kept.len() >= count * out.stride
                && out.counts.iter().all(|count| count + room_for(groups) <= out.stride)
                && sums <= out.sums_stride
                && out.sums.len() >= (count - 1) * out.sums_stride + sums),
        "coded: room for what is found of each head"
    );
}

/// Calls `scan` for as many queries at a time as share unpacked digits.
fn each_strip<'a>(
    queries: &'a CodedQueries,
    heads: std::ops::Range<usize>,
    keys: CodedKeys<'a>,
    first: usize,
    out: &mut Found<'_>,
    mut scan: impl FnMut(Call<'a>, &mut Found<'_>),
) {
    for at in (0..heads.len()).step_by(STRIP) {
        let strip = STRIP.min(heads.len() - at);
        let call = Call::new(queries, heads.start + at..heads.start + at + strip, keys, first % UNIT);
        scan(
            call,
            &mut Found {
                floors: &out.floors[at..at + strip],
                kept: &mut out.kept[at * out.stride..],
                stride: out.stride,
                counts: &mut out.counts[at..at + strip],
                sums: &mut out.sums[at * out.sums_stride..],
                sums_stride: out.sums_stride,
                few: out.few,
            },
        );
    }
}

/// Levels of keys for the queries `heads`, `[heads][stride]`: 0 for keys that are not searched. Queries may be of
/// the keys' leading lines.
///
/// # Panics
/// If codes are not whole groups, steps and masks are not one per group, or there is not room for the levels.
pub fn coded_levels(
    queries: &CodedQueries,
    heads: std::ops::Range<usize>,
    keys: CodedKeys<'_>,
    levels: &mut [u16],
    stride: usize,
) {
    coded_levels_on(Isa::active(), queries, heads, keys, levels, stride);
}

fn coded_levels_on(
    isa: Isa,
    queries: &CodedQueries,
    heads: std::ops::Range<usize>,
    keys: CodedKeys<'_>,
    levels: &mut [u16],
    stride: usize,
) {
    let (groups, _) = check(queries, &keys);
    assert!(
        heads.is_empty() || (groups * GROUP <= stride && levels.len() >= heads.len() * stride),
        "coded: room for the levels of each head"
    );
    for (head, levels) in heads.zip(levels.chunks_mut(stride.max(1))) {
        let call = Call::new(queries, head..head + 1, keys, 0);
        match isa {
            // SAFETY: an `Isa` that reaches a kernel was detected, AVX-512 implies AVX2; shapes were asserted above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => unsafe { avx2::levels(call, levels) },
            _ => scalar::levels(call, levels),
        }
    }
}

/// Keys of a unit: indices in it have 16 bits.
pub const UNIT: usize = 1 << 16;

impl<'a> Call<'a> {
    fn new(queries: &'a CodedQueries, heads: std::ops::Range<usize>, keys: CodedKeys<'a>, first: usize) -> Self {
        let lanes = queries.nibbles / 4;
        Self {
            keys,
            lines: queries.nibbles / 8,
            stride: lines_of(queries, &keys),
            lanes: &queries.lanes[heads.start * lanes..heads.end * lanes],
            heads: &queries.heads[heads],
            first,
        }
    }
}

/// Lines of a group of keys.
fn lines_of(queries: &CodedQueries, keys: &CodedKeys<'_>) -> usize {
    keys.codes
        .len()
        .checked_div(keys.masks.len())
        .unwrap_or(queries.nibbles / 8)
}

/// Groups of the keys, whose shape is right, and lines of each.
fn check(queries: &CodedQueries, keys: &CodedKeys<'_>) -> (usize, usize) {
    let groups = keys.masks.len();
    assert!(
        keys.steps.len() == groups,
        "coded: a step and a word of the mask per group"
    );
    let (read, lines) = (queries.nibbles / 8, lines_of(queries, keys));
    assert!(
        read > 0 && lines.is_multiple_of(read) && keys.codes.len() == groups * lines,
        "coded: codes are whole groups"
    );
    (groups, lines)
}

#[cfg(test)]
mod tests;
