//! Queries and keys of one head, as planners see them.

use half::f16;

/// The queries of one head over a run of positions, and the keys of all positions up to its end.
#[derive(Clone, Copy, Debug)]
pub struct HeadChunk<'a> {
    q: &'a [f32],
    keys: &'a [f16],
    head_dim: usize,
    scale: f32,
}

/// Slices that are no chunk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{q} elements of queries and {keys} of keys are no chunk of head_dim {head_dim}: both must be whole rows, with at least one \
     query, at least as many keys as queries, fewer than 2^30, and a finite scale above 0"
)]
pub struct BadChunk {
    q: usize,
    keys: usize,
    head_dim: usize,
}

impl<'a> HeadChunk<'a> {
    /// Rotated queries `[rows, head_dim]` of the last `rows` positions of rotated keys `[tokens, head_dim]`; `scale` is what
    /// scores are multiplied by before the softmax.
    ///
    /// # Errors
    /// [`BadChunk`] if the slices do not fit each other.
    pub fn new(q: &'a [f32], keys: &'a [f16], head_dim: usize, scale: f32) -> Result<Self, BadChunk> {
        let fits = head_dim > 0
            && !q.is_empty()
            && q.len().is_multiple_of(head_dim)
            && keys.len().is_multiple_of(head_dim)
            && keys.len() >= q.len()
            && keys.len() / head_dim < 1 << 30
            && scale > 0.0
            && scale.is_finite();
        if !fits {
            let (q, keys) = (q.len(), keys.len());
            return Err(BadChunk { q, keys, head_dim });
        }
        Ok(Self {
            q,
            keys,
            head_dim,
            scale,
        })
    }

    /// Queries.
    pub fn rows(&self) -> usize {
        self.q.len() / self.head_dim
    }

    /// Keys.
    pub fn tokens(&self) -> usize {
        self.keys.len() / self.head_dim
    }

    /// Position of the first query.
    pub fn offset(&self) -> usize {
        self.tokens() - self.rows()
    }

    /// Elements of a row.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// What scores are multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Queries of `count` rows from `first` on.
    pub(crate) fn queries(&self, first: usize, count: usize) -> &'a [f32] {
        &self.q[first * self.head_dim..(first + count) * self.head_dim]
    }

    /// Keys below position `end`.
    pub(crate) fn keys(&self, end: usize) -> &'a [f16] {
        &self.keys[..end * self.head_dim]
    }

    /// Softmax weights of the query in `row` over the keys it sees, into `weights`; `scores` is scratch.
    pub(crate) fn weights(&self, row: usize, scores: &mut Vec<f32>, weights: &mut Vec<f32>) {
        let seen = self.offset() + row + 1;
        scores.resize(seen, 0.0);
        weights.resize(seen, 0.0);
        let q = self.queries(row, 1);
        kvasir_simd::scores(q, self.keys(seen), self.head_dim, self.scale, scores);
        kvasir_simd::exp2_weights(scores, weights);
        let sum: f32 = weights.chunks(TERMS).map(|weights| weights.iter().sum::<f32>()).sum();
        if sum > 0.0 {
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
    }
}

/// Terms that are summed in a row before their sum is added to the others: keeps the error of long sums small.
const TERMS: usize = 256;
