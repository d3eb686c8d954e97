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
mod queries;
mod scalar;

pub use queries::{CodedQueries, Level};
use queries::{HIGHEST, LOWEST, Lane, Map, Weights};

use crate::isa::Isa;

/// Keys of a group.
pub const GROUP: usize = 16;
/// Groups that share a sum of weights.
pub const RUN_GROUPS: usize = 4;
/// Key of each slot of a line.
pub const SLOTS: [usize; GROUP] = [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15];
/// Query rows that share unpacked digits.
const STRIP: usize = 4;

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

/// Which groups a scan takes, in which order.
trait Places: Copy {
    /// Whether each has a sum of its own.
    const APART: bool;

    fn len(&self) -> usize;

    /// Which group is at a place.
    fn group(&self, place: usize) -> usize;
}

/// So many groups, all of them.
#[derive(Clone, Copy)]
struct All(usize);

impl Places for All {
    const APART: bool = false;

    #[inline(always)]
    fn len(&self) -> usize {
        self.0
    }

    #[inline(always)]
    fn group(&self, place: usize) -> usize {
        place
    }
}

/// Those that are listed.
#[derive(Clone, Copy)]
struct Listed<'a>(&'a [u32]);

impl Places for Listed<'_> {
    const APART: bool = true;

    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    fn group(&self, place: usize) -> usize {
        self.0[place] as usize
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
    each_strip(queries, heads, keys, first, out, |call, found| {
        scan_places(isa, call, Listed(list), found);
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
    each_strip(queries, heads, keys, first, out, |call, found| {
        scan_places(isa, call, All(groups), found);
    });
}

fn scan_places(isa: Isa, call: Call<'_>, places: impl Places, out: &mut Found<'_>) {
    match isa {
        // SAFETY: an `Isa` that reaches a kernel was detected; shapes and room were asserted, and places are groups of the keys.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::scan(call, places, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::scan(call, places, out) },
        _ => scalar::scan(call, places, out),
    }
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
    if groups == 0 {
        return;
    }
    for (at, levels) in heads.clone().step_by(STRIP).zip(levels.chunks_mut(STRIP * stride)) {
        let call = Call::new(queries, at..heads.end.min(at + STRIP), keys, 0);
        match isa {
            // SAFETY: an `Isa` that reaches a kernel was detected; shapes and room were asserted above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::levels(call, levels, stride) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::levels(call, levels, stride) },
            _ => scalar::levels(call, levels, stride),
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
