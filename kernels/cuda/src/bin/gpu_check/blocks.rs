//! Block-Sparse lists that the device builds: against the reference's products, and attention over them.

use kvasir_cuda::{
    BlockSparse, BlockSparseTiles, Gpu, GpuError, HeadMask, Mask, Prefill, Products,
    plan::{ROWS, TILE},
    reference,
};
use rand::{Rng, rngs::StdRng};

use crate::{
    check::Tally,
    prefill::{Queries, any_case, compare},
};

/// Products that differ by less than this share of the product of the norms may be taken for each other: means are rounded
/// after sums in another order.
const CLOSE: f64 = 4e-3;

pub(crate) fn planned(gpu: &Gpu, rng: &mut StdRng, cases: usize, tally: &mut Tally) -> Result<(), GpuError> {
    for _ in 0..cases {
        let (held, rows, q_heads) = any_case(gpu, rng)?;
        let (shape, tokens, scale) = (held.shape, held.rows.tokens, 0.1);
        let q = Queries::new(gpu, rng, shape.dtype, rows * q_heads * shape.head_dim)?;
        let plan = BlockSparse {
            blocks: 3 + rng.random_range(0..6),
        };
        let mut built = BlockSparseTiles::new(gpu, plan, shape, q_heads, rows, tokens)?;
        built.build(gpu, q.query(), &held.view()?)?;
        let chosen = built.chosen()?;
        let scores = reference::block_scores(shape, &q.numbers, q_heads, &held.rows, 1.0);
        let (row_blocks, key_blocks, offset) = (rows.div_ceil(ROWS), tokens.div_ceil(TILE), tokens - rows);
        let k = plan.blocks.min(key_blocks);
        let case = || {
            format!(
                "{plan:?} over {tokens} {shape:?} {:?}, {rows} rows, {q_heads} heads",
                held.form
            )
        };
        // What any product of means can be: the scale of what is close.
        let most = scores
            .iter()
            .copied()
            .filter(|score| score.is_finite())
            .fold(0.0, |a: f64, b| a.max(b.abs()));
        let mut heads = vec![Vec::new(); q_heads];
        for (list, (scores, tiles)) in scores.chunks_exact(key_blocks).zip(&chosen).enumerate() {
            let block = list % row_blocks;
            let end = tokens.min(offset + (block + 1) * ROWS);
            let seen = end.div_ceil(TILE);
            let orderly = tiles.windows(2).all(|pair| pair[0] < pair[1])
                && tiles
                    .iter()
                    .all(|tile| tile.is_multiple_of(TILE as u32) && (*tile as usize) < end);
            let has = |number: usize| tiles.contains(&((number * TILE) as u32));
            let own = (offset + block * ROWS) / TILE..seen;
            let forced = has(0) && own.clone().all(has);
            // The first block comes on top.
            let counted = tiles.len() == k.min(seen) || tiles.len() == k.min(seen) + 1;
            tally.count(f64::from(u8::from(!(orderly && forced && counted))), 0.0, || {
                format!("{tiles:?} of {}", case())
            });
            let free = |number: &usize| *number > 0 && !own.contains(number);
            let worst = (0..seen)
                .filter(free)
                .filter(|&number| has(number))
                .map(|number| scores[number]);
            let best = (0..seen)
                .filter(free)
                .filter(|&number| !has(number))
                .map(|number| scores[number]);
            let missed = best.fold(f64::NEG_INFINITY, f64::max) - worst.fold(f64::INFINITY, f64::min);
            tally.count(missed.max(0.0) / most.max(1e-12), CLOSE, || {
                format!("a better block is left out: {}", case())
            });
            heads[list / row_blocks].push(tiles.clone());
        }
        let list = Mask::new(
            ROWS,
            heads.into_iter().map(|rows| HeadMask::Absolute { rows }).collect(),
        );
        let list = list.expect("in order");
        let expected = reference::prefill(shape, &q.numbers, q_heads, &held.rows, &list, scale);
        let tiles = built.build(gpu, q.query(), &held.view()?)?;
        let prefill = Prefill {
            rows,
            q_heads,
            scale,
            products: Products::best(gpu),
        };
        compare(gpu, &held, &q, prefill, tiles, &expected, tally)?;
    }
    Ok(())
}
