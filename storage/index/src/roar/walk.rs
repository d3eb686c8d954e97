//! Walking a graph of keys by score.

use std::collections::BinaryHeap;

use crate::search::{Best, Scored};

/// Edges from key to key.
///
/// Invariant: `starts` has one entry more than there are keys, begins with 0, does not fall and ends with the number of edges;
/// every edge and the entry lead to a key (with no keys there are no edges, and the entry is 0).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Graph {
    /// Where walks begin.
    pub(super) entry: u32,
    pub(super) starts: Vec<u32>,
    pub(super) edges: Vec<u32>,
}

impl Graph {
    /// Joins lists of neighbours.
    pub(super) fn of(entry: u32, neighbours: &[Vec<u32>]) -> Self {
        let mut graph = Self {
            entry,
            starts: Vec::with_capacity(neighbours.len() + 1),
            edges: Vec::with_capacity(neighbours.iter().map(Vec::len).sum()),
        };
        graph.starts.push(0);
        for list in neighbours {
            graph.edges.extend_from_slice(list);
            graph.starts.push(graph.edges.len() as u32);
        }
        graph
    }

    pub(super) fn neighbours(&self, key: u32) -> &[u32] {
        &self.edges[self.starts[key as usize] as usize..self.starts[key as usize + 1] as usize]
    }

    /// The invariant, for what came from outside.
    pub(super) fn is_valid(&self, keys: usize) -> bool {
        self.starts.len() == keys + 1
            && self.starts[0] == 0
            && self.starts.is_sorted()
            && self.starts[keys] as usize == self.edges.len()
            && self.edges.iter().all(|edge| (*edge as usize) < keys)
            && (self.entry as usize) < keys.max(1)
    }
}

/// Work of a walk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Work {
    /// Keys scored.
    pub(super) scored: usize,
    /// Keys whose edges were read.
    pub(super) expanded: usize,
    /// Edges read.
    pub(super) edges: usize,
}

/// Buffers of walks over one number of keys.
#[derive(Clone, Debug)]
pub(super) struct Walk {
    /// The walk that saw the key last.
    seen: Vec<u32>,
    walk: u32,
    frontier: BinaryHeap<Scored>,
}

impl Walk {
    pub(super) fn new(keys: usize) -> Self {
        Self {
            seen: vec![0; keys],
            walk: 0,
            frontier: BinaryHeap::new(),
        }
    }

    fn begin(&mut self) {
        self.frontier.clear();
        self.walk = self.walk.wrapping_add(1);
        if self.walk == 0 {
            self.seen.fill(0);
            self.walk = 1;
        }
    }

    /// Marks `key`; whether this walk had not seen it.
    fn meet(&mut self, key: u32) -> bool {
        std::mem::replace(&mut self.seen[key as usize], self.walk) != self.walk
    }

    /// Always goes on from the best key that was not gone on from, until `budget` keys were scored; each is given to `take`.
    /// When no edge leads on, keys that were not seen follow by position.
    pub(super) fn best_first(
        &mut self,
        graph: &Graph,
        budget: usize,
        score: impl Fn(u32) -> f32,
        mut take: impl FnMut(u32, f32),
    ) -> Work {
        self.begin();
        let mut work = Work::default();
        let mut unseen = 0..self.seen.len() as u32;
        let mut next = Some(graph.entry).filter(|_| !self.seen.is_empty());
        while work.scored < budget {
            // No edge leads on: begin again at a key nobody has seen.
            let Some(start) = next.or_else(|| unseen.by_ref().find(|key| self.seen[*key as usize] != self.walk)) else {
                break;
            };
            next = None;
            self.meet(start);
            self.visit(start, &score, &mut take, &mut work);
            while work.scored < budget
                && let Some(from) = self.frontier.pop()
            {
                work.expanded += 1;
                for &key in graph.neighbours(from.position) {
                    if work.scored == budget {
                        break;
                    }
                    work.edges += 1;
                    if self.meet(key) {
                        self.visit(key, &score, &mut take, &mut work);
                    }
                }
            }
        }
        work
    }

    fn visit(&mut self, key: u32, score: &impl Fn(u32) -> f32, take: &mut impl FnMut(u32, f32), work: &mut Work) {
        let value = score(key);
        work.scored += 1;
        take(key, value);
        let value = if value.is_nan() { f32::NEG_INFINITY } else { value };
        self.frontier.push(Scored {
            score: value,
            position: key,
        });
    }

    /// Beam search: the `width` best keys met, best first, when the best key to go on from is worse than all of them.
    pub(super) fn beam(&mut self, graph: &Graph, width: usize, score: impl Fn(u32) -> f32) -> Vec<(u32, f32)> {
        self.begin();
        let mut best = Best::new(width);
        let mut meet = |walk: &mut Self, key: u32| {
            let scored = Scored {
                score: score(key),
                position: key,
            };
            if best.worst().is_none_or(|worst| scored > worst) {
                best.push(key, scored.score);
                walk.frontier.push(scored);
            }
            best.worst()
        };
        self.meet(graph.entry);
        let mut worst = meet(self, graph.entry);
        while let Some(from) = self.frontier.pop() {
            if worst.is_some_and(|worst| from < worst) {
                break;
            }
            for &key in graph.neighbours(from.position) {
                if self.meet(key) {
                    worst = meet(self, key);
                }
            }
        }
        best.into_sorted()
    }
}
