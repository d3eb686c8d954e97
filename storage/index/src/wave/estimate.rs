//! The estimation zone: clusters that stand for their keys.

use kvasir_simd::{Partial, add_assign, log_sum_exp2};

use super::Wave;
use crate::{IndexError, KeyIndex as _, Search, search::budget};

/// Partial attention that was estimated from clusters, and what it cost.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Estimate {
    /// `(o, lse)` per query head over the estimated clusters. The mass behind `lse` is never more than that of their keys,
    /// up to the rounding of mean keys to halves.
    pub partial: Partial,
    /// Clusters that were estimated.
    pub clusters: usize,
    /// Keys they stand for.
    pub keys: usize,
    /// Bytes of mean keys and values that were read; none of the keys themselves.
    pub bytes_read: u64,
}

impl Wave {
    /// Estimates the keys that a search does not score: those of the clusters behind its retrieved ones, as many as hold
    /// `share` of the clustered keys (published: 0.232, with an effort of 0.018), or all the rest with 1.
    ///
    /// It joins with the attention over *all* keys that the same search scores, not only over its best `k`; ask for a `k` of
    /// [`KeyIndex::keys`](crate::KeyIndex::keys) there. Of a cluster that the budget cut in two, the part that was not scored
    /// is estimated. Excluded members of a cluster are not counted, though its means were made with them.
    ///
    /// # Errors
    /// [`IndexError`] as [`KeyIndex::search`](crate::KeyIndex::search), if `share` is not 0 to 1, or if the index has no values.
    pub fn estimate(&self, search: &Search<'_>, share: f32) -> Result<Estimate, IndexError> {
        let heads = crate::search::check(search, self.head_dim, self.keys())?;
        if !self.with_values {
            return Err(IndexError::Unsupported {
                index: "wave",
                problem: "has no values to estimate with: make it with values",
            });
        }
        if !(0.0..=1.0).contains(&share) {
            return Err(IndexError::Invalid {
                argument: "share",
                problem: format!("{share} is not 0 to 1"),
            });
        }
        let (order, scores) = self.order(search.q, search.scale);
        let zone = self.zone(search, &order, share);
        let clusters = self.clusters.len();
        let mut out = Estimate {
            clusters: zone.len(),
            keys: zone.iter().map(|(_, size)| *size as usize).sum(),
            bytes_read: (2 * zone.len() * self.head_dim * 2) as u64,
            ..Estimate::default()
        };
        for head in 0..heads {
            let scores = &scores[head * clusters..][..clusters];
            let weights: Vec<f32> = zone
                .iter()
                .map(|&(cluster, size)| scores[cluster as usize] + (size as f32).log2())
                .collect();
            let lse = log_sum_exp2(&weights);
            let (mut o, mut value) = (vec![0.0; self.head_dim], vec![0.0; self.head_dim]);
            for (&(cluster, _), weight) in zone.iter().zip(&weights) {
                let weight = (weight - lse.max(f32::MIN)).exp2();
                kvasir_simd::to_f32(
                    &self.values[cluster as usize * self.head_dim..][..self.head_dim],
                    &mut value,
                );
                value.iter_mut().for_each(|x| *x *= weight);
                add_assign(&mut o, &value);
            }
            out.partial.o.extend(o);
            out.partial.lse.push(lse);
        }
        Ok(out)
    }

    /// The clusters to estimate, each with the number of keys it stands for.
    fn zone(&self, search: &Search<'_>, order: &[u32], share: f32) -> Vec<(u32, u32)> {
        let mut scored = budget(search, self.clustered);
        let mut wanted = (f64::from(share) * self.clustered as f64).ceil() as usize;
        let segment_keys = self.params.segment_keys as u32;
        let touched: Vec<bool> = (0..self.segments.len() as u32 - 1)
            .map(|segment| {
                let keys = segment * segment_keys..(segment + 1) * segment_keys;
                search.excluded.searched(keys).map(|part| part.len()).sum::<usize>() < self.params.segment_keys
            })
            .collect();
        let mut zone = Vec::new();
        for &cluster in order {
            let members = self.clusters.get(cluster as usize);
            let skip = members.len().min(scored);
            scored -= skip;
            let members = &members[skip..];
            if wanted == 0 {
                break;
            }
            if members.is_empty() {
                continue;
            }
            wanted = wanted.saturating_sub(members.len());
            let is_touched = touched[members[0] as usize / self.params.segment_keys];
            let size = if is_touched {
                members
                    .iter()
                    .filter(|member| !search.excluded.contains(**member))
                    .count()
            } else {
                members.len()
            };
            if size > 0 {
                zone.push((cluster, size as u32));
            }
        }
        zone
    }
}
