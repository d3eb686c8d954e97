use kvasir_reference as reference;

use super::*;
use crate::{Mask, Pattern, plan::tests::real_like};

/// Against plain attention in f64 over the pairs that the mask's definition names.
#[test]
fn qualities_are_those_of_plain_attention() {
    const D: usize = 16;
    let (q, keys, values) = real_like(300, 4);
    let offset = 100;
    let chunk = HeadChunk::new(&q[offset * D..], &keys, D, 0.25).expect("a chunk");
    let patterns = [
        Pattern::Dense,
        Pattern::AShape { initial: 2, local: 20 },
        Pattern::vertical_slash(40, 60),
        Pattern::BlockSparse { blocks: 2 },
    ];
    let heads: Vec<_> = patterns.iter().map(|pattern| pattern.plan(&chunk, 64)).collect();
    let found = judge(&chunk, &values, &heads, 64, 9, 0);
    let mask = Mask::new(64, heads).expect("sound");
    let row_of = |rows: &'_ [half::f16], key: usize| rows[key * D..][..D].to_vec();
    for (head, quality) in found.iter().enumerate() {
        let (mut mass, mut least, mut error, mut norm, mut count) = (0.0, f64::INFINITY, 0.0, 0.0, 0);
        for row in (0..200).filter(|row| (199 - row) % 9 == 0) {
            let query = &q[(offset + row) * D..][..D];
            let rows: Vec<_> = (0..=offset + row)
                .map(|key| (row_of(&keys, key), row_of(&values, key)))
                .collect();
            let pick = |wanted: &dyn Fn(usize) -> bool| {
                let picked: Vec<_> = rows
                    .iter()
                    .enumerate()
                    .filter(|(key, _)| wanted(*key))
                    .map(|(_, (k, v))| (&k[..], &v[..]))
                    .collect();
                reference::attend(query, &picked, 0.25)
            };
            let (dense, all) = pick(&|_| true);
            let (sparse, some) = pick(&|key| mask.sees(head, offset, row, key));
            let share = (some - all).exp2();
            mass += share;
            least = f64::min(least, share);
            error += dense.iter().zip(&sparse).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
            norm += dense.iter().map(|y| y.powi(2)).sum::<f64>();
            count += 1;
        }
        let pattern = patterns[head];
        assert_eq!(quality.queries, count);
        assert!(
            (quality.mass - mass / f64::from(count as u32)).abs() < 1e-4,
            "{pattern:?} {quality:?}"
        );
        assert!(
            (quality.mass_min - least).abs() < 1e-4,
            "{pattern:?} {quality:?} {least}"
        );
        assert!(
            (quality.output_error - (error / norm).sqrt()).abs() < 1e-4,
            "{pattern:?} {quality:?}"
        );
    }
    assert_eq!(found[0].work, found[0].work_dense);
    assert!(
        found[1].work_share() < 1.0 && found[1].output_error > 0.01,
        "{:?}",
        found[1]
    );
}

#[test]
fn joined_qualities_weigh_by_queries() {
    let one = Quality {
        queries: 1,
        mass: 0.4,
        mass_min: 0.4,
        output_error: 3.0,
        density: 0.1,
        work: 2,
        work_dense: 4,
    };
    let three = Quality {
        queries: 3,
        mass: 0.8,
        mass_min: 0.5,
        output_error: 1.0,
        density: 0.3,
        work: 5,
        work_dense: 6,
    };
    let both = one.join(three);
    assert_eq!((both.queries, both.work, both.work_dense), (4, 7, 10));
    assert!((both.mass - 0.7).abs() < 1e-12 && both.mass_min == 0.4 && (both.density - 0.25).abs() < 1e-12);
    assert!((both.output_error - 3.0_f64.sqrt()).abs() < 1e-12);
    assert_eq!(Quality::default().join(three), three);
}
