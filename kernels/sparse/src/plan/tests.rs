use half::f16;
use kvasir_reference as reference;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{select, *};
use crate::{Mask, TILE, judge};

const D: usize = 16;
const SCALE: f32 = 0.25;

/// Queries and keys in which attention does what it does in models: a sink that everyone looks at, neighbours that look alike,
/// and a subject that returns.
pub(crate) fn real_like(tokens: usize, seed: u64) -> (Vec<f32>, Vec<f16>, Vec<f16>) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut noise = || random.random_range(-1.0..1.0_f32);
    let subjects: Vec<[f32; D]> = (0..6).map(|_| std::array::from_fn(|_| noise())).collect();
    let (mut q, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
    let mut drift = [0.0_f32; D];
    for position in 0..tokens {
        let subject = &subjects[position / 37 % 6];
        for d in 0..D {
            drift[d] = 0.95 * drift[d] + 0.6 * noise();
            let key = if position == 0 {
                2.0
            } else {
                drift[d] + 1.2 * subject[d] + 0.3 * noise()
            };
            q.push(1.1 * drift[d] + 1.4 * subject[d] + 0.5);
            keys.push(f16::from_f32(key));
            values.push(f16::from_f32(noise()));
        }
    }
    (q, keys, values)
}

fn patterns() -> Vec<Pattern> {
    vec![
        Pattern::Dense,
        Pattern::AShape { initial: 4, local: 100 },
        Pattern::vertical_slash(60, 120),
        Pattern::BlockSparse { blocks: 4 },
        Pattern::FlexPrefill {
            gamma: 0.9,
            tau: 0.0,
            budget_min: 128,
        },
        Pattern::FlexPrefill {
            gamma: 0.9,
            tau: 1.0,
            budget_min: 128,
        },
        Pattern::XAttention {
            stride: 8,
            threshold: 0.9,
        },
        Pattern::XAttention {
            stride: 16,
            threshold: 0.8,
        },
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever the chunk: masks are sound, causal, and hold the first key and each query's own tile.
    #[test]
    fn sink_and_diagonal_are_kept(
        seed in any::<u64>(),
        tokens in 1_usize..500,
        queries in 1_usize..300,
        rows in prop_oneof![Just(64_usize), Just(128)],
    ) {
        let queries = queries.min(tokens);
        let (q, keys, _) = real_like(tokens, seed);
        let offset = tokens - queries;
        let chunk = HeadChunk::new(&q[offset * D..], &keys, D, SCALE).expect("a chunk");
        for pattern in patterns() {
            let mask = Mask::new(rows, vec![pattern.plan(&chunk, rows)]).expect("a planner's mask is sound");
            for row in 0..queries {
                let position = offset + row;
                prop_assert!(mask.sees(0, offset, row, 0), "{:?}: row {} and the first key", pattern, row);
                let nearest = position - position % TILE..=position;
                for key in nearest {
                    // Those of the query's tile that are in its row block, or near for a pattern without tiles.
                    if key >= offset {
                        prop_assert!(mask.sees(0, offset, row, key), "{:?}: row {} and key {}", pattern, row, key);
                    }
                }
                prop_assert!(!mask.sees(0, offset, row, position + 1));
            }
        }
    }
}

/// The estimate is that of plain attention in f64.
#[test]
fn estimates_are_sums_of_attention() {
    let (q, keys, _) = real_like(200, 3);
    let chunk = HeadChunk::new(&q[50 * D..], &keys, D, SCALE).expect("a chunk");
    let found = estimate(&chunk, 64);
    let (mut columns, mut diagonals) = (vec![0.0; 200], vec![0.0; 200]);
    for position in 136..200 {
        let scores = reference::scores(&q[position * D..][..D], &keys[..(position + 1) * D], D);
        let weights: Vec<f64> = scores.iter().map(|score| (score * f64::from(SCALE)).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (key, weight) in weights.iter().enumerate() {
            columns[key] += weight / sum;
            diagonals[position - key] += weight / sum;
        }
    }
    for (found, truth) in [(&found.columns, columns), (&found.diagonals, diagonals)] {
        for (found, truth) in found.iter().zip(truth) {
            assert!((f64::from(*found) - truth).abs() < 2e-5, "{found} and {truth}");
        }
    }
}

/// At one cost the planners that look are nearer to full attention than the A-shape, which does not.
#[test]
fn looking_pays() {
    let (q, keys, values) = real_like(1536, 11);
    let chunk = HeadChunk::new(&q, &keys, D, SCALE).expect("a chunk");
    let judged = |patterns: &[Pattern]| {
        let masks: Vec<_> = patterns.iter().map(|pattern| pattern.plan(&chunk, 64)).collect();
        judge(&chunk, &values, &masks, 64, 7, 0)
    };
    let all = judged(&patterns());
    assert!(
        (all[0].mass - 1.0).abs() < 1e-4 && all[0].output_error < 1e-5 && all[0].density == 1.0,
        "{:?}",
        all[0]
    );
    for (pattern, quality) in patterns().iter().zip(&all).skip(1) {
        // As much local attention as makes an A-shape no dearer.
        let a_shape = (64..1536_u32)
            .step_by(32)
            .map(|local| judged(&[Pattern::AShape { initial: 4, local }])[0])
            .take_while(|a_shape| a_shape.work <= quality.work)
            .last();
        let Some(a_shape) = a_shape else { continue };
        assert!(
            quality.mass < 1.0 && quality.density < 1.0,
            "{pattern:?} is sparse: {quality:?}"
        );
        if !matches!(pattern, Pattern::AShape { .. }) {
            assert!(
                quality.output_error < a_shape.output_error,
                "{pattern:?} {quality:?} beside {a_shape:?}"
            );
        }
    }
}

/// XAttention's tiles hold the share of the antidiagonal map that was asked for, computed plainly.
#[test]
fn antidiagonal_maps_are_covered() {
    let (q, keys, _) = real_like(512, 5);
    let offset = 128;
    let chunk = HeadChunk::new(&q[offset * D..], &keys, D, SCALE).expect("a chunk");
    for (stride, threshold) in [(8_usize, 0.7_f32), (16, 0.9)] {
        let pattern = Pattern::XAttention {
            stride: stride as u32,
            threshold,
        };
        let head = pattern.plan(&chunk, 64);
        let mut seen_tiles = 0;
        for block in 0..6 {
            let end = offset + (block + 1) * 64;
            let mut map = vec![0.0; end / TILE];
            for group in 0..64 / stride {
                let first = offset + block * 64 + group * stride;
                let weights: Vec<f64> = (0..(first + stride) / stride)
                    .map(|long| {
                        let pairs = (0..stride).map(|t| (first + stride - 1 - t, long * stride + t));
                        let score: f64 = pairs
                            .map(|(query, key)| reference::scores(&q[query * D..][..D], &keys[key * D..][..D], D)[0])
                            .sum();
                        (score * f64::from(SCALE) / stride as f64).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                for (long, weight) in weights.iter().enumerate() {
                    map[long * stride / TILE] += weight / sum;
                }
            }
            let tiles: Vec<usize> = (0..end / TILE)
                .filter(|tile| head.holds(end, block, tile * TILE))
                .collect();
            let kept: f64 = tiles.iter().map(|&tile| map[tile]).sum();
            let total: f64 = map.iter().sum();
            assert!(
                kept / total >= f64::from(threshold) - 1e-4,
                "{pattern:?}, block {block}: {}",
                kept / total
            );
            seen_tiles += tiles.len();
        }
        assert!(seen_tiles < (3..9).sum::<usize>(), "{pattern:?} leaves nothing out");
    }
}

/// FlexPrefill's two ways are told apart by how far the pooled estimate is off.
#[test]
fn the_test_decides_between_blocks_and_diagonals() {
    let (q, keys, _) = real_like(700, 9);
    let chunk = HeadChunk::new(&q, &keys, D, SCALE).expect("a chunk");
    let with = |tau| {
        Pattern::FlexPrefill {
            gamma: 0.9,
            tau,
            budget_min: 0,
        }
        .plan(&chunk, 64)
    };
    assert!(matches!(with(0.0), HeadMask::Relative { .. }));
    assert!(matches!(with(1.0), HeadMask::Absolute { .. }));
    // Where all keys are alike the estimate is off only by what the last queries do not see yet of the last blocks.
    let alike = vec![f16::ONE; 700 * D];
    let chunk = HeadChunk::new(&q, &alike, D, SCALE).expect("a chunk");
    assert!(matches!(
        Pattern::FlexPrefill {
            gamma: 0.9,
            tau: 0.15,
            budget_min: 0
        }
        .plan(&chunk, 64),
        HeadMask::Absolute { .. }
    ));
}

/// Bits do not depend on what else is in memory: the same chunk gives the same mask.
#[test]
fn plans_repeat() {
    let (q, keys, _) = real_like(640, 2);
    let chunk = HeadChunk::new(&q[128 * D..], &keys, D, SCALE).expect("a chunk");
    for pattern in patterns() {
        assert_eq!(pattern.plan(&chunk, 64), pattern.plan(&chunk, 64), "{pattern:?}");
    }
    let mut chosen = Vec::new();
    select::cover(&[0.5, 0.5, 0.5], 0.5, &mut chosen);
    assert_eq!(chosen, [0, 1], "ties go to the lower index");
}
