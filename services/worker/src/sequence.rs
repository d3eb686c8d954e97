//! One request while it is computed: its tokens, its pages, what it has said so far.

use std::{sync::Arc, time::Instant};

use kvasir_block::{ExtraKeys, HashChain};
use kvasir_model::{Draw, Logits, PageId, Sampler, TextDecoder, Tokenizer};
use tracing::Span;

use crate::{
    compute::{SequenceId, Submission},
    config::AttentionMode,
    device_tier::Promise,
    load::Ticket,
    onboard::StoreHit,
    outbox::Outbox,
    report::{Finished, Reason, Report, Started, Times},
    request::Request,
    retrieval::Tally,
    text::{Piece, StopText},
};

/// State of a sequence. Invariants: positions below `computed` are in pages; `tokens` is longer than `computed` until the
/// end; a block has a page, or was let go and lies at the store.
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    pub(crate) request: Request,
    pub(crate) span: Span,
    pub(crate) phase: Phase,
    /// Prompt, then what was fed.
    pub(crate) tokens: Vec<u32>,
    /// Names of the whole blocks of `tokens`.
    pub(crate) chain: HashChain,
    pub(crate) computed: usize,
    /// Position from which blocks get no name: the first token that was sampled from, where the device computes those
    /// otherwise ([`kvasir_model::Model::names_sampled_tokens`]), or the first block that is not computed as its name says.
    pub(crate) unnamed_from: usize,
    /// Position of the first block whose name stands for KV that this request does not want: one that asked for dense prefill
    /// of a worker whose blocks are sparse from there on.
    pub(crate) names_end: usize,
    pub(crate) pages: Vec<Option<PageId>>,
    pub(crate) promise: Promise,
    /// Device-tier blocks to be offered with the first step, as far as the store does not have them.
    pub(crate) offer_first: usize,
    /// Whether decoding is to switch to retrieval after the first token.
    pub(crate) wants_retrieval: bool,
    pub(crate) fallback: Option<String>,
    pub(crate) tally: Tally,
    pub(crate) bytes_pushed: u64,
    pub(crate) bytes_loaded: u64,
    pub(crate) started: Started,
    pub(crate) times: Times,
    /// Given back when the sequence is admitted.
    pub(crate) ticket: Option<Ticket>,
    told_started: bool,
    outbox: Outbox,
    produced: usize,
    /// Negative log-likelihood of the forced tokens so far, in nats.
    forced_nll: f64,
    sampler: Sampler,
    /// How the next token is drawn: kept while steps are given up, so that chance is asked once for each.
    draw: Option<Draw>,
    decoder: TextDecoder,
    stops: StopText,
}

/// What a step says of the next token.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Next<'a> {
    /// The token itself, drawn where the model computes.
    Token(u32),
    /// Its logits.
    Logits(&'a [f32]),
}

/// Where a sequence stands.
#[derive(Debug)]
pub(crate) enum Phase {
    /// Waiting, and the store is being asked.
    Matching,
    /// Waiting for a place and pages.
    Queued(StoreHit),
    /// Admitted; its prefix is on its way into pages.
    Onboarding,
    /// Admitted; may be computed.
    Running,
    /// Admitted; its context is being opened for retrieval.
    Opening,
}

impl Sequence {
    pub(crate) fn new(id: SequenceId, submission: Submission, block_tokens: usize, tokenizer: &Arc<Tokenizer>) -> Self {
        let Submission {
            request,
            outbox,
            ticket,
            span,
            submitted,
        } = submission;
        let mut chain = HashChain::new(block_tokens, ExtraKeys::with_cache_salt(&request.cache_salt));
        for token in &request.prompt {
            chain.push(*token);
        }
        // Forced tokens are the caller's; where they end is not for a stop string to say.
        let stops = if request.forced.is_empty() {
            request.stop.clone()
        } else {
            Vec::new()
        };
        Self {
            id,
            span,
            phase: Phase::Matching,
            tokens: request.prompt.clone(),
            chain,
            computed: 0,
            unnamed_from: usize::MAX,
            names_end: usize::MAX,
            pages: Vec::new(),
            promise: Promise::default(),
            offer_first: 0,
            wants_retrieval: request.attention.mode != AttentionMode::Full,
            fallback: None,
            tally: Tally::default(),
            bytes_pushed: 0,
            bytes_loaded: 0,
            started: Started {
                prompt_tokens: request.prompt.len(),
                ..Started::default()
            },
            times: Times::new(submitted),
            ticket: Some(ticket),
            told_started: false,
            outbox,
            produced: 0,
            forced_nll: 0.0,
            sampler: Sampler::new(request.sampling.clone()),
            draw: None,
            decoder: tokenizer.decoder(),
            stops: StopText::new(stops),
            request,
        }
    }

    /// Tokens whose KV is not computed.
    pub(crate) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Blocks that a cache may bring: all whole ones, but the last token is always computed, since its logits are what
    /// the next token is sampled from.
    pub(crate) fn cacheable_blocks(&self, block_tokens: usize) -> usize {
        if self.request.no_cache {
            0
        } else {
            (self.tokens.len() - 1).min(self.names_end) / block_tokens
        }
    }

    /// Whether nobody reads what it says.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.outbox.is_abandoned()
    }

    /// Whether it has been admitted before: it fell back and computes again what it had.
    pub(crate) fn is_resumed(&self) -> bool {
        self.told_started
    }

    /// Tells once what was found in caches.
    pub(crate) fn tell_started(&mut self) {
        if !std::mem::replace(&mut self.told_started, true) {
            self.outbox.started(self.started);
        }
    }

    /// What a step that computes all that remains is asked for: a token, or logits where a token is forced and its likelihood
    /// wanted.
    pub(crate) fn wants(&mut self) -> Logits {
        let draw = *self.draw.get_or_insert_with(|| self.sampler.next_draw());
        match self.request.forced.get(self.produced) {
            Some(_) => Logits::Last,
            None => Logits::Drawn(draw),
        }
    }

    /// Takes the next token, says so, and ends or goes on with it.
    pub(crate) fn choose(&mut self, next: Next<'_>, stop_ids: &[u32]) -> Option<Reason> {
        let draw = self.draw.take().unwrap_or_else(|| self.sampler.next_draw());
        let choice = match next {
            Next::Token(token) => token,
            Next::Logits(logits) => self.sampler.draw(logits, draw),
        };
        let forced = self.request.forced.get(self.produced).copied();
        if let (Some(token), Next::Logits(logits)) = (forced, next) {
            self.forced_nll += negative_log_likelihood(logits, token);
        }
        self.produced += 1;
        let is_stop = forced.is_none() && !self.request.ignore_eos && stop_ids.contains(&choice);
        let mut text = String::new();
        let mut reason = is_stop.then_some(Reason::Stop);
        if !is_stop {
            let fed = forced.unwrap_or(choice);
            self.tokens.push(fed);
            self.chain.push(fed);
            let piece = self.decoder.push(fed);
            reason = self.say(&piece, &mut text);
        }
        if reason.is_none() && self.produced == self.request.max_tokens {
            reason = Some(Reason::Length);
        }
        if reason == Some(Reason::Length) || is_stop {
            let rest = self.decoder.finish();
            reason = self.say(&rest, &mut text).or(reason);
            text += &self.stops.finish();
        }
        self.outbox.tokens(&text, &[choice]);
        let now = Instant::now();
        self.times.first_token.get_or_insert(now);
        self.times.last_token = Some(now);
        reason
    }

    /// Puts what is certain of `piece` behind `text`.
    fn say(&mut self, piece: &str, text: &mut String) -> Option<Reason> {
        match self.stops.push(piece) {
            Piece::Certain(certain) => {
                *text += &certain;
                None
            }
            Piece::Stopped(before) => {
                *text += &before;
                Some(Reason::Stop)
            }
        }
    }

    /// Gives the sequence's last word; its pages and promise must have been given back.
    pub(crate) fn finish(self, reason: Reason) -> Finished {
        let (queued, prefill, decode) = self.times.phases();
        let finished = Finished {
            reason,
            completion_tokens: self.produced,
            started: self.started,
            report: Report {
                mode: self.request.attention.mode,
                fallback: self.fallback,
                bytes_pushed: self.bytes_pushed,
                bytes_loaded: self.bytes_loaded,
                retrieval: self.tally,
                forced_nll: match self.request.forced.len().min(self.produced) {
                    0 => 0.0,
                    forced => (self.forced_nll / forced as f64) as f32,
                },
                queued,
                prefill,
                decode,
            },
        };
        self.outbox.finish(finished.clone());
        finished
    }

    /// Ends the sequence without a result.
    pub(crate) fn fail(self, failure: crate::outbox::Failure) {
        self.outbox.fail(failure);
    }
}

/// `-ln softmax(logits)[token]`, in nats.
fn negative_log_likelihood(logits: &[f32], token: u32) -> f64 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - highest).exp()).sum();
    // Tokens were checked against the vocabulary at the door.
    sum.ln() - f64::from(logits[token as usize] - highest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihoods_are_those_of_the_softmax() {
        let ln = f64::ln;
        // Logits, a token, what it costs.
        let table = [
            (vec![0.0; 4], 2, ln(4.0)),
            (vec![(1.0_f32).ln(), (3.0_f32).ln()], 1, ln(4.0 / 3.0)),
            (vec![(1.0_f32).ln(), (3.0_f32).ln()], 0, ln(4.0)),
            // Far beyond what exp can hold.
            (vec![1000.0, 1000.0, -1000.0], 0, ln(2.0)),
        ];
        for (logits, token, expected) in table {
            let found = negative_log_likelihood(&logits, token);
            assert!(
                (found - expected).abs() < 1e-6,
                "{logits:?}[{token}]: {found} is not {expected}"
            );
        }
    }
}
