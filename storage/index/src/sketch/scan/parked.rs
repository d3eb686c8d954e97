//! A scan with predicted queries, kept until the real ones arrive.
//!
//! It owns what it keeps: candidates with their levels, a weight per run and which keys a sample takes, some kilobytes a head, and
//! nothing of the blocks. So it can wait beside a stream while the blocks are free.

use kvasir_simd::{GROUP, RUN_GROUPS, score_slots};

use super::{Attend, SketchScan, Slots, certificate::Drawn, scattered};
use crate::{
    IndexError,
    sketch::{
        column::Column,
        format::invalid,
        search::{Candidates, Kind, Table},
    },
};

/// What [`SketchScan::park`] keeps.
#[derive(Clone, Debug)]
pub struct Parked {
    /// Predicted.
    q: Vec<f32>,
    table: Table,
    candidates: Candidates,
    /// By head.
    drawn: Vec<Drawn>,
    /// By head, see [`Parked::covered`].
    covered: Vec<f32>,
    /// Of all blocks, searched or not.
    slots: Slots,
}

impl Parked {
    /// How far the real queries `q` are from the predicted ones, relative to their own length: the furthest of all heads.
    /// Infinite where they cannot be compared. What to scan anew for is the caller's to say.
    pub fn distance(&self, q: &[f32]) -> f32 {
        let heads = self.table.heads();
        if heads == 0 || q.len() != self.q.len() {
            return f32::INFINITY;
        }
        distance(&self.q, q, q.len() / heads)
    }

    /// Share of everything that each predicted query attends to, here and [beside](SketchScan::beside), that its candidates and that
    /// cover, by sketch.
    pub fn covered(&self) -> &[f32] {
        &self.covered
    }

    /// Whether its candidates are keys of `column`: of the blocks that were searched, with as many of their segments clustered.
    pub fn is_of(&self, column: &Column) -> bool {
        (self.slots.all, self.slots.clustered) == (column.groups() * GROUP, column.order().len())
    }

    /// Bytes that one of `heads` query rows of `head_dim` holds at most, with so many candidates of each, over blocks that have so many
    /// keys once each is rounded up to sixteen.
    pub fn bytes_max(heads: usize, head_dim: usize, candidates: usize, keys: usize) -> usize {
        let runs = keys.div_ceil(GROUP * RUN_GROUPS);
        heads * (head_dim * 4 + 4 + candidates * 6 + runs * 6 + Drawn::BYTES_MAX + Table::BYTES_OF_HEAD)
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        let drawn: usize = self.drawn.iter().map(Drawn::bytes).sum();
        (self.q.len() + self.covered.len()) * 4 + self.candidates.slots.len() * 6 + self.table.bytes() + drawn
    }
}

/// How far query rows of `head_dim` are from `predicted` ones, relative to their own length: the furthest of all. Infinite where they
/// cannot be compared.
pub fn distance(predicted: &[f32], q: &[f32], head_dim: usize) -> f32 {
    if q.len() != predicted.len() {
        return f32::INFINITY;
    }
    let far = |(q, predicted): (&[f32], &[f32])| {
        let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>();
        let off = square(&mut q.iter().zip(predicted).map(|(a, b)| a - b));
        let far = (off / square(&mut q.iter().copied())).sqrt();
        if far.is_nan() { f32::INFINITY } else { far }
    };
    q.chunks(head_dim.max(1))
        .zip(predicted.chunks(head_dim.max(1)))
        .map(far)
        .fold(0.0, f32::max)
}

impl SketchScan<'_> {
    fn covered_by_candidates(&self, head: usize) -> f32 {
        let levels = &self.candidates.levels[self.candidates.of(head)];
        let found: f64 = levels.iter().map(|level| f64::from(level.weight())).sum();
        let held = found + self.table.beside.get(head).copied().unwrap_or(0.0);
        let all = held + self.table.total[head];
        if all > 0.0 { (held / all) as f32 } else { 1.0 }
    }

    /// Scans with the queries of [`SketchScan::begin`], which are predicted, and keeps the candidates that `how` will ask for.
    /// The scan is empty then.
    pub fn park(&mut self, how: Attend) -> Parked {
        self.find_for(how);
        let drawn = self.draw_ahead();
        self.keep(drawn)
    }

    /// As [`SketchScan::park`] for [`SketchScan::rows`], which sample nothing.
    pub fn park_for_rows(&mut self, effort: f32) -> Parked {
        self.find_for(Attend {
            target_mass: 1.0,
            effort,
            ..Attend::default()
        });
        self.keep(Vec::new())
    }

    fn keep(&mut self, drawn: Vec<Drawn>) -> Parked {
        self.bring_near(&drawn);
        let covered = (0..self.table.heads())
            .map(|head| self.covered_by_candidates(head))
            .collect();
        // Copies have the room that they need; what they are made of has room for more, and the next scan finds it.
        let parked = Parked {
            q: self.q.clone(),
            table: self.table.clone(),
            candidates: self.candidates.clone(),
            drawn,
            covered,
            slots: self.scanned(),
        };
        self.clear();
        parked
    }

    /// Reads what the answer will read, so that it lies in a cache when the real queries come and nobody waits for memory: the keys of
    /// candidates and samples, scattered, and the means; of values none. Scoring them is how rows are read without waiting for each.
    fn bring_near(&mut self, drawn: &[Drawn]) {
        /// Elements of a cache line.
        const LINE: usize = 32;
        let d = self.head_dim();
        let means = self.column().map_or(&[][..], Column::means);
        let touched = (means.iter().step_by(LINE)).fold(0, |all, half| all ^ half.to_bits());
        self.picked.clear();
        self.picked.extend(self.union.iter());
        self.picked.extend(drawn.iter().flat_map(Drawn::slots));
        let rows = scattered(self.column.or(self.own.as_ref()), &self.keys, d);
        let mut scores = vec![0.0; self.picked.len()];
        if let Some(q) = self.q.get(..d) {
            score_slots(q, rows, &self.picked, self.scale, &mut scores);
        }
        std::hint::black_box((touched, scores));
    }

    /// Starts anew, as [`SketchScan::begin`], with the real queries after a prediction was parked. The same blocks are added
    /// then as were before it, and what is asked then costs no scan of them: candidates are those of the prediction, scores are
    /// exact, and the tail is estimated as after [`SketchScan::resume`].
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if `q` has not the shape of the prediction.
    pub fn begin_parked(&mut self, parked: Parked, q: &[f32]) -> Result<(), IndexError> {
        if q.len() != parked.q.len() {
            return Err(invalid(
                "q",
                format!("{} elements, the predicted queries have {}", q.len(), parked.q.len()),
            ));
        }
        self.clear();
        self.q.clear();
        self.q.extend_from_slice(q);
        (self.table, self.candidates, self.parked_in) = (parked.table, parked.candidates, parked.slots);
        (self.forecast, self.drawn) = (parked.q, parked.drawn);
        self.parked = true;
        self.predicted = true;
        self.spoil_dead();
        Ok(())
    }

    /// Queries that are not finite find nothing.
    pub(super) fn spoil_dead(&mut self) {
        for (head, q) in self.q.chunks_exact(self.head_dim()).enumerate() {
            if !q.iter().all(|q| q.is_finite()) {
                self.table.kinds[head] = Kind::Dead;
            }
        }
    }
}
