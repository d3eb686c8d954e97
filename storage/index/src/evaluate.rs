//! How an index is judged: pure functions from an index and recorded queries, keys and values to figures.
//!
//! The setting is that of a decoding worker. The last tokens of a recording are decode steps; what came before is the prefill,
//! which the index holds. Sink, window and generated tokens are attended to by the worker itself, so they are excluded from
//! the search and counted in every output. Queries of the prefill may train an index; only those of decode steps judge it.
//!
//! [`Exact`] is the truth, computed once per recording; [`judge`] compares one index at one effort with it;
//! [`bytes_for_mass`] asks how much must be read for a share of the softmax; [`AttendTally`] judges finished attention and
//! the bounds it states. Figures are shares of keys *and* of bytes: a key that is scored costs its row, and codes, centroids and
//! edges cost too. Each is a tally, so that the recordings of many heads and layers can be judged as one.
//!
//! [`synthetic`] makes recordings as long as no small model can, and refuses those that are unlike attention.

mod attended;
mod exact;
mod figures;
mod for_mass;
mod judge;
pub mod synthetic;

use half::f16;

pub use self::{
    attended::{AttendJudgement, AttendTally},
    exact::Exact,
    figures::{Certificates, Summary},
    for_mass::{BytesForMass, MassTally, bytes_for_mass},
    judge::{Judgement, Tail, Tally, judge},
};
use crate::{Excluded, IndexError, KeyRows};

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

/// Rows of a recording's prefill, in one block.
fn rows<'a>(blocks: &'a [&'a [f16]; 1], head_dim: usize) -> KeyRows<'a> {
    KeyRows::new(blocks, (blocks[0].len() / head_dim).max(1), head_dim)
}

#[cfg(test)]
mod tests;
