//! What the searches of all indexes share: checked arguments, the budget of an effort, the best keys seen, lists scanned.

use std::{cmp::Ordering, collections::BinaryHeap};

use crate::{Cost, Hits, IndexError, Search, bits::Bits};

/// A key that was scored, ordered by rank: the better one is the greater. Ties go to the lower position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scored {
    pub(crate) score: f32,
    pub(crate) position: u32,
}

impl Eq for Scored {}

impl Ord for Scored {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then(other.position.cmp(&self.position))
    }
}

impl PartialOrd for Scored {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The `k` best of many scored keys. Scores that are not finite are not kept.
#[derive(Clone, Debug)]
pub(crate) struct Best {
    k: usize,
    /// The worst on top.
    heap: BinaryHeap<std::cmp::Reverse<Scored>>,
}

impl Best {
    pub(crate) fn new(k: usize) -> Self {
        Self {
            k,
            heap: BinaryHeap::new(),
        }
    }

    pub(crate) fn push(&mut self, position: u32, score: f32) {
        if !score.is_finite() {
            return;
        }
        let scored = Scored { score, position };
        if self.heap.len() < self.k {
            self.heap.push(std::cmp::Reverse(scored));
        } else if let Some(mut worst) = self.heap.peek_mut()
            && scored > worst.0
        {
            *worst = std::cmp::Reverse(scored);
        }
    }

    /// The worst of the `k`, once there are `k`.
    pub(crate) fn worst(&self) -> Option<Scored> {
        self.heap
            .peek()
            .filter(|_| self.heap.len() == self.k)
            .map(|worst| worst.0)
    }

    /// Best first.
    pub(crate) fn into_sorted(self) -> Vec<(u32, f32)> {
        let sorted = self.heap.into_sorted_vec();
        sorted
            .into_iter()
            .map(|std::cmp::Reverse(scored)| (scored.position, scored.score))
            .collect()
    }
}

/// Checks a search against an index of `keys` keys and answers the number of query heads.
pub(crate) fn check(search: &Search<'_>, head_dim: usize, keys: usize) -> Result<usize, IndexError> {
    let invalid = |argument, problem| Err(IndexError::Invalid { argument, problem });
    if search.keys.head_dim() != head_dim {
        return invalid(
            "keys",
            format!("rows of {}, the index has rows of {head_dim}", search.keys.head_dim()),
        );
    }
    if search.keys.len() != keys {
        return invalid(
            "keys",
            format!("{} rows, the index was given {keys}", search.keys.len()),
        );
    }
    if search.q.is_empty() || !search.q.len().is_multiple_of(head_dim) {
        return invalid("q", format!("{} elements are not rows of {head_dim}", search.q.len()));
    }
    if !search.q.iter().all(|x| x.is_finite()) {
        return invalid("q", "an element is not finite".to_owned());
    }
    if !search.scale.is_finite() {
        return invalid("scale", format!("{} is not finite", search.scale));
    }
    if search.k == 0 {
        return invalid("k", "0 keys are wanted; ask for at least 1".to_owned());
    }
    if !(search.effort > 0.0 && search.effort <= 1.0) {
        return invalid("effort", format!("{} is not above 0 and at most 1", search.effort));
    }
    if !(search.mass > 0.0 && search.mass <= 1.0) {
        return invalid("mass", format!("{} is not above 0 and at most 1", search.mass));
    }
    Ok(search.q.len() / head_dim)
}

/// Checks keys that are to be appended to `keys` and answers how many they are.
pub(crate) fn check_rows(rows: &[half::f16], head_dim: usize, keys: usize) -> Result<usize, IndexError> {
    let invalid = |problem| {
        Err(IndexError::Invalid {
            argument: "keys",
            problem,
        })
    };
    if !rows.len().is_multiple_of(head_dim) {
        return invalid(format!("{} elements are not rows of {head_dim}", rows.len()));
    }
    let count = rows.len() / head_dim;
    match keys.checked_add(count) {
        Some(all) if all < u32::MAX as usize => Ok(count),
        _ => invalid(format!("{keys} and {count} more are too many for 32 bits; use spans")),
    }
}

/// Keys that each query head may score: the effort's share of them, at least 1. It is not raised to `k`: whoever wants many
/// keys says so by effort, and whoever wants all that were scored says so by `k`.
pub(crate) fn budget(search: &Search<'_>, keys: usize) -> usize {
    ((f64::from(search.effort) * keys as f64).ceil() as usize)
        .max(1)
        .min(keys)
}

/// The row is made of numbers: others are never clustered, linked or bounded.
pub(crate) fn is_finite(row: &[half::f16]) -> bool {
    row.iter().all(|x| x.is_finite())
}

/// Numbers of the lists by falling score; ties go to the lower number.
pub(crate) fn ranked(scores: &[f32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_unstable_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
    order
}

/// Scans lists of keys, for each query head in its own order until its budget is spent; the last list is cut. Lists and
/// rows that several heads want are read once.
///
/// `members(list)` gives the positions of a list, `list_bytes` is what reading one member's entry costs (0 where positions
/// follow from the list).
pub(crate) fn scan_lists<I: ExactSizeIterator<Item = u32>>(
    search: &Search<'_>,
    orders: &[Vec<u32>],
    budget: usize,
    entry_bytes: u64,
    members: impl Fn(u32) -> I,
    cost: &mut Cost,
    best: &mut [Best],
) {
    let head_dim = search.keys.head_dim();
    // List, query head, members it may score.
    let mut wanted = Vec::new();
    for (head, order) in orders.iter().enumerate() {
        let mut left = budget;
        for &list in order {
            if left == 0 {
                break;
            }
            let take = members(list).len().min(left);
            left -= take;
            wanted.push((list, head, take));
        }
    }
    wanted.sort_unstable();
    for same in wanted.chunk_by(|a, b| a.0 == b.0) {
        let most = same.iter().map(|(_, _, take)| *take).max().unwrap_or(0);
        cost.bytes_read += entry_bytes * most as u64;
        for (at, position) in members(same[0].0).take(most).enumerate() {
            if search.excluded.contains(position) {
                continue;
            }
            let row = search.keys.row(position as usize);
            cost.bytes_read += size_of_val(row) as u64;
            for &(_, head, take) in same {
                if at < take {
                    let score = score(search, head, row);
                    best[head].push(position, score);
                    cost.keys_scored += 1;
                }
            }
        }
    }
    debug_assert!(search.q.len() == orders.len() * head_dim, "an order for each head");
}

/// Exact base-2 score of a key row for one query head.
pub(crate) fn score(search: &Search<'_>, head: usize, row: &[half::f16]) -> f32 {
    let head_dim = row.len();
    let mut out = [0.0];
    let q = &search.q[head * head_dim..][..head_dim];
    kvasir_simd::scores(q, row, head_dim, search.scale, &mut out);
    out[0]
}

/// Scans the positions from `from` on flat, for all query heads.
pub(crate) fn scan_tail(search: &Search<'_>, from: usize, cost: &mut Cost, best: &mut [Best]) {
    let head_dim = search.keys.head_dim();
    let mut scores = vec![0.0; best.len()];
    for position in search
        .excluded
        .searched(from as u32..search.keys.len() as u32)
        .flatten()
    {
        let row = search.keys.row(position as usize);
        kvasir_simd::scores(search.q, row, head_dim, search.scale, &mut scores);
        for (best, &score) in best.iter_mut().zip(&scores) {
            best.push(position, score);
        }
        cost.keys_scored += best.len() as u64;
        cost.bytes_read += size_of_val(row) as u64;
    }
}

/// Best keys per query head, sorted.
pub(crate) fn hits(best: Vec<Best>, cost: Cost) -> Hits {
    Hits {
        heads: best.into_iter().map(Best::into_sorted).collect(),
        covered: Vec::new(),
        cost,
    }
}

/// A mark for each key.
pub(crate) fn marks(keys: usize) -> Bits {
    let mut bits = Bits::default();
    bits.reset(keys);
    bits
}
