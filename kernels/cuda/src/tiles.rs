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

/// Words of a list, see prefill.cuh.
pub(crate) const LIST_WORDS: usize = 7;
/// A list that holds every key.
pub(crate) const DENSE_LIST: [u32; LIST_WORDS] = [0, 0, 0, 0, 0, 0, DENSE];

/// A list of tiles by distance and of columns, whose numbers are appended to `numbers`.
pub(crate) fn relative_list(tiles: &[u32], columns: &[u32], numbers: &mut Vec<u32>) -> [u32; LIST_WORDS] {
    let first = numbers.len();
    numbers.extend(tiles);
    let column = numbers.len();
    numbers.extend(columns);
    let cover = numbers.len();
    let words = cover_words(tiles);
    numbers.extend(&words);
    let [first, tiles, column, columns, cover, bits] =
        [first, tiles.len(), column, columns.len(), cover, 32 * words.len()].map(|number| number as u32);
    [first, tiles, column, columns, cover, bits, RELATIVE]
}

/// What a list says of row blocks alike, given the numbers: that of [`DeviceTiles`] read back.
pub(crate) fn read_list(list: &[u32; LIST_WORDS], numbers: &[u32]) -> HeadMask {
    let some = |first: u32, count: u32| numbers[first as usize..(first + count) as usize].to_vec();
    let [first, count, column, columns, _, _, kind] = *list;
    match kind {
        DENSE => HeadMask::Dense,
        ABSOLUTE => HeadMask::Absolute {
            rows: vec![some(first, count)],
        },
        _ => HeadMask::Relative {
            tiles: some(first, count),
            columns: some(column, columns),
        },
    }
}

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
            heads.push((lists.len() / LIST_WORDS) as u32);
            heads.push(u32::from(matches!(head, HeadMask::Absolute { .. })));
            match head {
                HeadMask::Dense => lists.extend(DENSE_LIST),
                HeadMask::Relative { tiles, columns } => lists.extend(relative_list(tiles, columns, &mut numbers)),
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
