//! A run of the arena's pages and its two lives: one owner that writes, then many that read.

use std::{fmt, ops::Range, sync::Arc};

use bytes::Bytes;

use super::Inner;
use crate::PAGE_BYTES;

/// A run of pages that is taken; given back on drop, from any thread.
pub(crate) struct Slot {
    arena: Arc<Inner>,
    start: u32,
    pages: u32,
}

impl Slot {
    /// The run must be taken in `arena`, and no other slot name it.
    pub(super) fn new(arena: Arc<Inner>, start: u32, pages: u32) -> Self {
        Self { arena, start, pages }
    }

    /// Where it begins in the arena.
    pub(super) fn offset(&self) -> usize {
        self.start as usize * PAGE_BYTES
    }

    pub(crate) fn len(&self) -> usize {
        self.pages as usize * PAGE_BYTES
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the run is inside the mapping and nobody else's until `self` is dropped; who writes has `&mut self`.
        unsafe { self.arena.memory.slice(self.offset(), self.len()) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`; the arena's mapping is writable, and `&mut self` makes the access exclusive.
        unsafe { self.arena.memory.slice_mut(self.offset(), self.len()) }
    }

    /// Shares a part of it; nobody writes to it any more. From now on [`super::Arena::hold`] finds it.
    pub(crate) fn share(self, part: Range<usize>) -> Held {
        assert!(
            part.start <= part.end && part.end <= self.len(),
            "{part:?} is not within {}",
            self.len()
        );
        let slot = Arc::new(self);
        slot.arena.register(slot.start, &slot);
        Held { slot, part }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.arena.give(self.start);
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({}..+{})", self.offset(), self.len())
    }
}

/// Bytes in an arena, with knowledge of who else reads them: what a tier keeps. The pages come back when it and all
/// [`Bytes`] made of it are gone.
#[derive(Debug)]
pub struct Held {
    slot: Arc<Slot>,
    part: Range<usize>,
}

impl Held {
    pub(super) fn new(slot: Arc<Slot>, part: Range<usize>) -> Self {
        debug_assert!(part.end <= slot.len());
        Self { slot, part }
    }

    /// The bytes, shared, for whoever wants to keep them for a while.
    pub fn bytes(&self) -> Bytes {
        Bytes::from_owner(Reader {
            slot: Arc::clone(&self.slot),
            part: self.part.clone(),
        })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.slot.as_slice()[self.part.clone()]
    }

    /// How many bytes.
    pub fn len(&self) -> usize {
        self.part.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.part.is_empty()
    }

    /// Bytes of the arena that come back with it: whole pages.
    pub fn footprint(&self) -> u64 {
        self.slot.len() as u64
    }

    /// Where its pages begin in the arena's file.
    pub fn offset(&self) -> u64 {
        self.slot.offset() as u64
    }

    /// Whether others hold the same pages, so that dropping it would give nothing back now. Others may let go at any time; they can
    /// only come by [`Self::bytes`], or from those who have them.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.slot) > 1
    }
}

/// What keeps the pages of some `Bytes`.
struct Reader {
    slot: Arc<Slot>,
    part: Range<usize>,
}

impl AsRef<[u8]> for Reader {
    fn as_ref(&self) -> &[u8] {
        &self.slot.as_slice()[self.part.clone()]
    }
}
