//! HNSW (Malkov & Yashunin 2016) by the crate `hnsw_rs`: the graph that a vector database would use, as a baseline.
//!
//! Edges are drawn by the Euclidean distance between keys and walked by the product with the query: drawn by the product, as
//! "inner product" indexes do, graphs of keys fall apart (recall@10 0.07 where these edges give 0.45). Both are one distance
//! function here: rows carry one element more, 0 for a key; in a query it is the shift that keeps `shift - q . k` above zero, which the crate
//! insists on.
//!
//! Only behind the cargo feature `hnsw`, since nothing that is served needs it. Keys are inserted one by one, because a parallel
//! build would depend on chance. Its file holds keys, not edges (the crate restores graphs from folders only), so decoding
//! builds again.

use std::cell::Cell;

use half::f16;
use hnsw_rs::prelude::{Distance, Hnsw as Graph};

use crate::{
    Cost, Hits, IndexError, KeyIndex, Search,
    file::{self, Fields, Kind, Origin},
    search::{Best, budget, check, check_rows, hits, is_finite, score},
};

const VERSION: u16 = 1;
/// Layers allowed; 32 neighbours and 2^20 keys use five.
const LAYERS_MAX: usize = 16;
/// Neighbours per key and layer; twice as many in the lowest.
const NEIGHBOURS: usize = 32;
/// Width of the search that inserts.
const BUILD_WIDTH: usize = 200;
/// Keys scored per key of search width, about: the crate cannot stop at a budget, so the width is chosen from it.
const SCORED_PER_WIDTH: usize = 8;

thread_local! {
    /// Distances evaluated by this thread.
    static EVALUATED: Cell<u64> = const { Cell::new(0) };
}

/// Squared distance of two keys, or the shifted product of a query and a key.
#[derive(Clone, Copy, Debug, Default)]
struct KeyDistance;

impl Distance<f32> for KeyDistance {
    fn eval(&self, a: &[f32], b: &[f32]) -> f32 {
        EVALUATED.set(EVALUATED.get() + 1);
        let (Some((&shift_a, a)), Some((&shift_b, b))) = (a.split_last(), b.split_last()) else {
            return 0.0;
        };
        let shift = shift_a + shift_b;
        let mut lanes = [0.0_f32; 16];
        let add = |lanes: &mut [f32; 16], a: &[f32], b: &[f32]| {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += if shift > 0.0 { a * b } else { (a - b) * (a - b) };
            }
        };
        let (a_whole, a_rest) = a.as_chunks::<16>();
        let (b_whole, b_rest) = b.as_chunks::<16>();
        a_whole.iter().zip(b_whole).for_each(|(a, b)| add(&mut lanes, a, b));
        add(&mut lanes, a_rest, b_rest);
        let sum: f32 = lanes.iter().sum();
        if shift > 0.0 { (shift - sum).max(0.0) } else { sum }
    }
}

/// A small world of keys.
pub struct Hnsw {
    origin: Origin,
    head_dim: usize,
    keys: usize,
    /// Keys in the graph: those that are numbers.
    inserted: usize,
    /// Length of the longest key.
    longest: f64,
    graph: Graph<'static, f32, KeyDistance>,
}

impl std::fmt::Debug for Hnsw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hnsw")
            .field("head_dim", &self.head_dim)
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

impl Hnsw {
    /// An empty graph; `keys_expected` sizes it.
    ///
    /// # Panics
    /// If `head_dim` is not 1 to 1024.
    pub fn new(head_dim: usize, keys_expected: usize, origin: Origin) -> Self {
        assert!((1..=1024).contains(&head_dim), "hnsw: head_dim is 1 to 1024");
        Self {
            origin,
            head_dim,
            keys: 0,
            inserted: 0,
            longest: 0.0,
            graph: Graph::new(
                NEIGHBOURS,
                keys_expected.clamp(1, 1 << 20),
                LAYERS_MAX,
                BUILD_WIDTH,
                KeyDistance,
            ),
        }
    }

    /// Reads what [`KeyIndex::encode`] wrote and builds the graph again.
    ///
    /// # Errors
    /// [`IndexError::Unusable`]: damaged, another kind or version, or built from something else than `origin`.
    pub fn decode(bytes: &[u8], origin: Origin) -> Result<Self, IndexError> {
        let frame = file::open(bytes, Kind::Hnsw, VERSION, origin)?;
        let mut fields = Fields::new(frame.payload);
        let keys = fields.halves(frame.keys.saturating_mul(frame.head_dim))?;
        fields.finish()?;
        let mut index = Self::new(frame.head_dim, frame.keys, origin);
        index.append(&keys)?;
        Ok(index)
    }

    /// The query as the graph takes it: of unit length, so that no product overflows, then the shift.
    fn query(&self, q: &[f32], scale: f32) -> Vec<f32> {
        let length = q.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let unit = if length > 0.0 {
            f64::from(scale.signum()) / length
        } else {
            0.0
        };
        let unit = q.iter().map(|x| (f64::from(*x) * unit) as f32);
        unit.chain([(self.longest * 1.01 + 1.0) as f32]).collect()
    }
}

impl KeyIndex for Hnsw {
    fn name(&self) -> &'static str {
        "hnsw"
    }

    fn keys(&self) -> usize {
        self.keys
    }

    /// Rows as f32, and per edge a shared pointer to a counted pointer with a distance, as the crate has them.
    fn bytes(&self) -> usize {
        const EDGE: usize = 8 + 16 + 16;
        if self.inserted == 0 {
            return 0;
        }
        let edges: usize = self
            .graph
            .get_point_indexation()
            .into_iter()
            .map(|point| point.get_neighborhood_id().iter().map(Vec::len).sum::<usize>())
            .sum();
        self.inserted * (self.head_dim + 1) * size_of::<f32>() + edges * EDGE
    }

    fn append(&mut self, keys: &[f16]) -> Result<(), IndexError> {
        check_rows(keys, self.head_dim, self.keys)?;
        let mut row = vec![0.0; self.head_dim + 1];
        for key in keys.chunks_exact(self.head_dim) {
            if is_finite(key) {
                kvasir_simd::to_f32(key, &mut row[..self.head_dim]);
                let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                self.longest = self.longest.max(length);
                self.graph.insert((&row, self.keys));
                self.inserted += 1;
            }
            self.keys += 1;
        }
        Ok(())
    }

    /// The effort chooses the width of the search: an eighth of the keys it allows; an effort of 1 is as wide as there are keys.
    /// What was scored is counted and may differ. It finds no more keys than it is wide, whatever `k` is, and of those it leaves
    /// out the excluded.
    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        let heads = check(search, self.head_dim, self.keys)?;
        let width = match budget(search, self.keys) {
            all if all == self.keys => all,
            some => (some / SCORED_PER_WIDTH).max(1),
        };
        let width = width.min(self.inserted);
        let mut cost = Cost::default();
        let mut best = vec![Best::new(search.k); heads];
        if self.inserted == 0 {
            return Ok(hits(best, cost));
        }
        for (head, best) in best.iter_mut().enumerate() {
            let q = self.query(&search.q[head * self.head_dim..][..self.head_dim], search.scale);
            let before = EVALUATED.get();
            let found = self.graph.search(&q, width, width);
            let evaluated = EVALUATED.get() - before;
            // The distances are shifted products: scored again where keys lie, for equal bits with other indexes.
            for position in found.iter().map(|neighbour| neighbour.d_id as u32) {
                if !search.excluded.contains(position) {
                    best.push(position, score(search, head, search.keys.row(position as usize)));
                }
            }
            let row = self.head_dim as u64 + 1;
            cost.keys_scored += evaluated;
            cost.bytes_read += evaluated * (row * 4 + 8) + found.len() as u64 * self.head_dim as u64 * 2;
        }
        Ok(hits(best, cost))
    }

    fn encode(&self) -> Vec<u8> {
        // Rows that are not in the graph are written as they went in: not numbers.
        let mut rows = vec![f16::NAN; self.keys * self.head_dim];
        // The crate cannot walk over a graph without points.
        let points = (self.inserted > 0).then(|| self.graph.get_point_indexation().into_iter());
        for point in points.into_iter().flatten() {
            let out = &mut rows[point.get_origin_id() * self.head_dim..][..self.head_dim];
            kvasir_simd::to_f16(&point.get_v()[..self.head_dim], out);
        }
        let mut payload = Vec::with_capacity(rows.len() * 2);
        file::put_halves(&mut payload, &rows);
        file::seal(Kind::Hnsw, VERSION, self.head_dim, self.keys, self.origin, &payload)
    }
}
