//! Which worker gets a request. Pure: prompt, candidates and prices in, a choice out; no clock, no lock, no network.
//!
//! The price of a worker is counted in prompt tokens that it would have to compute before the first new token appears:
//! those of this prompt that it neither has nor can load, a fraction for those that it can load from the store, and what
//! the work that is already there delays it by. The lowest price wins; equal prices take turns.

use crate::config::PolicyConfig;

/// A worker's place in the configured list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct WorkerId(pub(crate) u32);

/// What the router knows of a prompt before it chooses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Prompt {
    /// Tokens in all.
    pub(crate) tokens: usize,
    /// Tokens per block.
    pub(crate) block_tokens: usize,
    /// Blocks from the start that the store holds without a gap; any worker could load them.
    pub(crate) store_blocks: usize,
}

/// A worker that could take the request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) worker: WorkerId,
    /// Blocks from the start that this worker holds itself without a gap.
    pub(crate) device_blocks: usize,
    pub(crate) load: Load,
}

/// How busy a worker is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Load {
    /// Sequences that decode or prefill.
    pub(crate) running: u32,
    /// Sequences that wait for a place.
    pub(crate) waiting: u32,
    /// Prompt tokens that wait to be computed.
    pub(crate) prefill_tokens_waiting: u64,
    /// Share of the page pool in use, 0 to 1.
    pub(crate) kv_usage: f32,
}

/// The cheapest worker, and what it is expected to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) worker: WorkerId,
    /// Prompt tokens it has.
    pub(crate) device_tokens: usize,
    /// Prompt tokens it would load from the store.
    pub(crate) store_tokens: usize,
    /// Prompt tokens it would compute.
    pub(crate) compute_tokens: usize,
}

/// Prices closer than this are the same: the estimate is not better than one token.
const TIE_TOKENS: f64 = 1.0;

/// The cheapest candidate; `turn` picks among equals, so that a counter spreads them. `None` without candidates.
pub(crate) fn choose(prompt: &Prompt, candidates: &[Candidate], prices: &PolicyConfig, turn: u64) -> Option<Choice> {
    let priced: Vec<(f64, Choice)> = candidates
        .iter()
        .map(|candidate| price(prompt, candidate, prices))
        .collect();
    let lowest = priced.iter().map(|(price, _)| *price).min_by(f64::total_cmp)?;
    let equal: Vec<&Choice> = priced
        .iter()
        .filter(|(price, _)| *price < lowest + TIE_TOKENS)
        .map(|(_, choice)| choice)
        .collect();
    let at = usize::try_from(turn % equal.len() as u64).unwrap_or(0);
    equal.get(at).copied().copied()
}

fn price(prompt: &Prompt, candidate: &Candidate, prices: &PolicyConfig) -> (f64, Choice) {
    // The last token is always computed: its logits are what the first new token is drawn from.
    let reusable = prompt.tokens.saturating_sub(1);
    let tokens_of = |blocks: usize| blocks.saturating_mul(prompt.block_tokens).min(reusable);
    let device_tokens = tokens_of(candidate.device_blocks);
    let store_tokens = tokens_of(prompt.store_blocks).saturating_sub(device_tokens);
    let compute_tokens = prompt.tokens - device_tokens - store_tokens;
    let load = &candidate.load;
    // A worker that reports nonsense must not become a bargain.
    let kv_usage = if load.kv_usage.is_finite() {
        f64::from(load.kv_usage.clamp(0.0, 1.0))
    } else {
        1.0
    };
    let price = compute_tokens as f64
        + prices.load_weight * store_tokens as f64
        + prices.prefill_weight * load.prefill_tokens_waiting as f64
        + prices.running_tokens * f64::from(load.running)
        + prices.waiting_tokens * f64::from(load.waiting)
        + prices.kv_usage_tokens * kv_usage;
    let choice = Choice {
        worker: candidate.worker,
        device_tokens,
        store_tokens,
        compute_tokens,
    };
    (price, choice)
}

#[cfg(test)]
mod tests;
