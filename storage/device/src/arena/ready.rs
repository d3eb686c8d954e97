//! [`Ready`]: a thread that touches an arena's memory before it is needed.
//!
//! When a page is touched for the first time the system finds one and clears it. That takes several times as long as filling it
//! (0.6 against 0.05 processor seconds per GB, measured with pages of 4 KiB on a virtual AMD EPYC), and whoever fills it waits. Here it
//! is done ahead; who comes first all the same touches it himself.
//!
//! While pages are made the process can map nothing, so steps are small and the thread has the priority of any other: with a low one it
//! was seen to be put aside for seconds in the middle of a step, and everything that maps memory with it.

use std::{
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle, Thread},
};

use super::{Arena, Inner};
use crate::PAGE_BYTES;

/// Pages touched at a time: 256 KiB.
const STEP_PAGES: u32 = 64;

/// Up to where an arena was ever used, and who wants to know.
#[derive(Debug, Default)]
pub(super) struct HighWater {
    /// The first page that was never reserved; no page above it was.
    pages: AtomicU32,
    /// The thread is woken when `pages` gets there.
    wake_at: AtomicU32,
    thread: OnceLock<Thread>,
}

impl HighWater {
    /// Notes that pages up to `end` were reserved.
    pub(super) fn note(&self, end: u32) {
        let before = self.pages.fetch_max(end, Ordering::SeqCst);
        if end > before
            && end >= self.wake_at.load(Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }
}

/// Keeps memory of an arena ready; dropping it ends the thread.
#[derive(Debug)]
pub struct Ready {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ready {
    /// Starts the thread: the next `ahead` bytes that were never used are to be ready at any time. One for an arena; where the system
    /// has no thread left, or does not know how, nothing is done ahead.
    pub(super) fn start(arena: &Arena, ahead: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ahead = u32::try_from(ahead / PAGE_BYTES as u64).unwrap_or(u32::MAX);
        let spawned = thread::Builder::new().name("arena-ready".to_owned()).spawn({
            let (inner, stop) = (Arc::downgrade(&arena.inner), Arc::clone(&stop));
            move || keep(&inner, ahead, &stop)
        });
        Self {
            stop,
            thread: spawned.ok(),
        }
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It does not panic; if it did, memory would merely not be ready.
            let _ = thread.join();
        }
    }
}

/// Touches page after page until all are ready, the arena is gone, or it is told to stop.
fn keep(inner: &Weak<Inner>, ahead: u32, stop: &AtomicBool) {
    if let Some(inner) = inner.upgrade() {
        // The first one is woken; there is to be one.
        let _ = inner.high_water.thread.set(thread::current());
    }
    let mut ready = 0;
    while !stop.load(Ordering::SeqCst) {
        let Some(inner) = inner.upgrade() else { return };
        let (mark, pages) = (&inner.high_water, inner.pages);
        let high = mark.pages.load(Ordering::SeqCst);
        let target = high.saturating_add(ahead).min(pages);
        // What was reserved is touched by who fills it.
        let from = u32::max(ready, high);
        if from < target {
            let to = target.min(from + STEP_PAGES);
            if inner
                .memory
                .touch(from as usize * PAGE_BYTES..to as usize * PAGE_BYTES)
                .is_err()
            {
                return;
            }
            ready = to;
            continue;
        }
        if target == pages {
            return;
        }
        // When a quarter of what is ready has been used.
        let wake_at = high + (ahead / 4).max(1);
        mark.wake_at.store(wake_at, Ordering::SeqCst);
        if mark.pages.load(Ordering::SeqCst) < wake_at {
            // Not holding the arena meanwhile.
            drop(inner);
            thread::park();
        }
    }
}
