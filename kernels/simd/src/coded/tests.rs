use proptest::prelude::*;

use super::*;
use crate::testing::{bits, bytes, values};

struct Found {
    levels: Vec<u16>,
    sums: Vec<f32>,
}

fn run(isa: Isa, queries: &CodedQueries, keys: CodedKeys<'_>, groups: usize, run: usize) -> Found {
    let mut found = Found {
        levels: vec![0; queries.len() * (groups * GROUP + 3)],
        sums: vec![0.0; queries.len() * (groups + 1)],
    };
    let mut out = Levels {
        levels: &mut found.levels,
        stride: groups * GROUP + 3,
        sums: &mut found.sums,
        sums_stride: groups + 1,
        run,
    };
    coded_scores_on(isa, queries, 0..queries.len(), keys, &mut out);
    found
}

/// Digit `at` of key `key`, by the layout's description.
fn digit(codes: &[u8], nibbles: usize, key: usize, at: usize) -> u8 {
    let slot = SLOTS.iter().position(|k| *k == key % GROUP).unwrap();
    let (half, at) = (at / (nibbles / 2), at % (nibbles / 2));
    let byte = codes[key / GROUP * nibbles / 2 * GROUP + at / 4 * 64 + slot * 4 + at % 4];
    if half == 0 { byte & 15 } else { byte >> 4 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn truth_and_equal_bits(
        seed in 0_u64..1000,
        heads in 0_usize..10,
        groups in 0_usize..17,
        run_groups in 1_usize..6,
        nibbles in prop::sample::select(vec![32_usize, 64]),
        masked in any::<bool>(),
        spread in prop::sample::select(vec![0.0_f32, 0.01, 0.3, 0.7]),
    ) {
        let codes = bytes(seed, groups * GROUP * nibbles / 2);
        let mask: Vec<u16> = bytes(seed + 1, groups * 2).chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        let weights: Vec<f32> = values(seed + 2, heads * nibbles).iter().map(|w| w * spread).collect();
        let mut queries = CodedQueries::default();
        queries.begin(nibbles);
        weights.chunks(nibbles).for_each(|weights| queries.push(weights));
        let keys = CodedKeys { codes: &codes, step: 0.3, mask: masked.then_some(&mask[..]) };
        let truth = run(Isa::Scalar, &queries, keys, groups, run_groups);
        for isa in Isa::available() {
            let found = run(isa, &queries, keys, groups, run_groups);
            prop_assert_eq!(&found.levels, &truth.levels, "{:?}", isa);
            prop_assert_eq!(bits(&found.sums), bits(&truth.sums), "{:?}", isa);
        }
        for (head, weights) in weights.chunks(nibbles).enumerate() {
            if !queries.fits(head, 0.3) {
                // A rare draw of weights whose scores levels cannot tell apart: only that all sets agree is promised.
                continue;
            }
            let mut sums = vec![0.0_f64; groups.div_ceil(run_groups)];
            for key in 0..groups * GROUP {
                let level = Level(truth.levels[head * (groups * GROUP + 3) + key]);
                if masked && (mask[key / GROUP] >> (key % GROUP)) & 1 == 0 {
                    prop_assert_eq!(level.0, 0);
                    continue;
                }
                let score: f32 =
                    weights.iter().enumerate().map(|(i, w)| w * (f32::from(digit(&codes, nibbles, key, i)) - 7.5) * 0.3).sum();
                // Weights of a query are rounded to a 254th of the largest (or of a share of their sum).
                let rounding = weights.iter().fold(0.0_f32, |a, w| a.max(w.abs())) / 60.0 * 2.25 * nibbles as f32 / 8.0;
                prop_assert!((level.above_average() - score).abs() <= rounding + 0.07, "{} {}", level.above_average(), score);
                let weight = f64::from(level.weight());
                let exact = f64::from(level.above_average() + Level::UNIT).exp2();
                prop_assert!((weight / exact - 1.0).abs() < 0.045);
                sums[key / GROUP / run_groups] += weight;
            }
            for (at, sum) in sums.into_iter().enumerate() {
                let found = f64::from(truth.sums[head * (groups + 1) + at]);
                prop_assert!((found - sum).abs() <= 1e-5 * sum);
            }
        }
    }
}

/// The worst digits for the worst weights: sums stay within 16 bits on every path.
#[test]
fn extreme_weights_do_not_overflow() {
    for nibbles in [32, 64] {
        for (high, low) in [
            (1.0, 1.0),
            (-1.0, -1.0),
            (1.0, -1.0),
            (1.0, 0.01),
            (3e38, 3e38),
            (0.0, 0.0),
            (f32::NAN, 1.0),
        ] {
            let weights: Vec<f32> = (0..nibbles).map(|i| if i % 2 == 0 { high } else { low }).collect();
            let mut queries = CodedQueries::default();
            queries.begin(nibbles);
            queries.push(&weights);
            for code in [0, 0xff, 0x0f, 0xf0] {
                let codes = vec![code; GROUP * nibbles / 2];
                let keys = CodedKeys {
                    codes: &codes,
                    step: 1e-3,
                    mask: None,
                };
                let truth = run(Isa::Scalar, &queries, keys, 1, 1);
                for isa in Isa::available() {
                    let found = run(isa, &queries, keys, 1, 1);
                    assert_eq!(found.levels, truth.levels, "{isa:?} {high} {low} {code}");
                    assert!(found.sums[0].is_finite());
                }
            }
        }
    }
}

#[test]
fn levels_mean_what_they_say() {
    for above in [-40.0, -1.0, 0.0, 0.5, 12.25, 99.0] {
        let level = Level::at_least(above);
        assert!(level.above_average() >= above && Level(level.0 - 1).above_average() < above);
    }
    assert_eq!(Level::at_least(f32::NEG_INFINITY).0, LOWEST as u16);
}
