//! Weight matrices quantised in blocks of 32, packed for the int8 tiles.

use std::fmt;

use half::f16;

/// Columns per quantised block.
pub(crate) const BLOCK: usize = 32;
/// Rows packed side by side.
pub(crate) const GROUP: usize = 16;
/// Bytes of a GGUF Q4_1 block: scale and minimum as f16, then 32 nibbles.
const Q4_1_BYTES: usize = 20;
/// Bytes of a GGUF Q8_0 block: scale as f16, then 32 int8.
const Q8_0_BYTES: usize = 34;

/// Why a matrix could not be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShapeError {
    /// Columns come in blocks of 32.
    Columns {
        /// What was asked for.
        cols: usize,
    },
    /// The data is not `rows * cols` elements of its format.
    Length {
        /// Elements (f32) or bytes (quantised) that the shape takes.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// `rows * cols` does not fit in memory's address range.
    TooLarge,
}

impl fmt::Display for ShapeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Columns { cols } => {
                write!(
                    f,
                    "a quantised matrix needs a multiple of {BLOCK} columns, and this has {cols}"
                )
            }
            Self::Length { expected, found } => {
                write!(
                    f,
                    "the matrix's shape takes {expected} and the data holds {found}: is the file cut short?"
                )
            }
            Self::TooLarge => write!(
                f,
                "the matrix's shape is larger than memory can be: is the file damaged?"
            ),
        }
    }
}

impl std::error::Error for ShapeError {}

/// How a block's integers become values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Unsigned 4 bits: `d * q + m`.
    Affine4,
    /// Unsigned 8 bits: `d * (q - 128)`.
    Offset8,
}

impl Format {
    /// Lines of a block of a group.
    pub(crate) fn lines(self) -> usize {
        match self {
            Self::Affine4 => GROUP * BLOCK / 2 / size_of::<Line>(),
            Self::Offset8 => GROUP * BLOCK / size_of::<Line>(),
        }
    }
}

/// Sixteen packed rows.
#[derive(Clone, Copy)]
pub(crate) struct GroupView<'a> {
    pub(crate) format: Format,
    /// `[blocks, lines]`.
    pub(crate) lines: &'a [Line],
    /// `[blocks, 16]`.
    pub(crate) scales: &'a [[f16; GROUP]],
    /// `[blocks, 16]` for [`Format::Affine4`], empty otherwise.
    pub(crate) minima: &'a [[f16; GROUP]],
}

impl GroupView<'_> {
    /// Whether the parts have the sizes of `blocks` blocks, which the tiles rely on.
    pub(crate) fn is_whole(&self, blocks: usize) -> bool {
        let minima = if self.format == Format::Affine4 { blocks } else { 0 };
        self.scales.len() == blocks && self.minima.len() == minima && self.lines.len() == blocks * self.format.lines()
    }
}

/// A weight matrix `[rows, cols]`, quantised in blocks of 32 along cols, packed for the kernels.
///
/// Sixteen rows form a group. In a block of a group, line j (64 bytes) holds for each row its four bytes 4j..4j+4: for
/// 8 bits elements 4j.. of the block; for 4 bits element 4j+i low and element 16+4j+i high, as in GGUF.
pub struct Weights {
    format: Format,
    rows: usize,
    cols: usize,
    /// `[groups, blocks, lines]`.
    quants: Vec<Line>,
    /// `[groups, blocks, 16]`.
    scales: Vec<[f16; GROUP]>,
    /// `[groups, blocks, 16]` for [`Format::Affine4`], empty otherwise.
    minima: Vec<[f16; GROUP]>,
}

/// A cache line of packed integers.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

impl Weights {
    /// From GGUF Q4_1 data, `rows * cols / 32` blocks of 20 bytes (d, m as f16, 16 bytes of nibbles).
    ///
    /// # Errors
    /// [`ShapeError`] if cols is no multiple of 32 or the data has another length.
    pub fn from_q4_1(raw: &[u8], rows: usize, cols: usize) -> Result<Self, ShapeError> {
        let blocks = Self::check(raw.len(), rows, cols, Q4_1_BYTES)?;
        let mut packed = Self::empty(Format::Affine4, rows, cols);
        for (index, block) in raw.as_chunks::<Q4_1_BYTES>().0.iter().enumerate() {
            let (row, block_index) = (index / blocks, index % blocks);
            packed.set_minimum(row, block_index, f16::from_le_bytes([block[2], block[3]]));
            packed.set(row, block_index, f16::from_le_bytes([block[0], block[1]]), &block[4..]);
        }
        Ok(packed)
    }

    /// From GGUF Q8_0 data, `rows * cols / 32` blocks of 34 bytes (d as f16, 32 int8).
    ///
    /// # Errors
    /// [`ShapeError`] if cols is no multiple of 32 or the data has another length.
    pub fn from_q8_0(raw: &[u8], rows: usize, cols: usize) -> Result<Self, ShapeError> {
        let blocks = Self::check(raw.len(), rows, cols, Q8_0_BYTES)?;
        let mut packed = Self::empty(Format::Offset8, rows, cols);
        for (index, block) in raw.as_chunks::<Q8_0_BYTES>().0.iter().enumerate() {
            let mut quants = [0_u8; BLOCK];
            for (q, raw) in quants.iter_mut().zip(&block[2..]) {
                *q = raw ^ 0x80;
            }
            packed.set(
                index / blocks,
                index % blocks,
                f16::from_le_bytes([block[0], block[1]]),
                &quants,
            );
        }
        Ok(packed)
    }

    /// Quantised to Q8_0 blocks: `d = max|x| / 127` rounded to f16, `q = round(x / d)` with ties to even.
    ///
    /// # Errors
    /// [`ShapeError`] if cols is no multiple of 32 or there are not `rows * cols` values.
    pub fn from_f32(values: &[f32], rows: usize, cols: usize) -> Result<Self, ShapeError> {
        let blocks = Self::check(values.len(), rows, cols, BLOCK)?;
        let mut packed = Self::empty(Format::Offset8, rows, cols);
        for (index, block) in values.as_chunks::<BLOCK>().0.iter().enumerate() {
            let high = block.iter().fold(0.0_f32, |high, x| high.max(x.abs()));
            let d = f16::from_f32(high / 127.0);
            let inverse = if d.to_f32() > 0.0 { 1.0 / d.to_f32() } else { 0.0 };
            let quants = block.map(|x| ((x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8) ^ 0x80);
            packed.set(index / blocks, index % blocks, d, &quants);
        }
        Ok(packed)
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Memory the packed matrix takes.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.quants[..]) + size_of_val(&self.scales[..]) + size_of_val(&self.minima[..])
    }

    /// Row `row` as f32 (embedding lookup).
    ///
    /// # Panics
    /// If there is no such row or `out` is not `[cols]`.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "dequantize_row: row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "dequantize_row: out is [cols]");
        let (group, lane) = (row / GROUP, row % GROUP);
        for (block, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let at = group * self.blocks() + block;
            let d = self.scales[at][lane].to_f32();
            let lines = &self.quants[at * self.format.lines()..];
            match self.format {
                Format::Affine4 => {
                    let m = self.minima[at][lane].to_f32();
                    for (i, byte) in (0..BLOCK / 2).map(|i| (i, lines[i / 4].0[lane * 4 + i % 4])) {
                        out[i] = f32::from(byte & 15).mul_add(d, m);
                        out[i + BLOCK / 2] = f32::from(byte >> 4).mul_add(d, m);
                    }
                }
                Format::Offset8 => {
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = (f32::from(lines[i / 4].0[lane * 4 + i % 4]) - 128.0) * d;
                    }
                }
            }
        }
    }

    pub(crate) fn groups(&self) -> usize {
        self.rows.div_ceil(GROUP)
    }

    /// Packed rows `16 * group..`.
    pub(crate) fn group(&self, group: usize) -> GroupView<'_> {
        let blocks = group * self.blocks()..(group + 1) * self.blocks();
        let lines = self.format.lines();
        GroupView {
            format: self.format,
            lines: &self.quants[blocks.start * lines..blocks.end * lines],
            scales: &self.scales[blocks.clone()],
            minima: if self.format == Format::Affine4 {
                &self.minima[blocks]
            } else {
                &[]
            },
        }
    }

    fn blocks(&self) -> usize {
        self.cols / BLOCK
    }

    /// Blocks per row, once the shape is known to fit the data.
    fn check(found: usize, rows: usize, cols: usize, per_block: usize) -> Result<usize, ShapeError> {
        if !cols.is_multiple_of(BLOCK) {
            return Err(ShapeError::Columns { cols });
        }
        let blocks = cols / BLOCK;
        let expected = blocks
            .checked_mul(per_block)
            .and_then(|row| row.checked_mul(rows))
            .ok_or(ShapeError::TooLarge)?;
        if expected == found {
            Ok(blocks)
        } else {
            Err(ShapeError::Length { expected, found })
        }
    }

    fn empty(format: Format, rows: usize, cols: usize) -> Self {
        let blocks = rows.div_ceil(GROUP) * (cols / BLOCK);
        let zero = [f16::ZERO; GROUP];
        Self {
            format,
            rows,
            cols,
            quants: vec![Line([0; 64]); blocks * format.lines()],
            scales: vec![zero; blocks],
            minima: if format == Format::Affine4 {
                vec![zero; blocks]
            } else {
                Vec::new()
            },
        }
    }

    fn set(&mut self, row: usize, block: usize, d: f16, bytes: &[u8]) {
        let (group, lane) = (row / GROUP, row % GROUP);
        let at = group * self.blocks() + block;
        self.scales[at][lane] = d;
        let lines = self.format.lines();
        for (line, four) in self.quants[at * lines..][..lines].iter_mut().zip(bytes.chunks_exact(4)) {
            line.0[lane * 4..][..4].copy_from_slice(four);
        }
    }

    fn set_minimum(&mut self, row: usize, block: usize, m: f16) {
        let at = row / GROUP * self.blocks() + block;
        self.minima[at][row % GROUP] = m;
    }
}
