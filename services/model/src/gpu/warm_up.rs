//! What a first step would pay for otherwise: kernels are loaded by their first launch, buffers made for the largest step, steps of
//! sampled rows recorded.

use super::GpuModel;
use crate::{Attention, Draw, Logits, PageId, PagePool, StepError, StepHooks, StepSequence};

/// Sends the step's pages, as a push does.
struct Sending(Vec<PageId>);

impl StepHooks for Sending {
    fn wanted_pages(&self) -> &[PageId] {
        &self.0
    }
}

impl GpuModel {
    /// Runs a prompt of up to `tokens` tokens, with its pages sent to the host, and decodes behind it, into pages that belong to
    /// nobody yet.
    pub(crate) fn warm_up(&mut self, pool: &mut PagePool, tokens: usize) -> Result<(), StepError> {
        let block_tokens = usize::from(self.schema.block_tokens);
        let room = (pool.pages() * block_tokens).min(self.shape.context_tokens_max);
        // The first decode loads its kernels, the second records them, the third replays.
        let decoded = 3;
        let Some(most) = room.checked_sub(decoded).filter(|most| *most > 0) else {
            return Ok(());
        };
        let prompt = vec![0; tokens.clamp(1, most)];
        let pages: Vec<Option<PageId>> = (0..pool.pages() as u32).map(|page| Some(PageId(page))).collect();
        let whole = pages.iter().take(prompt.len() / block_tokens).copied().flatten();
        let mut hooks = Sending(whole.collect());
        let step = |tokens, position| StepSequence {
            tokens,
            position,
            pages: &pages,
            attention: Attention::Full,
            logits: Logits::Drawn(Draw::GREEDY),
        };
        self.step(&[step(&prompt, 0)], pool, &mut hooks)?;
        for nth in 0..decoded {
            self.step(&[step(&[0], prompt.len() + nth)], pool, &mut ())?;
        }
        Ok(())
    }
}
