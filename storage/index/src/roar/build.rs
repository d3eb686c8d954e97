//! Building the graph: exact nearest keys of sampled queries, projection to keys, connectivity.
//!
//! 1. Exact k-NN, query to key, by product: the costliest step, `samples * keys * head_dim` multiplications in blocks.
//! 2. Projection: the nearest key of a query (its pivot) is linked to the others of its list that survive occlusion pruning,
//!    both ways. A candidate is occluded when a chosen one is nearer to it than the pivot is.
//! 3. Connectivity: each key walks the projected graph with a beam and is linked to what it finds, both ways, so that
//!    keys which no sampled query wanted can be reached too.
//!
//! Nearness between keys is the product of centred keys, or their distance as the sampled queries see it (`nearness.rs`).
//!
//! Deterministic: the result depends neither on threads nor on chance.

use kvasir_simd::{Pool, scores};

use super::{
    Roar,
    nearness::{Nearness, Point},
    walk::{Graph, Walk},
};
use crate::{IndexError, KeyRows, file::Origin, search::check_rows};

/// How near two keys are, where edges are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// The product of *centred* keys: keys share a large mean, which makes long ones near to everything, and occlusion by plain
    /// products then prunes to hubs (recall@10 0.97 instead of 0.94 at the same number of keys).
    Keys,
    /// The distance of keys as the sampled queries see it.
    Seen,
}

/// How a graph is built. The defaults are those of RoarGraph's authors, but for `connections`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoarParams {
    /// Nearest keys listed per sampled query, 2 to 4096 (100).
    pub nearest: usize,
    /// Links kept per pruning in the projection, 2 to 256 (35). A key may hold up to twice as many.
    pub degree: usize,
    /// The same in the connectivity step, 1 to 256 (8). The authors take `degree` again; but these links go from keys to near
    /// keys, which is not where queries go, and every one of them is scored: with fewer, more is found for the same number of keys.
    pub connections: usize,
    /// Width of the beam in the connectivity step, at least `connections`, at most 65,536 (500).
    pub beam: usize,
    /// How near keys are to each other ([`Metric::Keys`]).
    pub metric: Metric,
}

impl Default for RoarParams {
    fn default() -> Self {
        Self {
            nearest: 100,
            degree: 35,
            connections: 8,
            beam: 500,
            metric: Metric::Keys,
        }
    }
}

impl RoarParams {
    /// With edges as queries see keys, and what suits them: better from about 100K keys on, and mixed below (tests/recall).
    pub fn seen() -> Self {
        Self {
            degree: 24,
            connections: 12,
            beam: 200,
            metric: Metric::Seen,
            ..Self::default()
        }
    }
}

/// Prefill queries that draw the graph, rotated as they were used, `[count, head_dim]` each. AlayaDB (arXiv 2504.10326) samples
/// 0.4 queries per key; RoarGraph's authors use 0.1 to 1.
#[derive(Clone, Copy, Debug)]
pub enum Samples<'a> {
    /// One graph for all query heads of the KV head, from the samples of all of them. No recall is lost against one graph per
    /// head, for a fraction of the bytes.
    Shared(&'a [f32]),
    /// One graph per query head, as RetrievalAttention's authors do.
    PerQueryHead(&'a [&'a [f32]]),
}

/// Samples searched together in one task of the k-NN.
const TASK_SAMPLES: usize = 16;
/// Keys scored at once for them.
const TILE_KEYS: usize = 1024;
/// Keys or samples per task of the other steps.
const TASK_KEYS: usize = 256;

impl Roar {
    /// Builds the index of `keys`.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] naming the argument: a parameter out of range, samples that are not finite rows.
    pub fn build(
        keys: KeyRows<'_>,
        samples: Samples<'_>,
        params: RoarParams,
        origin: Origin,
        pool: &Pool,
    ) -> Result<Self, IndexError> {
        let invalid = |argument, problem: &str| {
            Err(IndexError::Invalid {
                argument,
                problem: problem.to_owned(),
            })
        };
        check_rows(&[], keys.head_dim(), keys.len())?;
        if !(2..=4096).contains(&params.nearest) {
            return invalid("nearest", "is 2 to 4096");
        }
        if !(2..=256).contains(&params.degree) {
            return invalid("degree", "is 2 to 256");
        }
        if !(1..=256).contains(&params.connections) {
            return invalid("connections", "is 1 to 256");
        }
        if !(params.connections..=65_536).contains(&params.beam) {
            return invalid("beam", "is at least connections and at most 65,536");
        }
        let sets = match &samples {
            Samples::Shared(all) => std::slice::from_ref(all),
            Samples::PerQueryHead(heads) => heads,
        };
        if sets.is_empty() {
            return invalid("samples", "there is no query head");
        }
        for set in sets {
            if set.is_empty() || !set.len().is_multiple_of(keys.head_dim()) {
                return invalid("samples", "are not at least one row of head_dim for each query head");
            }
            if !set.iter().all(|x| x.is_finite()) {
                return invalid("samples", "an element is not finite");
            }
        }
        let graphs = sets.iter().map(|samples| graph(keys, samples, params, pool)).collect();
        Ok(Self {
            origin,
            head_dim: keys.head_dim(),
            keys: keys.len(),
            graphs,
        })
    }
}

fn graph(keys: KeyRows<'_>, samples: &[f32], params: RoarParams, pool: &Pool) -> Graph {
    let nearness = Nearness::of(keys, samples, params.metric, pool);
    let lists = nearest_keys(keys, samples, params.nearest, pool);
    let mut neighbours = project(&nearness, &lists, params.degree, pool);
    drop(lists);
    let projected = Graph::of(entry(keys, samples), &neighbours);
    connect(&nearness, &projected, &mut neighbours, params, pool);
    Graph::of(projected.entry, &neighbours)
}

/// Where walks begin: the key nearest to the mean of the samples.
fn entry(keys: KeyRows<'_>, samples: &[f32]) -> u32 {
    let head_dim = keys.head_dim();
    let mut mean = vec![0.0_f64; head_dim];
    for sample in samples.chunks_exact(head_dim) {
        mean.iter_mut().zip(sample).for_each(|(mean, x)| *mean += f64::from(*x));
    }
    let count = (samples.len() / head_dim) as f64;
    let mean: Vec<f32> = mean.iter().map(|sum| (sum / count) as f32).collect();
    nearest_keys(keys, &mean, 1, &Pool::new(1))
        .first()
        .and_then(|list| list.first())
        .map_or(0, |nearest| *nearest)
}

/// For each sample the keys of the greatest products, best first; keys whose product is no number are left out.
fn nearest_keys(keys: KeyRows<'_>, samples: &[f32], count: usize, pool: &Pool) -> Vec<Vec<u32>> {
    let head_dim = keys.head_dim();
    let mut lists = vec![Vec::new(); samples.len() / head_dim];
    pool.run_chunks(&mut lists, TASK_SAMPLES, &|task, lists| {
        let q = &samples[task * TASK_SAMPLES * head_dim..][..lists.len() * head_dim];
        let mut kept = vec![Nearest::new(count); lists.len()];
        let mut products = Vec::new();
        let mut first = 0;
        for block in keys.blocks() {
            for tile in block.chunks(TILE_KEYS * head_dim) {
                let len = tile.len() / head_dim;
                products.resize(lists.len() * len, 0.0);
                scores(q, tile, head_dim, 1.0, &mut products);
                for (kept, products) in kept.iter_mut().zip(products.chunks_exact(len)) {
                    kept.offer(first, products);
                }
                first += len as u32;
            }
        }
        for (list, kept) in lists.iter_mut().zip(kept) {
            *list = kept.into_list();
        }
    });
    lists
}

/// The `count` greatest of a stream of products: candidates above a threshold, halved when there are twice as many.
#[derive(Clone)]
struct Nearest {
    count: usize,
    threshold: f32,
    candidates: Vec<(f32, u32)>,
}

impl Nearest {
    fn new(count: usize) -> Self {
        Self {
            count,
            threshold: f32::NEG_INFINITY,
            candidates: Vec::with_capacity(2 * count),
        }
    }

    fn offer(&mut self, first: u32, products: &[f32]) {
        for (at, &product) in products.iter().enumerate() {
            if product > self.threshold && product.is_finite() {
                self.candidates.push((product, first + at as u32));
                if self.candidates.len() == 2 * self.count {
                    self.halve();
                }
            }
        }
    }

    fn halve(&mut self) {
        self.candidates
            .select_nth_unstable_by(self.count - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        self.candidates.truncate(self.count);
        self.threshold = self.candidates[self.count - 1].0;
    }

    fn into_list(mut self) -> Vec<u32> {
        self.candidates
            .sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        self.candidates.truncate(self.count);
        self.candidates.into_iter().map(|(_, key)| key).collect()
    }
}

/// Links the nearest key of each list with the rest of it, as far as pruning keeps them.
fn project(nearness: &Nearness, lists: &[Vec<u32>], degree: usize, pool: &Pool) -> Vec<Vec<u32>> {
    let mut links = vec![(0, Vec::new()); lists.len()];
    pool.run_chunks(&mut links, TASK_KEYS, &|task, links| {
        for (links, list) in links.iter_mut().zip(&lists[task * TASK_KEYS..]) {
            if let [pivot, others @ ..] = list.as_slice() {
                *links = (*pivot, prune(nearness, *pivot, others, degree));
            }
        }
    });
    let mut neighbours = vec![Vec::new(); nearness.keys()];
    for (pivot, links) in links {
        for key in links {
            link(nearness, &mut neighbours, pivot, key, degree);
            link(nearness, &mut neighbours, key, pivot, degree);
        }
    }
    neighbours
}

/// Adds an edge. A key that holds twice the degree is pruned back to it.
fn link(nearness: &Nearness, neighbours: &mut [Vec<u32>], from: u32, to: u32, degree: usize) {
    let list = &mut neighbours[from as usize];
    if list.contains(&to) {
        return;
    }
    list.push(to);
    if list.len() > 2 * degree {
        *list = prune(nearness, from, list, degree);
    }
}

/// Links each key with the nearest that it finds by walking the projected graph.
fn connect(nearness: &Nearness, projected: &Graph, neighbours: &mut [Vec<u32>], params: RoarParams, pool: &Pool) {
    let mut found = vec![Vec::new(); neighbours.len()];
    pool.run_chunks(&mut found, TASK_KEYS, &|task, found| {
        let mut walk = Walk::new(nearness.keys());
        let mut from = Point::default();
        for (at, found) in found.iter_mut().enumerate() {
            let key = (task * TASK_KEYS + at) as u32;
            if nearness.is_finite(key) {
                nearness.from(key, &mut from);
                let near = walk.beam(projected, params.beam, |other| nearness.near(&from, other));
                let near: Vec<u32> = near.into_iter().map(|(other, _)| other).collect();
                *found = prune(nearness, key, &near, params.connections);
            }
        }
    });
    // Kept apart from the projected edges, so that near keys never push out those that queries drew.
    let mut added = vec![Vec::new(); neighbours.len()];
    for (key, found) in found.iter().enumerate() {
        for &other in found {
            link(nearness, &mut added, key as u32, other, params.connections);
            link(nearness, &mut added, other, key as u32, params.connections);
        }
    }
    for (list, added) in neighbours.iter_mut().zip(added) {
        for key in added {
            if !list.contains(&key) {
                list.push(key);
            }
        }
    }
}

/// At most `degree` of `candidates` for `key`: nearest first, without those that a chosen one is nearer to than `key` is;
/// then filled up with the nearest of the rest.
fn prune(nearness: &Nearness, key: u32, candidates: &[u32], degree: usize) -> Vec<u32> {
    let mut from = Point::default();
    nearness.from(key, &mut from);
    let mut ranked: Vec<(f32, u32)> = candidates
        .iter()
        .filter(|other| **other != key && nearness.is_finite(**other))
        .map(|&other| (nearness.near(&from, other), other))
        .collect();
    ranked.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    ranked.dedup_by_key(|(_, other)| *other);
    let mut chosen: Vec<u32> = Vec::with_capacity(degree);
    let mut rest = Vec::new();
    for &(near, other) in &ranked {
        if chosen.len() == degree {
            break;
        }
        nearness.from(other, &mut from);
        if chosen.iter().any(|&chosen| nearness.near(&from, chosen) > near) {
            rest.push(other);
        } else {
            chosen.push(other);
        }
    }
    let missing = degree - chosen.len();
    chosen.extend(rest.into_iter().take(missing));
    chosen
}
