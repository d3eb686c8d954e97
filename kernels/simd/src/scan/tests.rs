use kvasir_reference as reference;
use proptest::prelude::*;

use super::*;
use crate::testing::{bits, error, halves, values};

#[test]
fn log_sum_exp2_of_few_and_many() {
    assert_eq!(log_sum_exp2(&[]), f32::NEG_INFINITY);
    assert_eq!(log_sum_exp2(&[f32::NEG_INFINITY; 3]), f32::NEG_INFINITY);
    assert_eq!(log_sum_exp2(&[5.0]), 5.0);
    assert_eq!(log_sum_exp2(&[3.0; 1 << 20]), 23.0);
    assert_eq!(log_sum_exp2(&[1e30, 1e30, -1e30]), 1e30);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn truth_and_equal_bits(
        seed in 0_u64..1000,
        heads in 0_usize..10,
        n in 0_usize..150,
        head_dim in prop::sample::select(vec![1_usize, 8, 16, 40, 64, 128]),
    ) {
        let (q, keys, rows) =
            (values(seed, heads * head_dim), halves(seed + 1, n * head_dim), halves(seed + 2, n * head_dim));
        let chosen: Vec<u32> = (0..n as u32).filter(|i| i % 3 != 1).collect();
        let run = |isa| {
            let mut out = vec![0.0; heads * n];
            scores_on(isa, &q, &keys, head_dim, 0.3, &mut out);
            let lse = log_sum_exp2_on(isa, &out);
            let mut o = vec![0.0; head_dim];
            if heads > 0 {
                weighted_values_on(isa, &out[..n], &chosen, lse, &rows, head_dim, &mut o);
            }
            let mut weights = vec![7.0; out.len()];
            let (high, same) = exp2_weights_on(isa, &out, &mut weights);
            assert_eq!(same.to_bits(), lse.to_bits());
            assert_eq!(high, out.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            (out, lse, o, weights)
        };
        let (out, lse, o, weights) = run(Isa::Scalar);
        for isa in Isa::available() {
            let found = run(isa);
            prop_assert_eq!(bits(&found.0), bits(&out), "{:?}", isa);
            prop_assert_eq!(found.1.to_bits(), lse.to_bits(), "{:?}", isa);
            prop_assert_eq!(bits(&found.2), bits(&o), "{:?}", isa);
            prop_assert_eq!(bits(&found.3), bits(&weights), "{:?}", isa);
        }
        let truth: Vec<f64> =
            reference::scores(&q, &keys, head_dim).iter().map(|s| s * f64::from(0.3_f32)).collect();
        prop_assert!(error(&out, &truth) < 2e-6);
        let sum: f64 = out.iter().map(|&s| f64::from(s).exp2()).sum();
        prop_assert!(out.is_empty() || (f64::from(lse) - sum.log2()).abs() < 1e-5);
        let high = out.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for (score, weight) in out.iter().zip(&weights) {
            prop_assert!((f64::from(score - high).exp2() - f64::from(*weight)).abs() < 2e-7);
        }
        let weighted = |d: usize| -> f64 {
            let weigh = |&i: &u32| {
                let value = f64::from(rows[i as usize * head_dim + d].to_f32());
                (f64::from(out[i as usize]) - f64::from(lse)).exp2() * value
            };
            if heads > 0 { chosen.iter().map(weigh).sum() } else { 0.0 }
        };
        prop_assert!(error(&o, &(0..head_dim).map(weighted).collect::<Vec<_>>()) < 2e-6);
    }
}
