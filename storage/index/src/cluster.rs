//! k-means over keys, and the lists it gives: what `wave` and `ivf` are made of.

use half::f16;
use kvasir_simd::{Pool, to_f16};

use crate::{
    KeyRows,
    search::{is_finite, marks},
};

/// Rows assigned in one task.
const TASK_ROWS: usize = 64;

/// Which centroid is a row's nearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metric {
    /// Greatest cosine: centroids have unit length.
    Cosine,
    /// Least Euclidean distance.
    Euclid,
}

/// Assigns each of `rows[n, head_dim]` to one of `count` clusters; a cluster may stay empty. Rows are finite.
///
/// Lloyd's iterations from rows that are evenly spaced (not random, so that equal rows give equal clusters). Centroids are
/// rounded to halves for the products, which is far below the spread of a cluster.
pub(crate) fn k_means(
    rows: &[f32],
    head_dim: usize,
    count: usize,
    iterations: usize,
    metric: Metric,
    pool: &Pool,
) -> Vec<u32> {
    let n = rows.len() / head_dim;
    assert!(
        (1..=n).contains(&count),
        "k_means: from 1 cluster to as many as there are rows"
    );
    // Halves hold centroids of any scale once the greatest element is 1.
    let most = rows.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let shrink = if most > 0.0 { 1.0 / most } else { 0.0 };
    let row = |at: usize| &rows[at * head_dim..][..head_dim];
    let mut centroids: Vec<f32> = (0..count)
        .flat_map(|cluster| row((2 * cluster + 1) * n / (2 * count)).iter().map(|x| x * shrink))
        .collect();
    let mut halves = vec![f16::ZERO; centroids.len()];
    let mut assigned = vec![0; n];
    for _ in 0..iterations.max(1) {
        if metric == Metric::Cosine {
            centroids.chunks_exact_mut(head_dim).for_each(normalize);
        }
        to_f16(&centroids, &mut halves);
        // x . c - |c|^2 / 2 orders as the Euclidean distance does.
        let offsets: Vec<f32> = halves
            .chunks_exact(head_dim)
            .map(|centroid| match metric {
                Metric::Cosine => 0.0,
                Metric::Euclid => 0.5 * centroid.iter().map(|x| x.to_f32().powi(2)).sum::<f32>(),
            })
            .collect();
        pool.run_chunks(&mut assigned, TASK_ROWS, &|task, assigned| {
            let q = &rows[task * TASK_ROWS * head_dim..][..assigned.len() * head_dim];
            let mut products = vec![0.0; assigned.len() * count];
            kvasir_simd::scores(q, &halves, head_dim, shrink * std::f32::consts::LN_2, &mut products);
            for (assigned, products) in assigned.iter_mut().zip(products.chunks_exact(count)) {
                *assigned = nearest(products, &offsets);
            }
        });
        centroids = means(rows, head_dim, &assigned, centroids, shrink);
    }
    assigned
}

/// Mean of the rows of each cluster, times `shrink`; that of an empty one stays `before`.
fn means(rows: &[f32], head_dim: usize, assigned: &[u32], mut before: Vec<f32>, shrink: f32) -> Vec<f32> {
    let mut sums = vec![0.0_f32; before.len()];
    let mut sizes = vec![0_u32; before.len() / head_dim];
    for (row, &cluster) in rows.chunks_exact(head_dim).zip(assigned) {
        kvasir_simd::add_assign(&mut sums[cluster as usize * head_dim..][..head_dim], row);
        sizes[cluster as usize] += 1;
    }
    for ((before, sum), &size) in before
        .chunks_exact_mut(head_dim)
        .zip(sums.chunks_exact(head_dim))
        .zip(&sizes)
    {
        if size > 0 {
            let share = shrink / size as f32;
            before.iter_mut().zip(sum).for_each(|(mean, sum)| *mean = sum * share);
        }
    }
    before
}

fn normalize(row: &mut [f32]) {
    let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
    if norm > 0.0 {
        row.iter_mut().for_each(|x| *x /= norm);
    }
}

/// The first greatest.
fn nearest(products: &[f32], offsets: &[f32]) -> u32 {
    let (mut nearest, mut high) = (0, f32::NEG_INFINITY);
    for (at, (product, offset)) in products.iter().zip(offsets).enumerate() {
        let value = product - offset;
        if value > high {
            (nearest, high) = (at as u32, value);
        }
    }
    nearest
}

/// Positions and elements of the keys that are numbers.
pub(crate) fn finite_rows(keys: KeyRows<'_>) -> (Vec<u32>, Vec<f32>) {
    let positions: Vec<u32> = (0..keys.len() as u32)
        .filter(|&position| is_finite(keys.row(position as usize)))
        .collect();
    let mut rows = vec![0.0; positions.len() * keys.head_dim()];
    for (row, &position) in rows.chunks_exact_mut(keys.head_dim()).zip(&positions) {
        kvasir_simd::to_f32(keys.row(position as usize), row);
    }
    (positions, rows)
}

/// Mean of some rows, summed in f64; zeros of none. A mean of finite halves fits a half.
pub(crate) fn mean_row<'a>(rows: impl Iterator<Item = &'a [f16]>, head_dim: usize) -> Vec<f16> {
    let mut sums = vec![0.0_f64; head_dim];
    let mut count = 0_u32;
    for row in rows {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.to_f64());
        count += 1;
    }
    let count = f64::from(count.max(1));
    sums.iter().map(|sum| f16::from_f64(sum / count)).collect()
}

/// Lists of positions that lie one behind the other.
///
/// Invariant: `starts` begins with 0, does not fall, and ends with the number of members.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lists {
    pub(crate) starts: Vec<u32>,
    pub(crate) members: Vec<u32>,
}

impl Lists {
    /// The lists of the clusters that are not empty, members rising; member `i` of `assigned` is `positions[i]`.
    pub(crate) fn of(assigned: &[u32], count: usize, positions: &[u32]) -> Self {
        let mut by_cluster = vec![Vec::new(); count];
        for (&cluster, &position) in assigned.iter().zip(positions) {
            by_cluster[cluster as usize].push(position);
        }
        let mut lists = Self {
            starts: vec![0],
            members: Vec::with_capacity(positions.len()),
        };
        for members in by_cluster.iter().filter(|members| !members.is_empty()) {
            lists.push(members);
        }
        lists
    }

    /// Adds a list.
    pub(crate) fn push(&mut self, members: &[u32]) {
        self.members.extend_from_slice(members);
        self.starts.push(self.members.len() as u32);
    }

    /// How many lists there are.
    pub(crate) fn len(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// Positions of a list.
    pub(crate) fn get(&self, list: usize) -> &[u32] {
        &self.members[self.starts[list] as usize..self.starts[list + 1] as usize]
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        size_of_val(self.starts.as_slice()) + size_of_val(self.members.as_slice())
    }

    /// Checks what came from outside: the invariant, each member below `keys`, and none twice.
    pub(crate) fn is_valid(&self, keys: usize) -> bool {
        let rises = self.starts.first() == Some(&0)
            && self.starts.is_sorted()
            && self.starts.last().map(|last| *last as usize) == Some(self.members.len());
        let mut seen = marks(keys);
        rises
            && self.members.iter().all(|&member| {
                let fresh = (member as usize) < keys && !seen.contains(member);
                if fresh {
                    seen.insert(member);
                }
                fresh
            })
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

    use super::*;

    #[test]
    fn finds_clusters_that_lie_apart() {
        let mut rng = SmallRng::seed_from_u64(1);
        let centres: Vec<[f32; 8]> = (0..5)
            .map(|_| std::array::from_fn(|_| rng.random_range(-9.0..9.0)))
            .collect();
        // Interleaved, so that the evenly spaced first centroids lie in all of them.
        let rows: Vec<f32> = (0..405)
            .flat_map(|at| centres[at * 7 % 5])
            .map(|x| x + rng.random_range(-0.3..0.3))
            .collect();
        for metric in [Metric::Cosine, Metric::Euclid] {
            let pool = Pool::new(2);
            let assigned = k_means(&rows, 8, 5, 10, metric, &pool);
            for at in 5..405 {
                assert_eq!(assigned[at], assigned[at % 5], "{metric:?}: row {at}");
            }
            assert_eq!(
                assigned,
                k_means(&rows, 8, 5, 10, metric, &Pool::new(1)),
                "threads change nothing"
            );
        }
    }

    #[test]
    fn equal_rows_and_huge_rows_are_assigned() {
        for value in [0.0, 1.0, 3e38] {
            let assigned = k_means(&[value; 40], 4, 3, 10, Metric::Euclid, &Pool::new(1));
            assert_eq!(assigned.len(), 10);
            assert!(assigned.iter().all(|cluster| *cluster < 3), "{value}");
        }
    }

    #[test]
    fn lists_keep_every_member_once() {
        let lists = Lists::of(&[2, 0, 2, 0, 4], 5, &[10, 11, 12, 13, 14]);
        assert_eq!(
            (lists.len(), lists.get(0), lists.get(1), lists.get(2)),
            (3, &[11, 13][..], &[10, 12][..], &[14][..])
        );
        let broken = |change: fn(&mut Lists)| {
            let mut lists = lists.clone();
            change(&mut lists);
            lists
        };
        for (what, lists, expected) in [
            ("as it is", lists.clone(), true),
            ("a member beyond", broken(|lists| lists.members[0] = 15), false),
            ("a member twice", broken(|lists| lists.members[0] = 14), false),
            ("starts fall", broken(|lists| lists.starts[1] = 5), false),
            ("a member too many", broken(|lists| lists.members.push(9)), false),
            ("no starts", broken(|lists| lists.starts.clear()), false),
        ] {
            assert_eq!(lists.is_valid(15), expected, "{what}");
        }
    }
}
