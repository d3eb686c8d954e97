//! How much must be read for a share of the softmax.

use super::{
    Summary,
    exact::{Exact, Question},
};
use crate::{Hits, IndexError, KeyIndex, Search};

/// Of the masses that are tried the first.
const LEAST_MASS: f32 = 0.5;

/// Bytes that must be read until the keys scored hold a share of the searched softmax mass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BytesForMass {
    /// Decode steps at which every query head of the group reached the share with one of the efforts.
    pub reached: f64,
    /// Bytes read by the whole group at the smallest effort that reached it; over the steps that did.
    pub bytes: Summary,
    /// The same as shares of the bytes of the searched keys.
    pub bytes_share: Summary,
    /// That effort; of an index that stops by mass, the mass that it was asked for.
    pub effort: Summary,
}

/// Tries rising `efforts` at each decode step until the keys scored hold `share` of the mass for every query head; of an index that
/// [stops by mass](crate::Search::mass), rising masses.
///
/// # Errors
/// What the index answers.
pub fn bytes_for_mass(
    index: &dyn KeyIndex,
    exact: &Exact<'_>,
    share: f64,
    efforts: &[f32],
) -> Result<BytesForMass, IndexError> {
    let mut tally = MassTally::new(share, efforts);
    tally.add(index, exact)?;
    Ok(tally.figures())
}

/// Adds such trials up, of one recording or of many; [`bytes_for_mass`] for one.
#[derive(Clone, Debug)]
pub struct MassTally {
    share: f64,
    efforts: Vec<f32>,
    steps: usize,
    bytes: Vec<f64>,
    shares: Vec<f64>,
    taken: Vec<f64>,
}

impl MassTally {
    /// No trial yet. `efforts` rise.
    pub fn new(share: f64, efforts: &[f32]) -> Self {
        Self {
            share,
            efforts: efforts.to_vec(),
            steps: 0,
            bytes: Vec::new(),
            shares: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// Adds every decode step of a recording. As many keys are wanted of a search as its effort lets it score: an index that
    /// counts what is wanted among what it must score is then asked for no more than the others.
    ///
    /// # Errors
    /// What the index answers.
    pub fn add(&mut self, index: &dyn KeyIndex, exact: &Exact<'_>) -> Result<(), IndexError> {
        let all = exact.searched() as f64 * exact.head_dim() as f64 * 2.0;
        let mut trials = None;
        exact.each(|question| {
            self.steps += 1;
            let search = |effort: f32, mass| {
                let k = (f64::from(effort) * index.keys() as f64).ceil().max(1.0) as usize;
                let search = exact.search(question, k, effort);
                index.search(&Search { mass, ..search })
            };
            if trials.is_none() {
                let least = self.efforts.first().copied().unwrap_or(1.0);
                let stops = !search(least, LEAST_MASS)?.covered.is_empty();
                let by_effort = self.efforts.iter().map(|effort| (*effort, 1.0));
                trials = Some(if stops { by_mass() } else { by_effort.collect() });
            }
            for &(effort, mass) in trials.iter().flatten() {
                let hits = search(effort, mass)?;
                if question.is_covered(&hits, self.share) {
                    self.bytes.push(hits.cost.bytes_read as f64);
                    self.shares.push(hits.cost.bytes_read as f64 / all);
                    self.taken.push(f64::from(if mass < 1.0 { mass } else { effort }));
                    break;
                }
            }
            Ok(())
        })
    }

    /// The figures of all that was added.
    pub fn figures(&self) -> BytesForMass {
        BytesForMass {
            reached: self.bytes.len() as f64 / self.steps.max(1) as f64,
            bytes: Summary::of(&mut self.bytes.clone()),
            bytes_share: Summary::of(&mut self.shares.clone()),
            effort: Summary::of(&mut self.taken.clone()),
        }
    }
}

/// Efforts and masses that are tried of an index that stops by mass: of the mass that may be missed each a fifth less than the one
/// before, at last none.
fn by_mass() -> Vec<(f32, f32)> {
    let missed = std::iter::successors(Some(1.0 - LEAST_MASS), |missed| Some(missed * 0.8));
    let masses = missed.take_while(|missed| *missed > 1e-5).map(|missed| 1.0 - missed);
    masses.chain([1.0]).map(|mass| (1.0, mass)).collect()
}

impl Question {
    /// Whether the keys found hold `share` of each head's searched mass.
    fn is_covered(&self, hits: &Hits, share: f64) -> bool {
        self.heads.iter().zip(&hits.heads).all(|(truth, hits)| {
            let mass: f64 = hits
                .iter()
                .map(|(_, score)| (f64::from(*score) - truth.searched_lse).exp2())
                .sum();
            truth.searched_lse == f64::NEG_INFINITY || mass >= share
        })
    }
}
