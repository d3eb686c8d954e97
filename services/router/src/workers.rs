//! The workers: who they are, whether they can be asked, how busy they are.
//!
//! Each worker has one supervising task. It asks who the worker is, compares that with what this router serves, and then
//! follows its load and its blocks until one of them breaks; then it waits a little and asks again. A call that fails
//! tells the supervisor at once, so that a dead worker is left out from the first failure and not from the next probe.

mod load;
mod watch;

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use kvasir_block::{KvSchema, NamespaceId};
use kvasir_runtime::admin::Readiness;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch as latest};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use self::watch::follow_store;
use crate::{
    backoff::Backoff,
    grpc::{CallError, LoadReport, WorkerCalls, WorkerInfo},
    holders::Holders,
    metrics,
    policy::{Load, WorkerId},
};

/// What the router calls itself in `/readyz`.
pub(crate) const READINESS: &str = "router";

/// What every worker must agree with.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// Model and block size that the router tokenises and hashes for.
    pub(crate) schema: KvSchema,
    /// The window that the router refuses longer prompts by.
    pub(crate) context_tokens_max: usize,
}

/// All workers of a router.
#[derive(Debug)]
pub(crate) struct Workers {
    list: Vec<Arc<Worker>>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    expected: Expected,
    holders: Arc<Holders>,
    readiness: Readiness,
    /// The namespace of the first worker that was reached; all others must have the same.
    namespace: latest::Sender<Option<NamespaceId>>,
    /// Usable or not, by place in the list; decides readiness.
    usable: Mutex<Vec<bool>>,
    connect_timeout: Duration,
}

/// One worker.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) url: Arc<str>,
    pub(crate) calls: WorkerCalls,
    state: Mutex<State>,
    /// A call failed: look again now.
    suspect: Notify,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct State {
    health: Health,
    reported: Option<LoadReport>,
    /// Prompts this router has sent there and not seen the end of ..
    in_flight: u32,
    /// .. and tokens to compute of those that have not begun to answer. A report is up to 50 ms old; these are not.
    unanswered_tokens: u64,
}

/// Whether a worker can be asked, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Health {
    Unreachable(String),
    Refused(Disagreement),
    Reachable,
}

/// A worker that must not be used: its tokens or its blocks would not be what this router takes them for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the worker at {url} cannot serve here: its {field} is {theirs}, this router's is {ours}; {remedy}")]
pub(crate) struct Disagreement {
    url: String,
    field: String,
    theirs: String,
    ours: String,
    remedy: &'static str,
}

impl Workers {
    /// Knows the workers; nothing is connected yet.
    pub(crate) fn new(
        urls: &[String],
        connect_timeout: Duration,
        expected: Expected,
        holders: Arc<Holders>,
        readiness: Readiness,
    ) -> Result<Self, tonic::transport::Error> {
        let shared = Arc::new(Shared {
            expected,
            holders,
            readiness,
            namespace: latest::Sender::new(None),
            usable: Mutex::new(vec![false; urls.len()]),
            connect_timeout,
        });
        let list = urls
            .iter()
            .zip(0..)
            .map(|(url, id)| {
                Ok(Arc::new(Worker {
                    id: WorkerId(id),
                    url: Arc::from(url.as_str()),
                    calls: WorkerCalls::new(url, connect_timeout)?,
                    state: Mutex::new(State::new()),
                    suspect: Notify::new(),
                    shared: Arc::clone(&shared),
                }))
            })
            .collect::<Result<_, tonic::transport::Error>>()?;
        Ok(Self { list, shared })
    }

    /// Asks every worker once. A worker that is away may come later; one that disagrees is an error now.
    pub(crate) async fn greet(&self) -> Result<(), Disagreement> {
        let greetings = join_all(self.list.iter().map(|worker| worker.greet())).await;
        for greeting in greetings {
            if let Err(Greeting::Disagrees(disagreement)) = greeting {
                return Err(disagreement);
            }
        }
        self.shared.publish_readiness();
        Ok(())
    }

    /// Starts the supervising tasks; they end when `stop` is cancelled. `seed` decides the jitter of their waits.
    pub(crate) fn supervise(&self, tasks: &TaskTracker, stop: &CancellationToken, seed: u64) {
        for worker in &self.list {
            let backoff = Backoff::new(seed.wrapping_add(u64::from(worker.id.0)));
            let supervised = supervise(Arc::clone(worker), backoff);
            let stop = stop.clone();
            tasks.spawn(async move {
                stop.run_until_cancelled(supervised).await;
            });
        }
    }

    /// Workers that can be asked now.
    pub(crate) fn usable(&self) -> impl Iterator<Item = (&Arc<Worker>, Load)> {
        self.list
            .iter()
            .filter_map(|worker| worker.usable_load().map(|load| (worker, load)))
    }

    /// The worker with this id.
    pub(crate) fn get(&self, id: WorkerId) -> Option<&Arc<Worker>> {
        self.list.get(id.0 as usize)
    }

    /// The namespace of all workers, once one was reached.
    pub(crate) fn namespace(&self) -> Option<NamespaceId> {
        *self.shared.namespace.borrow()
    }

    /// Follows [`Workers::namespace`].
    pub(crate) fn watch_namespace(&self) -> latest::Receiver<Option<NamespaceId>> {
        self.shared.namespace.subscribe()
    }

    /// Why nobody can be asked, in words for a person.
    pub(crate) fn why_none(&self) -> String {
        let reasons = self.list.iter().map(|worker| worker.why_not());
        reasons.collect::<Vec<_>>().join("; ")
    }
}

/// What came of asking a worker who it is.
#[derive(Debug)]
enum Greeting {
    Disagrees(Disagreement),
    Away,
}

impl Worker {
    /// Asks the worker who it is and notes whether it can be used.
    async fn greet(&self) -> Result<NamespaceId, Greeting> {
        let answer = tokio::time::timeout(self.shared.connect_timeout, self.calls.info()).await;
        let info = match answer {
            Ok(Ok(info)) => info,
            Ok(Err(error)) => {
                self.set_health(Health::Unreachable(error.to_string()));
                return Err(Greeting::Away);
            }
            Err(_) => {
                let why = format!("no answer within {:?}", self.shared.connect_timeout);
                self.set_health(Health::Unreachable(why));
                return Err(Greeting::Away);
            }
        };
        match self.agree(&info) {
            Ok(()) => {
                self.set_health(Health::Reachable);
                Ok(info.namespace)
            }
            Err(disagreement) => {
                self.set_health(Health::Refused(disagreement.clone()));
                Err(Greeting::Disagrees(disagreement))
            }
        }
    }

    fn agree(&self, info: &WorkerInfo) -> Result<(), Disagreement> {
        let expected = &self.shared.expected;
        disagreement(&self.url, info, expected).map_or(Ok(()), Err)?;
        let mut first = None;
        self.shared.namespace.send_if_modified(|known| {
            let news = known.is_none();
            first = Some(*known.get_or_insert(info.namespace));
            news
        });
        match first {
            Some(ours) if ours != info.namespace => Err(Disagreement {
                url: self.url.to_string(),
                field: "namespace".to_owned(),
                theirs: info.namespace.to_string(),
                ours: ours.to_string(),
                remedy: "give all workers of a router the same worker.tenant, and start the router after them",
            }),
            _ => Ok(()),
        }
    }

    fn set_health(&self, health: Health) {
        let before = {
            let mut state = self.state.lock();
            if state.health == health {
                return;
            }
            if health != Health::Reachable {
                state.reported = None;
            }
            std::mem::replace(&mut state.health, health.clone())
        };
        match &health {
            Health::Reachable => tracing::info!(worker = %self.url, "worker is reachable"),
            Health::Unreachable(why) if before == Health::Reachable => {
                tracing::warn!(worker = %self.url, %why, "worker was lost, requests go to others");
            }
            Health::Unreachable(why) => {
                tracing::info!(worker = %self.url, %why, "worker is not reachable, trying again")
            }
            Health::Refused(why) => tracing::error!(worker = %self.url, %why, "worker is not used"),
        }
        self.publish();
    }

    fn set_load(&self, report: LoadReport) {
        let changed = {
            let mut state = self.state.lock();
            let was = state.usable();
            state.reported = Some(report);
            was != state.usable()
        };
        if changed {
            tracing::info!(worker = %self.url, draining = report.draining, "worker changed its mind about taking requests");
            self.publish();
        }
    }

    /// Tells the world whether this worker can be asked.
    fn publish(&self) {
        let usable = self.state.lock().usable();
        metrics::worker_usable(&self.url, usable);
        if let Some(mine) = self.shared.usable.lock().get_mut(self.id.0 as usize) {
            *mine = usable;
        }
        self.shared.publish_readiness();
    }

    /// A call failed as if nobody were there: leave this worker out and look again at once.
    pub(crate) fn lost(&self, why: &CallError) {
        self.set_health(Health::Unreachable(why.to_string()));
        self.suspect.notify_one();
    }

    /// The load to choose by, or `None` when the worker must not be asked.
    fn usable_load(&self) -> Option<Load> {
        let state = self.state.lock();
        state.usable().then(|| state.load())
    }

    fn why_not(&self) -> String {
        let state = self.state.lock();
        match &state.health {
            Health::Unreachable(why) => format!("{} cannot be reached ({why})", self.url),
            Health::Refused(why) => why.to_string(),
            Health::Reachable if state.usable() => format!("{} is usable", self.url),
            Health::Reachable => format!("{} is draining", self.url),
        }
    }

    /// Notes that a prompt was sent there, of which it is expected to compute so many tokens.
    pub(crate) fn assign(self: &Arc<Self>, compute_tokens: usize) -> Assignment {
        let tokens = compute_tokens as u64;
        let mut state = self.state.lock();
        state.in_flight += 1;
        state.unanswered_tokens += tokens;
        drop(state);
        Assignment {
            worker: Arc::clone(self),
            unanswered: Some(tokens),
        }
    }
}

/// A prompt at a worker, from being sent until its end.
#[derive(Debug)]
pub(crate) struct Assignment {
    worker: Arc<Worker>,
    /// Tokens to compute, until the first answer.
    unanswered: Option<u64>,
}

impl Assignment {
    /// The worker it is at.
    pub(crate) fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }

    /// Its first token has come: the prompt is computed.
    pub(crate) fn answered(&mut self) {
        if let Some(tokens) = self.unanswered.take() {
            let mut state = self.worker.state.lock();
            state.unanswered_tokens -= tokens;
        }
    }
}

impl Drop for Assignment {
    fn drop(&mut self) {
        self.answered();
        self.worker.state.lock().in_flight -= 1;
    }
}

impl State {
    fn new() -> Self {
        Self {
            health: Health::Unreachable("not asked yet".to_owned()),
            reported: None,
            in_flight: 0,
            unanswered_tokens: 0,
        }
    }

    fn usable(&self) -> bool {
        self.health == Health::Reachable && !self.reported.is_some_and(|report| report.draining)
    }

    /// What the worker reported, or what this router knows to be there if that is more: other routers may send work
    /// too, and a report may be older than what was just sent.
    fn load(&self) -> Load {
        let reported = self.reported.map(|report| report.load).unwrap_or_default();
        let busy = reported.running.saturating_add(reported.waiting);
        Load {
            running: reported.running.saturating_add(self.in_flight.saturating_sub(busy)),
            prefill_tokens_waiting: reported.prefill_tokens_waiting.max(self.unanswered_tokens),
            ..reported
        }
    }
}

impl Shared {
    fn publish_readiness(&self) {
        let usable = self.usable.lock().iter().filter(|usable| **usable).count();
        metrics::usable_workers(usable);
        if usable > 0 {
            self.readiness.ready(READINESS);
        } else {
            self.readiness.not_ready(READINESS, "no worker can be asked");
        }
    }
}

fn disagreement(url: &str, info: &WorkerInfo, expected: &Expected) -> Option<Disagreement> {
    let differs = |field: &str, theirs: String, ours: String, remedy| Disagreement {
        url: url.to_owned(),
        field: field.to_owned(),
        theirs,
        ours,
        remedy,
    };
    let (theirs, ours) = (&info.schema, &expected.schema);
    if theirs.block_tokens != ours.block_tokens {
        return Some(differs(
            "block_tokens",
            theirs.block_tokens.to_string(),
            ours.block_tokens.to_string(),
            "set router.block_tokens and worker.block_tokens to the same value",
        ));
    }
    if theirs.model != ours.model {
        let remedy = "start both with the same model file";
        return Some(differs(
            "model",
            format!("{:?}", theirs.model),
            format!("{:?}", ours.model),
            remedy,
        ));
    }
    // Workers on other devices compute other last bits, under other names. What they are sent is the same.
    let ours = KvSchema {
        numerics: theirs.numerics.clone(),
        ..ours.clone()
    };
    if let Some(field) = ours.first_difference(theirs) {
        let remedy = "start both with the same model file and the same version of kvasir";
        return Some(differs(field, "another one".to_owned(), "its own".to_owned(), remedy));
    }
    let window = info.context_tokens_max as usize;
    (window < expected.context_tokens_max).then(|| {
        differs(
            "context_tokens_max",
            window.to_string(),
            expected.context_tokens_max.to_string(),
            "give all workers the whole context window",
        )
    })
}

/// Greets, follows, and starts over, for as long as it is polled.
async fn supervise(worker: Arc<Worker>, mut backoff: Backoff) {
    loop {
        if let Ok(namespace) = worker.greet().await {
            let ended = tokio::select! {
                ended = load::follow(&worker, &mut backoff) => ended,
                never = watch::follow_worker(&worker, &worker.shared.holders, namespace) => match never {},
                () = worker.suspect.notified() => {
                    // Marked already by whoever noticed; ask at once whether it is true.
                    continue;
                }
            };
            worker.set_health(Health::Unreachable(ended.to_string()));
            metrics::watch_restarted(&worker.url, "load");
        }
        tokio::time::sleep(backoff.next()).await;
    }
}

#[cfg(test)]
mod tests;
