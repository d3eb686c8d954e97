//! RetroInfer's wave index (Chen et al. 2025, arXiv 2505.02922): clusters of about 16 keys, made in segments of 8,192.
//!
//! Keys of a segment, less their mean, go through spherical k-means (10 iterations from evenly spaced keys); a cluster keeps its
//! mean key, its mean value and its size. A search has three zones, as published:
//!
//! - *retrieved*: the clusters that the query heads of the group weigh most, together; all their keys are scored;
//! - *estimated*: the next clusters stand for their keys by `size * exp(q . mean key)` and their mean value. By Jensen's
//!   inequality this is never more than the cluster's true mass: [`Wave::estimate`];
//! - dropped: the rest.
//!
//! Keys that do not yet fill a segment are scanned flat: a search scores all of them, whatever its effort.

mod estimate;

use half::f16;
use kvasir_simd::{Pool, log_sum_exp2};

pub use self::estimate::Estimate;
use crate::{
    Cost, Hits, IndexError, KeyIndex, KeyRows, Search,
    cluster::{Lists, Metric, finite_rows, k_means, mean_row},
    file::{self, Fields, Kind, Origin},
    search::{Best, budget, check, check_rows, hits, is_finite, ranked, scan_lists, scan_tail},
};

const VERSION: u16 = 1;

/// How clusters are made. The defaults are the published ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaveParams {
    /// Keys of a segment, at least 16 (8,192: less than 1 % of recall lost against one clustering over all keys, and a fifth
    /// of the time).
    pub segment_keys: usize,
    /// Keys of a cluster on average, at least 1 (16).
    pub cluster_keys: usize,
    /// Iterations of k-means, at least 1 (10).
    pub iterations: usize,
}

impl Default for WaveParams {
    fn default() -> Self {
        Self {
            segment_keys: 8192,
            cluster_keys: 16,
            iterations: 10,
        }
    }
}

/// Clusters of keys in segments, with their mean values where values were given.
#[derive(Clone, Debug, PartialEq)]
pub struct Wave {
    origin: Origin,
    params: WaveParams,
    head_dim: usize,
    /// Keys in segments; what was appended behind them waits in `fresh_*`.
    clustered: usize,
    /// Clusters before each segment, and at the end their number.
    segments: Vec<u32>,
    clusters: Lists,
    /// Mean keys, `[clusters, head_dim]`.
    centroids: Vec<f16>,
    /// Mean values, `[clusters, head_dim]`; empty in an index of keys alone. Means, because a sum may not fit a half.
    values: Vec<f16>,
    fresh_keys: Vec<f16>,
    fresh_values: Vec<f16>,
    with_values: bool,
}

impl Wave {
    /// An empty index. `with_values`: it is given values too ([`Wave::append_rows`]) and can estimate.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] naming the parameter that cannot be.
    pub fn new(head_dim: usize, params: WaveParams, with_values: bool, origin: Origin) -> Result<Self, IndexError> {
        let invalid = |argument, problem: &str| {
            Err(IndexError::Invalid {
                argument,
                problem: problem.to_owned(),
            })
        };
        if !(1..=1024).contains(&head_dim) {
            return invalid("head_dim", "is 1 to 1024");
        }
        if !(16..=1 << 20).contains(&params.segment_keys) {
            return invalid("segment_keys", "is 16 to 1,048,576");
        }
        if !(1..=params.segment_keys).contains(&params.cluster_keys) {
            return invalid("cluster_keys", "is 1 to segment_keys");
        }
        if !(1..=1000).contains(&params.iterations) {
            return invalid("iterations", "is 1 to 1000");
        }
        Ok(Self {
            origin,
            params,
            head_dim,
            clustered: 0,
            segments: vec![0],
            clusters: Lists {
                starts: vec![0],
                members: Vec::new(),
            },
            centroids: Vec::new(),
            values: Vec::new(),
            fresh_keys: Vec::new(),
            fresh_values: Vec::new(),
            with_values,
        })
    }

    /// Adds keys and their values, `[n, head_dim]` each. Each segment that fills is clustered at once.
    ///
    /// # Errors
    /// [`IndexError`] if the shapes do not fit or the index was made for keys alone.
    pub fn append_rows(&mut self, keys: &[f16], values: &[f16]) -> Result<(), IndexError> {
        check_rows(keys, self.head_dim, self.keys())?;
        if !self.with_values {
            return Err(IndexError::Unsupported {
                index: "wave",
                problem: "was made for keys alone: append keys, or make it with values",
            });
        }
        if values.len() != keys.len() {
            return Err(IndexError::Invalid {
                argument: "values",
                problem: format!("{} elements for {} of keys", values.len(), keys.len()),
            });
        }
        self.grow(keys, values);
        Ok(())
    }

    /// Clusters made so far.
    pub fn clusters(&self) -> usize {
        self.clusters.len()
    }

    fn grow(&mut self, mut keys: &[f16], mut values: &[f16]) {
        let whole = self.params.segment_keys * self.head_dim;
        while !keys.is_empty() {
            let take = (whole - self.fresh_keys.len()).min(keys.len());
            let (now, later) = keys.split_at(take);
            self.fresh_keys.extend_from_slice(now);
            keys = later;
            if self.with_values {
                let (now, later) = values.split_at(take);
                self.fresh_values.extend_from_slice(now);
                values = later;
            }
            if self.fresh_keys.len() == whole {
                self.cluster();
            }
        }
    }

    /// Makes a segment of the fresh keys.
    fn cluster(&mut self) {
        let head_dim = self.head_dim;
        let (fresh_keys, fresh_values) = (
            std::mem::take(&mut self.fresh_keys),
            std::mem::take(&mut self.fresh_values),
        );
        let (positions, mut rows) = finite_rows(KeyRows::new(&[&fresh_keys], self.params.segment_keys, head_dim));
        let row_of = |at: u32| at as usize * head_dim..(at as usize + 1) * head_dim;
        let mean = mean_row(positions.iter().map(|&at| &fresh_keys[row_of(at)]), head_dim);
        for row in rows.chunks_exact_mut(head_dim) {
            row.iter_mut().zip(&mean).for_each(|(x, mean)| *x -= mean.to_f32());
        }
        let count = (self.params.segment_keys / self.params.cluster_keys).min(positions.len());
        if count > 0 {
            let pool = Pool::new(1);
            let assigned = k_means(&rows, head_dim, count, self.params.iterations, Metric::Cosine, &pool);
            let lists = Lists::of(&assigned, count, &positions);
            for list in 0..lists.len() {
                let members = lists.get(list);
                let key_rows = members.iter().map(|&at| &fresh_keys[row_of(at)]);
                self.centroids.extend(mean_row(key_rows, head_dim));
                if self.with_values {
                    let value_rows = members.iter().map(|&at| &fresh_values[row_of(at)]);
                    self.values
                        .extend(mean_row(value_rows.filter(|row| is_finite(row)), head_dim));
                }
                let members: Vec<u32> = members.iter().map(|at| at + self.clustered as u32).collect();
                self.clusters.push(&members);
            }
        }
        self.clustered += self.params.segment_keys;
        self.segments.push(self.clusters.len() as u32);
    }

    /// Clusters in the order in which the group wants them: per query head a softmax over mean keys, summed over heads.
    /// Also the base-2 scores of the mean keys, `[heads, clusters]`.
    fn order(&self, q: &[f32], scale: f32) -> (Vec<u32>, Vec<f32>) {
        let clusters = self.clusters.len();
        let mut scores = vec![0.0; q.len() / self.head_dim * clusters];
        kvasir_simd::scores(q, &self.centroids, self.head_dim, scale, &mut scores);
        // A product of huge halves may overflow: such a cluster comes last.
        scores
            .iter_mut()
            .filter(|score| !score.is_finite())
            .for_each(|score| *score = f32::NEG_INFINITY);
        let mut weights = vec![0.0; clusters];
        if clusters > 0 {
            for scores in scores.chunks_exact(clusters) {
                let lse = log_sum_exp2(scores).max(f32::MIN);
                for (weight, score) in weights.iter_mut().zip(scores) {
                    *weight += (score - lse).exp2();
                }
            }
        }
        (ranked(&weights), scores)
    }
}

impl KeyIndex for Wave {
    fn name(&self) -> &'static str {
        "wave"
    }

    fn keys(&self) -> usize {
        self.clustered + self.fresh_keys.len() / self.head_dim
    }

    fn bytes(&self) -> usize {
        let halves = [&self.centroids, &self.values, &self.fresh_keys, &self.fresh_values];
        halves.iter().map(|part| size_of_val(part.as_slice())).sum::<usize>()
            + self.clusters.bytes()
            + size_of_val(self.segments.as_slice())
    }

    /// Adds keys to an index made for keys alone.
    fn append(&mut self, keys: &[f16]) -> Result<(), IndexError> {
        check_rows(keys, self.head_dim, self.keys())?;
        if self.with_values {
            return Err(IndexError::Unsupported {
                index: "wave",
                problem: "was made with values: append keys and values together",
            });
        }
        self.grow(keys, &[]);
        Ok(())
    }

    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        let heads = check(search, self.head_dim, self.keys())?;
        let (order, _) = self.order(search.q, search.scale);
        let mut cost = Cost {
            keys_scored: 0,
            bytes_read: size_of_val(self.centroids.as_slice()) as u64,
        };
        let mut best = vec![Best::new(search.k); heads];
        scan_lists(
            search,
            &vec![order; heads],
            budget(search, self.clustered),
            size_of::<u32>() as u64,
            |cluster| self.clusters.get(cluster as usize).iter().copied(),
            &mut cost,
            &mut best,
        );
        scan_tail(search, self.clustered, &mut cost, &mut best);
        Ok(hits(best, cost))
    }

    fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(self.bytes() + 64);
        let counts = [
            self.params.segment_keys,
            self.params.cluster_keys,
            self.params.iterations,
            usize::from(self.with_values),
            self.segments.len(),
            self.clusters.len(),
            self.clusters.members.len(),
        ];
        file::put_u32s(&mut payload, &counts.map(|count| count as u32));
        for part in [&self.segments, &self.clusters.starts, &self.clusters.members] {
            file::put_u32s(&mut payload, part);
        }
        for part in [&self.centroids, &self.values, &self.fresh_keys, &self.fresh_values] {
            file::put_halves(&mut payload, part);
        }
        file::seal(Kind::Wave, VERSION, self.head_dim, self.keys(), self.origin, &payload)
    }
}

impl Wave {
    /// Reads what [`KeyIndex::encode`] wrote.
    ///
    /// # Errors
    /// [`IndexError::Unusable`]: damaged, another kind or version, or built from something else than `origin`.
    pub fn decode(bytes: &[u8], origin: Origin) -> Result<Self, IndexError> {
        let unusable = |why: &str| IndexError::Unusable(why.to_owned());
        let frame = file::open(bytes, Kind::Wave, VERSION, origin)?;
        let mut fields = Fields::new(frame.payload);
        let mut count = || fields.u32().map(|count| count as usize);
        let params = WaveParams {
            segment_keys: count()?,
            cluster_keys: count()?,
            iterations: count()?,
        };
        let (with_values, segments, clusters, members) = (count()?, count()?, count()?, count()?);
        let with_values = match with_values {
            0 => false,
            1 => true,
            _ => return Err(unusable("whether it has values is neither 0 nor 1")),
        };
        let mut index = Self::new(frame.head_dim, params, with_values, origin)
            .map_err(|error| IndexError::Unusable(error.to_string()))?;
        index.segments = fields.u32s(segments)?;
        index.clusters.starts = fields.u32s(clusters.saturating_add(1))?;
        index.clusters.members = fields.u32s(members)?;
        index.centroids = fields.halves(clusters.saturating_mul(frame.head_dim))?;
        let (values, fresh) = (clusters * usize::from(with_values), frame.keys % params.segment_keys);
        index.values = fields.halves(values * frame.head_dim)?;
        index.fresh_keys = fields.halves(fresh * frame.head_dim)?;
        index.fresh_values = fields.halves(fresh * usize::from(with_values) * frame.head_dim)?;
        fields.finish()?;
        index.clustered = frame.keys - fresh;
        if !index.is_valid() {
            return Err(unusable("its segments or clusters cannot be"));
        }
        Ok(index)
    }

    /// What the rest of the code relies on; decoded bytes may say anything.
    fn is_valid(&self) -> bool {
        let segments_fit = self.segments.first() == Some(&0)
            && self.segments.is_sorted()
            && self.segments.last().map(|last| *last as usize) == Some(self.clusters.len())
            && self.segments.len() == self.clustered / self.params.segment_keys + 1;
        let within = |(segment, range): (usize, &[u32])| {
            let keys = segment * self.params.segment_keys..(segment + 1) * self.params.segment_keys;
            (range[0]..range[1])
                .flat_map(|cluster| self.clusters.get(cluster as usize))
                .all(|member| keys.contains(&(*member as usize)))
        };
        segments_fit
            && self.clusters.is_valid(self.clustered)
            && self.segments.windows(2).enumerate().all(within)
            && is_finite(&self.centroids)
            && is_finite(&self.values)
    }
}

#[cfg(test)]
mod tests;
