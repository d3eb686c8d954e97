//! How long to wait before the next attempt: twice as long each time, within bounds, with jitter so that many routers do
//! not knock at a returning worker in step.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// Waits that grow until [`Backoff::reset`].
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    attempt: u32,
    random: u64,
}

impl Backoff {
    /// `seed` decides the jitter.
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            attempt: 0,
            random: seed,
        }
    }

    /// The next wait: between half of the current step and the whole of it.
    pub(crate) fn next(&mut self) -> Duration {
        let step = FIRST.saturating_mul(1 << self.attempt.min(16)).min(LONGEST);
        self.attempt = self.attempt.saturating_add(1);
        step.mul_f64(0.5 + 0.5 * self.fraction())
    }

    /// The attempt succeeded: the next wait is short again.
    pub(crate) fn reset(&mut self) {
        self.attempt = 0;
    }

    /// SplitMix64 (Steele, Lea, Flood 2014), as a fraction of 1.
    fn fraction(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_within_bounds_and_start_over() {
        for seed in 0..100 {
            let mut backoff = Backoff::new(seed);
            for attempt in 0..40 {
                let step = FIRST.saturating_mul(1 << attempt.min(16)).min(LONGEST);
                let wait = backoff.next();
                assert!(
                    wait >= step / 2 && wait <= step,
                    "seed {seed}, attempt {attempt}: {wait:?} of {step:?}"
                );
            }
            backoff.reset();
            assert!(backoff.next() <= FIRST);
        }
        assert_ne!(
            Backoff::new(1).next(),
            Backoff::new(2).next(),
            "two routers wait differently"
        );
    }
}
