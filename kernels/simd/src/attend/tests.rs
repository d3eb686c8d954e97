use half::f16;
use kvasir_reference as reference;
use proptest::prelude::*;

use super::*;
use crate::{
    merge,
    testing::{bits, error, halves, values},
};

/// A call with its own data.
struct Case {
    head_dim: usize,
    q: Vec<f32>,
    visible: Vec<usize>,
    /// (position, keys, values)
    runs: Vec<(usize, Vec<f16>, Vec<f16>)>,
}

impl Case {
    /// Runs of the given (position, length).
    fn new(seed: u64, head_dim: usize, visible: &[usize], runs: &[(usize, usize)]) -> Self {
        let data = |salt: u64, len: usize| halves(seed * 1000 + salt, len * head_dim);
        Self {
            head_dim,
            q: values(seed, visible.len() * head_dim),
            visible: visible.to_vec(),
            runs: (0..)
                .zip(runs)
                .map(|(i, &(at, len))| (at, data(2 * i, len), data(2 * i + 1, len)))
                .collect(),
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    fn rows(&self, isa: Isa, rows: std::ops::Range<usize>) -> Partial {
        let segments: Vec<_> = self
            .runs
            .iter()
            .map(|(position, keys, values)| Segment {
                keys,
                values,
                position: *position,
            })
            .collect();
        let mut out = Partial {
            o: vec![9.0; rows.len() * self.head_dim],
            lse: vec![9.0; rows.len()],
        };
        let call = Call {
            q: &self.q[rows.start * self.head_dim..rows.end * self.head_dim],
            visible: &self.visible[rows],
            head_dim: self.head_dim,
            factor: self.scale() * std::f32::consts::LOG2_E,
            segments: &segments,
        };
        attend_to(isa, call, &mut out);
        out
    }

    fn all(&self, isa: Isa) -> Partial {
        self.rows(isa, 0..self.visible.len())
    }

    fn truth(&self) -> (Vec<f64>, Vec<f64>) {
        let (mut o, mut lse) = (Vec::new(), Vec::new());
        for (q, &end) in self.q.chunks_exact(self.head_dim).zip(&self.visible) {
            let mut seen: Vec<(&[f16], &[f16])> = Vec::new();
            for (position, keys, values) in &self.runs {
                let rows = keys.chunks_exact(self.head_dim).zip(values.chunks_exact(self.head_dim));
                seen.extend(rows.take(end.saturating_sub(*position)));
            }
            let (row, row_lse) = reference::attend(q, &seen, self.scale());
            o.extend(row);
            lse.push(row_lse);
        }
        (o, lse)
    }

    /// Truth within 2e-6 and equal bits on every instruction set.
    fn check(&self) {
        let (o, lse) = self.truth();
        let scalar = self.all(Isa::Scalar);
        assert!(error(&scalar.o, &o) < 2e-6, "o is off by {}", error(&scalar.o, &o));
        for (found, truth) in scalar.lse.iter().zip(lse) {
            assert!(
                f64::from(*found) == truth || (f64::from(*found) - truth).abs() < 1e-5,
                "lse {found}, {truth}"
            );
        }
        for isa in Isa::available() {
            let found = self.all(isa);
            assert_eq!(bits(&found.o), bits(&scalar.o), "{isa:?}");
            assert_eq!(bits(&found.lse), bits(&scalar.lse), "{isa:?}");
        }
    }
}

#[test]
fn truth_on_edge_shapes() {
    for (head_dim, visible, runs) in [
        (64, &[][..], &[(0, 10)][..]),
        (64, &[5, 6, 7], &[(0, 64)]),
        (64, &[0, 200, 64, 65, 63], &[(0, 64), (64, 64), (128, 1)]),
        (8, &[1000], &[(0, 64), (64, 7)]),
        (1, &[70], &[(0, 70)]),
        (20, &[9, 33, 40], &[(0, 33), (33, 0), (33, 9)]),
        (256, &[130, 128], &[(0, 130)]),
        (80, &[500; 70], &[(100, 300)]),
    ] {
        Case::new(3, head_dim, visible, runs).check();
    }
}

#[test]
fn nothing_seen_is_zero_and_minus_infinity() {
    for case in [Case::new(1, 64, &[4, 0], &[(4, 64)]), Case::new(1, 64, &[4, 9], &[])] {
        let out = case.all(Isa::active());
        assert!(out.o.iter().all(|x| x.to_bits() == 0) && out.lse.iter().all(|x| *x == f32::NEG_INFINITY));
    }
}

#[test]
fn what_is_not_visible_cannot_reach_a_row() {
    let mut case = Case::new(5, 64, &[10, 40, 41, 60, 60], &[(0, 64), (64, 64)]);
    let clean: Vec<_> = Isa::available().map(|isa| case.all(isa)).collect();
    for (position, keys, values) in &mut case.runs {
        let first = (60 - 60.min(*position)).min(64) * 64;
        keys[first..].fill(f16::NAN);
        values[first..].fill(f16::INFINITY);
    }
    for (isa, clean) in Isa::available().zip(clean) {
        assert_eq!(case.all(isa), clean, "{isa:?}");
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_company() {
    let visible: Vec<usize> = (0..150).map(|i| 90 + i / 3).collect();
    let case = Case::new(11, 64, &visible, &[(0, 64), (64, 64), (128, 64)]);
    let whole = case.all(Isa::active());
    for rows in [0..1, 3..8, 60..70, 64..150, 149..150] {
        let part = case.rows(Isa::active(), rows.clone());
        assert_eq!(
            bits(&part.o),
            bits(&whole.o[rows.start * 64..rows.end * 64]),
            "{rows:?}"
        );
        assert_eq!(bits(&part.lse), bits(&whole.lse[rows]));
    }
}

#[test]
fn merged_parts_are_the_whole() {
    let whole = Case::new(17, 64, &[300, 100, 250], &[(0, 64), (64, 64), (128, 100)]);
    let (truth, _) = whole.truth();
    let part = |runs: &[usize]| Case {
        head_dim: 64,
        q: whole.q.clone(),
        visible: whole.visible.clone(),
        runs: runs.iter().map(|&i| whole.runs[i].clone()).collect(),
    };
    for split in [
        [&[0][..], &[1, 2][..]],
        [&[2], &[1, 0]],
        [&[], &[0, 1, 2]],
        [&[0, 1, 2], &[]],
    ] {
        let mut joined = part(split[0]).all(Isa::active());
        merge(&mut joined, &part(split[1]).all(Isa::active()), 64);
        assert!(error(&joined.o, &truth) < 2e-6, "{split:?}");
        for (a, b) in joined.lse.iter().zip(whole.all(Isa::active()).lse) {
            assert!((a - b).abs() < 1e-5, "{split:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn truth_on_any_shape(
        seed in 0_u64..1000,
        head_dim in prop::sample::select(vec![8_usize, 16, 24, 64, 72, 128]),
        visible in prop::collection::vec(0_usize..200, 0..9),
        lens in prop::collection::vec(0_usize..90, 0..4),
    ) {
        let mut at = 0;
        let runs: Vec<_> = lens.iter().map(|&len| { at += len; (at - len, len) }).collect();
        Case::new(seed, head_dim, &visible, &runs).check();
    }
}
