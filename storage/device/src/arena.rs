//! [`Arena`]: a fixed amount of shared memory, given out in runs of pages.
//!
//! The memory is an anonymous file (memfd), so that a co-located process can map it and read what lies in it; it is sealed so
//! that its size cannot change and nobody else can write. All bookkeeping is outside it: what a reader sees are payloads, and
//! it can break nothing.
//!
//! Runs, not slabs of one size each. Payloads of a store have few sizes, but they change with the models it serves, and a slab
//! belongs to a size until its last slot is free: with one old payload in each, none is. Runs of pages join with free
//! neighbours at once, whatever their size was; a payload wastes less than a page and nothing else. What cannot be had
//! otherwise is made: [`Arena::fence`] names the payloads that stand in the way of a long run, and their owner moves them
//! ([`Held`] has the only reference). So all memory but what is shared at the moment can become any run.
//!
//! A reserved buffer holds what was there before, perhaps another tenant's bytes. It is not cleared (that would cost as
//! much as filling it): whoever reserves writes all that it then shares, and freezes no more than it wrote.

mod memory;
mod ready;
mod runs;
mod slot;
mod view;

use std::{
    fmt, io,
    ops::Range,
    os::fd::BorrowedFd,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use parking_lot::Mutex;

pub(crate) use self::slot::Slot;
use self::{memory::Memory, ready::HighWater, runs::Runs};
pub use self::{
    memory::PageKind,
    ready::Ready,
    slot::Held,
    view::{ArenaView, ViewError},
};
use crate::{Buffer, PAGE_BYTES};

/// How large an arena is, and of what.
#[derive(Clone, Copy, Debug)]
pub struct ArenaConfig {
    /// Bytes, down to whole pages; memory is taken from the system as it is first written. At most 8 TiB.
    pub bytes: u64,
    /// Whether to ask for pages of 2 MiB.
    pub huge_pages: HugePages,
}

/// Whether to ask for large pages, which make a scan of payloads miss the TLB less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Reserved ones if there are enough, else transparent ones if the system gives them to shared memory, else none. Turn the signal
    /// `PageKind` into more by `vm.nr_hugepages` or `transparent_hugepage/shmem_enabled = advise`.
    #[default]
    Auto,
    /// Pages of 4 KiB.
    Off,
}

/// The system gave no memory of the kind that an arena needs.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} for an arena of {bytes} bytes: {source}")]
pub struct ArenaError {
    what: &'static str,
    bytes: u64,
    source: io::Error,
}

/// A fixed amount of shared memory. Clones are the same arena; its memory lives until the last buffer of it is gone.
#[derive(Clone)]
pub struct Arena {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    memory: Memory,
    pages: u32,
    high_water: HighWater,
    state: Mutex<State>,
}

struct State {
    runs: Runs,
    /// By first page: what was shared and is still there.
    shared: Box<[Option<Weak<Slot>>]>,
}

impl Arena {
    /// # Errors
    /// [`ArenaError`] when the system refuses; having no huge pages is none.
    pub fn new(config: ArenaConfig) -> Result<Self, ArenaError> {
        let page = PAGE_BYTES as u64;
        let pages = config.bytes / page;
        if pages >= 1 << 31 {
            return Err(ArenaError {
                what: "count the pages",
                bytes: config.bytes,
                source: io::Error::new(io::ErrorKind::InvalidInput, "it must be less than 8 TiB"),
            });
        }
        // A file of no bytes cannot be mapped: an arena of none has a page that is never given out.
        let memory = Memory::new(pages.max(1) * page, config.huge_pages)?;
        let pages = pages.min(memory.len() / page) as u32;
        let state = State {
            runs: Runs::new(pages),
            shared: vec![None; pages as usize].into(),
        };
        Ok(Self {
            inner: Arc::new(Inner {
                memory,
                pages,
                high_water: HighWater::default(),
                state: Mutex::new(state),
            }),
        })
    }

    /// Memory for `bytes`, or `None` when no run of free pages is long enough. Its content is not said; see the module.
    pub fn try_reserve(&self, bytes: usize) -> Option<Buffer> {
        let pages = pages_of(bytes)?;
        let start = self.inner.state.lock().runs.take(pages)?;
        Some(self.buffer(start, pages, bytes))
    }

    /// Keeps the next `ahead` bytes that were never used ready to be filled, by a thread of its own, until what is given
    /// back is dropped: else who fills a page first waits until the system has made it. To be called once.
    pub fn keep_ready(&self, ahead: u64) -> Ready {
        Ready::start(self, ahead)
    }

    /// What a payload of `bytes` costs: whole pages, at least one.
    pub fn footprint(bytes: usize) -> u64 {
        (bytes.max(1) as u64).next_multiple_of(PAGE_BYTES as u64)
    }

    /// Bytes in buffers and in what was made of them.
    pub fn used(&self) -> u64 {
        u64::from(self.inner.state.lock().runs.used()) * PAGE_BYTES as u64
    }

    /// Bytes in all.
    pub fn capacity(&self) -> u64 {
        u64::from(self.inner.state.lock().runs.pages()) * PAGE_BYTES as u64
    }

    /// What its memory is made of.
    pub fn page_kind(&self) -> PageKind {
        self.inner.memory.pages()
    }

    /// The offset of bytes that lie in this arena; what another process asks its [`ArenaView`] for. `None` for bytes elsewhere.
    pub fn locate(&self, bytes: &Bytes) -> Option<Range<u64>> {
        let start = self.inner.memory.offset_of(bytes)? as u64;
        Some(start..start + bytes.len() as u64)
    }

    /// The file, to send to a process that may read everything in it. Sealed: it keeps its size, and new mappings cannot write.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.inner.memory.file()
    }

    /// Bytes of the file: what [`ArenaView::map`] is to be told.
    pub fn file_bytes(&self) -> u64 {
        self.inner.memory.len()
    }

    /// Takes a hold of bytes that were made of this arena's memory; `None` for bytes elsewhere.
    pub fn hold(&self, bytes: &Bytes) -> Option<Held> {
        let offset = self.inner.memory.offset_of(bytes)?;
        let slot = self.inner.slot_at(offset)?;
        let start = offset - slot.offset();
        Some(Held::new(slot, start..start + bytes.len()))
    }

    /// Looks for a place where a run for `bytes` could be had by moving payloads that nobody shares, and keeps what is free there
    /// from being reserved otherwise. One at a time; `None` if a bounded search finds no such place.
    pub fn fence(&self, bytes: usize) -> Option<Fence<'_>> {
        let pages = pages_of(bytes)?;
        let mut state = self.inner.state.lock();
        let State { runs, shared } = &mut *state;
        if runs.is_fenced_off() {
            return None;
        }
        let movable = |start: u32| {
            let slot = shared[start as usize].as_ref();
            slot.is_some_and(|slot| slot.strong_count() == 1)
        };
        let in_the_way = runs.raise_fence(pages, movable)?;
        drop(state);
        let page = PAGE_BYTES as u64;
        Some(Fence {
            arena: self,
            bytes,
            in_the_way: in_the_way.iter().map(|run| u64::from(run.start) * page).collect(),
            up: true,
        })
    }

    fn buffer(&self, start: u32, pages: u32, bytes: usize) -> Buffer {
        self.inner.high_water.note(start + pages);
        Buffer::in_arena(Slot::new(Arc::clone(&self.inner), start, pages), bytes)
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({} of {} bytes)", self.used(), self.capacity())
    }
}

impl Inner {
    fn register(&self, start: u32, slot: &Arc<Slot>) {
        self.state.lock().shared[start as usize] = Some(Arc::downgrade(slot));
    }

    fn give(&self, start: u32) {
        let mut state = self.state.lock();
        state.runs.give(start);
        let name = state.shared[start as usize].take();
        // Its memory is given back without the lock.
        drop(state);
        drop(name);
    }

    /// The shared slot that covers a byte.
    fn slot_at(&self, offset: usize) -> Option<Arc<Slot>> {
        let page = u32::try_from(offset / PAGE_BYTES).ok()?;
        let state = self.state.lock();
        let start = state.runs.covering(page)?;
        state.shared[start as usize].as_ref()?.upgrade()
    }
}

/// A stretch of the arena that is being cleared; see [`Arena::fence`]. Dropping it gives up.
#[derive(Debug)]
pub struct Fence<'a> {
    arena: &'a Arena,
    bytes: usize,
    in_the_way: Vec<u64>,
    up: bool,
}

impl Fence<'_> {
    /// Offsets ([`Held::offset`]) of the payloads that are to be moved elsewhere.
    pub fn in_the_way(&self) -> &[u64] {
        &self.in_the_way
    }

    /// The run, if all that was in its way is gone.
    pub fn reserve(mut self) -> Option<Buffer> {
        self.up = false;
        let pages = pages_of(self.bytes)?;
        let start = self.arena.inner.state.lock().runs.take_fenced(pages)?;
        Some(self.arena.buffer(start, pages, self.bytes))
    }
}

impl Drop for Fence<'_> {
    fn drop(&mut self) {
        if self.up {
            self.arena.inner.state.lock().runs.lower_fence();
        }
    }
}

fn pages_of(bytes: usize) -> Option<u32> {
    u32::try_from(bytes.max(1).div_ceil(PAGE_BYTES)).ok()
}

#[cfg(test)]
mod tests;
