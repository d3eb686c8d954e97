//! Activations quantised for the int8 tiles.

use crate::{
    isa::{Isa, dispatched},
    lanes::Lanes,
    pool::Pool,
    weights::BLOCK,
};

/// A block whose largest magnitude is below this is taken as zero: its inverse scale would not be finite.
const TINY: f32 = 1e-30;
/// Elements of a parallel task at least: less is not worth waking anyone.
const TASK_ELEMENTS: usize = 16 * 1024;

/// Activation rows `[tokens, cols]` quantised to int8 blocks of 32; the buffer is reused.
///
/// Per block `d = max|x| / 127` in f32, `q = round(x * (127 / max|x|))` with ties to even, and the sum of the q. NaN
/// counts as 0; a block with an infinity yields infinite or NaN products.
#[derive(Default)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    /// `[tokens, cols / 32]`.
    blocks: Vec<Block>,
}

/// 32 quantised elements.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Block {
    /// In [-127, 127].
    pub(crate) q: [i8; BLOCK],
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
    pub fn quantize(&mut self, x: &[f32], cols: usize, pool: &Pool) {
        self.quantize_on(Isa::active(), x, cols, pool);
    }

    pub(crate) fn quantize_on(&mut self, isa: Isa, x: &[f32], cols: usize, pool: &Pool) {
        assert!(
            cols > 0 && cols.is_multiple_of(BLOCK),
            "quantize: {cols} columns are no multiple of {BLOCK}"
        );
        assert!(x.len().is_multiple_of(cols), "quantize: x is rows of {cols}");
        self.tokens = x.len() / cols;
        self.cols = cols;
        self.blocks.resize(x.len() / BLOCK, Block::default());
        let x = x.as_chunks().0;
        let share = x.len().div_ceil(pool.threads()).max(TASK_ELEMENTS / BLOCK);
        pool.run_chunks(&mut self.blocks, share, &|index, blocks| {
            quantize_blocks(isa, &x[index * share..][..blocks.len()], blocks);
        });
    }

    /// Rows held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Elements per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The blocks of rows `tokens`, `[tokens.len(), cols / 32]`.
    pub(crate) fn rows(&self, tokens: std::ops::Range<usize>) -> &[Block] {
        let blocks = self.cols / BLOCK;
        &self.blocks[tokens.start * blocks..tokens.end * blocks]
    }
}

dispatched!(fn quantize_blocks(x: &[[f32; BLOCK]], blocks: &mut [Block]) = quantize_blocks_in);
#[inline(always)]
fn quantize_blocks_in<L: Lanes>(l: L, x: &[[f32; BLOCK]], blocks: &mut [Block]) {
    let zero = l.splat(0.0);
    for (x, block) in x.iter().zip(blocks) {
        let ([low, high], _) = x.as_chunks() else { continue };
        let (low, high) = (l.load(low), l.load(high));
        let size = l.max(
            l.max(l.sub(zero, low), low),
            l.max(l.max(l.sub(zero, high), high), zero),
        );
        let size = l.highest(l.max(size, zero));
        let (d, inverse) = if size >= TINY {
            (size / 127.0, 127.0 / size)
        } else {
            (0.0, 0.0)
        };
        let inverse = l.splat(inverse);
        let step = |x| {
            let whole = l.round(l.mul(x, inverse));
            // NaN is not even equal to itself.
            l.where_not_less(whole, whole, whole)
        };
        let (low, high) = (step(low), step(high));
        if let ([q_low, q_high], _) = block.q.as_chunks_mut() {
            l.store_i8(low, q_low);
            l.store_i8(high, q_high);
        }
        // Exact: at most 32 * 127.
        let sum = l.sum(l.add(low, high));
        block.d = d;
        block.sum = d * sum;
        block.offset = 128 * sum as i32;
    }
}
