//! Attention that was finished near the data, against the truth.

use super::{
    Certificates, Summary,
    exact::{Attention, Exact},
};
use crate::{IndexError, Search, SketchAttended};

/// Figures of finished attention, over all decode queries.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttendJudgement {
    /// Query heads times decode steps.
    pub queries: usize,
    /// Keys attended to exactly, as a share of the searched keys, per query head.
    pub rows_share: f64,
    /// Bytes read, as a share of the bytes of the searched keys *and values*, for the whole group.
    pub bytes_share: f64,
    /// Bytes read per answer of a group, in the mean.
    pub bytes_per_search: f64,
    /// Share of the searched softmax mass on the keys attended to exactly: the truth, not what the answer says. Only of answers
    /// with a tail, whose `lse` is of all keys.
    pub mass: Summary,
    /// `|o - o*| / |o*|` of the output merged with the static set.
    pub error: Summary,
    /// The bounds on the missed mass; a count of 0 where none were asked for.
    pub certificates: Certificates,
}

/// Adds answers up, of one recording or of many.
#[derive(Clone, Debug, Default)]
pub struct AttendTally {
    rows: u64,
    keys_searched: u64,
    bytes: u64,
    bytes_searched: u64,
    groups: u64,
    masses: Vec<f64>,
    errors: Vec<f64>,
    bounds: Vec<(f64, f64)>,
}

impl AttendTally {
    /// Asks `attend` at every decode step and adds what it answers. It is told the queries, the keys and what is excluded;
    /// `k` and effort are its own matter.
    ///
    /// # Errors
    /// What `attend` answers; [`IndexError::Unusable`] if that has not a row for each query head.
    pub fn add(
        &mut self,
        exact: &Exact<'_>,
        mut attend: impl FnMut(&Search<'_>) -> Result<SketchAttended, IndexError>,
    ) -> Result<(), IndexError> {
        let (head_dim, searched) = (exact.head_dim(), exact.searched() as u64);
        exact.each(|question| {
            let heads = question.heads.len();
            let found = attend(&exact.search(question, 1, 1.0))?;
            if found.lse.len() != heads || found.o.len() != heads * head_dim || found.mass.len() != heads {
                return Err(IndexError::Unusable(format!(
                    "an answer for {} of {heads} heads",
                    found.lse.len()
                )));
            }
            self.rows += found.keys.iter().map(|keys| *keys as u64).sum::<u64>();
            self.keys_searched += searched * heads as u64;
            self.bytes += found.bytes_read;
            self.bytes_searched += searched * head_dim as u64 * 4;
            self.groups += 1;
            for (head, truth) in question.heads.iter().enumerate() {
                let lse = f64::from(found.lse[head]);
                // What the answer says of itself is a share of its own sum; the truth is a share of the true one.
                let mass = (f64::from(found.mass[head]) * (lse - truth.searched_lse).exp2()).min(1.0);
                self.masses.push(mass);
                if let Some(bound) = found.missed_max.get(head) {
                    self.bounds.push((f64::from(*bound), 1.0 - mass));
                }
                let mut o: Attention = truth.fixed.clone();
                o.merge_row(&found.o[head * head_dim..][..head_dim], found.lse[head]);
                self.errors.push(truth.error(&o));
            }
            Ok(())
        })
    }

    /// The figures of all that was added.
    pub fn judgement(&self) -> AttendJudgement {
        let share = |part: u64, all: u64| part as f64 / all.max(1) as f64;
        AttendJudgement {
            queries: self.errors.len(),
            rows_share: share(self.rows, self.keys_searched),
            bytes_share: share(self.bytes, self.bytes_searched),
            bytes_per_search: share(self.bytes, self.groups),
            mass: Summary::of(&mut self.masses.clone()),
            error: Summary::of(&mut self.errors.clone()),
            certificates: Certificates::of(&self.bounds),
        }
    }
}
