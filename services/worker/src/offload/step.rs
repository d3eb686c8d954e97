//! The hooks of a step that does nothing but push.

use std::time::Duration;

use kvasir_block::BlockHash;
use kvasir_model::{PageId, PagePool, StepHooks};

use super::{Offer, Offload};

/// Blocks that are offered before a step, and pushed layer by layer while it runs.
#[derive(Debug)]
pub struct PushStep<'a> {
    offload: &'a Offload,
    /// What was accepted, and its pages.
    blocks: Vec<BlockHash>,
    pages: Vec<PageId>,
    dropped: usize,
    waited: Duration,
}

impl<'a> PushStep<'a> {
    pub(crate) fn new(offload: &'a Offload) -> Self {
        Self {
            offload,
            blocks: Vec::new(),
            pages: Vec::new(),
            dropped: 0,
            waited: Duration::ZERO,
        }
    }

    /// Offers a block that lies in `page`; the most wanted come first.
    pub(crate) fn offer(&mut self, hash: BlockHash, page: PageId) -> Offer {
        let offer = self.offload.offer(hash);
        match offer {
            Offer::Accepted => {
                self.blocks.push(hash);
                self.pages.push(page);
            }
            Offer::Needless => {}
            Offer::Dropped => self.dropped += 1,
        }
        offer
    }

    /// Blocks that the queue had no room for.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// How long the step waited for page-locked memory.
    pub fn waited(&self) -> Duration {
        self.waited
    }
}

impl StepHooks for PushStep<'_> {
    fn wanted_pages(&self) -> &[PageId] {
        &self.pages
    }

    fn waited_for_room(&mut self, time: Duration) {
        self.waited += time;
        self.offload.waited(time);
    }

    fn after_layer(&mut self, layer: usize, pool: &PagePool) {
        for (hash, page) in self.blocks.iter().zip(&self.pages) {
            self.offload.push_page(pool, layer, *hash, *page);
        }
    }
}
