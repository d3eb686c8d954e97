//! What retrieval did for one request, in bounded memory.

use kvasir_client::{Reply, Report};

/// Sums over all replies, and the covered mass as a histogram.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tally {
    pub(crate) keys_scanned: u64,
    pub(crate) keys_total: u64,
    pub(crate) keys_attended: u64,
    pub(crate) bytes: u64,
    pub(crate) round_trips: u64,
    mass: Mass,
}

impl Tally {
    pub(crate) fn add(&mut self, reply: &Reply) {
        let Report {
            keys_scanned,
            keys_total,
            keys_attended,
            mass_covered,
            shortfall: _,
            bytes_read: _,
        } = &reply.report;
        self.keys_scanned += keys_scanned;
        self.keys_total += keys_total;
        self.keys_attended += keys_attended;
        self.bytes += reply.wire_bytes as u64;
        self.round_trips += 1;
        for mass in mass_covered {
            self.mass.add(*mass);
        }
    }

    /// Median of the covered mass over steps, layers and heads, to within 1 % of the missed mass; 0 without replies.
    pub(crate) fn mass_p50(&self) -> f32 {
        self.mass.median()
    }

    /// Lowest covered mass; 0 without replies.
    pub(crate) fn mass_min(&self) -> f32 {
        self.mass.lowest.unwrap_or(0.0)
    }
}

/// Buckets of the missed mass `1 - m`, each 2 % narrower than the one before; the last takes all below 1e-6.
const BUCKETS: usize = 698;
const NARROWING: f64 = 0.98;

/// A histogram over the *missed* mass on a logarithmic scale, because 0.999 and 0.9999 are ten times apart in what they
/// miss. Sparse runs are common and it is 2.8 KiB, so it is allocated with the first value.
#[derive(Clone, Debug, Default, PartialEq)]
struct Mass {
    counts: Vec<u32>,
    total: u64,
    lowest: Option<f32>,
}

impl Mass {
    fn add(&mut self, mass: f32) {
        let mass = if mass.is_finite() { mass.clamp(0.0, 1.0) } else { 0.0 };
        if self.counts.is_empty() {
            self.counts = vec![0; BUCKETS];
        }
        let missed = (1.0 - f64::from(mass)).max(1e-9);
        let bucket = (missed.ln() / NARROWING.ln()) as usize;
        let count = &mut self.counts[bucket.min(BUCKETS - 1)];
        *count = count.saturating_add(1);
        self.total += 1;
        self.lowest = Some(self.lowest.map_or(mass, |lowest| lowest.min(mass)));
    }

    fn median(&self) -> f32 {
        let mut seen = 0;
        // From the last bucket: the one that misses least.
        for (bucket, count) in self.counts.iter().enumerate().rev() {
            seen += u64::from(*count);
            if 2 * seen >= self.total && seen > 0 {
                if bucket == BUCKETS - 1 {
                    return 1.0;
                }
                return (1.0 - NARROWING.powf(bucket as f64 + 0.5)) as f32;
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(masses: &[f32], median: f32, lowest: f32) {
        let mut mass = Mass::default();
        masses.iter().for_each(|value| mass.add(*value));
        let (found, missed) = (mass.median(), 1.0 - median);
        assert!(
            (found - median).abs() <= 0.012 * missed + 2e-6,
            "{masses:?}: {found} is not {median}"
        );
        assert_eq!(mass.lowest.unwrap_or(0.0), lowest);
    }

    #[test]
    fn the_median_is_good_to_a_percent_of_what_is_missed() {
        check(&[], 0.0, 0.0);
        check(&[0.9], 0.9, 0.9);
        check(&[0.5, 0.99, 0.999], 0.99, 0.5);
        check(&[0.999, 0.9999, 0.99, 0.9995, 0.2], 0.999, 0.2);
        check(&[1.0, 1.0, 0.3], 1.0, 0.3);
        check(&[0.0, 0.0, 1.0], 0.0, 0.0);
        check(&[f32::NAN, 2.0, 2.0], 1.0, 0.0);
        let spread: Vec<f32> = (0..1001).map(|i| 0.9 + i as f32 * 0.0001 * 0.999).collect();
        check(&spread, spread[500], 0.9);
    }
}
