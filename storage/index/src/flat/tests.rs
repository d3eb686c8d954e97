use half::f16;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;

/// Keys and values of one KV head, in blocks, and the query rows of its group.
struct Case {
    head_dim: usize,
    heads: usize,
    block: usize,
    q: Vec<f32>,
    keys: Vec<f16>,
    values: Vec<f16>,
}

impl Case {
    fn random(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let head_dim = [4, 24, 64, 128][rng.random_range(0..4)];
        let (heads, block) = (rng.random_range(1..=8), rng.random_range(1..=64));
        let keys = rng.random_range(0..12) * block;
        // Peaked and flat softmaxes both.
        let spread = [0.1, 1.0, 3.0][rng.random_range(0..3)];
        let mut draw = |count: usize, spread: f32| {
            (0..count)
                .map(|_| rng.random_range(-spread..spread))
                .collect::<Vec<f32>>()
        };
        let halves = |values: Vec<f32>| values.into_iter().map(f16::from_f32).collect::<Vec<_>>();
        let q = draw(heads * head_dim, spread);
        let (keys, values) = (
            halves(draw(keys * head_dim, spread)),
            halves(draw(keys * head_dim, 1.0)),
        );
        Self {
            head_dim,
            heads,
            block,
            q,
            keys,
            values,
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn scan(&self, excluded: &Excluded) -> FlatScan<'_> {
        let mut scan = FlatScan::new(self.head_dim, self.scale());
        scan.begin(&self.q);
        let rows = self.block * self.head_dim;
        for (at, (keys, values)) in self.keys.chunks(rows).zip(self.values.chunks(rows)).enumerate() {
            scan.scan(
                Segment {
                    keys,
                    values,
                    position: at * self.block,
                },
                excluded,
            );
        }
        scan
    }

    fn positions(&self) -> u32 {
        (self.keys.len() / self.head_dim) as u32
    }

    /// Base-2 scores of `positions` for one query head, in f64.
    fn scores(&self, head: usize, positions: &[u32]) -> Vec<f64> {
        let q = &self.q[head * self.head_dim..][..self.head_dim];
        let dot = |at: u32| {
            let key = &self.keys[at as usize * self.head_dim..][..self.head_dim];
            q.iter()
                .zip(key)
                .map(|(q, key)| f64::from(*q) * key.to_f64())
                .sum::<f64>()
        };
        positions
            .iter()
            .map(|&at| dot(at) * f64::from(self.scale()) * std::f64::consts::LOG2_E)
            .collect()
    }

    /// Attention over exactly `positions`: output and base-2 log-sum-exp.
    fn attention(&self, head: usize, positions: &[u32]) -> (Vec<f64>, f64) {
        let row = |at: u32| at as usize * self.head_dim..(at as usize + 1) * self.head_dim;
        let seen: Vec<_> = positions
            .iter()
            .map(|&at| (&self.keys[row(at)], &self.values[row(at)]))
            .collect();
        kvasir_reference::attend(&self.q[head * self.head_dim..][..self.head_dim], &seen, self.scale())
    }

    /// Positions by falling score, ties by rising position, from the scores as scanned.
    fn by_score(scan: &FlatScan<'_>, head: usize, positions: &[u32]) -> Vec<u32> {
        let mut order: Vec<usize> = (0..positions.len()).collect();
        let scores = &scan.scores[head];
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        order.into_iter().map(|at| positions[at]).collect()
    }
}

fn assert_near(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = f64::from(*found) == *expected;
        assert!(
            same || (f64::from(*found) - expected).abs() <= tolerance,
            "{what}: element {at} is {found}, not {expected}"
        );
    }
}

fn some_excluded(seed: u64, positions: u32) -> Excluded {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0xE0);
    let count = rng.random_range(0..4);
    let ranges: Vec<_> = (0..count)
        .map(|_| {
            let start = rng.random_range(0..positions + 1);
            start..start + rng.random_range(0..positions / 2 + 2)
        })
        .collect();
    Excluded::new(&ranges)
}

#[test]
fn attend_is_attention_over_the_fewest_best_keys() {
    for seed in 0..200 {
        let case = Case::random(seed);
        let excluded = some_excluded(seed, case.positions());
        let scan = case.scan(&excluded);
        let searched: Vec<u32> = excluded.searched(0..case.positions()).flatten().collect();
        assert_eq!(scan.keys_scanned(), searched.len(), "seed {seed}");
        for (target, k_max) in [
            (1.0, None),
            (0.3, None),
            (0.9, None),
            (0.999, None),
            (0.9, Some(3)),
            (1.0, Some(5)),
            (1e-9, None),
        ] {
            let what = format!("seed {seed}, mass {target}, at most {k_max:?}");
            let found = scan.attend(target, k_max);
            for head in 0..case.heads {
                let order = Case::by_score(&scan, head, &searched);
                let lse = case.attention(head, &searched).1;
                let mass: Vec<f64> = case
                    .scores(head, &order)
                    .iter()
                    .map(|score| (score - lse).exp2())
                    .collect();
                let count = found.keys[head];
                let covered: f64 = mass[..count].iter().sum();
                let capped = k_max.is_some_and(|k_max| count == k_max) && found.cut_short;
                if searched.is_empty() {
                    assert_eq!(
                        (count, found.mass[head], found.lse[head]),
                        (0, 1.0, f32::NEG_INFINITY),
                        "{what}"
                    );
                } else if target == 1.0 && k_max.is_none() {
                    assert_eq!((count, found.mass[head]), (searched.len(), 1.0), "{what}");
                } else {
                    assert!(
                        capped || covered >= f64::from(target) - 1e-5,
                        "{what}: {count} keys hold {covered}"
                    );
                    let without_last = covered - mass[count - 1];
                    assert!(
                        without_last < f64::from(target) + 1e-5,
                        "{what}: {count} keys are more than needed"
                    );
                    assert!((f64::from(found.mass[head]) - covered).abs() < 1e-5, "{what}");
                }
                let (o, lse) = case.attention(head, &order[..count]);
                assert_near(&found.o[head * case.head_dim..][..case.head_dim], &o, 1e-4, &what);
                assert_near(&found.lse[head..=head], &[lse], 1e-4, &what);
            }
        }
    }
}

#[test]
fn rows_are_the_union_of_each_heads_best() {
    for seed in 0..200 {
        let case = Case::random(seed);
        let excluded = some_excluded(seed, case.positions());
        let scan = case.scan(&excluded);
        let searched: Vec<u32> = excluded.searched(0..case.positions()).flatten().collect();
        for k in [1, 7, 1000] {
            let found = scan.rows(k);
            let mut union: Vec<u32> = (0..case.heads)
                .flat_map(|head| Case::by_score(&scan, head, &searched).into_iter().take(k))
                .collect();
            union.sort_unstable();
            union.dedup();
            assert_eq!(found.positions(), union, "seed {seed}, k {k}");
            let mut at = 0;
            scan.each_row(&found, |key, value| {
                let span = union[at] as usize * case.head_dim..(union[at] as usize + 1) * case.head_dim;
                assert_eq!((key, value), (&case.keys[span.clone()], &case.values[span]));
                at += 1;
            });
            assert_eq!(at, union.len());
            for head in 0..case.heads {
                let (all, part) = (case.attention(head, &searched).1, case.attention(head, &union).1);
                let mass = if searched.is_empty() { 1.0 } else { (part - all).exp2() };
                assert_near(&found.mass[head..=head], &[mass], 1e-5, "mass of the union");
            }
        }
    }
}

#[test]
fn ties_go_to_the_lower_position() {
    let keys = vec![f16::ONE; 1000 * 4];
    let mut scan = FlatScan::new(4, 1.0);
    scan.begin(&[1.0, 0.0, 0.0, 0.0]);
    scan.scan(
        Segment {
            keys: &keys,
            values: &keys,
            position: 5000,
        },
        &Excluded::none(),
    );
    assert_eq!(scan.rows(3).positions(), [5000, 5001, 5002]);
    for (target, keys) in [(0.25, 250), (0.2505, 251), (0.9995, 1000), (0.0001, 1)] {
        let found = scan.attend(target, None);
        assert!(found.keys[0].abs_diff(keys) <= 1, "{target}: {} keys", found.keys[0]);
        assert_eq!(found, scan.attend(target, None), "the same answer twice");
    }
    assert_eq!(
        (scan.attend(0.5, Some(10)).keys[0], scan.attend(0.5, Some(10)).cut_short),
        (10, true)
    );
    assert!(!scan.attend(0.5, Some(501)).cut_short);
}

#[test]
fn keys_that_are_not_numbers_are_never_chosen() {
    let mut keys = vec![f16::ONE; 8 * 2];
    (keys[2], keys[6], keys[9]) = (f16::NAN, f16::INFINITY, f16::NEG_INFINITY);
    let values = vec![f16::ONE; 8 * 2];
    let mut scan = FlatScan::new(2, 1.0);
    scan.begin(&[1.0, 1.0]);
    scan.scan(
        Segment {
            keys: &keys,
            values: &values,
            position: 0,
        },
        &Excluded::none(),
    );
    assert_eq!(scan.rows(8).positions(), [0, 2, 5, 6, 7]);
    let found = scan.attend(1.0, None);
    assert_eq!((found.keys[0], found.mass[0], found.value_rows), (5, 1.0, 5));
    assert!(found.o.iter().all(|value| (value - 1.0).abs() < 1e-6));
    assert_eq!(scan.attend(0.5, None).keys[0], 3);
}

#[test]
fn value_rows_count_once_for_all_heads() {
    let keys: Vec<f16> = (0..4)
        .flat_map(|at| (0..4).map(move |d| if at == d { 40.0 } else { 0.0 }))
        .map(f16::from_f32)
        .collect();
    let mut scan = FlatScan::new(4, 1.0);
    scan.begin(&[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]);
    scan.scan(
        Segment {
            keys: &keys,
            values: &keys,
            position: 0,
        },
        &Excluded::none(),
    );
    let found = scan.attend(0.9, None);
    assert_eq!((found.keys, found.value_rows), (vec![1, 1, 1], 2));
}

proptest! {
    /// The count is the fewest whatever the scores: compared with a sort, in f64.
    #[test]
    fn fewest_equals_a_sort(scores in prop::collection::vec(prop_oneof![-60.0..60.0f32, Just(1.0f32), Just(f32::NEG_INFINITY)], 1..600), target in 0.001..0.9999f32) {
        let lse = kvasir_simd::log_sum_exp2(&scores);
        let (mut selection, mut found) = (Selection::default(), Vec::new());
        prop_assert!(!selection.fewest(&scores, lse, target, None, &mut found));
        let mut sorted: Vec<usize> = (0..scores.len()).filter(|&at| scores[at] > f32::NEG_INFINITY).collect();
        sorted.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        let all: f64 = sorted.iter().map(|&at| f64::from(scores[at]).exp2()).sum();
        let mut rest = &sorted[..];
        let mut mass = 0.0;
        while mass < f64::from(target) - 2e-6 && !rest.is_empty() {
            mass += f64::from(scores[rest[0]]).exp2() / all;
            rest = &rest[1..];
        }
        let fewest = sorted.len() - rest.len();
        // One more may be taken where the target is met within rounding.
        let mut slack = 0;
        while mass < f64::from(target) + 2e-6 && slack < rest.len() {
            mass += f64::from(scores[rest[slack]]).exp2() / all;
            slack += 1;
        }
        prop_assert!((fewest..=fewest + slack).contains(&found.len()), "{} keys, not {}..={}", found.len(), fewest, fewest + slack);
        let mut expected: Vec<u32> = sorted[..found.len()].iter().map(|&at| at as u32).collect();
        expected.sort_unstable();
        prop_assert_eq!(found, expected);
    }
}
