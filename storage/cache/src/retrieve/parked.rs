//! Searches that begin ahead, with predicted queries, and what they leave for the real ones.
//!
//! What is parked per KV head is which keys are candidates and what the others weigh by their sketches. The real queries then score
//! the candidates by themselves and estimate the others from a sample that they score, so that a prediction decides what is looked at
//! and never what is found there.
//!
//! Candidates are those of one set of searched positions: a query that leaves out others is searched for anew, or a key that its
//! caller holds would count twice, and one that he let go would be lost.

use std::sync::{Arc, Weak, atomic::AtomicBool};

use kvasir_index::{Attend, Excluded, Parked};
use parking_lot::Mutex;

use super::{
    Context, Form, Query,
    blocks::ContextBlocks,
    head::{Head, HeadFound},
    search::{Purpose, Search, wants_exact, wants_lift, wants_scan},
    sketches::{self, Extra},
};
use crate::cache::Shared;

/// Real queries further than this from the predicted ones, relative to their own length, are searched for anew. Predicted one layer
/// ahead, SmolLM2's are about 0.3 away from layer 3 on and 0.8 in layer 2, where two thirds of the best keys are lost. Decoding 160
/// tokens behind 4,000 with 0.35, 0.5, 0.75 and 2 made no difference in what was chosen (99.4 % as full attention); 3,808, 4,275, 4,293
/// and 4,293 of the 4,770 searches took something from their hint.
const DISTANCE_MAX: f32 = 0.5;
/// Where real queries miss, beyond what a prediction's candidates were to leave, so many times the mass that may be missed, they look
/// for their own: a forecast can be near by its length and still miss what a steep head attends to. (Noise whose scores deviate
/// by 4: without this .82 of the mass was found, not .99.)
const MISSED_MAX: f32 = 3.0;
/// What a search with real queries covers varies by about so much from one token to the next, where effort bounds it.
const USUAL_VARIES: f32 = 0.05;
/// Candidates that are parked, as a multiple of what a search without a prediction looks at: a prediction misplaces some.
const GENEROUS: f32 = 1.5;

/// What became of one KV head's search that had begun ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ahead {
    /// There was none.
    No,
    Used,
    /// The prediction was too far off.
    TooFar,
}

/// Whether what real queries found among a prediction's candidates is much less than was `wanted`, and also than was `expected` of
/// them, per query head, or than is `usual` where a search begins with real queries.
pub(super) fn covers_too_little(found: &Extra, expected: &[f32], usual: f32, wanted: Attend) -> bool {
    let slack = MISSED_MAX * (1.0 - wanted.target_mass).max(1e-4);
    let mut heads = found.covered.iter().zip(expected);
    heads.any(|(found, expected)| {
        let attainable = expected.max(usual - USUAL_VARIES);
        *found < wanted.target_mass.min(attainable) - slack
    })
}

/// A search with predicted queries, that has its blocks. Threads [work](Self::work) on it as on a [`Search`].
#[derive(Debug)]
pub struct SearchAhead {
    search: Search,
    found_for: FoundFor,
    bytes_max: usize,
}

/// What a search with predicted queries left, kept until the real ones arrive.
#[derive(Debug)]
pub struct ParkedSearch {
    found_for: FoundFor,
    /// By KV head; `None` where nothing could be kept.
    heads: Vec<Option<Box<Parked>>>,
}

/// What a real query must agree with.
#[derive(Clone, Debug)]
struct FoundFor {
    blocks: Weak<ContextBlocks>,
    q_heads: usize,
    scale: f32,
    layer: u16,
    form: Form,
    excluded: Excluded,
    tokens: u32,
}

impl FoundFor {
    fn new(context: &Context, query: &Query<'_>) -> Self {
        Self {
            blocks: Arc::downgrade(context.blocks()),
            q_heads: context.q_heads(),
            scale: context.scale(),
            layer: query.layer,
            form: query.form,
            excluded: Excluded::new(query.excluded),
            // Positions of a context have 32 bits.
            tokens: context.tokens() as u32,
        }
    }

    fn is_for(&self, context: &Context, query: &Query<'_>) -> bool {
        let searched = |excluded: &Excluded| excluded.searched(0..self.tokens).collect::<Vec<_>>();
        Weak::as_ptr(&self.blocks) == Arc::as_ptr(context.blocks())
            && self.q_heads == context.q_heads()
            && self.scale.to_bits() == context.scale().to_bits()
            && self.layer == query.layer
            && self.form == query.form
            // What lies behind the context grows with every token, and is not searched anyway.
            && searched(&self.excluded) == searched(&Excluded::new(query.excluded))
    }
}

impl SearchAhead {
    /// Of a layer with `predicted` queries, which were checked. `None` where a prediction gains nothing: every key is to be
    /// scored, or no sketches serve.
    pub(super) fn begin(
        shared: &Arc<Shared>,
        context: &Context,
        predicted: &Query<'_>,
        dropped: &Arc<AtomicBool>,
    ) -> Option<Self> {
        let walked = context.covering(shared).is_some() && !wants_scan(predicted.form);
        // What is drawn is drawn by the query itself.
        let drawn = wants_lift(predicted.form);
        if context.basis().is_none() || wants_exact(predicted.form) || walked || drawn {
            return None;
        }
        let effort = generous(sketches::wanted(predicted.form, context.tokens()).effort);
        if effort >= 1.0 {
            return None;
        }
        let layout = context.schema().layout();
        // At least one, and rounded up.
        let candidates = (f64::from(effort) * context.tokens() as f64) as usize + 2;
        let keys = context.blocks().len() * layout.block_tokens.next_multiple_of(16);
        let head_bytes = Parked::bytes_max(context.group(), layout.head_dim, candidates, keys);
        let purpose = Purpose::Park {
            head_bytes,
            dropped: Arc::clone(dropped),
        };
        let queries = std::slice::from_ref(predicted);
        Some(Self {
            search: Search::begin(shared, context, predicted, queries, purpose),
            found_for: FoundFor::new(context, predicted),
            bytes_max: head_bytes * layout.kv_heads,
        })
    }

    /// Most bytes that it may leave.
    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// KV heads: as many threads can work at once.
    pub fn parts(&self) -> usize {
        self.search.parts()
    }

    /// Takes one KV head after another until none is left to take. Others may still be at work then.
    pub fn work(&self) {
        self.search.work();
    }

    /// As [`Self::work`], doing `then` after each KV head.
    pub fn work_and(&self, then: &mut dyn FnMut()) {
        self.search.work_and(then);
    }

    /// Waits until all KV heads are done; what is left, once. `None` where that is nothing: it was dropped, or blocks are missing.
    ///
    /// # Panics
    /// If a thread panicked at work.
    pub fn wait(&self) -> Option<ParkedSearch> {
        let parked = |head: Head| match head.found {
            HeadFound::Parked(parked) => parked,
            HeadFound::Rows(..) | HeadFound::Attend(..) => None,
        };
        let heads: Vec<_> = self.search.finished().into_iter().map(parked).collect();
        heads.iter().any(Option::is_some).then(|| ParkedSearch {
            found_for: self.found_for.clone(),
            heads,
        })
    }
}

impl ParkedSearch {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.heads.iter().flatten().map(|parked| parked.bytes()).sum()
    }

    /// Whether a search for `query` may begin with it: the same layer of the same blocks, asked in the same form, and the same
    /// positions searched.
    pub fn is_for(&self, context: &Context, query: &Query<'_>) -> bool {
        self.found_for.is_for(context, query)
    }

    pub(super) fn into_purpose(self) -> Purpose {
        Purpose::Answer(self.heads.into_iter().map(Mutex::new).collect())
    }
}

/// Whether real queries are near enough to the predicted ones.
pub(super) fn is_near(parked: &Parked, q: &[f32]) -> bool {
    parked.distance(q) <= DISTANCE_MAX
}

impl Context {
    /// Whether a prediction serves a query at all: whether it is near enough for at least one KV head. What was searched ahead with one
    /// that is not will not be used. Both `[q_heads, head_dim]`.
    pub fn is_near(&self, predicted: &[f32], q: &[f32]) -> bool {
        let (row, head) = (usize::from(self.schema().head_dim), self.group());
        let mut heads = predicted.chunks(row * head).zip(q.chunks(row * head));
        let near = |(predicted, q)| kvasir_index::distance(predicted, q, row) <= DISTANCE_MAX;
        predicted.len() == q.len() && heads.any(near)
    }
}

/// Share of the keys that become candidates where a search without a prediction scores `effort` of them.
pub(super) fn generous(effort: f32) -> f32 {
    (effort * GENEROUS).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_forecast_left_is_judged_by_what_is_wanted_expected_and_usual() {
        let wanted = Attend {
            target_mass: 0.99,
            ..Attend::default()
        };
        // What two query heads found, what was expected of them, what is usual; whether that is too little.
        for (found, expected, usual, too_little) in [
            ([0.99, 0.99], [0.99, 0.99], 0.0, false),
            ([0.99, 0.97], [0.99, 0.99], 0.0, false),
            ([0.99, 0.90], [0.99, 0.99], 0.0, true),
            // A head that spreads its mass: effort ends before the target is reached, and is no better another time.
            ([0.80, 0.99], [0.80, 0.99], 0.80, false),
            ([0.80, 0.99], [0.80, 0.99], 0.0, false),
            // What the forecast's own queries would have missed, real ones usually find.
            ([0.40, 0.99], [0.40, 0.99], 0.99, true),
            ([0.92, 0.92], [0.40, 0.40], 0.99, false),
            // More than is wanted is not asked for.
            ([0.97, 0.97], [1.00, 1.00], 1.0, false),
        ] {
            let extra = Extra {
                covered: found.to_vec(),
                ..Extra::default()
            };
            let case = format!("{found:?} of {expected:?}, usually {usual}");
            assert_eq!(
                covers_too_little(&extra, &expected, usual, wanted),
                too_little,
                "{case}"
            );
        }
    }
}
