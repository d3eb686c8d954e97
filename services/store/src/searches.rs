//! Queries on their way to the threads for retrieval, and how they share scans.
//!
//! A query that finds no thread free waits, and so do others. Whoever gets a thread takes its own query and all that can share
//! its scan: those of other sequences over the same context, layer and options. So the busier the store, the fewer scans per query,
//! and nobody waits for company. A scan of many keys is worked on by further threads, as far as they are idle.
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
    retrieve::{Context, Form, Found, Query, Report},
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::{
    door::{Door, Lost},
    metrics,
};

/// Most queries in one scan: bounds the memory for its scores.
const JOINED_MAX: usize = 16;

/// Keys of a scan, summed over KV heads, below which waking a second thread costs more than it saves.
const HELP_KEYS: usize = 4096;

/// The way to the threads for retrieval.
#[derive(Debug)]
pub(crate) struct Searches {
    pub(crate) door: Door,
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
}

/// What was found, and how long it took.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) found: Found,
    pub(crate) report: Report,
    /// In the queue.
    pub(crate) waited: Duration,
    /// At work, blocks that were read included.
    pub(crate) search: Duration,
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
    fn query(&self) -> Query<'_> {
        Query {
            layer: self.layer,
            q: &self.q,
            form: self.form,
            excluded: &self.excluded,
            deadline: self.deadline,
        }
    }
}

impl Searches {
    pub(crate) fn new(threads: usize) -> Self {
        Self {
            door: Door::new("retrieval", threads),
            waiting: Mutex::default(),
            next: AtomicU64::new(0),
        }
    }

    /// Answers a query, alone or together with others that wait.
    pub(crate) async fn answer(
        &self,
        cache: Arc<BlockCache>,
        context: Arc<Context>,
        asked: Asked,
    ) -> Result<Result<Answer, CacheError>, Lost> {
        // Before it may share a scan: a query that cannot be must not spoil those of others.
        if let Err(error) = cache.check_query(&context, &asked.query()) {
            return Ok(Err(error));
        }
        let (sender, mut answer) = oneshot::channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.waiting.lock().push(Waiting {
            id,
            context,
            asked,
            since: Instant::now(),
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

    /// Reads the blocks of a layer that will be asked soon, if a thread has nothing better to do.
    pub(crate) fn hint(&self, cache: Arc<BlockCache>, context: Arc<Context>, layer: u16) {
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
    let answers: Result<Vec<_>, CacheError> = cache.search(context, &queries).map(|search| {
        let search = Arc::new(search);
        if context.tokens() * search.parts() >= HELP_KEYS {
            for _ in 1..search.parts() {
                let help = Arc::clone(&search);
                if !door.start_if_idle(move || help.work()) {
                    break;
                }
            }
        }
        search.work();
        search.wait()
    });
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
            waited,
            search,
        });
        // Who left does not want it.
        let _ = waiting.answer.send(answer);
    }
}

#[cfg(test)]
mod tests;
