//! What becomes of the files of segments that were dropped, beside the writer and off the path of readers.
//!
//! One waits as a spare for the next segment: what a reader may still be reading must not be written over, so it is one once no
//! reader has it. The space of others is given back. A file whose name is gone is freed when its last user closes it, all at once:
//! here that is never a reader, and the file is cut in steps, so that nobody's sync waits behind one large transaction of the
//! file system.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_block::planted::point;

use super::{
    Shared,
    table::{SegmentRef, Spare},
};

/// Bytes that are given back in one go.
const STEP_BYTES: u64 = 32 << 20;
/// How long readers that hold the file are waited for: they would find it cut short, which costs them a miss.
const READERS_MAX: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// How long a writer waits for space that is being given back before it makes more.
const REMOVAL_MAX: Duration = Duration::from_secs(10);

/// Until the tier stops and the disk's writer has ended.
pub(super) fn run(shared: &Shared, number: u8) {
    while let Some(at) = next(shared, number) {
        let spare = free(shared, at);
        // Closed without the lock.
        let doomed = {
            let mut state = shared.state.lock();
            state.table.spares.extend(spare.map(|spare| (number, spare)));
            state.table.doomed.remove(&at)
        };
        drop(doomed);
        shared.removal.notify_all();
    }
}

fn next(shared: &Shared, number: u8) -> Option<SegmentRef> {
    let mut state = shared.state.lock();
    loop {
        let first = state.table.doomed.range(SegmentRef::of_disk(number)).next();
        if let Some((&at, _)) = first {
            return Some(at);
        }
        if state.stop && !state.health[usize::from(number)].running {
            return None;
        }
        shared.removal.wait(&mut state);
    }
}

/// Gives back the space of a file, unless it is to be a spare and is free to be one.
fn free(shared: &Shared, at: SegmentRef) -> Option<Spare> {
    let doomed = shared.state.lock().table.doomed.get(&at).cloned()?;
    let since = Instant::now();
    // One is the table's, one is ours.
    while Arc::strong_count(&doomed.file) > 2 && since.elapsed() < READERS_MAX {
        std::thread::sleep(LOOK_AGAIN);
    }
    if let Some(path) = doomed.spare {
        if Arc::strong_count(&doomed.file) <= 2 {
            return Some(Spare {
                path,
                bytes: doomed.bytes,
            });
        }
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!(file = %path.display(), %error, "cannot remove a dropped segment");
        }
    }
    let io = &shared.volumes[usize::from(at.disk())].io;
    let mut left = doomed.bytes;
    while left > 0 {
        left = left.saturating_sub(STEP_BYTES);
        if let Err(error) = io.truncate(&doomed.file, left) {
            tracing::warn!(segment = at.id(), %error, "cannot cut a dropped segment, closing it as it is");
            return None;
        }
        if let Some(doomed) = shared.state.lock().table.doomed.get_mut(&at) {
            doomed.bytes = left;
        }
        point("reclaim: file cut");
        shared.removal.notify_all();
    }
    None
}

impl Shared {
    /// Waits until a disk has given back something; false if it has nothing to give, or takes too long.
    pub(super) fn wait_for_removal(&self, number: u8) -> bool {
        let mut state = self.state.lock();
        let before = state.table.doomed_bytes(number);
        let until = Instant::now() + REMOVAL_MAX;
        while before > 0 && state.table.doomed_bytes(number) == before {
            if self.removal.wait_until(&mut state, until).timed_out() {
                return false;
            }
        }
        before > 0
    }
}
