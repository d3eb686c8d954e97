//! The exact flat scan: every key is scored, so what an answer covers is known exactly.
//!
//! Costs for `n` keys, `g` query heads: the keys are read once for all heads, `g * n` scores are kept (f32), a choice is one
//! more pass over them, and values are read only where they were chosen.
//!
//! Non-finite scores (keys with infinities or NaN in them) count as -inf: such a key is scanned, never chosen, and has no
//! mass. Ties go to the lower position, so an answer is a function of its inputs alone.

mod index;
mod select;

use half::f16;
use kvasir_simd::{Segment, add_assign, log_sum_exp2, scores, top_k, weighted_values};

pub use self::index::Flat;
pub(crate) use self::select::Selection;
use crate::{Excluded, bits::Bits};

/// The scan of one KV head for the query rows of its group. Buffers are reused from query to query.
#[derive(Default)]
pub struct FlatScan<'a> {
    head_dim: usize,
    scale: f32,
    /// `[heads, head_dim]`
    q: Vec<f32>,
    /// What was scanned: the parts that were not excluded, by rising position.
    segments: Vec<Segment<'a>>,
    keys: usize,
    /// Base-2 scores, `[heads][keys]`.
    scores: Vec<Vec<f32>>,
    /// Of one segment, `[heads, len]`.
    part: Vec<f32>,
}

/// The union of the best keys of a group's query heads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    pub(crate) positions: Vec<u32>,
    /// Segment and row inside it, one per position.
    pub(crate) places: Vec<(u32, u32)>,
    /// Share of the scanned softmax mass that the union holds, per query head; 1 where nothing was to be found.
    pub mass: Vec<f32>,
}

/// Partial attention over chosen keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attended {
    /// Outputs, `[heads, head_dim]`, normalised over the chosen keys; 0 where there are none.
    pub o: Vec<f32>,
    /// Base-2 log-sum-exp of the chosen scores, per query head; -inf where there are none.
    pub lse: Vec<f32>,
    /// Share of the scanned softmax mass that was attended to, per query head; 1 where there is none.
    pub mass: Vec<f32>,
    /// Keys attended to, per query head.
    pub keys: Vec<usize>,
    /// Value rows read; one that several query heads attend to counts once.
    pub value_rows: usize,
    /// A query head would have needed more keys than it was allowed.
    pub cut_short: bool,
}

impl Rows {
    /// Token positions, rising.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }
}

impl<'a> FlatScan<'a> {
    /// A scan of rows of `head_dim` elements; `scale` is multiplied into `q . k`, usually `1/sqrt(head_dim)`.
    pub fn new(head_dim: usize, scale: f32) -> Self {
        Self {
            head_dim,
            scale,
            ..Self::default()
        }
    }

    /// Starts anew with the query rows `q[heads, head_dim]`.
    ///
    /// # Panics
    /// If `q` is not whole rows.
    pub fn begin(&mut self, q: &[f32]) {
        assert!(
            self.head_dim > 0 && q.len().is_multiple_of(self.head_dim),
            "begin: q is rows of head_dim {}",
            self.head_dim
        );
        self.q.clear();
        self.q.extend_from_slice(q);
        self.segments.clear();
        self.keys = 0;
        self.scores.resize_with(q.len() / self.head_dim, Vec::new);
        self.scores.iter_mut().for_each(Vec::clear);
    }

    /// Scores the keys of `segment` that are not excluded. Segments come by rising position and do not overlap.
    ///
    /// # Panics
    /// If keys and values are not the same number of whole rows, or positions do not fit 32 bits.
    pub fn scan(&mut self, segment: Segment<'a>, excluded: &Excluded) {
        let head_dim = self.head_dim;
        assert!(
            segment.keys.len() == segment.values.len() && segment.keys.len().is_multiple_of(head_dim),
            "scan: as many values as keys, rows of head_dim {head_dim}"
        );
        let len = segment.keys.len() / head_dim;
        let positions = u32::try_from(segment.position)
            .ok()
            .zip(u32::try_from(segment.position + len).ok());
        let Some((start, end)) = positions else {
            panic!("scan: positions have 32 bits")
        };
        for part in excluded.searched(start..end) {
            let rows = (part.start - start) as usize * head_dim..(part.end - start) as usize * head_dim;
            self.score(Segment {
                keys: &segment.keys[rows.clone()],
                values: &segment.values[rows],
                position: part.start as usize,
            });
        }
    }

    /// Keys scored so far.
    pub fn keys_scanned(&self) -> usize {
        self.keys
    }

    /// The union of the `k` best keys of each query head.
    pub fn rows(&self, k: usize) -> Rows {
        let mut union = Bits::default();
        union.reset(self.keys);
        let mut best = Vec::new();
        for scores in &self.scores {
            top_k(scores, k, &mut best);
            let finite = best.iter().filter(|&&index| scores[index as usize] > f32::NEG_INFINITY);
            finite.for_each(|&index| union.insert(index));
        }
        let chosen: Vec<u32> = union.iter().collect();
        let mut rows = Rows::default();
        let mut gathered = Vec::new();
        for scores in &self.scores {
            let lse = log_sum_exp2(scores);
            rows.mass.push(share(lse_of(scores, &chosen, lse, &mut gathered), lse));
        }
        let mut rest = chosen.as_slice();
        self.each_segment(|at, segment, from, to| {
            let (here, behind) = rest.split_at(rest.partition_point(|&index| (index as usize) < to));
            rest = behind;
            for &index in here {
                let row = index - from as u32;
                rows.positions.push(segment.position as u32 + row);
                rows.places.push((at as u32, row));
            }
        });
        rows
    }

    /// Calls `take` with the key and the value of each position of `rows`, which this scan gave.
    ///
    /// # Panics
    /// If `rows` is of another scan.
    pub fn each_row(&self, rows: &Rows, mut take: impl FnMut(&'a [f16], &'a [f16])) {
        for &(at, row) in &rows.places {
            let segment = self.segments[at as usize];
            let span = row as usize * self.head_dim..(row as usize + 1) * self.head_dim;
            take(&segment.keys[span.clone()], &segment.values[span]);
        }
    }

    /// Attends to the fewest best keys of each query head that hold `target_mass` of the scanned softmax mass, at most
    /// `k_max` of them. `target_mass` 1 attends to every key.
    pub fn attend(&self, target_mass: f32, k_max: Option<usize>) -> Attended {
        let mut out = Attended::default();
        let mut selection = Selection::default();
        let mut gathered = Vec::new();
        let mut union = Bits::default();
        union.reset(self.keys);
        let mut chosen = Vec::with_capacity(self.scores.len());
        for scores in &self.scores {
            let lse = log_sum_exp2(scores);
            let mut best = Vec::new();
            out.cut_short |= selection.fewest(scores, lse, target_mass, k_max, &mut best);
            best.iter().for_each(|&index| union.insert(index));
            let chosen_lse = lse_of(scores, &best, lse, &mut gathered);
            out.lse.push(chosen_lse);
            out.mass.push(share(chosen_lse, lse));
            out.keys.push(best.len());
            chosen.push(best);
        }
        out.value_rows = union.count();
        self.weigh(&chosen, &out.lse, &mut out.o);
        out
    }

    /// `o[head] = sum of exp2(score - lse[head]) * value` over `chosen[head]`, segment by segment so that the values of one
    /// are still near when the next query head wants them.
    fn weigh(&self, chosen: &[Vec<u32>], lse: &[f32], o: &mut Vec<f32>) {
        let head_dim = self.head_dim;
        o.clear();
        o.resize(self.scores.len() * head_dim, 0.0);
        let mut rest: Vec<&[u32]> = chosen.iter().map(Vec::as_slice).collect();
        let (mut rows, mut part) = (Vec::new(), vec![0.0; head_dim]);
        self.each_segment(|_, segment, from, to| {
            for (head, o) in o.chunks_exact_mut(head_dim).enumerate() {
                let (here, behind) = rest[head].split_at(rest[head].partition_point(|&index| (index as usize) < to));
                rest[head] = behind;
                if here.is_empty() {
                    continue;
                }
                rows.clear();
                rows.extend(here.iter().map(|index| index - from as u32));
                weighted_values(
                    &self.scores[head][from..to],
                    &rows,
                    lse[head],
                    segment.values,
                    head_dim,
                    &mut part,
                );
                add_assign(o, &part);
            }
        });
    }

    /// Calls `with` for each scanned segment: its number, itself, and the indices of its keys among all, from and to.
    fn each_segment(&self, mut with: impl FnMut(usize, Segment<'a>, usize, usize)) {
        let mut from = 0;
        for (at, &segment) in self.segments.iter().enumerate() {
            let to = from + segment.keys.len() / self.head_dim;
            with(at, segment, from, to);
            from = to;
        }
    }

    fn score(&mut self, segment: Segment<'a>) {
        let len = segment.keys.len() / self.head_dim;
        self.part.resize(self.scores.len() * len, 0.0);
        scores(&self.q, segment.keys, self.head_dim, self.scale, &mut self.part);
        for (all, part) in self.scores.iter_mut().zip(self.part.chunks_exact(len)) {
            all.extend(
                part.iter()
                    .map(|score| if score.is_finite() { *score } else { f32::NEG_INFINITY }),
            );
        }
        self.keys += len;
        self.segments.push(segment);
    }
}

impl std::fmt::Debug for FlatScan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlatScan")
            .field("head_dim", &self.head_dim)
            .field("heads", &self.scores.len())
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

/// Log-sum-exp of the chosen scores; `all` is that of all scores, and taken as it is when all were chosen.
fn lse_of(scores: &[f32], chosen: &[u32], all: f32, gathered: &mut Vec<f32>) -> f32 {
    if chosen.len() == scores.len() {
        return all;
    }
    gathered.clear();
    gathered.extend(chosen.iter().map(|&index| scores[index as usize]));
    log_sum_exp2(gathered)
}

/// Share of the mass under `all` that `chosen` holds; all of nothing where there is none.
pub(crate) fn share(chosen: f32, all: f32) -> f32 {
    if all == f32::NEG_INFINITY {
        1.0
    } else {
        (chosen - all).exp2().min(1.0)
    }
}

#[cfg(test)]
mod tests;
