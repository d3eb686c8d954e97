//! Masks on the device.

use kvasir_sparse::{HeadMask, Mask};

use crate::{
    Buffer, Gpu, GpuError,
    plan::{ROWS, TILE},
};

/// How the kernels number the kinds of lists.
const RELATIVE: u32 = 0;
const ABSOLUTE: u32 = 1;
const DENSE: u32 = 2;

/// A [`Mask`] on the device: a list of tiles for each head, or for each row block of a head.
#[derive(Debug)]
pub struct DeviceTiles {
    pub(crate) heads: Buffer<u32>,
    pub(crate) lists: Buffer<u32>,
    pub(crate) numbers: Buffer<u32>,
    pub(crate) q_heads: usize,
    /// Row blocks that every head with lists of its own per block has.
    pub(crate) blocks: usize,
}

impl DeviceTiles {
    /// Full causal attention of `q_heads` heads, whatever the length.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn dense(gpu: &Gpu, q_heads: usize) -> Result<Self, GpuError> {
        Self::of(gpu, &vec![HeadMask::Dense; q_heads])
    }

    /// Copies a mask to the device, and waits.
    ///
    /// # Errors
    /// If its row blocks have not [`ROWS`] rows, it has more than 2^32 numbers, or the device has no room.
    pub fn upload(gpu: &Gpu, mask: &Mask) -> Result<Self, GpuError> {
        if mask.rows() != ROWS {
            let why = format!("row blocks of {}; the kernels have {ROWS}", mask.rows());
            return Err(GpuError::shape("tiles", why));
        }
        Self::of(gpu, mask.heads())
    }

    fn of(gpu: &Gpu, masks: &[HeadMask]) -> Result<Self, GpuError> {
        let (mut heads, mut lists, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
        let mut blocks = usize::MAX;
        for head in masks {
            heads.push(lists.len() as u32 / 7);
            heads.push(u32::from(matches!(head, HeadMask::Absolute { .. })));
            match head {
                HeadMask::Dense => lists.extend([0, 0, 0, 0, 0, 0, DENSE]),
                HeadMask::Relative { tiles, columns } => {
                    let first = numbers.len();
                    numbers.extend(tiles);
                    let column = numbers.len();
                    numbers.extend(columns);
                    let cover = numbers.len();
                    let words = cover_words(tiles);
                    numbers.extend(&words);
                    let entry = [first, tiles.len(), column, columns.len(), cover, 32 * words.len()];
                    lists.extend(entry.map(|number| number as u32));
                    lists.push(RELATIVE);
                }
                HeadMask::Absolute { rows } => {
                    blocks = blocks.min(rows.len());
                    for tiles in rows {
                        lists.extend([numbers.len() as u32, tiles.len() as u32, 0, 0, 0, 0, ABSOLUTE]);
                        numbers.extend(tiles);
                    }
                }
            }
        }
        if u32::try_from(numbers.len()).is_err() || u32::try_from(lists.len()).is_err() {
            let why = format!("{} numbers; 2^32 are possible", numbers.len());
            return Err(GpuError::shape("tiles", why));
        }
        Ok(Self {
            heads: gpu.upload(&heads)?,
            lists: gpu.upload(&lists)?,
            numbers: gpu.upload(&numbers)?,
            q_heads: masks.len(),
            blocks,
        })
    }
}

/// Bit `u - 1` is set if a tile holds distance `u`.
fn cover_words(tiles: &[u32]) -> Vec<u32> {
    let bits = tiles.last().map_or(0, |&tile| tile as usize + TILE);
    let mut words = vec![0u32; bits.div_ceil(32)];
    for &tile in tiles {
        for bit in tile as usize..tile as usize + TILE {
            words[bit / 32] |= 1 << (bit % 32);
        }
    }
    words
}
