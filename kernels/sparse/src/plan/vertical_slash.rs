//! Vertical-Slash: columns and diagonals, estimated from the last queries (MInference, arXiv 2407.02490, algorithm 2).

use kvasir_simd::top_k;

use crate::{HeadChunk, HeadMask};

/// Queries that MInference estimates from.
pub(super) const LAST_QUERIES: usize = 64;

/// Attention weights of some queries, summed by key and by distance of key from query.
#[derive(Clone, Debug, PartialEq)]
pub struct Sums {
    /// By position of the key, `[tokens]`.
    pub columns: Vec<f32>,
    /// By distance, `[tokens]`; 0 is the query itself.
    pub diagonals: Vec<f32>,
}

/// Sums of the last `last` queries of the chunk, or of as many as it has. One row of scores at a time: memory is that of the
/// result.
pub fn estimate(chunk: &HeadChunk<'_>, last: usize) -> Sums {
    let (mut columns, mut diagonals) = (vec![0.0; chunk.tokens()], vec![0.0; chunk.tokens()]);
    let (mut scores, mut weights) = (Vec::new(), Vec::new());
    for row in chunk.rows().saturating_sub(last)..chunk.rows() {
        chunk.weights(row, &mut scores, &mut weights);
        for (column, weight) in columns.iter_mut().zip(&weights) {
            *column += weight;
        }
        for (diagonal, weight) in diagonals.iter_mut().zip(weights.iter().rev()) {
            *diagonal += weight;
        }
    }
    Sums { columns, diagonals }
}

/// More than any sum: chosen first.
const FIRST: f32 = 3e38;

impl Sums {
    /// Puts the first `sink` columns and the `near` nearest diagonals before all others.
    pub fn favour(&mut self, sink: usize, near: usize) {
        let (sink, near) = (sink.min(self.columns.len()), near.min(self.diagonals.len()));
        self.columns[..sink].fill(FIRST);
        self.diagonals[..near].fill(FIRST);
    }

    /// The mask of the best `verticals` columns and `slashes` diagonals.
    pub fn mask(&self, rows: usize, verticals: usize, slashes: usize) -> HeadMask {
        let (mut columns, mut diagonals) = (Vec::new(), Vec::new());
        top_k(&self.columns, verticals, &mut columns);
        top_k(&self.diagonals, slashes, &mut diagonals);
        HeadMask::vertical_slash(rows, &columns, &diagonals)
    }
}
