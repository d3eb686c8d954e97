//! RetrievalAttention's index: a graph over keys that is drawn by queries (Liu et al. 2024, arXiv 2409.10516), built as RoarGraph
//! (Chen et al. 2024, VLDB 17(11), arXiv 2408.08933).
//!
//! Queries are no neighbours of keys: they lie far outside of them, and graphs or clusters made of keys alone lead a query
//! astray. So links are made through queries: keys that are among the nearest of the same sampled prefill query are linked to
//! each other, the queries are dropped, and a search walks from key to key by the product with its own query.
//!
//! The build is in `roar/build.rs`, the walk in `roar/walk.rs`. The graph keeps edges only; a search reads the keys where they
//! lie. It is built once: [`KeyIndex::append`] refuses, and who has newer keys scans them flat beside it.

mod build;
mod nearness;
mod walk;

use half::f16;

pub use self::build::{Metric, RoarParams, Samples};
use self::walk::{Graph, Walk};
use crate::{
    Cost, Hits, IndexError, KeyIndex, Search,
    file::{self, Fields, Kind, Origin},
    search::{Best, budget, check, hits, score},
};

const VERSION: u16 = 1;

/// A graph over the keys of one KV head, shared by its query heads, or one for each of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Roar {
    origin: Origin,
    head_dim: usize,
    keys: usize,
    /// One, or one per query head.
    graphs: Vec<Graph>,
}

impl Roar {
    /// Reads what [`KeyIndex::encode`] wrote.
    ///
    /// # Errors
    /// [`IndexError::Unusable`]: damaged, another kind or version, or built from something else than `origin`.
    pub fn decode(bytes: &[u8], origin: Origin) -> Result<Self, IndexError> {
        let frame = file::open(bytes, Kind::Roar, VERSION, origin)?;
        let mut fields = Fields::new(frame.payload);
        let count = fields.u32()?;
        let mut graphs = Vec::new();
        for _ in 0..count {
            let (entry, edges) = (fields.u32()?, fields.u32()? as usize);
            let graph = Graph {
                entry,
                starts: fields.u32s(frame.keys + 1)?,
                edges: fields.u32s(edges)?,
            };
            if !graph.is_valid(frame.keys) {
                return Err(IndexError::Unusable("its edges cannot be".to_owned()));
            }
            graphs.push(graph);
        }
        fields.finish()?;
        if graphs.is_empty() {
            return Err(IndexError::Unusable("it holds no graph".to_owned()));
        }
        Ok(Self {
            origin,
            head_dim: frame.head_dim,
            keys: frame.keys,
            graphs,
        })
    }

    /// Edges of all graphs.
    pub fn edges(&self) -> usize {
        self.graphs.iter().map(|graph| graph.edges.len()).sum()
    }

    fn graph(&self, head: usize) -> &Graph {
        // Either one for all, or as many as query heads: checked where a search begins.
        &self.graphs[head.min(self.graphs.len() - 1)]
    }
}

impl KeyIndex for Roar {
    fn name(&self) -> &'static str {
        "roar"
    }

    fn keys(&self) -> usize {
        self.keys
    }

    fn bytes(&self) -> usize {
        let parts = |graph: &Graph| size_of_val(graph.starts.as_slice()) + size_of_val(graph.edges.as_slice());
        self.graphs.iter().map(parts).sum()
    }

    /// Refuses: a graph that was drawn by queries has no place for a key that they never saw.
    fn append(&mut self, _: &[f16]) -> Result<(), IndexError> {
        Err(IndexError::Unsupported {
            index: "roar",
            problem: "is built once from keys and query samples: build it anew, or scan newer keys flat beside it",
        })
    }

    /// Walks best first until as many keys were scored as the effort allows.
    ///
    /// That is the published beam search with its width left open: at the moment when a beam of some width would end, both
    /// have scored the same keys. Where the walk ends before its budget does (keys that no edge leads to), the rest of the
    /// budget goes to keys not yet seen, by position; an effort of 1 is therefore exact. Excluded keys are walked over.
    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        let heads = check(search, self.head_dim, self.keys)?;
        if self.graphs.len() > 1 && self.graphs.len() != heads {
            return Err(IndexError::Invalid {
                argument: "q",
                problem: format!(
                    "{heads} query heads, the index has a graph for each of {}",
                    self.graphs.len()
                ),
            });
        }
        let budget = budget(search, self.keys);
        let mut walk = Walk::new(self.keys);
        let mut cost = Cost::default();
        let mut best = vec![Best::new(search.k); heads];
        for (head, best) in best.iter_mut().enumerate() {
            let graph = self.graph(head);
            let key_score = |key: u32| score(search, head, search.keys.row(key as usize));
            let work = walk.best_first(graph, budget, key_score, |key, score| {
                if !search.excluded.contains(key) {
                    best.push(key, score);
                }
            });
            cost.keys_scored += work.scored as u64;
            cost.bytes_read += (work.scored * self.head_dim * size_of::<f16>()) as u64;
            cost.bytes_read += ((work.edges + 2 * work.expanded) * size_of::<u32>()) as u64;
        }
        Ok(hits(best, cost))
    }

    fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(self.bytes() + 64);
        file::put_u32s(&mut payload, &[self.graphs.len() as u32]);
        for graph in &self.graphs {
            file::put_u32s(&mut payload, &[graph.entry, graph.edges.len() as u32]);
            file::put_u32s(&mut payload, &graph.starts);
            file::put_u32s(&mut payload, &graph.edges);
        }
        file::seal(Kind::Roar, VERSION, self.head_dim, self.keys, self.origin, &payload)
    }
}

#[cfg(test)]
mod tests;
