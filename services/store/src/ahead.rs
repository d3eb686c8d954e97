//! Searches that begin with a hint, before their query is there.
//!
//! They live on what is left over: a thread with nothing to do, while no query waits for one, and memory under a bound over all
//! streams. A hint that finds none of it is dropped, and its query is searched for as any other. A stream has one at a time; dropping
//! it ends it. A stream that has a thread of its own searches on that, in the place of an idle one.
//!
//! No query waits for what will not serve it: where a forecast turns out too far off, its search is dropped at once. And none waits long
//! for what will: a search ahead ends by itself at [`ahead_max`], and on a stream's own thread with the KV head during which the query
//! came; the others are searched for with the query.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvasir_cache::{
    BlockCache,
    retrieve::{Context, Form, ParkedSearch},
};
use tokio::sync::oneshot;

use crate::{
    door::Door,
    metrics,
    searches::{Asked, HELP_KEYS},
};

/// What queries of a stream ask for, beside their layer and their values.
#[derive(Clone, Debug)]
pub(crate) struct Asking {
    pub(crate) form: Form,
    pub(crate) excluded: Vec<Range<u32>>,
    /// How long the last one's search took in all, once it is known.
    pub(crate) took: Option<Duration>,
}

/// About what the queries of a layer will be.
#[derive(Debug)]
pub(crate) struct Forecast {
    pub(crate) layer: u16,
    pub(crate) q: Vec<f32>,
    pub(crate) local_lse: Vec<f32>,
    /// As the stream's last query; `None` where there was none.
    pub(crate) asking: Option<Asking>,
}

/// A search that was begun with a hint, under way or done.
#[derive(Debug)]
pub(crate) struct Ahead {
    layer: u16,
    q: Vec<f32>,
    dropped: Arc<AtomicBool>,
    state: State,
}

#[derive(Debug)]
enum State {
    UnderWay(oneshot::Receiver<Parked>),
    Done(Parked),
}

/// What is left of one that is done.
#[derive(Debug)]
pub(crate) struct Parked {
    pub(crate) search: ParkedSearch,
    begun: Instant,
    done: Instant,
    /// Until when the query was not there, as far as is known.
    unasked: Instant,
    _room: Room,
}

/// Bytes that parked searches hold, under a limit.
#[derive(Debug)]
pub(crate) struct Rooms {
    bytes: AtomicU64,
    bytes_max: u64,
}

/// Bytes of them, given back on drop.
#[derive(Debug)]
struct Room {
    rooms: Arc<Rooms>,
    bytes: u64,
}

impl Ahead {
    /// Begins it on an idle thread; `None` where there is none.
    pub(crate) fn begin(
        door: &Door,
        rooms: &Arc<Rooms>,
        cache: Arc<BlockCache>,
        context: Arc<Context>,
        expected: Asked,
    ) -> Option<Self> {
        let (sender, parked) = oneshot::channel();
        let (layer, q, dropped) = (expected.layer, expected.q.clone(), Arc::new(AtomicBool::new(false)));
        let (helpers, rooms, is_dropped) = (door.clone(), Arc::clone(rooms), Arc::clone(&dropped));
        let started = door.start_if_idle(move || {
            if let Some(parked) = search(&helpers, &rooms, &cache, &context, &expected, &is_dropped, &|| false) {
                // Whose stream has ended does not want it.
                let _ = sender.send(parked);
            }
        });
        let state = State::UnderWay(parked);
        started.then_some(Self {
            layer,
            q,
            dropped,
            state,
        })
    }

    /// Does it on this thread, which has a place among those of `door`. `is_asked` says whether the query is there meanwhile.
    pub(crate) fn here(
        door: &Door,
        rooms: &Arc<Rooms>,
        cache: &BlockCache,
        context: &Context,
        expected: Asked,
        is_asked: &dyn Fn() -> bool,
    ) -> Option<Self> {
        let dropped = Arc::new(AtomicBool::new(false));
        let parked = search(door, rooms, cache, context, &expected, &dropped, is_asked)?;
        Some(Self {
            layer: expected.layer,
            q: expected.q,
            dropped,
            state: State::Done(parked),
        })
    }

    /// What it leaves for a query, waiting for it until the query's deadline; `None` where that is nothing for it.
    pub(crate) async fn parked_for(mut self, context: &Context, asked: &Asked) -> Option<Parked> {
        if self.layer != asked.layer {
            metrics::parked("other");
            return None;
        }
        if !context.is_near(&self.q, &asked.q) {
            metrics::parked("too_far");
            return None;
        }
        // What is done is kept to its end by `self`, whose drop ends what is not.
        let state = std::mem::replace(&mut self.state, State::UnderWay(oneshot::channel().1));
        let parked = match (state, asked.deadline) {
            (State::Done(parked), _) => parked,
            (State::UnderWay(parked), Some(deadline)) => {
                tokio::time::timeout_at(deadline.into(), parked).await.ok()?.ok()?
            }
            (State::UnderWay(parked), None) => parked.await.ok()?,
        };
        let is_for = parked.search.is_for(context, &asked.query());
        metrics::parked(if is_for { "taken" } else { "other" });
        is_for.then_some(parked)
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::Relaxed);
    }
}

impl Parked {
    /// Time of its search.
    pub(crate) fn search_time(&self) -> Duration {
        self.done - self.begun
    }

    /// How much of that had passed at `arrived`.
    pub(crate) fn hidden(&self, arrived: Instant) -> Duration {
        let unasked = self.done.min(arrived).min(self.unasked);
        unasked.saturating_duration_since(self.begun)
    }
}

impl Rooms {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self {
            bytes: AtomicU64::new(0),
            bytes_max,
        }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Room {
    fn take(rooms: &Arc<Rooms>, bytes: usize) -> Option<Self> {
        let bytes = bytes as u64;
        let within = |now: u64| now.checked_add(bytes).filter(|sum| *sum <= rooms.bytes_max);
        let taken = (rooms.bytes).fetch_update(Ordering::Relaxed, Ordering::Relaxed, within);
        taken.is_ok().then(|| Self {
            rooms: Arc::clone(rooms),
            bytes,
        })
    }

    fn give_back_all_but(&mut self, bytes: usize) {
        let over = self.bytes.saturating_sub(bytes as u64);
        self.rooms.bytes.fetch_sub(over, Ordering::Relaxed);
        self.bytes -= over;
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.rooms.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// How long a search ahead may take before it is given up, where a stream's last search took `last`, all in all: as long as a fresh one
/// and then some, so that a query that comes in the middle of it loses little by it.
pub(crate) fn ahead_max(last: Option<Duration>) -> Duration {
    /// Where nothing is known: blocks may have to be read.
    const FIRST: Duration = Duration::from_millis(100);
    const LEAST: Duration = Duration::from_millis(2);
    last.map_or(FIRST, |last| (2 * last).max(LEAST))
}

/// Searches ahead, with idle threads where it is large.
fn search(
    door: &Door,
    rooms: &Arc<Rooms>,
    cache: &BlockCache,
    context: &Context,
    expected: &Asked,
    dropped: &Arc<AtomicBool>,
    is_asked: &dyn Fn() -> bool,
) -> Option<Parked> {
    let begun = Instant::now();
    // It was checked; where a forecast gains nothing, the blocks are in memory at least.
    let ahead = cache.search_ahead(context, &expected.query(), dropped).ok().flatten()?;
    let Some(mut room) = Room::take(rooms, ahead.bytes_max()) else {
        metrics::hint("no_room");
        return None;
    };
    let ahead = Arc::new(ahead);
    if context.tokens() * ahead.parts() >= HELP_KEYS {
        let help = Arc::clone(&ahead);
        door.start_on_idle(ahead.parts().saturating_sub(1), move || help.work());
    }
    let (mut unasked, mut asked) = (begun, false);
    let mut look = || {
        asked = asked || is_asked();
        if asked {
            // For what is left the query itself is quicker: it need not be scored twice.
            dropped.store(true, Ordering::Relaxed);
        } else {
            unasked = Instant::now();
        }
    };
    ahead.work_and(&mut look);
    let search = ahead.wait()?;
    look();
    room.give_back_all_but(search.bytes());
    Some(Parked {
        search,
        begun,
        done: Instant::now(),
        unasked,
        _room: room,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_ahead_may_take_as_long_as_a_fresh_one_and_then_some() {
        let us = Duration::from_micros;
        let table = [
            (None, us(100_000)),
            (Some(us(0)), us(2_000)),
            (Some(us(400)), us(2_000)),
            (Some(us(5_000)), us(10_000)),
            (Some(us(200_000)), us(400_000)),
        ];
        for (last, expected) in table {
            assert_eq!(ahead_max(last), expected, "{last:?}");
        }
    }
}
