//! Retrieve path: decoding over a context that lies at the store.
//!
//! The *context* is the prompt's whole blocks. The worker keeps the pages of the static set (first `sink` and last
//! `window` tokens of the context) and of everything behind the context, and lets the rest go. In each layer of each
//! step it sends the query of the one new token and merges what comes back.
//!
//! The context does not grow with the generation. The KV of a token that was computed with retrieval attention is not
//! the KV that full attention computes, so its blocks must never get the name of their tokens: they are neither cached
//! nor pushed, and stay local until the sequence ends.

mod auto;
mod hints;
mod link;
mod open;
mod row_cache;
mod rows;
mod samples;
mod tally;
mod wire;

use std::ops::Range;

use crate::request::Attention;

pub(crate) use auto::{Experience, ReplyShape};
pub use hints::Hints;
pub(crate) use link::{Link, LinkAround, LinkPlan, LinkShape};
pub(crate) use open::{OpenStream, Opening, open};
pub(crate) use row_cache::rows_within;
pub(crate) use samples::{QuerySamples, Wish, ask_for_index};
pub(crate) use tally::Tally;
pub(crate) use wire::{BulkWire, StoreWire, Wire};

/// Which positions are whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Split {
    /// Tokens of the context: the prompt's whole blocks.
    pub(crate) context: usize,
    /// First tokens kept.
    pub(crate) sink: usize,
    /// Last tokens of the context kept.
    pub(crate) window: usize,
    block_tokens: usize,
}

impl Split {
    /// How a prompt is split; `None` when the static set leaves less than a block to retrieve from.
    pub(crate) fn new(prompt_tokens: usize, block_tokens: usize, attention: &Attention) -> Option<Self> {
        let context = prompt_tokens / block_tokens * block_tokens;
        let kept = attention.sink.saturating_add(attention.window);
        (kept.saturating_add(block_tokens) <= context).then_some(Self {
            context,
            sink: attention.sink,
            window: attention.window,
            block_tokens,
        })
    }

    /// What a query at `position` attends to locally.
    pub(crate) fn local(&self, position: usize) -> Vec<Range<usize>> {
        let ranges = [0..self.sink, self.context - self.window..position + 1];
        ranges.into_iter().filter(|range| !range.is_empty()).collect()
    }

    /// What the store must leave out: the local positions inside the context.
    pub(crate) fn excluded(&self) -> Vec<Range<u32>> {
        let ranges = [0..self.sink, self.context - self.window..self.context];
        ranges
            .into_iter()
            .filter(|range| !range.is_empty())
            .map(|range| range.start as u32..range.end as u32)
            .collect()
    }

    /// Blocks none of whose tokens are local.
    pub(crate) fn remote_blocks(&self) -> Range<usize> {
        let first = self.sink.div_ceil(self.block_tokens);
        let end = (self.context - self.window) / self.block_tokens;
        first..end.max(first)
    }

    /// Blocks of the context.
    pub(crate) fn context_blocks(&self) -> usize {
        self.context / self.block_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AttentionMode;

    fn split(prompt: usize, sink: usize, window: usize) -> Option<Split> {
        let attention = Attention {
            mode: AttentionMode::Attend,
            target_mass: 1.0,
            sink,
            window,
            ..Attention::default()
        };
        Split::new(prompt, 16, &attention)
    }

    #[test]
    fn ranges_tile_the_positions() {
        // (prompt, sink, window) -> local at the first new position, excluded, remote blocks
        let table = [
            ((100, 16, 32), "0..16 64..101", "0..16 64..96", 1..4),
            ((96, 20, 30), "0..20 66..97", "0..20 66..96", 2..4),
            ((96, 0, 16), "80..97", "80..96", 0..5),
            ((97, 16, 0), "0..16 96..98", "0..16", 1..6),
            ((111, 0, 0), "96..112", "", 0..6),
        ];
        for ((prompt, sink, window), local, excluded, remote) in table {
            let split = split(prompt, sink, window).expect("something to retrieve");
            let text = |ranges: Vec<Range<usize>>| {
                ranges
                    .iter()
                    .map(|range| format!("{range:?}"))
                    .collect::<Vec<_>>()
                    .join(" ")
            };
            assert_eq!(text(split.local(prompt)), local);
            let left_out = split
                .excluded()
                .into_iter()
                .map(|range| range.start as usize..range.end as usize);
            assert_eq!(text(left_out.collect()), excluded);
            assert_eq!(split.remote_blocks(), remote);
            // Every position is local, or in the context and not excluded.
            for position in 0..=prompt {
                let is_local = split.local(prompt).iter().any(|range| range.contains(&position));
                let is_excluded = split.excluded().iter().any(|range| range.contains(&(position as u32)));
                let is_remote = position < split.context && !is_excluded;
                assert!(is_local != is_remote, "position {position} of {prompt}");
                // A page that is let go holds no local position.
                assert!(!(is_local && remote.contains(&(position / 16))), "position {position}");
            }
        }
    }

    #[test]
    fn a_short_prompt_has_nothing_to_retrieve() {
        assert_eq!(split(63, 16, 32), None, "three whole blocks, all of them static");
        assert!(split(64, 16, 32).is_some());
        assert_eq!(split(1000, usize::MAX, 32), None, "sizes beyond all bounds do not wrap");
    }
}
