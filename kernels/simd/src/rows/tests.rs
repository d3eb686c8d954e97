use kvasir_reference as reference;
use proptest::prelude::*;

use super::{
    project::project_on,
    score::{score_rows_on, score_slots_on},
    weigh::{weigh_dense_on, weigh_rows_on, weigh_slots_on},
    *,
};
use crate::{
    isa::Isa,
    lanes::LANES,
    testing::{bits, error, halves, values},
};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn truth_and_equal_bits(
        seed in 0_u64..1000,
        heads in 0_usize..10,
        n in 0_usize..40,
        rank in 0_usize..40,
        head_dim in prop::sample::select(vec![1_usize, 24, 64, 96, 128, 256]),
    ) {
        let (q, keys) = (values(seed, heads * head_dim), halves(seed + 1, n * head_dim));
        let rows: Vec<&[f16]> = keys.chunks_exact(head_dim).collect();
        let weights: Vec<f32> = values(seed + 2, heads * n).iter().map(|w| w.max(0.0)).collect();
        let (directions, mean) = (values(seed + 3, rank * head_dim), values(seed + 4, head_dim));
        let few = &keys[..n.min(LANES) * head_dim];
        let run = |isa| {
            let mut scores = vec![0.0; heads * n];
            score_rows_on(isa, &q, &rows, head_dim, 0.3, &mut scores);
            let mut sums = vec![0.0; heads * head_dim];
            weigh_rows_on(isa, &weights, &rows, head_dim, &mut sums);
            let mut z = vec![[9.0; LANES]; rank];
            project_on(isa, &directions, &mean, few, &mut z);
            let mut dense = vec![0.0; heads * head_dim];
            weigh_dense_on(isa, &weights, &keys, head_dim, &mut dense);
            prop_assert_eq!(bits(&dense), bits(&sums), "{:?} dense", isa);
            // Blocks of 32 slots, of which the last may be short; every row, then backwards.
            let blocks: Vec<&[f16]> = keys.chunks(32 * head_dim).collect();
            let scattered = Scattered::new(&blocks, head_dim, 2);
            for head in 0..heads {
                for slots in [(0..n as u32).collect::<Vec<_>>(), (0..n as u32).rev().collect()] {
                    let mut found = vec![0.0; n];
                    let q = &q[head * head_dim..][..head_dim];
                    score_slots_on(isa, q, scattered, &slots, 0.3, &mut found);
                    let some = n / 2;
                    score_slots_on(isa, q, scattered, &slots, 0.3, &mut found[..some]);
                    score_slots_on(isa, q, scattered, &slots[some..], 0.3, &mut found[some..]);
                    let expected: Vec<f32> = slots.iter().map(|slot| scores[head * n + *slot as usize]).collect();
                    prop_assert_eq!(bits(&found), bits(&expected), "{:?} slots", isa);
                }
                let slots: Vec<u32> = (0..n as u32).collect();
                let mut found = vec![0.0; head_dim];
                weigh_slots_on(isa, &weights[head * n..][..n], scattered, &slots, &mut found);
                prop_assert_eq!(bits(&found), bits(&sums[head * head_dim..][..head_dim]), "{:?} slots", isa);
            }
            Ok((scores, sums, z))
        };
        let (scores, sums, z) = run(Isa::Scalar)?;
        for isa in Isa::available() {
            let found = run(isa)?;
            prop_assert_eq!(bits(&found.0), bits(&scores), "{:?}", isa);
            prop_assert_eq!(bits(&found.1), bits(&sums), "{:?}", isa);
            prop_assert_eq!(bits(found.2.as_flattened()), bits(z.as_flattened()), "{:?}", isa);
        }
        let truth: Vec<f64> =
            reference::scores(&q, &keys, head_dim).iter().map(|s| s * f64::from(0.3_f32)).collect();
        prop_assert!(error(&scores, &truth) < 2e-6);
        let weighed: Vec<f64> = (0..heads * head_dim).map(|at| {
            let (head, d) = (at / head_dim, at % head_dim);
            (0..n).map(|i| f64::from(weights[head * n + i]) * rows[i][d].to_f64()).sum()
        }).collect();
        prop_assert!(error(&sums, &weighed) < 2e-6);
        let projected: Vec<f64> = (0..rank * LANES).map(|at| {
            let (r, key) = (at / LANES, at % LANES);
            if key >= n { return 0.0 }
            (0..head_dim).map(|d| f64::from(directions[r * head_dim + d]) * f64::from(rows[key][d].to_f32() - mean[d])).sum()
        }).collect();
        prop_assert!(error(z.as_flattened(), &projected) < 2e-6);
    }
}

/// Slots of an order are those of the rows it names; slots behind it are in their own order.
#[test]
fn ordered_slots_are_their_rows() {
    for (head_dim, groups) in [(128, 4), (64, 1), (24, 2)] {
        let (segments, each) = (3, groups * 16);
        // The last segment is not whole, nor is its last block.
        let n = (segments - 1) * SEGMENT + 2 * each + 7;
        let keys = halves(11, n * head_dim);
        let blocks: Vec<&[f16]> = keys.chunks(each * head_dim).collect();
        let plain = Scattered::new(&blocks, head_dim, groups);
        let mut order: Vec<u16> = (0..(segments - 1) * SEGMENT)
            .map(|slot| (slot % SEGMENT) as u16)
            .collect();
        for (segment, order) in order.chunks_mut(SEGMENT).enumerate() {
            let drawn = values(12 + segment as u64, SEGMENT);
            order.sort_by(|a, b| drawn[usize::from(*a)].total_cmp(&drawn[usize::from(*b)]));
        }
        let ordered = plain.ordered(&order);
        let slots: Vec<u32> = (0..n as u32).step_by(5).chain([n as u32 - 1]).collect();
        let row = |slot: &u32| match order.get(*slot as usize) {
            Some(row) => *slot / SEGMENT as u32 * SEGMENT as u32 + u32::from(*row),
            None => *slot,
        };
        let rows: Vec<u32> = slots.iter().map(row).collect();
        assert_ne!(rows, slots);
        let (q, weights) = (values(13, head_dim), values(14, slots.len()));
        for isa in Isa::available() {
            let (mut found, mut expected) = (vec![0.0; slots.len()], vec![0.0; slots.len()]);
            score_slots_on(isa, &q, ordered, &slots, 0.3, &mut found);
            score_slots_on(isa, &q, plain, &rows, 0.3, &mut expected);
            assert_eq!(bits(&found), bits(&expected), "{isa:?} scores of {head_dim}");
            let (mut found, mut expected) = (vec![0.0; head_dim], vec![0.0; head_dim]);
            weigh_slots_on(isa, &weights, ordered, &slots, &mut found);
            weigh_slots_on(isa, &weights, plain, &rows, &mut expected);
            assert_eq!(bits(&found), bits(&expected), "{isa:?} sums of {head_dim}");
        }
    }
}

#[test]
fn slots_have_places() {
    let row = [f16::ONE; 2];
    let blocks = vec![&row[..]; 1];
    for groups in 1..=16 {
        let rows = Scattered::new(&blocks, 1, groups);
        for slot in (0..3000).chain([16 * 65_536 - 1, 16 * 65_536, u32::MAX / 2, u32::MAX]) {
            let each = groups as u32 * 16;
            assert_eq!(
                rows.place(slot),
                ((slot / each) as usize, (slot % each) as usize),
                "{slot} {groups}"
            );
        }
    }
}

/// A row of weight 0 cannot spoil a sum.
#[test]
fn weight_zero_is_not_multiplied() {
    let mut sums = [1.0];
    weigh_rows(&[0.0, 2.0], &[&[f16::NAN], &[f16::ONE]], 1, &mut sums);
    assert_eq!(sums, [3.0]);
}
