//! The device tier: who holds which page, and which whole blocks lie in pages nobody holds.
//!
//! A page is *free*, *private* to one sequence (being written, or never to be shared), or *cached* under a block's hash.
//! Cached pages are shared by any number of sequences; when the last lets go they stay, found by their hash, until a new
//! page is needed. Then the page that was let go longest ago is taken, and of one chain the last block first, so that
//! what remains of a chain is a prefix.
//!
//! Invariants:
//! - a page gets its hash only when every layer of its block is written; it is never written again.
//! - `free + evictable >= promised`: a sequence that was admitted gets every page it was promised, so sequences never
//!   wait for each other's pages. The alternative, preempting by recompute when pages run out, would admit more at a
//!   time and pay with seconds of prefill; the bound of a request is known, so we keep it.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
};

use kvasir_block::BlockHash;
use kvasir_model::PageId;

/// Owners of the pages of a pool. Knows no bytes.
#[derive(Debug)]
pub(crate) struct DeviceTier {
    pages: Vec<Page>,
    free: Vec<PageId>,
    by_hash: HashMap<BlockHash, PageId>,
    /// Cached pages that nobody holds; the first is taken first.
    evictable: BTreeSet<Rank>,
    promised: usize,
    clock: u64,
    changes: Vec<Change>,
}

/// When a page was let go, and how deep in its chain it lies.
type Rank = (u64, Reverse<usize>, PageId);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Free,
    Private,
    Cached {
        hash: BlockHash,
        depth: usize,
        holders: usize,
        let_go: u64,
    },
}

/// A block that came into the tier or left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Stored(BlockHash),
    Removed(BlockHash),
}

/// Pages that are sure to be there when they are needed. Given back with [`DeviceTier::settle`].
#[derive(Debug, Default)]
#[must_use = "promised pages are lost to others until the promise is settled"]
pub(crate) struct Promise(usize);

impl DeviceTier {
    /// All of `pages` free.
    pub(crate) fn new(pages: usize) -> Self {
        let ids = u32::try_from(pages).unwrap_or(u32::MAX);
        Self {
            pages: vec![Page::Free; ids as usize],
            // Taken from the end, so low pages first: a lightly used pool stays in few memory pages.
            free: (0..ids).rev().map(PageId).collect(),
            by_hash: HashMap::new(),
            evictable: BTreeSet::new(),
            promised: 0,
            clock: 0,
            changes: Vec::new(),
        }
    }

    /// Blocks of `chain` held without a gap.
    pub(crate) fn hit(&self, chain: &[BlockHash]) -> usize {
        chain.iter().take_while(|hash| self.by_hash.contains_key(*hash)).count()
    }

    /// Holds the cached pages of `prefix`, all of which must be held by the tier, and promises pages up to `total`.
    /// `None`, and nothing changed, when that many cannot be promised now.
    pub(crate) fn admit(&mut self, prefix: &[BlockHash], total: usize) -> Option<(Vec<PageId>, Promise)> {
        let pages: Vec<PageId> = prefix
            .iter()
            .map(|hash| self.by_hash.get(hash).copied())
            .collect::<Option<_>>()?;
        let unheld = pages.iter().filter(|page| self.is_evictable(**page)).count();
        let new = total.saturating_sub(pages.len());
        if self.available() < new + unheld {
            return None;
        }
        for page in &pages {
            self.hold(*page);
        }
        self.promised += new;
        self.check();
        Some((pages, Promise(new)))
    }

    /// A private page out of a promise; evicts where nothing is free.
    ///
    /// # Panics
    /// When the promise is used up: the caller computed beyond what it was admitted for.
    pub(crate) fn take(&mut self, promise: &mut Promise) -> PageId {
        assert!(promise.0 > 0, "more pages taken than promised");
        promise.0 -= 1;
        self.promised -= 1;
        let page = match self.free.pop() {
            Some(page) => page,
            None => self.evict(),
        };
        self.pages[page.0 as usize] = Page::Private;
        self.check();
        page
    }

    /// Gives the private, completely written `page` the name `hash`; `depth` is the block's index in its chain. When
    /// the block is there already, that page is held instead and `page` is free again: the forward is batch-invariant,
    /// so both have the same bytes.
    pub(crate) fn register(&mut self, page: PageId, hash: BlockHash, depth: usize) -> PageId {
        debug_assert_eq!(
            self.pages[page.0 as usize],
            Page::Private,
            "only a page of one's own is registered"
        );
        if let Some(&shared) = self.by_hash.get(&hash) {
            // Freed first: `shared` may leave the evictable pages, and the promises must stay covered.
            self.free_page(page);
            self.hold(shared);
            self.check();
            return shared;
        }
        self.pages[page.0 as usize] = Page::Cached {
            hash,
            depth,
            holders: 1,
            let_go: 0,
        };
        self.by_hash.insert(hash, page);
        self.changes.push(Change::Stored(hash));
        page
    }

    /// Lets pages go: private ones are free, cached ones stay until their place is needed. Pages let go in one call are
    /// of one age.
    pub(crate) fn release(&mut self, pages: impl IntoIterator<Item = PageId>) {
        self.clock += 1;
        let now = self.clock;
        for page in pages {
            match &mut self.pages[page.0 as usize] {
                Page::Free => debug_assert!(false, "a free page was released"),
                Page::Private => self.free_page(page),
                Page::Cached {
                    depth, holders, let_go, ..
                } => {
                    *holders -= 1;
                    if *holders == 0 {
                        *let_go = now;
                        let rank = (now, Reverse(*depth), page);
                        self.evictable.insert(rank);
                    }
                }
            }
        }
    }

    /// Makes the unheld pages of `chain` as young as the last release: a sequence that held only a part of its chain
    /// used all of it.
    pub(crate) fn touch(&mut self, chain: &[BlockHash]) {
        let now = self.clock;
        for hash in chain {
            let Some(&page) = self.by_hash.get(hash) else { continue };
            if let Page::Cached {
                depth,
                holders: 0,
                let_go,
                ..
            } = &mut self.pages[page.0 as usize]
            {
                self.evictable.remove(&(*let_go, Reverse(*depth), page));
                *let_go = now;
                self.evictable.insert((now, Reverse(*depth), page));
            }
        }
    }

    /// Gives back what is left of a promise.
    pub(crate) fn settle(&mut self, promise: Promise) {
        self.promised -= promise.0;
    }

    /// Pages that could be promised now.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.evictable.len() - self.promised
    }

    /// Pages of the pool.
    pub(crate) fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Blocks that came and went since the last call, in order.
    pub(crate) fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    fn is_evictable(&self, page: PageId) -> bool {
        matches!(self.pages[page.0 as usize], Page::Cached { holders: 0, .. })
    }

    fn hold(&mut self, page: PageId) {
        if let Page::Cached {
            depth, holders, let_go, ..
        } = &mut self.pages[page.0 as usize]
        {
            if *holders == 0 {
                self.evictable.remove(&(*let_go, Reverse(*depth), page));
            }
            *holders += 1;
        }
    }

    fn free_page(&mut self, page: PageId) {
        self.pages[page.0 as usize] = Page::Free;
        self.free.push(page);
    }

    fn evict(&mut self) -> PageId {
        let Some((_, _, page)) = self.evictable.pop_first() else {
            unreachable!("free + evictable >= promised");
        };
        if let Page::Cached { hash, .. } = self.pages[page.0 as usize] {
            self.by_hash.remove(&hash);
            self.changes.push(Change::Removed(hash));
        }
        page
    }

    fn check(&self) {
        debug_assert!(
            self.free.len() + self.evictable.len() >= self.promised,
            "{} free, {} evictable, {} promised",
            self.free.len(),
            self.evictable.len(),
            self.promised
        );
    }
}

#[cfg(test)]
mod tests;
