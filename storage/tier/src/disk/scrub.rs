//! The scrub: reads what lies on the disks, oldest first, at a bounded rate, and drops what has gone wrong before someone
//! asks for it. It begins anew when it has seen everything, and stands aside while callers read. How far it has come is kept in the
//! index, segment by segment: a store that is restarted more often than a round takes still sees everything.

use std::{
    collections::BTreeMap,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use super::{Shared, format::SegmentId, read::RecordOutcome, table::SegmentRef};

/// Between looks whether callers still read, and between rounds over everything.
const STAND_ASIDE: Duration = Duration::from_millis(5);
const BETWEEN_ROUNDS: Duration = Duration::from_secs(60);
/// However busy the callers are, a record is verified this often.
const PATIENCE: Duration = Duration::from_secs(1);

/// Until the tier stops.
pub(super) fn run(shared: &Shared) {
    // The newest segment that was seen whole, of each disk: a round goes on behind it.
    let mut seen: BTreeMap<u8, SegmentRef> = shared
        .volumes
        .iter()
        .filter_map(|volume| Some((volume.number, SegmentRef::new(volume.number, volume.scrubbed_to)?)))
        .collect();
    loop {
        let next = {
            let state = shared.state.lock();
            let segments = state.table.segments.keys().copied();
            let mut unseen = segments.filter(|at| seen.get(&at.disk()).is_none_or(|last| at > last));
            unseen.next()
        };
        match next {
            Some(at) => {
                if !scrub(shared, at) {
                    return;
                }
                seen.insert(at.disk(), at);
                note(shared, at.disk(), at.id());
            }
            None => {
                if !sleep(shared, BETWEEN_ROUNDS) {
                    return;
                }
                seen.clear();
                shared.volumes.iter().for_each(|volume| note(shared, volume.number, 0));
            }
        }
    }
}

/// Remembers for the next life how far this one has come.
fn note(shared: &Shared, disk: u8, to: SegmentId) {
    let volume = &shared.volumes[usize::from(disk)];
    if let Err(error) = volume.index.scrubbed(to) {
        tracing::warn!(dir = %volume.dir.display(), %error, "the scrub will verify the same again after a restart");
    }
}

/// Verifies what lies in one segment; false when it is time to go.
fn scrub(shared: &Shared, at: SegmentRef) -> bool {
    let records = shared.state.lock().table.records_of(at);
    let rate = shared.config.scrub_bytes_per_second.max(1);
    for (key, location) in records {
        let asked = Instant::now();
        while shared.reading.load(Ordering::Relaxed) > 0 && asked.elapsed() < PATIENCE {
            if !sleep(shared, STAND_ASIDE) {
                return false;
            }
        }
        let reads = shared.read_records(&[(key, location)], &mut |_| None, None);
        for read in reads.into_iter().flatten() {
            let right = matches!(read.outcome, RecordOutcome::Right(_) | RecordOutcome::TooLate);
            if !right {
                shared.drop_wrong(&read);
            }
            let mut state = shared.state.lock();
            state.counts.scrubbed_bytes += location.record_bytes();
            state.counts.scrub_corrupt += u64::from(!right);
        }
        let nanos = u128::from(location.record_bytes()) * 1_000_000_000 / u128::from(rate);
        if !sleep(shared, Duration::from_nanos(nanos.min(u128::from(u64::MAX)) as u64)) {
            return false;
        }
    }
    true
}

/// False when it is time to go.
fn sleep(shared: &Shared, time: Duration) -> bool {
    let until = Instant::now() + time;
    let mut state = shared.state.lock();
    while !state.stop {
        if shared.scrub.wait_until(&mut state, until).timed_out() {
            return !state.stop;
        }
    }
    false
}
