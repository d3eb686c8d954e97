//! Seeded data for the tests.

use half::f16;
use rand::{Rng, SeedableRng, rngs::SmallRng};

pub(crate) fn values(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-2.0..2.0)).collect()
}

pub(crate) fn halves(seed: u64, len: usize) -> Vec<f16> {
    values(seed, len).into_iter().map(f16::from_f32).collect()
}

pub(crate) fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random()).collect()
}

/// Bits, so that zeros of different sign and NaN count.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Largest difference from the truth, relative to the largest magnitude of it (at least 1).
pub(crate) fn error(found: &[f32], truth: &[f64]) -> f64 {
    assert_eq!(found.len(), truth.len());
    let scale = truth.iter().fold(1.0_f64, |high, x| high.max(x.abs()));
    found
        .iter()
        .zip(truth)
        .fold(0.0, |worst, (a, b)| f64::max(worst, (f64::from(*a) - b).abs() / scale))
}
