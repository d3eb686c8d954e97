//! Activations quantised for the int8 tiles.

use crate::{pool::Pool, weights::BLOCK};

/// A block whose largest magnitude is below this is taken as zero: its inverse scale would not be finite.
const TINY: f32 = 1e-30;

/// Activation rows `[tokens, cols]` quantised to int8 blocks of 32; the buffer is reused.
///
/// Per block `d = max|x| / 127` in f32, `q = round(x * (127 / max|x|))` with ties to even, and the sum of the q.
#[derive(Default)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    quants: Vec<i8>,
    /// `[tokens, blocks]`.
    scales: Vec<BlockScale>,
}

/// What the tiles need of a block besides its integers.
#[derive(Clone, Copy, Default)]
pub(crate) struct BlockScale {
    /// Value of one step.
    pub(crate) d: f32,
    /// `d` times the sum of the integers: the factor of a weight block's minimum.
    pub(crate) sum: f32,
    /// 128 times the sum of the integers: what unsigned 8-bit weights overshoot by.
    pub(crate) offset: i32,
}

impl Activations {
    /// Quantises rows `x[tokens, cols]`.
    ///
    /// # Panics
    /// If cols is 0 or no multiple of 32, or `x` is not whole rows.
    pub fn quantize(&mut self, x: &[f32], cols: usize, _pool: &Pool) {
        assert!(
            cols > 0 && cols.is_multiple_of(BLOCK),
            "quantize: {cols} columns are no multiple of {BLOCK}"
        );
        assert!(x.len().is_multiple_of(cols), "quantize: x is rows of {cols}");
        self.tokens = x.len() / cols;
        self.cols = cols;
        self.quants.resize(x.len(), 0);
        self.scales.resize(x.len() / BLOCK, BlockScale::default());
        let quants = self.quants.as_chunks_mut::<BLOCK>().0;
        for ((x, q), scale) in x.as_chunks::<BLOCK>().0.iter().zip(quants).zip(&mut self.scales) {
            let high = x.iter().fold(0.0_f32, |high, x| high.max(x.abs()));
            let (d, inverse) = if high >= TINY {
                (high / 127.0, 127.0 / high)
            } else {
                (0.0, 0.0)
            };
            let mut sum = 0_i32;
            for (q, x) in q.iter_mut().zip(x) {
                *q = (x * inverse).round_ties_even() as i8;
                sum += i32::from(*q);
            }
            *scale = BlockScale {
                d,
                sum: d * sum as f32,
                offset: 128 * sum,
            };
        }
    }

    /// Rows held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Elements per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn row(&self, token: usize) -> (&[[i8; BLOCK]], &[BlockScale]) {
        let blocks = self.cols / BLOCK;
        let quants = &self.quants[token * self.cols..][..self.cols];
        (quants.as_chunks().0, &self.scales[token * blocks..][..blocks])
    }
}
