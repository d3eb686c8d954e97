//! Rows here and there in many blocks: scored for one query, and weighed.

use std::time::{Duration, Instant};

use half::f16;
use kvasir_simd::{Scattered, score_slots, weigh_slots};

use crate::{halves, wave};

/// Rows of a context.
const ROWS: usize = 1 << 17;
/// Contexts that are read in turn where none is to be in a cache.
const CONTEXTS: usize = 6;
/// Rows of a block.
const BLOCK: usize = 64;
/// One row of so many is taken.
const SHARE: usize = 50;

pub(crate) fn scattered() {
    for head_dim in [128, 64] {
        let keys = halves(CONTEXTS * ROWS * head_dim);
        // Neighbours of the context are none in memory.
        let contexts: Vec<Vec<&[f16]>> = keys
            .chunks(ROWS * head_dim)
            .map(|keys| {
                let blocks: Vec<_> = keys.chunks(BLOCK * head_dim).collect();
                (0..blocks.len()).map(|at| blocks[at * 677 % blocks.len()]).collect()
            })
            .collect();
        let slots: Vec<Vec<u32>> = (0..SHARE).map(slots).collect();
        let (q, mut sums) = (wave(head_dim), vec![0.0; head_dim]);
        let mut scores = vec![0.0; ROWS / SHARE];
        let weights: Vec<f32> = wave(scores.len()).iter().map(|w| w.abs()).collect();
        for (warmth, turns) in [("warm", 1), ("cold", CONTEXTS * SHARE)] {
            let mut next = (0..turns).cycle();
            let mut turn = || {
                let turn = next.next().unwrap_or(0);
                let rows = Scattered::new(&contexts[turn % CONTEXTS], head_dim, BLOCK / 16);
                (rows, &slots[turn / CONTEXTS])
            };
            let each = |seconds: f64| seconds * 1e9 / (ROWS / SHARE) as f64;
            let scored = each(typical(|| {
                let (rows, slots) = turn();
                score_slots(&q, rows, slots, 0.1, &mut scores);
            }));
            let weighed = each(typical(|| {
                let (rows, slots) = turn();
                weigh_slots(&weights, rows, slots, &mut sums);
            }));
            println!(
                "rows of {head_dim}, one of {SHARE} in {} MiB, {warmth}: score_slots {scored:.1} ns a row, weigh_slots {weighed:.1}",
                (ROWS * head_dim) >> 19
            );
        }
    }
}

/// The median of runs over half a second: of turns that differ in what is in a cache, the fastest would say nothing.
fn typical(mut run: impl FnMut()) -> f64 {
    let begun = Instant::now();
    let mut seconds = Vec::new();
    while begun.elapsed() < Duration::from_millis(500) {
        let start = Instant::now();
        run();
        seconds.push(start.elapsed().as_secs_f64());
    }
    let middle = seconds.len() / 2;
    *seconds.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// One in each stretch of [`SHARE`], somewhere in it, and never one of another turn.
fn slots(turn: usize) -> Vec<u32> {
    (0..ROWS / SHARE)
        .map(|at| (at * SHARE + (((at * 48_271) >> 3) + turn) % SHARE) as u32)
        .collect()
}
