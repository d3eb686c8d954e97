//! How an index is judged: pure functions from an index and recorded queries, keys and values to figures.
//!
//! The setting is that of a decoding worker. The last tokens of a recording are decode steps; what came before is the prefill,
//! which the index holds. Sink, window and generated tokens are attended to by the worker itself, so they are excluded from
//! the search and counted in every output. Queries of the prefill may train an index; only those of decode steps judge it.
//!
//! [`Exact`] is the truth, computed once per recording; [`judge`] compares one index at one effort with it;
//! [`bytes_for_mass`] asks how much must be read for a share of the softmax; [`Certificates`] judges stated bounds. Figures are
//! shares of keys *and* of bytes: a key that is scored costs its row, and codes, centroids and edges cost too.
//!
//! [`synthetic`] makes recordings as long as no small model can, and refuses those that are unlike attention.

mod exact;
mod figures;
pub mod synthetic;

use half::f16;
use kvasir_simd::Partial;

use self::exact::{Question, attention_of};
pub use self::{
    exact::Exact,
    figures::{Certificates, Summary},
};
use crate::{Excluded, Hits, IndexError, KeyIndex, KeyRows, Search};

/// What one KV head saw: queries of its group, keys and values, all rotated.
#[derive(Clone, Copy, Debug)]
pub struct Recording<'a> {
    /// `[heads, tokens, head_dim]`
    pub q: &'a [f16],
    /// `[tokens, head_dim]`
    pub keys: &'a [f16],
    /// `[tokens, head_dim]`
    pub values: &'a [f16],
    /// Query heads of the group.
    pub heads: usize,
    /// Elements per row.
    pub head_dim: usize,
}

impl<'a> Recording<'a> {
    /// Tokens recorded.
    pub fn tokens(&self) -> usize {
        self.keys.len() / self.head_dim
    }

    /// The query of a head at a token.
    ///
    /// # Panics
    /// If there is no such head or token.
    pub fn query(&self, head: usize, token: usize) -> &'a [f16] {
        let at = (head * self.tokens() + token) * self.head_dim;
        &self.q[at..at + self.head_dim]
    }

    /// Queries of all heads at a token, `[heads, head_dim]`.
    pub fn group(&self, token: usize) -> Vec<f32> {
        let rows = (0..self.heads).flat_map(|head| self.query(head, token));
        rows.map(|x| x.to_f32()).collect()
    }

    /// `1/sqrt(head_dim)`
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Queries of prefill tokens that may train an index: of every `stride`-th token behind the first 64, all heads in turn.
    pub fn samples(&self, setting: &Setting, stride: usize) -> Vec<f32> {
        let tokens = (64..setting.prefill(self)).step_by(stride.max(1));
        tokens.flat_map(|token| self.group(token)).collect()
    }

    fn check(&self, setting: &Setting) -> Result<(), IndexError> {
        let invalid = |argument, problem| Err(IndexError::Invalid { argument, problem });
        if self.head_dim == 0 || self.heads == 0 || !self.keys.len().is_multiple_of(self.head_dim) {
            return invalid("keys", format!("{} elements are not rows of head_dim", self.keys.len()));
        }
        if self.values.len() != self.keys.len() {
            return invalid(
                "values",
                format!("{} elements for {} of keys", self.values.len(), self.keys.len()),
            );
        }
        if Some(self.q.len()) != self.keys.len().checked_mul(self.heads) {
            return invalid(
                "q",
                format!("{} elements are not [heads, tokens, head_dim]", self.q.len()),
            );
        }
        let least = setting.decode + setting.sink + setting.window + 1;
        if setting.decode == 0 || setting.stride == 0 || self.tokens() < least {
            return invalid(
                "setting",
                format!(
                    "{} tokens recorded; decode steps, sink and window leave none of {least}",
                    self.tokens()
                ),
            );
        }
        Ok(())
    }
}

/// Which tokens of a recording play which part. The default is the one that published and our own figures use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Tokens at the end that are decode steps (256).
    pub decode: usize,
    /// Every `stride`-th decode step is a query (2).
    pub stride: usize,
    /// First tokens that the worker keeps (4).
    pub sink: usize,
    /// Last tokens of the prefill that the worker keeps (64).
    pub window: usize,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            decode: 256,
            stride: 2,
            sink: 4,
            window: 64,
        }
    }
}

impl Setting {
    /// Tokens of the prefill: what an index is built from.
    ///
    /// # Panics
    /// If the recording is shorter than the decode steps.
    pub fn prefill(&self, recording: &Recording<'_>) -> usize {
        recording.tokens() - self.decode
    }

    /// Sink and window, which no search looks at.
    pub fn excluded(&self, recording: &Recording<'_>) -> Excluded {
        let prefill = self.prefill(recording) as u32;
        Excluded::new(&[0..self.sink as u32, prefill.saturating_sub(self.window as u32)..prefill])
    }

    /// Decode steps that are queries.
    pub fn steps(&self, recording: &Recording<'_>) -> impl Iterator<Item = usize> + use<> {
        (self.prefill(recording)..recording.tokens()).step_by(self.stride)
    }
}

/// Figures of an index at one effort, over all decode queries of a recording.
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
    if let Some(wrong) = recalls.iter().find(|at| **at == 0 || **at > exact.k().min(k)) {
        return Err(IndexError::Invalid {
            argument: "recalls",
            problem: format!("{wrong} is not 1 to {}", exact.k().min(k)),
        });
    }
    let mut out = Judgement::default();
    let (mut masses, mut errors) = (Vec::new(), Vec::new());
    let mut found = vec![0_u64; recalls.len()];
    let mut wanted = vec![0_u64; recalls.len()];
    let (mut keys, mut bytes, mut groups) = (0, 0, 0_u64);
    exact.each(|question| {
        let search = exact.search(question, k, effort);
        let hits = index.search(&search)?;
        let tail = tail.map(|tail| tail(&search, &hits)).transpose()?;
        keys += hits.cost.keys_scored;
        bytes += hits.cost.bytes_read;
        groups += 1;
        for (head, (truth, hits)) in question.heads.iter().zip(&hits.heads).enumerate() {
            for ((found, wanted), &at) in found.iter_mut().zip(&mut wanted).zip(recalls) {
                let best = &truth.best[..at.min(truth.best.len())];
                *wanted += best.len() as u64;
                *found += hits.iter().filter(|(position, _)| best.contains(position)).count() as u64;
            }
            let mut o = truth.fixed.clone();
            let chosen = attention_of(hits.iter().copied(), exact.values(), exact.head_dim());
            masses.push((chosen.lse - truth.searched_lse).exp2().min(1.0));
            o.merge(&chosen);
            if let Some(tail) = &tail {
                o.merge_row(&tail.o[head * exact.head_dim()..][..exact.head_dim()], tail.lse[head]);
            }
            errors.push(truth.error(&o));
        }
        Ok(())
    })?;
    let searched = exact.searched() as f64;
    out.queries = errors.len();
    out.recall = recalls
        .iter()
        .zip(found.iter().zip(&wanted))
        .map(|(&at, (&found, &wanted))| (at, found as f64 / wanted.max(1) as f64))
        .collect();
    out.keys_share = keys as f64 / (out.queries.max(1) as f64 * searched);
    out.bytes_share = bytes as f64 / (groups.max(1) as f64 * searched * exact.head_dim() as f64 * 2.0);
    out.mass = Summary::of(&mut masses);
    out.error = Summary::of(&mut errors);
    Ok(out)
}

/// Bytes that must be read until the keys scored hold a share of the searched softmax mass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BytesForMass {
    /// Decode steps at which every query head of the group reached the share with one of the efforts.
    pub reached: f64,
    /// Bytes read by the whole group at the smallest effort that reached it; over the steps that did.
    pub bytes: Summary,
    /// That effort.
    pub effort: Summary,
}

/// Tries rising `efforts` at each decode step until the keys scored hold `share` of the mass for every query head.
///
/// # Errors
/// What the index answers.
pub fn bytes_for_mass(
    index: &dyn KeyIndex,
    exact: &Exact<'_>,
    share: f64,
    efforts: &[f32],
) -> Result<BytesForMass, IndexError> {
    let (mut bytes, mut taken, mut steps) = (Vec::new(), Vec::new(), 0);
    exact.each(|question| {
        steps += 1;
        for &effort in efforts {
            let search = exact.search(question, index.keys().max(1), effort);
            let hits = index.search(&search)?;
            if question.is_covered(&hits, share) {
                bytes.push(hits.cost.bytes_read as f64);
                taken.push(f64::from(effort));
                break;
            }
        }
        Ok(())
    })?;
    Ok(BytesForMass {
        reached: bytes.len() as f64 / steps.max(1) as f64,
        bytes: Summary::of(&mut bytes),
        effort: Summary::of(&mut taken),
    })
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

/// Rows of a recording's prefill, in one block.
fn rows<'a>(blocks: &'a [&'a [f16]; 1], head_dim: usize) -> KeyRows<'a> {
    KeyRows::new(blocks, (blocks[0].len() / head_dim).max(1), head_dim)
}

#[cfg(test)]
mod tests;
