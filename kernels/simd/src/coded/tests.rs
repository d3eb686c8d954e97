use proptest::prelude::*;

use super::*;
use crate::testing::{bits, bytes, values};

#[derive(Debug, PartialEq)]
struct Run {
    levels: Vec<u16>,
    kept: Vec<Vec<u32>>,
    sums: Vec<u32>,
}

/// All that can be asked, from key `first` on.
fn run(isa: Isa, queries: &CodedQueries, keys: CodedKeys<'_>, first: usize, floors: &[Level], few: bool) -> Run {
    let (heads, groups) = (queries.len(), keys.masks.len());
    let (stride, sums_stride) = (room_for(groups) + 3, groups.div_ceil(RUN_GROUPS) + 1);
    let mut levels = vec![0; heads * (groups * GROUP + 5)];
    coded_levels_on(isa, queries, 0..heads, keys, &mut levels, groups * GROUP + 5);
    let (mut kept, mut counts) = (vec![7; heads * stride], vec![2; heads]);
    let mut sums = vec![0.0; heads * sums_stride];
    let mut found = Found {
        floors,
        kept: &mut kept,
        stride,
        counts: &mut counts,
        sums: &mut sums,
        sums_stride,
        few,
    };
    coded_scan_on(isa, queries, 0..heads, keys, first, &mut found);
    assert!(
        kept.chunks(stride).all(|kept| kept[..2] == [7, 7]),
        "what is there stays"
    );
    Run {
        levels,
        kept: kept
            .chunks(stride)
            .zip(&counts)
            .map(|(kept, count)| kept[2..*count].to_vec())
            .collect(),
        sums: bits(&sums),
    }
}

/// What a scan of listed groups keeps, of keys at the beginning of a unit, and its sums.
fn run_listed(isa: Isa, queries: &CodedQueries, keys: CodedKeys<'_>, list: &[u32], floors: &[Level], few: bool) -> Run {
    let heads = queries.len();
    let (stride, sums_stride) = (room_for(list.len()) + 3, list.len() + 1);
    let (mut kept, mut counts) = (vec![7; heads * stride], vec![2; heads]);
    let mut sums = vec![9.0; heads * sums_stride];
    let mut found = Found {
        floors,
        kept: &mut kept,
        stride,
        counts: &mut counts,
        sums: &mut sums,
        sums_stride,
        few,
    };
    coded_scan_listed_on(isa, queries, 0..heads, keys, (UNIT, list), &mut found);
    assert!(
        kept.chunks(stride).all(|kept| kept[..2] == [7, 7]),
        "what is there stays"
    );
    assert!(
        sums.chunks(sums_stride).all(|sums| sums[list.len()] == 9.0),
        "no sum but the groups'"
    );
    Run {
        levels: Vec::new(),
        kept: kept
            .chunks(stride)
            .zip(&counts)
            .map(|(kept, count)| kept[2..*count].to_vec())
            .collect(),
        sums: bits(&sums),
    }
}

fn lines(codes: &[u8]) -> Vec<Line> {
    codes.as_chunks().0.iter().map(|line| Line(*line)).collect()
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
        nibbles in prop::sample::select(vec![32_usize, 64]),
        masked in any::<bool>(),
        steps in 1_usize..4,
        spread in prop::sample::select(vec![0.0_f32, 0.01, 0.3, 0.7, 3.0, 12.0, 40.0, 110.0]),
        floor in prop::sample::select(vec![-300.0_f32, -3.0, 0.0, 2.0, 50.0, 126.5]),
        first in 0_usize..200_000,
    ) {
        let first = first.min(UNIT * (first / UNIT + 1) - groups * GROUP);
        let codes = bytes(seed, groups * GROUP * nibbles / 2);
        let word = |b: &[u8]| if masked { u16::from_le_bytes([b[0], b[1]]) } else { u16::MAX };
        let mask: Vec<u16> = bytes(seed + 1, groups * 2).chunks(2).map(word).collect();
        let step = |group: usize| 0.1 + 0.1 * (group / 2 % steps) as f32;
        let weights: Vec<f32> = values(seed + 2, heads * nibbles).iter().map(|w| w * spread).collect();
        let mut queries = CodedQueries::default();
        queries.begin(nibbles);
        weights.chunks(nibbles).for_each(|weights| queries.push(weights));
        let steps: Vec<f32> = (0..groups).map(step).collect();
        let floors: Vec<Level> = (0..heads).map(|head| Level::at_least(floor + head as f32)).collect();
        let lines = lines(&codes);
        let keys = CodedKeys { codes: &lines, steps: &steps, masks: &mask };
        let truth = run(Isa::Scalar, &queries, keys, first, &floors, false);
        for isa in Isa::available() {
            for few in [false, true] {
                prop_assert_eq!(&run(isa, &queries, keys, first, &floors, few), &truth, "{:?} {}", isa, few);
            }
        }
        for (head, weights) in weights.chunks(nibbles).enumerate() {
            let mut sums = vec![0.0_f64; groups.div_ceil(RUN_GROUPS)];
            let mut kept = Vec::new();
            for key in 0..groups * GROUP {
                let level = Level(truth.levels[head * (groups * GROUP + 5) + key]);
                if (mask[key / GROUP] >> (key % GROUP)) & 1 == 0 {
                    prop_assert_eq!(level.0, 0);
                    continue;
                }
                let weight = f64::from(level.weight());
                if level >= floors[head] {
                    kept.push(u32::from(level.0) << 16 | ((first + key) % UNIT) as u32);
                } else {
                    sums[key / GROUP / RUN_GROUPS] += weight;
                }
                if !queries.fits(head, 0.3) {
                    // A rare draw of weights whose scores levels cannot tell apart: only that all sets agree is promised.
                    continue;
                }
                let digit = |i| f32::from(digit(&codes, nibbles, key, i)) - 7.5;
                // Beyond what levels reach they stay at their ends.
                let (low, high) = (Level::LOWEST.above_average(), Level::HIGHEST.above_average());
                let score: f32 = weights.iter().enumerate().map(|(i, w)| w * digit(i) * step(key / GROUP)).sum::<f32>().clamp(low, high);
                // Weights of a query are rounded to a 254th of the largest (or of a share of their sum).
                let rounding = weights.iter().fold(0.0_f32, |a, w| a.max(w.abs())) / 60.0 * 2.25 * nibbles as f32 / 8.0;
                prop_assert!((level.above_average() - score).abs() <= rounding + 0.07, "{} {}", level.above_average(), score);
                let exact = f64::from(level.above_average() + Level::UNIT).exp2();
                prop_assert!((weight / exact - 1.0).abs() < 0.045);
            }
            prop_assert_eq!(&truth.kept[head], &kept);
            for (at, sum) in sums.into_iter().enumerate() {
                let found = f64::from(f32::from_bits(truth.sums[head * (groups.div_ceil(RUN_GROUPS) + 1) + at]));
                prop_assert!((found - sum).abs() <= 1e-5 * sum);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn listed_groups_are_those_of_the_whole(
        seed in 0_u64..1000,
        heads in 1_usize..10,
        groups in 1_usize..30,
        nibbles in prop::sample::select(vec![32_usize, 64]),
        masked in any::<bool>(),
        steps in 1_usize..4,
        spread in prop::sample::select(vec![0.0_f32, 0.3, 3.0, 12.0, 40.0]),
        floor in prop::sample::select(vec![-300.0_f32, 0.0, 2.0, 126.5]),
        share in prop::sample::select(vec![0_u8, 40, 128, 255]),
    ) {
        let codes = lines(&bytes(seed, groups * GROUP * nibbles / 2));
        let word = |b: &[u8]| if masked { u16::from_le_bytes([b[0], b[1]]) } else { u16::MAX };
        let masks: Vec<u16> = bytes(seed + 1, groups * 2).chunks(2).map(word).collect();
        let steps: Vec<f32> = (0..groups).map(|group| 0.1 + 0.1 * (group % steps) as f32).collect();
        let weights: Vec<f32> = values(seed + 2, heads * nibbles).iter().map(|w| w * spread).collect();
        let mut queries = CodedQueries::default();
        queries.begin(nibbles);
        weights.chunks(nibbles).for_each(|weights| queries.push(weights));
        let floors: Vec<Level> = (0..heads).map(|head| Level::at_least(floor + head as f32)).collect();
        let keys = CodedKeys { codes: &codes, steps: &steps, masks: &masks };
        let drawn = bytes(seed + 3, groups);
        for list in [
            (0..groups as u32).collect::<Vec<_>>(),
            (0..groups as u32).filter(|group| drawn[*group as usize] < share).collect(),
            vec![groups as u32 - 1],
        ] {
            let truth = run_listed(Isa::Scalar, &queries, keys, &list, &floors, false);
            for isa in Isa::available() {
                for few in [false, true] {
                    prop_assert_eq!(&run_listed(isa, &queries, keys, &list, &floors, few), &truth, "{:?} {}", isa, few);
                }
                // As a scan of all, of which only these are asked.
                let whole = run(isa, &queries, keys, 0, &floors, false);
                let listed = |key: &u32| list.contains(&((key & 0xffff) / GROUP as u32));
                for (found, kept) in truth.kept.iter().zip(&whole.kept) {
                    let asked: Vec<u32> = kept.iter().copied().filter(listed).collect();
                    prop_assert_eq!(found, &asked, "{:?}", isa);
                }
                for (head, floor) in floors.iter().enumerate() {
                    for (at, group) in list.iter().enumerate() {
                        let levels = &whole.levels[head * (groups * GROUP + 5)..][*group as usize * GROUP..][..GROUP];
                        let below = levels.iter().filter(|level| **level < floor.0.max(LOWEST as u16));
                        let expected: f64 = below.map(|level| f64::from(Level(*level).weight())).sum();
                        let sum = f64::from(f32::from_bits(truth.sums[head * (list.len() + 1) + at]));
                        prop_assert!((sum - expected).abs() <= 1e-5 * expected, "{} {}", sum, expected);
                    }
                }
            }
        }
    }
}

/// Leading lines are scored as keys are whose other digits weigh nothing, on every path.
#[test]
fn leading_lines_are_whole_keys_of_less() {
    for (nibbles, read) in [(32, 8), (32, 16), (64, 16), (64, 32)] {
        let (groups, half) = (7, nibbles / 2);
        let raw = bytes(5, groups * GROUP * nibbles / 2);
        let (codes, weights) = (lines(&raw), values(6, read));
        let keys = CodedKeys {
            codes: &codes,
            steps: &[0.1, 0.1, 0.2, 0.2, 0.3, 0.1, 0.1],
            masks: &[u16::MAX, 0x0ff0, u16::MAX, 1, u16::MAX, u16::MAX, 0],
        };
        let (mut queries, mut whole) = (CodedQueries::default(), vec![0.0; nibbles]);
        for (part, weights) in weights.chunks(read / 2).enumerate() {
            whole[part * half..][..read / 2].copy_from_slice(weights);
        }
        queries.begin(read);
        queries.push(&weights);
        let mut truth = vec![0; groups * GROUP];
        coded_levels_on(Isa::Scalar, &queries, 0..1, keys, &mut truth, groups * GROUP);
        for isa in Isa::available() {
            let mut levels = vec![0; groups * GROUP];
            coded_levels_on(isa, &queries, 0..1, keys, &mut levels, groups * GROUP);
            assert_eq!(levels, truth, "{isa:?}");
        }
        for (key, level) in truth.iter().enumerate() {
            let digit = |at: usize| f32::from(digit(&raw, nibbles, key, at)) - 7.5;
            let score: f32 = whole.iter().enumerate().map(|(at, weight)| weight * digit(at)).sum();
            let searched = (keys.masks[key / GROUP] >> (key % GROUP)) & 1 == 1;
            assert_eq!(*level > 0, searched);
            let found = Level(*level).above_average();
            assert!(
                !searched || (found - score * keys.steps[key / GROUP]).abs() < 0.3,
                "{found} {score}"
            );
        }
    }
}

/// A digit that moves the score by many powers of two: levels are as right as the query's eight bits, up to the ends.
#[test]
fn steep_queries_keep_their_order() {
    for per_digit in [0.4_f32, 0.99, 1.0, 1.5, 2.7, 7.9, 16.0, 29.0] {
        let mut weights = vec![0.0; 32];
        weights[3] = per_digit;
        let mut queries = CodedQueries::default();
        queries.begin(32);
        queries.push(&weights);
        assert!(queries.fits(0, 1.0), "{per_digit}");
        // Key i has the digit i in direction 3, all others have 0.
        let mut codes = vec![Line([0; 64]); 4];
        for (slot, key) in SLOTS.into_iter().enumerate() {
            codes[0].0[slot * 4 + 3] = key as u8;
        }
        let keys = CodedKeys {
            codes: &codes,
            steps: &[1.0],
            masks: &[u16::MAX],
        };
        let truth = run(Isa::Scalar, &queries, keys, 0, &[Level::HIGHEST], true);
        for isa in Isa::available() {
            assert_eq!(
                run(isa, &queries, keys, 0, &[Level::HIGHEST], true),
                truth,
                "{isa:?} {per_digit}"
            );
        }
        for (key, level) in truth.levels[..GROUP].iter().enumerate() {
            let score = (key as f32 - 7.5) * per_digit;
            let expected = score.clamp(Level::LOWEST.above_average(), Level::HIGHEST.above_average());
            let found = Level(*level).above_average();
            assert!(
                (found - expected).abs() <= 0.02 + 0.004 * score.abs(),
                "{per_digit}: {found}, not {expected}"
            );
        }
        let beyond = (0..GROUP).filter(|key| (*key as f32 - 7.5) * per_digit > 128.0).count();
        assert_eq!(
            truth.kept[0].len(),
            beyond,
            "{per_digit}: all above the scale are at its end"
        );
    }
    let mut queries = CodedQueries::default();
    queries.begin(32);
    queries.push(&[40.0; 32]);
    assert!(!queries.fits(0, 1.0));
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
                let codes = lines(&vec![code; 4 * GROUP * nibbles / 2]);
                let keys = CodedKeys {
                    codes: &codes,
                    steps: &[1e-3; 4],
                    masks: &[u16::MAX; 4],
                };
                let floors = [Level(u16::MAX)];
                let truth = run(Isa::Scalar, &queries, keys, 0, &floors, false);
                assert!(f32::from_bits(truth.sums[0]).is_finite());
                for isa in Isa::available() {
                    assert_eq!(
                        run(isa, &queries, keys, 0, &floors, false),
                        truth,
                        "{isa:?} {high} {low} {code}"
                    );
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
