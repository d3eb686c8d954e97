//! What an index finds at one effort, against the truth.

use kvasir_simd::Partial;

use super::{
    Summary,
    exact::{Exact, attention_of},
};
use crate::{Hits, IndexError, KeyIndex, Search};

/// Figures of an index at one effort, over all decode queries.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judgement {
    /// Query heads times decode steps.
    pub queries: usize,
    /// Recall at each `k` that was asked for: the mean share of the exact `k` best that was found.
    pub recall: Vec<(usize, f64)>,
    /// Keys scored, as a share of the searched keys, per query head.
    pub keys_share: f64,
    /// Bytes read, as a share of the bytes of the searched keys, for the whole group.
    pub bytes_share: f64,
    /// Bytes read per search of a group, in the mean.
    pub bytes_per_search: f64,
    /// Share of the searched softmax mass on the keys found.
    pub mass: Summary,
    /// `|o - o*| / |o*|`: attention over the static set and the keys found (and the tail, if one was given) against exact
    /// attention over everything.
    pub error: Summary,
}

/// A partial over keys that were not found, made by the index or its owner from the search and what it found.
pub type Tail<'a> = dyn Fn(&Search<'_>, &Hits) -> Result<Partial, IndexError> + 'a;

/// Judges `index`, which holds the prefill of the recording that `exact` is the truth of. `recalls` are the `k` to report,
/// `k` the keys that are attended to (at least the greatest of `recalls`).
///
/// # Errors
/// What the index answers; [`IndexError::Invalid`] if a `k` of `recalls` is 0 or beyond what `exact` or `k` has.
pub fn judge(
    index: &dyn KeyIndex,
    exact: &Exact<'_>,
    recalls: &[usize],
    k: usize,
    effort: f32,
    tail: Option<&Tail<'_>>,
) -> Result<Judgement, IndexError> {
    let mut tally = Tally::new(recalls);
    tally.add(index, exact, k, effort, tail)?;
    Ok(tally.judgement())
}

/// Adds searches up, of one recording or of many; [`judge`] for one.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    recalls: Vec<usize>,
    /// Of the best keys at each of `recalls`: those found, those there are.
    found: Vec<u64>,
    wanted: Vec<u64>,
    keys: u64,
    /// Searched keys, once for each query head.
    keys_searched: u64,
    bytes: u64,
    /// Bytes of the searched keys, once for each group.
    bytes_searched: u64,
    groups: u64,
    masses: Vec<f64>,
    errors: Vec<f64>,
}

impl Tally {
    /// Nothing yet; `recalls` are the `k` to report.
    pub fn new(recalls: &[usize]) -> Self {
        Self {
            recalls: recalls.to_vec(),
            found: vec![0; recalls.len()],
            wanted: vec![0; recalls.len()],
            ..Self::default()
        }
    }

    /// Adds every decode query of a recording; arguments and errors as those of [`judge`].
    ///
    /// # Errors
    /// As [`judge`]; what was added before the error stays.
    pub fn add(
        &mut self,
        index: &dyn KeyIndex,
        exact: &Exact<'_>,
        k: usize,
        effort: f32,
        tail: Option<&Tail<'_>>,
    ) -> Result<(), IndexError> {
        if let Some(wrong) = self.recalls.iter().find(|at| **at == 0 || **at > exact.k().min(k)) {
            return Err(IndexError::Invalid {
                argument: "recalls",
                problem: format!("{wrong} is not 1 to {}", exact.k().min(k)),
            });
        }
        let (head_dim, searched) = (exact.head_dim(), exact.searched() as u64);
        exact.each(|question| {
            let search = exact.search(question, k, effort);
            let hits = index.search(&search)?;
            let tail = tail.map(|tail| tail(&search, &hits)).transpose()?;
            self.keys += hits.cost.keys_scored;
            self.keys_searched += searched * question.heads.len() as u64;
            self.bytes += hits.cost.bytes_read;
            self.bytes_searched += searched * head_dim as u64 * 2;
            self.groups += 1;
            for (head, (truth, hits)) in question.heads.iter().zip(&hits.heads).enumerate() {
                for ((found, wanted), &at) in self.found.iter_mut().zip(&mut self.wanted).zip(&self.recalls) {
                    let best = &truth.best[..at.min(truth.best.len())];
                    *wanted += best.len() as u64;
                    *found += hits.iter().filter(|(position, _)| best.contains(position)).count() as u64;
                }
                let mut o = truth.fixed.clone();
                let chosen = attention_of(hits.iter().copied(), exact.values(), head_dim);
                self.masses.push((chosen.lse - truth.searched_lse).exp2().min(1.0));
                o.merge(&chosen);
                if let Some(tail) = &tail {
                    o.merge_row(&tail.o[head * head_dim..][..head_dim], tail.lse[head]);
                }
                self.errors.push(truth.error(&o));
            }
            Ok(())
        })
    }

    /// The figures of all that was added.
    pub fn judgement(&self) -> Judgement {
        let share = |part: u64, all: u64| part as f64 / all.max(1) as f64;
        Judgement {
            queries: self.errors.len(),
            recall: (self.recalls.iter().zip(&self.found).zip(&self.wanted))
                .map(|((&at, &found), &wanted)| (at, share(found, wanted)))
                .collect(),
            keys_share: share(self.keys, self.keys_searched),
            bytes_share: share(self.bytes, self.bytes_searched),
            bytes_per_search: share(self.bytes, self.groups),
            mass: Summary::of(&mut self.masses.clone()),
            error: Summary::of(&mut self.errors.clone()),
        }
    }
}
