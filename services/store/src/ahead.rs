//! Searches that begin with a hint, before their query is there.
//!
//! They live on what is left over: a thread with nothing to do, while no query waits for one, and memory under a bound over all
//! streams. A hint that finds none of it is dropped, and its query is searched for as any other. A stream has one at a time; dropping
//! it ends it.

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
    retrieve::{Context, Form, ParkedSearch, SearchAhead},
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
    dropped: Arc<AtomicBool>,
    parked: oneshot::Receiver<Parked>,
}

/// What is left of one that is done.
#[derive(Debug)]
pub(crate) struct Parked {
    pub(crate) search: ParkedSearch,
    begun: Instant,
    done: Instant,
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
        let (layer, dropped) = (expected.layer, Arc::new(AtomicBool::new(false)));
        let (helpers, rooms, is_dropped) = (door.clone(), Arc::clone(rooms), Arc::clone(&dropped));
        let started = door.start_if_idle(move || {
            let begun = Instant::now();
            let ahead = cache.search_ahead(&context, &expected.query(), &is_dropped);
            // It was checked; where a forecast gains nothing, the blocks are in memory at least.
            let Ok(Some(ahead)) = ahead else { return };
            let Some(mut room) = Room::take(&rooms, ahead.bytes_max()) else {
                return metrics::hint("no_room");
            };
            if let Some(search) = search(&helpers, &context, ahead) {
                room.give_back_all_but(search.bytes());
                let done = Instant::now();
                // Whose stream has ended does not want it.
                let _ = sender.send(Parked {
                    search,
                    begun,
                    done,
                    _room: room,
                });
            }
        });
        started.then_some(Self { layer, dropped, parked })
    }

    /// What it leaves for a query, waiting for it until the query's deadline; `None` where that is nothing for it.
    pub(crate) async fn parked_for(mut self, context: &Context, asked: &Asked) -> Option<Parked> {
        if self.layer != asked.layer {
            metrics::parked("other");
            return None;
        }
        let parked = match asked.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), &mut self.parked).await.ok()?,
            None => (&mut self.parked).await,
        };
        let parked = parked.ok()?;
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
        self.done.min(arrived).saturating_duration_since(self.begun)
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

/// Works on it, with idle threads where it is large.
fn search(door: &Door, context: &Context, ahead: SearchAhead) -> Option<ParkedSearch> {
    let ahead = Arc::new(ahead);
    if context.tokens() * ahead.parts() >= HELP_KEYS {
        let help = Arc::clone(&ahead);
        door.start_on_idle(ahead.parts().saturating_sub(1), move || help.work());
    }
    ahead.work();
    ahead.wait()
}
