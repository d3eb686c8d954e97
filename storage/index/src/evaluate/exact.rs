//! The truth: exact attention of every decode query, and its best keys.

use half::f16;
use kvasir_simd::{Pool, scores};

use super::{Recording, Setting, rows};
use crate::{Excluded, IndexError, Search, search::Best};

/// Attention over some keys: normalised output and base-2 log-sum-exp, in f64.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Attention {
    pub(super) o: Vec<f64>,
    pub(super) lse: f64,
}

impl Attention {
    /// Joins attention over other keys.
    pub(super) fn merge(&mut self, other: &Self) {
        self.join(other.o.iter().copied(), other.lse);
    }

    /// The same for a row in f32.
    pub(super) fn merge_row(&mut self, o: &[f32], lse: f32) {
        self.join(o.iter().map(|x| f64::from(*x)), f64::from(lse));
    }

    fn join(&mut self, o: impl Iterator<Item = f64>, lse: f64) {
        if lse == f64::NEG_INFINITY {
            return;
        }
        let high = self.lse.max(lse);
        let (ours, theirs) = ((self.lse - high).exp2(), (lse - high).exp2());
        for (x, other) in self.o.iter_mut().zip(o) {
            *x = (*x * ours + other * theirs) / (ours + theirs);
        }
        self.lse = high + (ours + theirs).log2();
    }
}

/// Attention over keys given by position and base-2 score. Scores that are not finite are left out.
pub(super) fn attention_of(
    keys: impl Iterator<Item = (u32, f32)> + Clone,
    values: &[f16],
    head_dim: usize,
) -> Attention {
    let keys = keys.filter(|(_, score)| score.is_finite());
    let high = keys
        .clone()
        .map(|(_, score)| f64::from(score))
        .fold(f64::NEG_INFINITY, f64::max);
    let mut out = Attention {
        o: vec![0.0; head_dim],
        lse: f64::NEG_INFINITY,
    };
    let mut sum = 0.0;
    for (position, score) in keys {
        let weight = (f64::from(score) - high).exp2();
        sum += weight;
        let value = &values[position as usize * head_dim..][..head_dim];
        out.o.iter_mut().zip(value).for_each(|(o, x)| *o += weight * x.to_f64());
    }
    if sum > 0.0 {
        out.o.iter_mut().for_each(|o| *o /= sum);
        out.lse = high + sum.log2();
    }
    out
}

/// What is true of one query head at one decode step.
#[derive(Clone, Debug)]
pub(super) struct Truth {
    /// Attention over sink, window and generated tokens.
    pub(super) fixed: Attention,
    /// Output over everything.
    pub(super) o: Vec<f64>,
    /// Log-sum-exp of the searched keys.
    pub(super) searched_lse: f64,
    /// The best searched keys, best first.
    pub(super) best: Vec<u32>,
}

impl Truth {
    /// `|o - o*| / |o*|`
    pub(super) fn error(&self, found: &Attention) -> f64 {
        let norm = |x: f64, y: f64| x.hypot(y);
        let apart = self.o.iter().zip(&found.o).map(|(x, y)| x - y).fold(0.0, norm);
        let length = self.o.iter().copied().fold(0.0, norm);
        if apart == 0.0 { 0.0 } else { apart / length }
    }
}

/// One decode step.
#[derive(Clone, Debug)]
pub(super) struct Question {
    q: Vec<f32>,
    pub(super) heads: Vec<Truth>,
}

/// Exact attention of the decode steps of a recording. Scores are those of the kernels (f32), sums are f64.
#[derive(Clone, Debug)]
pub struct Exact<'a> {
    recording: Recording<'a>,
    keys: [&'a [f16]; 1],
    excluded: Excluded,
    k: usize,
    searched: usize,
    questions: Vec<Question>,
}

impl<'a> Exact<'a> {
    /// Computes the truth, with the `k` best keys of each query.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] naming what does not fit: shapes, a recording too short for the setting, a `k` of 0.
    pub fn of(recording: Recording<'a>, setting: &Setting, k: usize, pool: &Pool) -> Result<Self, IndexError> {
        recording.check(setting)?;
        if k == 0 {
            return Err(IndexError::Invalid {
                argument: "k",
                problem: "0 best keys say nothing; ask for at least 1".to_owned(),
            });
        }
        let excluded = setting.excluded(&recording);
        let prefill = setting.prefill(&recording);
        let mut questions: Vec<(usize, Option<Question>)> =
            setting.steps(&recording).map(|step| (step, None)).collect();
        pool.run_chunks(&mut questions, 1, &|_, questions| {
            for (step, question) in questions {
                *question = Some(answer(&recording, *step, prefill, &excluded, k));
            }
        });
        Ok(Self {
            recording,
            keys: [&recording.keys[..prefill * recording.head_dim]],
            searched: excluded.searched_count(prefill as u32) as usize,
            excluded,
            k,
            questions: questions.into_iter().filter_map(|(_, question)| question).collect(),
        })
    }

    /// Best keys known per query.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Keys that are searched: the prefill without sink and window.
    pub fn searched(&self) -> usize {
        self.searched
    }

    pub(super) fn head_dim(&self) -> usize {
        self.recording.head_dim
    }

    pub(super) fn values(&self) -> &'a [f16] {
        self.recording.values
    }

    pub(super) fn each(&self, mut with: impl FnMut(&Question) -> Result<(), IndexError>) -> Result<(), IndexError> {
        self.questions.iter().try_for_each(&mut with)
    }

    pub(super) fn search<'s>(&'s self, question: &'s Question, k: usize, effort: f32) -> Search<'s> {
        Search {
            q: &question.q,
            scale: self.recording.scale(),
            keys: rows(&self.keys, self.recording.head_dim),
            k,
            effort,
            mass: 1.0,
            excluded: &self.excluded,
        }
    }
}

fn answer(recording: &Recording<'_>, step: usize, prefill: usize, excluded: &Excluded, k: usize) -> Question {
    let head_dim = recording.head_dim;
    let q = recording.group(step);
    let seen = &recording.keys[..(step + 1) * head_dim];
    let mut all = vec![0.0; recording.heads * (step + 1)];
    scores(&q, seen, head_dim, recording.scale(), &mut all);
    let heads = all
        .chunks_exact(step + 1)
        .map(|scores| {
            let scored = |position: u32| (position, scores[position as usize]);
            let searched = || excluded.searched(0..prefill as u32).flatten();
            let is_fixed = |position: &u32| *position as usize >= prefill || excluded.contains(*position);
            let fixed = attention_of(
                (0..=step as u32).filter(is_fixed).map(scored),
                recording.values,
                head_dim,
            );
            let rest: Vec<(u32, f32)> = searched().map(scored).collect();
            let rest_attention = attention_of(rest.iter().copied(), recording.values, head_dim);
            let mut whole = fixed.clone();
            whole.merge(&rest_attention);
            let mut best = Best::new(k);
            rest.iter().for_each(|&(position, score)| best.push(position, score));
            Truth {
                fixed,
                o: whole.o,
                searched_lse: rest_attention.lse,
                best: best.into_sorted().into_iter().map(|(position, _)| position).collect(),
            }
        })
        .collect();
    Question { q, heads }
}
