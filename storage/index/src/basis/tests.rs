//! Bases of made-up queries and keys whose best directions are known, and files that must be refused.

use half::f16;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::IndexError;

const D: usize = 24;

/// Rows of `D` elements, `mean + noise`, where element `i` of the noise is spread by `spread(i)`.
fn rows(n: usize, rng: &mut StdRng, mean: impl Fn(usize) -> f32, spread: impl Fn(usize) -> f32) -> Vec<f32> {
    (0..n * D)
        .map(|at| mean(at % D) + spread(at % D) * rng.random_range(-1.7_f32..1.7))
        .collect()
}

fn halves(values: &[f32]) -> Vec<f16> {
    values.iter().copied().map(f16::from_f32).collect()
}

fn dot(a: &[f32], b: impl IntoIterator<Item = f32>) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(b)).sum()
}

/// Queries that use a few directions, none of them the widest of the keys, as real ones do.
fn sample(seed: u64) -> (Vec<f32>, Vec<f16>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let narrow = |i: usize| if (8..12).contains(&i) { 2.0 } else { 0.02 };
    let q = rows(600, &mut rng, |i| if i == 9 { 1.0 } else { 0.0 }, narrow);
    let k = rows(
        500,
        &mut rng,
        |i| i as f32 / 4.0 - 2.0,
        |i| if i < 6 { 4.0 } else { 0.7 },
    );
    (q, halves(&k))
}

fn moments(q: &[f32], k: &[f16]) -> Moments {
    let mut moments = Moments::new(D);
    moments.add_queries(q);
    moments.add_keys(k);
    moments
}

/// `queries . q`, and `keys . (k - mean)` of each key.
fn sketched(basis: &HeadBasis, q: &[f32], k: &[f16]) -> (Vec<f64>, Vec<Vec<f64>>) {
    let y = basis.queries.chunks_exact(D).map(|row| dot(row, q.iter().copied()));
    let z = k.chunks_exact(D).map(|k| {
        let centred: Vec<f32> = k.iter().zip(&basis.mean).map(|(k, mean)| k.to_f32() - mean).collect();
        let z = basis.keys.chunks_exact(D).map(|row| dot(row, centred.iter().copied()));
        z.collect()
    });
    (y.collect(), z.collect())
}

/// Mean square of `y . z - (q . k - q . mean)` over all queries and keys.
fn error(basis: &HeadBasis, q: &[f32], k: &[f16]) -> f64 {
    let mut sum = 0.0;
    for q in q.chunks_exact(D) {
        let (y, z) = sketched(basis, q, k);
        for (k, z) in k.chunks_exact(D).zip(z) {
            let exact = dot(q, k.iter().map(|k| k.to_f32())) - dot(q, basis.mean.iter().copied());
            sum += (exact - y.iter().zip(z).map(|(y, z)| y * z).sum::<f64>()).powi(2);
        }
    }
    sum / (q.len() / D * (k.len() / D)) as f64
}

#[test]
fn all_directions_give_the_product_itself() {
    let (q, k) = sample(1);
    let all = moments(&q, &k).basis(D).expect("sound moments");
    assert!((all.kept - 1.0).abs() < 1e-12);
    let scale = error(
        &HeadBasis {
            queries: vec![0.0; D * D],
            ..all.basis.clone()
        },
        &q,
        &k,
    );
    let error = error(&all.basis, &q, &k);
    // f32 rows: parts in 10^7 of each term.
    assert!(error < 1e-9 * scale, "{error} of {scale}");
}

#[test]
fn fewer_directions_beat_the_keys_own() {
    let (q, k) = sample(2);
    let moments = moments(&q, &k);
    let mut before = f64::INFINITY;
    for rank in [1, 2, 4, 8, 16] {
        let found = moments.basis(rank).expect("sound moments");
        assert_eq!(
            (found.basis.keys.len(), found.basis.queries.len()),
            (rank * D, rank * D)
        );
        // Principal components of the keys are what this is when every query is as likely as any other.
        let mut blind = Moments::new(D);
        blind.add_keys(&k);
        for axis in 0..D {
            blind.add_queries(&std::array::from_fn::<f32, D, _>(|i| f32::from(u8::from(i == axis))));
        }
        let own = blind.basis(rank).expect("sound moments");
        let (ours, theirs) = (error(&found.basis, &q, &k), error(&own.basis, &q, &k));
        assert!(ours <= before * (1.0 + 1e-9), "rank {rank}: {ours} after {before}");
        // Queries have four directions of the same weight; each that is kept counts.
        let bound = match rank {
            1 => 0.8,
            2 => 0.6,
            4 => 0.01,
            _ => 1.0,
        };
        assert!(
            ours < bound * theirs,
            "rank {rank}: {ours} against {theirs} of the keys' components"
        );
        // What is not kept is the error, as queries and keys were drawn independently.
        let all = error(
            &HeadBasis {
                queries: vec![0.0; rank * D],
                ..found.basis.clone()
            },
            &q,
            &k,
        );
        assert!(
            (1.0 - found.kept - ours / all).abs() < 1e-3,
            "rank {rank}: kept {}, error {ours} of {all}",
            found.kept
        );
        before = ours;
    }
    assert_eq!(
        moments.basis(D + 5).expect("capped").basis,
        moments.basis(D).expect("all").basis
    );
}

#[test]
fn sketched_keys_have_unit_spread() {
    let (q, k) = sample(3);
    let basis = moments(&q, &k).basis(6).expect("sound moments").basis;
    let (_, z) = sketched(&basis, &q[..D], &k);
    for at in 0..6 {
        let mean = z.iter().map(|z| z[at]).sum::<f64>() / z.len() as f64;
        let square = z.iter().map(|z| z[at] * z[at]).sum::<f64>() / z.len() as f64;
        assert!(
            mean.abs() < 1e-3 && (square - 1.0).abs() < 1e-3,
            "direction {at}: mean {mean}, square {square}"
        );
    }
}

#[test]
fn parts_add_up() {
    let (q, k) = sample(4);
    let whole = moments(&q, &k);
    let mut parts = moments(&q[..D * 100], &k[..D * 450]);
    parts.merge(&moments(&q[D * 100..], &k[D * 450..]));
    assert_eq!((parts.queries(), parts.keys()), (600, 500));
    let (whole, parts) = (whole.basis(8).expect("sound"), parts.basis(8).expect("sound"));
    assert!((whole.kept - parts.kept).abs() < 1e-12);
    let (whole, parts) = (error(&whole.basis, &q, &k), error(&parts.basis, &q, &k));
    assert!((whole - parts).abs() < 1e-6 * whole);
}

#[test]
fn what_has_no_directions_is_refused() {
    let (q, k) = sample(5);
    let (nan, infinite) = ([f32::NAN; D], [f16::INFINITY; D]);
    let with = |q: &[f32], k: &[f16]| moments(q, k);
    let table: [(Moments, usize, &str); 6] = [
        (with(&q, &k), 0, "rank: keep at least one"),
        (with(&[], &k), 4, "moments: too few"),
        (with(&q, &k[..D]), 4, "moments: too few"),
        (with(&[0.0; 2 * D], &k), 4, "moments: all queries are 0"),
        (
            with(&[&q[..D], &nan].concat(), &k),
            4,
            "moments: a query or key was not finite",
        ),
        (
            with(&q, &[&k[..D], &infinite].concat()),
            4,
            "moments: a query or key was not finite",
        ),
    ];
    for (moments, rank, expected) in table {
        let error = moments.basis(rank).expect_err(expected).to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    // Keys that do not differ have no direction, and that is fine: all scores are the same.
    let same = k[..D].repeat(7);
    let basis = with(&q, &same).basis(4).expect("a basis");
    assert_eq!(basis.kept, 1.0);
    assert!(error(&basis.basis, &q, &same) < 1e-6);
}

fn small() -> Basis {
    let heads = (0..6).map(|seed| {
        let (q, k) = sample(seed);
        let basis = moments(&q, &k).basis(5).expect("sound moments").basis;
        HeadBasis {
            streaming: seed == 4,
            ..basis
        }
    });
    Basis {
        model: std::array::from_fn(|i| i as u8),
        layers: 3,
        kv_heads: 2,
        head_dim: D,
        rank: 5,
        heads: heads.collect(),
    }
}

#[test]
fn a_file_gives_its_basis_back() {
    let basis = small();
    let bytes = basis.encode();
    assert_eq!(bytes.len(), 60 + 6 * (1 + 2 * (D + 2 * 5 * D)) + 4);
    let again = Basis::decode(&bytes).expect("what was encoded");
    assert_eq!(again.encode(), bytes);
    assert_eq!(again.id(), basis.id());
    assert_eq!(Basis::decode(&again.encode()).expect("the same"), again);
    assert_eq!((again.streaming_heads(), again.head(2, 0).streaming), (1, true));
    let (q, k) = sample(2);
    let (rounded, exact) = (error(again.head(1, 0), &q, &k), error(basis.head(1, 0), &q, &k));
    assert!(
        (rounded - exact).abs() < 1e-2 * exact,
        "{rounded} after rounding, {exact} before"
    );
    let mut other = again.clone();
    other.heads[4].streaming = false;
    assert_ne!(other.id(), again.id());
}

#[test]
fn a_basis_is_for_one_model() {
    let basis = small();
    let model = basis.model;
    assert_eq!(basis.check(&model, 3, 2, D), Ok(()));
    let table = [
        (model, 4, 2, D, "3 layers, and the model 4"),
        (model, 3, 1, D, "2 KV heads, and the model 1"),
        (model, 3, 2, 64, "24 elements per key, and the model 64"),
        ([7; 32], 3, 2, D, "calibrated for other weights"),
    ];
    for (model, layers, kv_heads, head_dim, expected) in table {
        let error = basis
            .check(&model, layers, kv_heads, head_dim)
            .expect_err(expected)
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// The bytes with a checksum that fits them.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = bytes.len() - 4;
    let crc = crate::file::crc32c(&bytes[..body]);
    bytes[body..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn damaged_and_forged_files_are_refused() {
    let good = small().encode();
    for len in 0..good.len() {
        assert!(Basis::decode(&good[..len]).is_err(), "cut to {len} bytes");
    }
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        assert!(Basis::decode(&bad).is_err(), "byte {at} flipped");
    }
    let set = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        sealed(bad)
    };
    let table = [
        (set(0, b"KVBASIT"), "does not begin as a basis file does"),
        (set(8, &[2]), "version 2, and this program reads version 1"),
        (set(12, &u32::MAX.to_le_bytes()), "4294967295 layers"),
        (set(16, &[0]), "0 KV heads"),
        (set(20, &4096_u32.to_le_bytes()), "and its sizes ask for"),
        (set(24, &[D as u8 + 1]), "rank 25, which cannot be"),
        (set(24, &[4]), "and its sizes ask for"),
        (set(63, &[2]), "flags 0x2"),
        (
            set(66, &[0, 0x7c]),
            "layer 0, KV head 0 holds numbers that are not finite",
        ),
        (good[..good.len() - 1].to_vec(), "checksum does not match"),
        (b"GGUF".to_vec(), "does not begin as a basis file does"),
        (good[..40].to_vec(), "cut short"),
    ];
    for (bytes, expected) in table {
        let error = Basis::decode(&bytes).expect_err(expected);
        assert!(
            matches!(&error, IndexError::Unusable(text) if text.contains(expected)),
            "{error}"
        );
    }
}

proptest! {
    #[test]
    fn any_bytes_are_answered(
        edits in proptest::collection::vec((0_usize..80, any::<u8>()), 0..6),
        len in 64_usize..4000,
    ) {
        let mut bytes = small().encode();
        bytes.resize(len, 0);
        for (at, byte) in edits {
            let at = at % len;
            bytes[at] = byte;
        }
        if let Ok(basis) = Basis::decode(&sealed(bytes.clone())) {
            prop_assert_eq!(basis.encode(), sealed(bytes));
        }
    }
}

/// Keys of two elements: the first says whether a key is near a sink or window, the second is what is looked for.
fn outside_mass(wanted: f32, needle: f32) -> OutsideMass {
    let policy = Streaming {
        sink: 4,
        window: 8,
        queries_min: 3,
        ..Streaming::default()
    };
    let mut seen = OutsideMass::default();
    for n in [10, 12, 40, 50, 60] {
        let key = |at: usize| {
            [
                if at < 4 || at >= n - 8 { 20.0 } else { 0.0 },
                if at == 7 { needle } else { 0.0 },
            ]
        };
        let keys: Vec<f16> = (0..n).flat_map(key).map(f16::from_f32).collect();
        // Two query heads: one that looks at the ends, one that looks for the needle as far as `wanted`.
        seen.add(&[1.0, 0.0, 1.0, wanted], &keys, 2, 1.0, &policy);
    }
    seen
}

#[test]
fn a_head_that_finds_needles_is_not_streaming() {
    let policy = Streaming {
        sink: 4,
        window: 8,
        queries_min: 3,
        ..Streaming::default()
    };
    // 10 and 12 tokens have nothing outside; three positions of two query heads are left.
    let ends = outside_mass(0.0, 30.0);
    assert_eq!(ends.queries(), 6);
    assert!(ends.is_streaming(&policy), "{:?}", ends.quantile(1.0));
    assert!(!outside_mass(1.0, 30.0).is_streaming(&policy));
    assert!(!outside_mass(1.0, f32::NAN).is_streaming(&policy));
    assert!(
        !ends.is_streaming(&Streaming {
            queries_min: 7,
            ..policy
        }),
        "too few queries to conclude"
    );
    assert!(!OutsideMass::default().is_streaming(&policy) && OutsideMass::default().quantile(0.5) == 1.0);
    // 99 quiet queries hide one needle from a median, not from the bound on the largest.
    let mut once = OutsideMass::default();
    (0..40).for_each(|_| once.merge(&ends));
    once.merge(&outside_mass(1.0, 30.0));
    assert!(once.quantile(0.98) < policy.mass_p99_max && !once.is_streaming(&policy));
}
