//! Which heads attend to the first and the last tokens only, as far as a calibration can tell.

use half::f16;
use kvasir_simd::{log_sum_exp2, scores};

/// When a head counts as streaming: over the queries that were looked at, of all query heads of its group, the softmax mass
/// that lies neither in the first `sink` nor in the last `window` tokens stays below a bound.
///
/// The bound is meant to be hard to meet. A head that is called streaming by mistake loses the document without anyone
/// noticing, since nothing is searched for it; one that is missed costs a scan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Streaming {
    /// First tokens that are always attended to.
    pub sink: usize,
    /// Last tokens that are always attended to, the query's own included.
    pub window: usize,
    /// Bound for the 99th percentile of the mass outside.
    pub mass_p99_max: f32,
    /// Bound for the largest mass outside that was seen.
    pub mass_max: f32,
    /// With fewer queries than this nothing is concluded.
    pub queries_min: usize,
}

impl Streaming {
    /// First tokens that a head marked as streaming in a basis file attends to.
    pub const SINK: usize = 128;

    /// Last tokens that a head marked as streaming in a basis file attends to. Whoever attends to fewer than these by itself
    /// must not obey the mark.
    pub const WINDOW: usize = 512;
}

impl Default for Streaming {
    fn default() -> Self {
        Self {
            sink: Self::SINK,
            window: Self::WINDOW,
            mass_p99_max: 1e-3,
            mass_max: 1e-2,
            queries_min: 256,
        }
    }
}

/// The masses outside that were seen for one KV head.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OutsideMass {
    masses: Vec<f32>,
}

impl OutsideMass {
    /// Adds the queries `q[heads, head_dim]` of the group at the position of the last of `keys[n, head_dim]`: full attention
    /// over all keys, and how much of each query's mass lies outside. `scale` as for attention. Positions that have nothing
    /// outside say nothing and are left out.
    ///
    /// # Panics
    /// If queries or keys are not whole rows.
    pub fn add(&mut self, q: &[f32], keys: &[f16], head_dim: usize, scale: f32, policy: &Streaming) {
        assert!(
            head_dim > 0 && q.len().is_multiple_of(head_dim) && keys.len().is_multiple_of(head_dim),
            "streaming: queries and keys are rows of {head_dim}"
        );
        let n = keys.len() / head_dim;
        let outside = policy.sink..n.saturating_sub(policy.window);
        if outside.is_empty() {
            return;
        }
        let mut all = vec![0.0; q.len() / head_dim * n];
        scores(q, keys, head_dim, scale, &mut all);
        for scores in all.chunks_exact(n) {
            let share = (log_sum_exp2(&scores[outside.clone()]) - log_sum_exp2(scores)).exp2();
            // A score that is not a number must not look like a quiet head.
            let sound = scores.iter().all(|score| score.is_finite());
            self.masses.push(if sound { share } else { 1.0 });
        }
    }

    /// Adds what `other` saw.
    pub fn merge(&mut self, other: &Self) {
        self.masses.extend_from_slice(&other.masses);
    }

    /// Queries looked at.
    pub fn queries(&self) -> usize {
        self.masses.len()
    }

    /// The `share` quantile (0 to 1) of the masses outside, 1 if none was seen.
    pub fn quantile(&self, share: f32) -> f32 {
        let mut masses = self.masses.clone();
        masses.sort_by(f32::total_cmp);
        let at = (share * masses.len() as f32).ceil() as usize;
        masses.get(at.clamp(1, masses.len().max(1)) - 1).copied().unwrap_or(1.0)
    }

    /// Whether the head counts as streaming.
    pub fn is_streaming(&self, policy: &Streaming) -> bool {
        self.queries() >= policy.queries_min
            && self.quantile(0.99) < policy.mass_p99_max
            && self.quantile(1.0) < policy.mass_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_by_rank() {
        let seen = OutsideMass {
            masses: vec![0.4, 0.1, 0.3, 0.2],
        };
        for (share, expected) in [(0.0, 0.1), (0.25, 0.1), (0.5, 0.2), (0.51, 0.3), (1.0, 0.4)] {
            assert_eq!(seen.quantile(share), expected, "share {share}");
        }
    }
}
