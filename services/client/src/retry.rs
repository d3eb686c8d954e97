//! Pauses between tries.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

const FIRST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_secs(1);

/// Pauses that double from 20 ms to 1 s, each shortened by up to a half so that clients do not come back in step.
#[derive(Debug)]
pub(crate) struct Backoff(AtomicU64);

impl Backoff {
    pub(crate) fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }

    /// The pause after try number `tries`, counted from 1.
    pub(crate) fn pause(&self, tries: u32) -> Duration {
        let full = FIRST.saturating_mul(1 << tries.saturating_sub(1).min(10)).min(LONGEST);
        full.mul_f64(1.0 - self.fraction() / 2.0)
    }

    /// The next of a sequence in [0, 1): a Weyl sequence, mixed by two xor-multiply rounds.
    fn fraction(&self) -> f64 {
        let step = 0x9E37_79B9_7F4A_7C15;
        let mut x = self.0.fetch_add(step, Ordering::Relaxed).wrapping_add(step);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^= x >> 31;
        (x >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_within_their_bounds_and_differ() {
        let backoff = Backoff::new(7);
        for (tries, full) in [(1, 20), (2, 40), (3, 80), (6, 640), (7, 1000), (60, 1000)] {
            let full = Duration::from_millis(full);
            let pauses: Vec<_> = (0..100).map(|_| backoff.pause(tries)).collect();
            assert!(
                pauses.iter().all(|pause| *pause > full / 2 && *pause <= full),
                "{tries}: {pauses:?}"
            );
            assert!(pauses.windows(2).all(|pair| pair[0] != pair[1]));
        }
        assert_eq!(Backoff::new(7).pause(1), Backoff::new(7).pause(1), "a seed repeats");
    }
}
