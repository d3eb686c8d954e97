//! What a request is told about itself: at its start, and at its end.

use std::time::{Duration, Instant};

use crate::{config::AttentionMode, retrieval::Tally};

/// Told once, when the first step is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Started {
    pub(crate) prompt_tokens: usize,
    /// Prompt tokens whose KV was in the device tier.
    pub(crate) cached_device: usize,
    /// Prompt tokens whose KV was loaded from the store.
    pub(crate) cached_store: usize,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Reason {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens`, the window, or the end of the forced tokens.
    #[default]
    Length,
}

impl Reason {
    /// As vLLM's label `finished_reason` has it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Told at the end.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Finished {
    pub(crate) reason: Reason,
    pub(crate) completion_tokens: usize,
    pub(crate) started: Started,
    pub(crate) report: Report,
}

/// What the request's KV did.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Report {
    pub(crate) mode: AttentionMode,
    /// Why full attention finished a request that asked for retrieval; `None` where it did not.
    pub(crate) fallback: Option<String>,
    /// Layer-block bytes that entered the offload queue for this request.
    pub(crate) bytes_pushed: u64,
    /// Layer-block bytes that came from the store into pages for this request.
    pub(crate) bytes_loaded: u64,
    pub(crate) retrieval: Tally,
    /// Mean negative log-likelihood of the forced tokens, in nats; 0 without any.
    pub(crate) forced_nll: f32,
    pub(crate) queued: Duration,
    pub(crate) prefill: Duration,
    pub(crate) decode: Duration,
}

/// When a request passed from one state to the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) submitted: Instant,
    pub(crate) admitted: Option<Instant>,
    pub(crate) first_token: Option<Instant>,
    pub(crate) last_token: Option<Instant>,
}

impl Times {
    pub(crate) fn new(submitted: Instant) -> Self {
        Self {
            submitted,
            admitted: None,
            first_token: None,
            last_token: None,
        }
    }

    /// Waiting, from admission to the first token, from the first token to the last.
    pub(crate) fn phases(&self) -> (Duration, Duration, Duration) {
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        };
        (
            between(Some(self.submitted), self.admitted),
            between(self.admitted, self.first_token),
            between(self.first_token, self.last_token),
        )
    }
}
