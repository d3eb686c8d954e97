//! Queries on their way to the threads for retrieval, and how they share scans.
//!
//! A query that finds no thread free waits, and so do others. Whoever gets a thread takes its own query and all that can share
//! its scan: those of other sequences over the same context, layer and options. So the busier the store, the fewer scans per query,
//! and nobody waits for company. A scan of many keys is worked on by further threads, as far as they are idle. A query that was
//! searched ahead of time ([`crate::ahead`]) has its candidates already, and shares nothing.
//!
//! Invariant: a query in `waiting` has a caller who waits for a thread; callers who leave take their query along.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use kvasir_cache::{
    BlockCache, CacheError,
    retrieve::{Context, Form, Found, Query, Report, Search},
};
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::oneshot};

use crate::{
    ahead::{Ahead, Forecast, Parked, Rooms, ahead_max},
    door::{Door, Lost},
    metrics,
};

/// Most queries in one scan: bounds the memory for its scores.
const JOINED_MAX: usize = 16;

/// Keys of a scan, summed over KV heads, below which waking a second thread costs more than it saves: about half a millisecond's.
pub(crate) const HELP_KEYS: usize = 1 << 16;

/// The way to the threads for retrieval.
#[derive(Debug)]
pub(crate) struct Searches {
    pub(crate) door: Door,
    /// What searches ahead of time hold.
    pub(crate) rooms: Arc<Rooms>,
    waiting: Mutex<Vec<Waiting>>,
    next: AtomicU64,
}

/// A query's fields.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) layer: u16,
    pub(crate) q: Vec<f32>,
    pub(crate) form: Form,
    pub(crate) excluded: Vec<Range<u32>>,
    pub(crate) deadline: Option<Instant>,
    pub(crate) local_lse: Vec<f32>,
}

/// What was found, and how long it took.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) found: Found,
    pub(crate) report: Report,
    pub(crate) times: Times,
}

/// Where the time of an answer went.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    /// In the queue.
    pub(crate) waited: Duration,
    /// At work, blocks that were read included, and what was done ahead of time.
    pub(crate) search: Duration,
    /// Of `search`, before the query was there.
    pub(crate) hidden: Duration,
}

#[derive(Debug)]
struct Waiting {
    id: u64,
    context: Arc<Context>,
    asked: Asked,
    since: Instant,
    answer: oneshot::Sender<Result<Answer, CacheError>>,
}

impl Asked {
    pub(crate) fn query(&self) -> Query<'_> {
        Query {
            layer: self.layer,
            q: &self.q,
            form: self.form,
            excluded: &self.excluded,
            deadline: self.deadline,
            local_lse: &self.local_lse,
        }
    }
}

impl Searches {
    /// With so many threads, and so many bytes for searches ahead of time.
    pub(crate) fn new(threads: usize, parked_bytes_max: u64) -> Self {
        Self {
            door: Door::new("retrieval", threads),
            rooms: Arc::new(Rooms::new(parked_bytes_max)),
            waiting: Mutex::default(),
            next: AtomicU64::new(0),
        }
    }

    /// Answers a query: with what was searched ahead for it, or alone, or together with others that wait.
    pub(crate) async fn answer(
        &self,
        cache: Arc<BlockCache>,
        context: Arc<Context>,
        asked: Asked,
        ahead: Option<Ahead>,
    ) -> Result<Result<Answer, CacheError>, Lost> {
        // Before it may share a scan: a query that cannot be must not spoil those of others.
        if let Err(error) = cache.check_query(&context, &asked.query()) {
            return Ok(Err(error));
        }
        let since = Instant::now();
        if let Some(ahead) = ahead
            && let Some(parked) = ahead.parked_for(&context, &asked).await
        {
            let permit = self.door.permit().await?;
            let door = self.door.clone();
            let work = move || finish(&door, &cache, &context, &asked, parked, since);
            return self.door.spawn(permit, work).await;
        }
        let (sender, mut answer) = oneshot::channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.waiting.lock().push(Waiting {
            id,
            context,
            asked,
            since,
            answer: sender,
        });
        let _place = Place { searches: self, id };
        tokio::select! {
            biased;
            joined = &mut answer => return joined.map_err(|_| Lost::Panicked),
            permit = self.door.permit() => {
                let (permit, joined) = (permit?, self.take(id));
                // Without its query there, another one answers it, or has.
                if !joined.is_empty() {
                    let door = self.door.clone();
                    self.door.spawn(permit, move || run(&door, &cache, joined)).await?;
                }
            }
        }
        answer.await.map_err(|_| Lost::Panicked)
    }

    /// As [`Self::answer`], on the calling thread, where one of the door's has nothing to do and gives its place: no other is woken, and
    /// what the search reads is in this one's caches. For a thread that may block.
    pub(crate) fn answer_here(
        &self,
        runtime: &Handle,
        cache: Arc<BlockCache>,
        context: Arc<Context>,
        asked: Asked,
        ahead: Option<Ahead>,
    ) -> Result<Result<Answer, CacheError>, Lost> {
        let Some(_permit) = self.door.permit_if_idle() else {
            return runtime.block_on(self.answer(cache, context, asked, ahead));
        };
        if let Err(error) = cache.check_query(&context, &asked.query()) {
            return Ok(Err(error));
        }
        // Idle threads may help.
        let _inside = runtime.enter();
        let since = Instant::now();
        let parked = ahead.and_then(|ahead| runtime.block_on(ahead.parked_for(&context, &asked)));
        Ok(match parked {
            Some(parked) => finish(&self.door, &cache, &context, &asked, parked, since),
            None => alone(&self.door, &cache, &context, &asked),
        })
    }

    /// As [`Self::hint`], on the calling thread in the place of an idle one; `is_asked` says whether the query is there meanwhile.
    ///
    /// # Errors
    /// A forecast that no query could be.
    pub(crate) fn hint_here(
        &self,
        runtime: &Handle,
        cache: &Arc<BlockCache>,
        context: &Arc<Context>,
        forecast: Forecast,
        is_asked: &dyn Fn() -> bool,
    ) -> Result<Option<Ahead>, CacheError> {
        let _inside = runtime.enter();
        let Some(expected) = self.expected(cache, context, forecast)? else {
            return Ok(None);
        };
        let permit = self.has_none_waiting().then(|| self.door.permit_if_idle()).flatten();
        metrics::hint(if permit.is_some() { "searched" } else { "busy" });
        let search = |_permit| Ahead::here(&self.door, &self.rooms, cache, context, expected, is_asked);
        Ok(permit.and_then(search))
    }

    /// Begins the search of a layer that will be asked soon, if a thread has nothing better to do; or reads its blocks, where
    /// what will be asked is not known or every key will be scored.
    ///
    /// # Errors
    /// A forecast that no query could be.
    pub(crate) fn hint(
        &self,
        cache: Arc<BlockCache>,
        context: Arc<Context>,
        forecast: Forecast,
    ) -> Result<Option<Ahead>, CacheError> {
        let Some(expected) = self.expected(&cache, &context, forecast)? else {
            return Ok(None);
        };
        let is_idle = self.has_none_waiting();
        let ahead = is_idle.then(|| Ahead::begin(&self.door, &self.rooms, cache, context, expected));
        let ahead = ahead.flatten();
        metrics::hint(if ahead.is_some() { "searched" } else { "busy" });
        Ok(ahead)
    }

    /// The query that a forecast is of. `None` where what will be asked is not known or every key will be scored: the blocks are read
    /// then.
    fn expected(
        &self,
        cache: &Arc<BlockCache>,
        context: &Arc<Context>,
        forecast: Forecast,
    ) -> Result<Option<Asked>, CacheError> {
        let Forecast {
            layer,
            q,
            local_lse,
            asking,
        } = forecast;
        let Some(asking) = asking.filter(|_| context.basis_id().is_some()) else {
            self.warm(Arc::clone(cache), Arc::clone(context), layer);
            return Ok(None);
        };
        let expected = Asked {
            layer,
            q,
            form: asking.form,
            excluded: asking.excluded,
            deadline: Instant::now().checked_add(ahead_max(asking.took)),
            local_lse,
        };
        cache.check_query(context, &expected.query())?;
        Ok(Some(expected))
    }

    fn has_none_waiting(&self) -> bool {
        self.waiting.lock().is_empty()
    }

    fn warm(&self, cache: Arc<BlockCache>, context: Arc<Context>, layer: u16) {
        if context.is_warm(layer) {
            return metrics::hint("warm");
        }
        let started = self.door.start_if_idle(move || cache.warm(&context, layer));
        metrics::hint(if started { "read" } else { "busy" });
    }

    /// The query `id` and those that join it; nothing if it was taken already.
    fn take(&self, id: u64) -> Vec<Waiting> {
        let mut waiting = self.waiting.lock();
        let Some(at) = waiting.iter().position(|waiting| waiting.id == id) else {
            return Vec::new();
        };
        let mut taken = vec![waiting.remove(at)];
        let mut at = 0;
        while at < waiting.len() && taken.len() < JOINED_MAX {
            if waiting[at].joins(&taken[0]) {
                taken.push(waiting.remove(at));
            } else {
                at += 1;
            }
        }
        taken
    }
}

impl Waiting {
    fn joins(&self, other: &Self) -> bool {
        self.context.joins(&other.context) && self.asked.query().joins(&other.asked.query())
    }
}

/// The place of a query among those that wait; given up when its caller leaves.
struct Place<'a> {
    searches: &'a Searches,
    id: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.searches.waiting.lock().retain(|waiting| waiting.id != self.id);
    }
}

/// Answers queries that join each other.
fn run(door: &Door, cache: &BlockCache, joined: Vec<Waiting>) {
    let begun = Instant::now();
    let queries: Vec<Query<'_>> = joined.iter().map(|waiting| waiting.asked.query()).collect();
    let context = &joined[0].context;
    let answers: Result<Vec<_>, CacheError> = cache
        .search(context, &queries)
        .map(|search| work(door, context, search).wait());
    let search = begun.elapsed();
    drop(queries);
    let answers: Vec<Result<_, CacheError>> = match answers {
        Ok(answers) => answers.into_iter().map(Ok).collect(),
        // Each was checked, so it is the joining that failed: each for itself then.
        Err(_) => {
            let alone = |waiting: &Waiting| cache.retrieve(&waiting.context, &waiting.asked.query());
            joined.iter().map(alone).collect()
        }
    };
    for (waiting, answer) in joined.into_iter().zip(answers) {
        let waited = begun.saturating_duration_since(waiting.since);
        metrics::searched(waited, search);
        let answer = answer.map(|(found, report)| Answer {
            found,
            report,
            times: Times {
                waited,
                search,
                hidden: Duration::ZERO,
            },
        });
        // Who left does not want it.
        let _ = waiting.answer.send(answer);
    }
}

/// Works on a search on this thread and, where that pays, on those that are idle.
fn work(door: &Door, context: &Context, search: Search) -> Arc<Search> {
    let search = Arc::new(search);
    if context.tokens() * search.parts() >= HELP_KEYS {
        let help = Arc::clone(&search);
        door.start_on_idle(search.parts().saturating_sub(1), move || help.work());
    }
    search.work();
    search
}

/// Answers a query by itself.
fn alone(door: &Door, cache: &BlockCache, context: &Context, asked: &Asked) -> Result<Answer, CacheError> {
    let begun = Instant::now();
    let search = cache.search(context, std::slice::from_ref(&asked.query()))?;
    let (found, report) = work(door, context, search).wait_for_one()?;
    let times = Times {
        search: begun.elapsed(),
        ..Times::default()
    };
    metrics::searched(times.waited, times.search);
    Ok(Answer { found, report, times })
}

/// Answers a query that came at `arrived` with what was searched ahead for it.
fn finish(
    door: &Door,
    cache: &BlockCache,
    context: &Context,
    asked: &Asked,
    parked: Parked,
    arrived: Instant,
) -> Result<Answer, CacheError> {
    let begun = Instant::now();
    let (ahead, hidden) = (parked.search_time(), parked.hidden(arrived));
    let search = cache.search_parked(context, &asked.query(), parked.search)?;
    let (found, report) = work(door, context, search).wait_for_one()?;
    // Of what was done ahead the part that was of use.
    let (used, of) = (report.heads_ahead, report.heads_ahead + report.heads_too_far);
    let share = f64::from(used) / f64::from(of.max(1));
    let (ahead, hidden) = (ahead.mul_f64(share), hidden.mul_f64(share));
    let waited = begun.saturating_duration_since(arrived).saturating_sub(ahead - hidden);
    let search = ahead + begun.elapsed();
    metrics::searched(waited, search);
    metrics::searched_ahead(hidden, used, report.heads_too_far);
    Ok(Answer {
        found,
        report,
        times: Times { waited, search, hidden },
    })
}

#[cfg(test)]
mod tests;
