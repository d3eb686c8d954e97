//! Bytes of a block's sketch.

use half::f16;
use kvasir_simd::{GROUP, Line, SLOTS, cast_f16, project, weigh_rows};

use crate::{HeadBasis, IndexError};

/// Directions that a basis has at least.
pub(super) const RANK: usize = 32;
/// Leading directions whose coordinates spread too far for one digit: keys that everyone attends to lie far out on them, and a
/// digit that stops at 2.5 deviations takes them for common ones. They have steps twice as wide and a second digit.
pub(super) const LEADING: usize = 2;
/// Keys per mean of values.
pub(super) const RUN: usize = 64;
/// Lines of 64 bytes that a group of keys has at most.
pub(super) const LINES_MAX: usize = 2 * RANK / 8;
/// Keys of a block at most.
const KEYS_MAX: usize = 256;
/// Keys of a block mostly.
const BLOCK_USUAL: usize = 64;
const HEADER: usize = 8;
const VERSION: u16 = 3;
/// Step of a uniform quantiser of 16 levels for a normal variable of unit variance.
const STEP: f32 = 0.335;

/// Bits per direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 16 bytes per key.
    Four,
    /// 32 bytes per key.
    Eight,
}

/// Shape of a sketch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SketchFormat {
    /// Elements per key and value.
    pub head_dim: usize,
    /// Bits per direction.
    pub width: Width,
    /// Whether the means of values are kept: what the tail of an attention is estimated with.
    pub values: bool,
}

impl SketchFormat {
    /// 16 bytes per key, with means of values.
    pub fn new(head_dim: usize) -> Self {
        Self {
            head_dim,
            width: Width::Four,
            values: true,
        }
    }

    pub(super) fn nibbles(self) -> usize {
        match self.width {
            Width::Four => RANK,
            Width::Eight => 2 * RANK,
        }
    }

    /// Directions kept of a key.
    pub(super) fn directions(self) -> usize {
        match self.width {
            Width::Four => RANK - LEADING,
            Width::Eight => RANK,
        }
    }

    /// Direction of digit `at` of a key, and whether it is the direction's second digit.
    ///
    /// Of 32 digits those of the first lines, eight a line, matter most: each [leading line](kvasir_simd::CodedQueries::begin) makes
    /// scores better. Of 64 they are upper digits, then lower ones.
    fn digit(self, at: usize) -> (usize, bool) {
        /// Digits before the second ones of the leading directions: those are the last of the first line.
        const FIRST: usize = 8 - LEADING;
        if self.width == Width::Eight {
            return (at % RANK, at >= RANK);
        }
        let (half, at) = (at / (RANK / 2), at % (RANK / 2));
        match at / 4 * 8 + half * 4 + at % 4 {
            rank @ 0..FIRST => (rank, false),
            rank @ FIRST..8 => (rank - FIRST, true),
            rank => (rank - LEADING, false),
        }
    }

    /// What the digits of a key are multiplied with for `along`, a query's weights per direction.
    pub(super) fn weigh_digits(self, along: &[f32], digits: &mut Vec<f32>) {
        digits.clear();
        digits.extend((0..self.nibbles()).map(|at| {
            let (direction, second) = self.digit(at);
            let wide = if direction < LEADING { 2.0 } else { 1.0 };
            along[direction] * wide / if second { 16.0 } else { 1.0 }
        }));
    }

    /// Of such weights those of the leading lines.
    pub(super) fn leading_digits(self, digits: &[f32], lines: usize) -> Vec<f32> {
        let (low, high) = digits.split_at(self.nibbles() / 2);
        [&low[..4 * lines], &high[..4 * lines]].concat()
    }

    /// Digits of a group of sixteen keys from their coordinates `z[direction][key]`, where one is worth `step`.
    pub(super) fn quantise(self, z: &[[f32; GROUP]], step: f32, codes: &mut [u8]) {
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        let mut digits = [[0_u8; GROUP]; 2 * RANK];
        let two = self.nibbles() - self.directions();
        for (at, digits) in digits.iter_mut().enumerate().take(self.nibbles()) {
            let (direction, second) = self.digit(at);
            let inverse = if direction < LEADING { 0.5 * inverse } else { inverse };
            for (digit, &z) in digits.iter_mut().zip(&z[direction]) {
                // A cast of a float saturates, and takes NaN to 0.
                *digit = if direction < two {
                    let code = (z * inverse * 16.0 + 128.0).clamp(0.0, 255.0) as u8;
                    if second { code & 15 } else { code >> 4 }
                } else {
                    (z * inverse + 8.0).clamp(0.0, 15.0) as u8
                };
            }
        }
        let half = codes.len() / GROUP;
        for (line, bytes) in codes.chunks_exact_mut(64).enumerate() {
            for (slot, key) in SLOTS.into_iter().enumerate() {
                for i in 0..4 {
                    bytes[slot * 4 + i] = digits[line * 4 + i][key] | digits[half + line * 4 + i][key] << 4;
                }
            }
        }
    }

    /// Coordinates `z[direction][key]` of a group of sixteen keys from its digits: what they stand for in a product.
    pub(super) fn coordinates(self, step: f32, codes: &[Line], z: &mut [[f32; GROUP]]) {
        z.fill([0.0; GROUP]);
        let half = self.nibbles() / 2;
        for at in 0..self.nibbles() {
            let (direction, second) = self.digit(at);
            let (wide, worth) = (
                if direction < LEADING { 2.0 } else { 1.0 },
                if second { 0.0625 } else { 1.0 },
            );
            let (line, byte, high) = (&codes[at % half / 4].0, at % 4, at >= half);
            for (slot, key) in SLOTS.into_iter().enumerate() {
                let code = line[slot * 4 + byte];
                let digit = f32::from(if high { code >> 4 } else { code & 15 });
                z[direction][key] += (digit - 7.5) * worth * wide * step;
            }
        }
    }

    /// Bytes of the sketch of a block of `keys` keys.
    pub fn bytes(self, keys: usize) -> usize {
        self.means_at(keys)
            + if self.values {
                keys.div_ceil(RUN) * self.head_dim * 2
            } else {
                0
            }
    }

    /// Bytes of a column of such sketches, besides those of its blocks' sketches and 8 per sixteen keys, at most.
    pub fn column_bytes(self) -> usize {
        if self.values {
            self.directions() * self.head_dim * 4
        } else {
            0
        }
    }

    fn codes_at(keys: usize) -> usize {
        HEADER + (keys.div_ceil(GROUP) * 2).next_multiple_of(8)
    }

    fn means_at(self, keys: usize) -> usize {
        Self::codes_at(keys) + keys.div_ceil(GROUP) * GROUP * self.nibbles() / 2
    }

    /// Appends the sketch of a block without values.
    pub(super) fn write(self, keys: usize, step: f32, masks: &[u16], codes: &[Line], out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + Self::codes_at(keys), 0);
        put_header(keys, step, masks, &mut out[start..]);
        codes.iter().for_each(|line| out.extend_from_slice(&line.0));
    }

    /// Whether `basis` is one for keys of this shape.
    pub(super) fn check(self, basis: &HeadBasis) -> Result<(), IndexError> {
        let d = self.head_dim;
        let whole = |rows: &[f32]| rows.len() >= RANK * d && rows.len().is_multiple_of(d);
        if d == 0 || basis.mean.len() != d || !whole(&basis.keys) || basis.queries.len() != basis.keys.len() {
            return Err(invalid(
                "basis",
                format!("wants a mean of {d} and at least {RANK} directions of {d} for keys and queries"),
            ));
        }
        Ok(())
    }
}

pub(super) fn invalid(argument: &'static str, problem: String) -> IndexError {
    IndexError::Invalid { argument, problem }
}

/// Appends to `out` the sketch of a block: `keys[n, head_dim]` with their `values` (ignored if the format has none).
///
/// Keys with elements that are not finite are marked and never found; values that are not are left out of the means.
///
/// # Errors
/// [`IndexError::Invalid`] if shapes do not fit, or there are no keys or more than 256.
pub fn encode_block(
    format: SketchFormat,
    basis: &HeadBasis,
    keys: &[f16],
    values: &[f16],
    out: &mut Vec<u8>,
) -> Result<(), IndexError> {
    encode_block_and(format, basis, keys, values, out, |_| ())
}

/// As [`encode_block`]; `also` is shown the coordinates of the keys, per group `[direction][key]`.
pub(super) fn encode_block_and(
    format: SketchFormat,
    basis: &HeadBasis,
    keys: &[f16],
    values: &[f16],
    out: &mut Vec<u8>,
    also: impl FnOnce(&[[f32; GROUP]]),
) -> Result<(), IndexError> {
    let d = format.head_dim;
    format.check(basis)?;
    let n = keys.len() / d;
    if !keys.len().is_multiple_of(d) || n == 0 || n > KEYS_MAX {
        return Err(invalid(
            "keys",
            format!(
                "a block has 1 to {KEYS_MAX} rows of {d}, this has {} elements",
                keys.len()
            ),
        ));
    }
    if format.values && values.len() != keys.len() {
        return Err(invalid(
            "values",
            format!("as many as keys ({}), not {}", keys.len(), values.len()),
        ));
    }
    let start = out.len();
    out.resize(start + format.bytes(n), 0);
    let block = &mut out[start..];
    let rows = n.div_ceil(GROUP) * format.directions();
    // Most blocks are short: room for the longest is only made for long ones.
    if n <= BLOCK_USUAL {
        let z = &mut [[0.0; GROUP]; BLOCK_USUAL / GROUP * RANK][..rows];
        encode(format, basis, keys, z, block);
        also(z);
    } else {
        let z = &mut [[0.0; GROUP]; KEYS_MAX / GROUP * RANK][..rows];
        encode(format, basis, keys, z, block);
        also(z);
    }
    if format.values {
        mean_values(values, d, &mut block[format.means_at(n)..]);
    }
    Ok(())
}

/// Header, mask and codes of a block, and the coordinates `z` of its groups.
fn encode(format: SketchFormat, basis: &HeadBasis, keys: &[f16], z: &mut [[f32; GROUP]], block: &mut [u8]) {
    let (d, directions) = (format.head_dim, format.directions());
    let n = keys.len() / d;
    let mut mask = [0_u16; KEYS_MAX / GROUP];
    let (mut square, mut count) = (0.0_f32, 0_usize);
    let groups = keys.chunks(GROUP * d).zip(z.chunks_exact_mut(directions));
    for ((keys, z), mask) in groups.zip(&mut mask) {
        project(&basis.keys[..directions * d], &basis.mean, keys, z);
        let mut sums = [0.0_f32; GROUP];
        for row in &*z {
            for (sum, z) in sums.iter_mut().zip(row) {
                *sum += z * z;
            }
        }
        for (key, sum) in sums[..keys.len() / d].iter().enumerate() {
            if sum.is_finite() {
                *mask |= 1 << key;
                square += sum;
                count += directions;
            }
        }
    }
    let rms = (square / count.max(1) as f32).sqrt();
    let step = if rms.is_finite() { rms * STEP } else { 1.0 };
    put_header(n, step, &mask[..n.div_ceil(GROUP)], block);
    let codes = &mut block[SketchFormat::codes_at(n)..format.means_at(n)];
    for (z, codes) in z
        .chunks_exact(directions)
        .zip(codes.chunks_exact_mut(GROUP * format.nibbles() / 2))
    {
        format.quantise(z, step, codes);
    }
}

/// Header and mask of a block of `keys` keys.
fn put_header(keys: usize, step: f32, masks: &[u16], block: &mut [u8]) {
    block[..2].copy_from_slice(&VERSION.to_le_bytes());
    block[2..4].copy_from_slice(&(keys as u16).to_le_bytes());
    block[4..8].copy_from_slice(&step.to_le_bytes());
    for (bytes, word) in block[HEADER..].chunks_exact_mut(2).zip(masks) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

/// Means of the values of every run, as bytes; values that are not finite are left out.
pub(super) fn mean_values(values: &[f16], d: usize, means: &mut [u8]) {
    let mut rows: Vec<&[f16]> = Vec::with_capacity(RUN);
    let (mut sum, ones) = (vec![0.0_f32; d], [1.0_f32; RUN]);
    for (run, mean) in values.chunks(RUN * d).zip(means.chunks_exact_mut(2 * d)) {
        rows.clear();
        rows.extend(run.chunks_exact(d).filter(|row| finite(row)));
        sum.fill(0.0);
        weigh_rows(&ones[..rows.len()], &rows, d, &mut sum);
        let count = rows.len().max(1) as f32;
        for (bytes, sum) in mean.chunks_exact_mut(2).zip(&sum) {
            bytes.copy_from_slice(&f16::from_f32(sum / count).to_le_bytes());
        }
    }
}

/// Whether all are; looks at all, since nearly always they are.
pub(super) fn finite(row: &[f16]) -> bool {
    const EXPONENT: u16 = 0x7c00;
    row.iter().fold(0, |worst, x| (x.to_bits() & EXPONENT).max(worst)) < EXPONENT
}

/// The parts of a block's sketch.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    pub(super) keys: usize,
    pub(super) step: f32,
    mask: &'a [u8],
    pub(super) codes: &'a [u8],
    pub(super) means: &'a [f16],
}

impl<'a> View<'a> {
    /// # Errors
    /// [`IndexError::Unusable`] if these are not the bytes of a sketch of this format, or are not aligned to two bytes.
    pub(super) fn new(format: SketchFormat, bytes: &'a [u8]) -> Result<Self, IndexError> {
        let unusable = |what: &str| Err(IndexError::Unusable(format!("sketch of a block: {what}")));
        let Some((header, _)) = bytes.split_first_chunk::<HEADER>() else {
            return unusable("shorter than its header");
        };
        let [v0, v1, k0, k1, s @ ..] = *header;
        let (version, keys, step) = (
            u16::from_le_bytes([v0, v1]),
            u16::from_le_bytes([k0, k1]).into(),
            f32::from_le_bytes(s),
        );
        if version != VERSION {
            return unusable(&format!("version {version}, this code reads {VERSION}"));
        }
        if keys == 0 || keys > KEYS_MAX || bytes.len() != format.bytes(keys) {
            return unusable(&format!("{} bytes for {keys} keys", bytes.len()));
        }
        if !step.is_finite() || step < 0.0 {
            return unusable("a step that is not a number of at least 0");
        }
        let (codes_at, means_at) = (SketchFormat::codes_at(keys), format.means_at(keys));
        let Some(means) = cast_f16(&bytes[means_at..]) else {
            return unusable("not aligned to two bytes");
        };
        Ok(Self {
            keys,
            step,
            mask: &bytes[HEADER..codes_at],
            codes: &bytes[codes_at..means_at],
            means,
        })
    }

    /// Word `group` of the mask.
    pub(super) fn mask(&self, group: usize) -> u16 {
        u16::from_le_bytes([self.mask[2 * group], self.mask[2 * group + 1]])
    }
}
