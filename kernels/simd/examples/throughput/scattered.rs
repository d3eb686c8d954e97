//! Rows here and there in many blocks: scored for one query, and weighed.

use half::f16;
use kvasir_simd::{Scattered, score_slots, weigh_slots};

use crate::{fastest, halves, wave};

/// Rows of all blocks.
const ROWS: usize = 1 << 17;
/// Rows of a block.
const BLOCK: usize = 64;
/// One row of so many is taken.
const SHARE: usize = 50;
/// Other rows are taken in so many turns, until the first ones come again.
const TURNS: usize = 48;

pub(crate) fn scattered() {
    for head_dim in [128, 64] {
        let keys = halves(ROWS * head_dim);
        let blocks: Vec<&[f16]> = keys.chunks(BLOCK * head_dim).collect();
        // Neighbours of the context are none in memory.
        let blocks: Vec<&[f16]> = (0..blocks.len()).map(|at| blocks[at * 677 % blocks.len()]).collect();
        let rows = Scattered::new(&blocks, head_dim, BLOCK / 16);
        let slots: Vec<Vec<u32>> = (0..TURNS).map(slots).collect();
        let (q, mut sums) = (wave(head_dim), vec![0.0; head_dim]);
        let mut scores = vec![0.0; slots[0].len()];
        let weights: Vec<f32> = wave(scores.len()).iter().map(|w| w.abs()).collect();
        for (warmth, turns) in [("warm", 1), ("cold", TURNS)] {
            let mut next = (0..turns).cycle();
            let mut turn = || &slots[next.next().unwrap_or(0)];
            let each = |seconds: f64| seconds * 1e9 / (ROWS / SHARE) as f64;
            let scored = each(fastest(|| score_slots(&q, rows, turn(), 0.1, &mut scores)));
            let weighed = each(fastest(|| weigh_slots(&weights, rows, turn(), &mut sums)));
            println!(
                "rows of {head_dim} in {} MiB, {warmth}: score_slots {scored:.1} ns a row, weigh_slots {weighed:.1}",
                keys.len() >> 19
            );
        }
    }
}

/// As many in every turn, one in each stretch of [`SHARE`], somewhere in it.
fn slots(turn: usize) -> Vec<u32> {
    (0..ROWS / SHARE)
        .map(|at| (at * SHARE + ((at * 48_271 + turn * 7_919) >> 3) % SHARE) as u32)
        .collect()
}
