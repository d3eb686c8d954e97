//! Distributions in a few numbers.

/// Mean and percentiles of some figures; zeros where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// The mean.
    pub mean: f64,
    /// A tenth is at most this.
    pub p10: f64,
    /// The median.
    pub p50: f64,
    /// Nine of ten are at most this.
    pub p90: f64,
    /// All but a hundredth are at most this.
    pub p99: f64,
}

impl Summary {
    /// Sorts `values` and describes them. A percentile is the smallest value that the share does not exceed (nearest rank).
    pub fn of(values: &mut [f64]) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.max(1) - 1).copied().unwrap_or(0.0)
        };
        Self {
            // A sum of nothing is -0.
            mean: values.iter().sum::<f64>() / values.len().max(1) as f64 + 0.0,
            p10: at(0.1),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
        }
    }
}

/// How bounds on the missed mass compare with what was missed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Certificates {
    /// Bounds given.
    pub count: usize,
    /// Share of bounds that were kept: the missed mass was at most the bound, up to what rounding does to either.
    pub coverage: f64,
    /// The bounds.
    pub bound: Summary,
    /// What was missed.
    pub missed: Summary,
    /// The median bound over the median missed mass: 1 is tight.
    pub tightness: f64,
}

/// A bound is computed in f32 and the truth from f32 scores: where every key was scored, both are the same but for this.
const ROUNDING: f64 = 1e-5;

impl Certificates {
    /// Judges pairs of a bound and the mass that was missed in truth, both shares from 0 to 1.
    pub fn of(pairs: &[(f64, f64)]) -> Self {
        let kept = pairs
            .iter()
            .filter(|(bound, missed)| *missed <= bound + ROUNDING)
            .count();
        let bound = Summary::of(&mut pairs.iter().map(|(bound, _)| *bound).collect::<Vec<_>>());
        let missed = Summary::of(&mut pairs.iter().map(|(_, missed)| *missed).collect::<Vec<_>>());
        Self {
            count: pairs.len(),
            coverage: kept as f64 / pairs.len().max(1) as f64,
            bound,
            missed,
            tightness: if missed.p50 > 0.0 {
                bound.p50 / missed.p50
            } else {
                f64::INFINITY
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        for (mut values, expected) in [
            (vec![], [0.0; 5]),
            (vec![7.0], [7.0; 5]),
            (vec![2.0, 1.0], [1.5, 1.0, 1.0, 2.0, 2.0]),
            (hundred, [50.5, 10.0, 50.0, 90.0, 99.0]),
        ] {
            let found = Summary::of(&mut values);
            assert_eq!([found.mean, found.p10, found.p50, found.p90, found.p99], expected);
        }
    }

    #[test]
    fn certificates_count_broken_bounds() {
        let found = Certificates::of(&[(0.2, 0.1), (0.1, 0.1 + 1e-6), (0.3, 0.4), (0.4, 0.2)]);
        assert_eq!((found.count, found.coverage), (4, 0.75));
        assert_eq!((found.bound.p50, found.missed.p50), (0.2, 0.1 + 1e-6));
        assert!((found.tightness - 2.0).abs() < 1e-4, "{}", found.tightness);
        assert_eq!(Certificates::of(&[(0.0, 0.0)]).tightness, f64::INFINITY);
    }
}
