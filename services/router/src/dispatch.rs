//! One prompt's way through the workers: choose one, start, read its events, and start again elsewhere if it fails
//! before any text was handed out.
//!
//! After the first text there is no second attempt: another worker might sample another continuation, and what the
//! client has already read cannot be taken back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::{
    admission::Admission,
    config::{PolicyConfig, RouterConfig},
    grpc::{CallError, EventStream},
    holders::{Hits, Holders},
    job::{Event, Job},
    metrics,
    policy::{self, Candidate, Choice, Prompt, WorkerId},
    workers::{Assignment, Worker, Workers},
};

/// Chooses workers and starts jobs on them.
#[derive(Debug)]
pub(crate) struct Dispatcher {
    workers: Workers,
    holders: Arc<Holders>,
    admission: Arc<Admission>,
    prices: PolicyConfig,
    block_tokens: usize,
    first_token_timeout: Duration,
    idle_timeout: Duration,
    /// Spreads requests over equals.
    turn: AtomicU64,
    /// Ends everything that is in flight.
    cut: CancellationToken,
}

/// Why a prompt was not generated from, or not to the end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DispatchError {
    /// Nobody can be asked.
    #[error("no worker can take requests: {0}")]
    NoWorker(String),
    /// Everybody who can be asked has no room.
    #[error("all workers are full ({why}): try again in {retry_after_secs} s")]
    Busy { why: String, retry_after_secs: u64 },
    /// The worker says that the request is wrong.
    #[error("{0}")]
    Refused(String),
    /// No token came in time.
    #[error("no token came within {0:?}")]
    FirstTokenLate(Duration),
    /// A token came, and then nothing for too long.
    #[error("the worker fell silent for {0:?} in the middle of the answer")]
    Silent(Duration),
    /// The worker failed, and there is no other attempt to make.
    #[error("the worker failed ({0})")]
    Failed(String),
    /// The router is stopping.
    #[error("this router is stopping")]
    Stopping,
}

/// A job that is being generated. Dropping it cancels it at the worker.
pub(crate) struct Generation {
    dispatcher: Arc<Dispatcher>,
    job: Job,
    stream: EventStream,
    assignment: Assignment,
    choice: Choice,
    /// Workers that were tried, this one included.
    tried: Vec<WorkerId>,
    first_token_by: Instant,
    /// A token has come, even if its text is not certain yet.
    token_seen: bool,
    /// Text was handed out: no other worker may continue.
    committed: bool,
}

/// A started attempt.
type Attempt = (EventStream, Assignment, Choice);

impl Dispatcher {
    /// A dispatcher over `workers`, whose work ends when `cut` is cancelled.
    pub(crate) fn new(
        config: &RouterConfig,
        workers: Workers,
        holders: Arc<Holders>,
        admission: Arc<Admission>,
        cut: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            workers,
            holders,
            admission,
            prices: config.policy.clone(),
            block_tokens: usize::from(config.block_tokens),
            first_token_timeout: config.first_token_timeout.get(),
            idle_timeout: config.idle_timeout.get(),
            turn: AtomicU64::new(0),
            cut,
        })
    }

    /// Seconds after which a refused client may try again.
    pub(crate) fn retry_after(&self) -> u64 {
        self.admission.retry_after(self.workers.usable().map(|(_, load)| load))
    }

    /// Starts `job` on the cheapest worker that takes it.
    pub(crate) async fn start(self: &Arc<Self>, job: Job) -> Result<Generation, DispatchError> {
        let first_token_by = Instant::now() + self.first_token_timeout;
        let mut tried = Vec::new();
        let (stream, assignment, choice) = self.attempt(&job, &mut tried, first_token_by, None).await?;
        Ok(Generation {
            dispatcher: Arc::clone(self),
            job,
            stream,
            assignment,
            choice,
            tried,
            first_token_by,
            token_seen: false,
            committed: false,
        })
    }

    /// Tries workers that were not tried yet, cheapest first, until one takes the job. `failure` is what went wrong last.
    async fn attempt(
        &self,
        job: &Job,
        tried: &mut Vec<WorkerId>,
        by: Instant,
        mut failure: Option<CallError>,
    ) -> Result<Attempt, DispatchError> {
        while let Some((worker, choice)) = self.choose(job, tried) {
            if let Some(failure) = &failure {
                metrics::retry(reason(failure));
                tracing::info!(worker = %worker.url, why = %failure, "trying another worker");
            }
            tried.push(worker.id);
            metrics::chosen(&worker.url, expectation(&choice));
            let assignment = worker.assign(choice.compute_tokens);
            let call = tokio::select! {
                biased;
                () = self.cut.cancelled() => return Err(DispatchError::Stopping),
                call = timeout_at(by, worker.calls.generate(job)) => call,
            };
            match call {
                Ok(Ok(stream)) => return Ok((stream, assignment, choice)),
                Ok(Err(error)) => failure = Some(self.note(&worker, error)?),
                Err(_) => return Err(DispatchError::FirstTokenLate(self.first_token_timeout)),
            }
        }
        Err(match failure {
            None => DispatchError::NoWorker(self.workers.why_none()),
            Some(CallError::Busy(why)) => DispatchError::Busy {
                why,
                retry_after_secs: self.retry_after(),
            },
            Some(CallError::Lost(why)) => DispatchError::NoWorker(why),
            Some(CallError::Failed(why) | CallError::Refused(why)) => DispatchError::Failed(why),
        })
    }

    /// What a failed call means: an error for the client, or a reason to try another worker.
    fn note(&self, worker: &Worker, error: CallError) -> Result<CallError, DispatchError> {
        match error {
            CallError::Refused(why) => Err(DispatchError::Refused(why)),
            CallError::Lost(_) => {
                worker.lost(&error);
                Ok(error)
            }
            CallError::Failed(ref why) => {
                tracing::warn!(worker = %worker.url, %why, "worker failed a request");
                Ok(error)
            }
            CallError::Busy(_) => Ok(error),
        }
    }

    fn choose(&self, job: &Job, tried: &[WorkerId]) -> Option<(Arc<Worker>, Choice)> {
        let hits = match self.workers.namespace() {
            Some(namespace) if !job.options.no_cache => self.holders.lookup(namespace, &job.chain),
            _ => Hits::default(),
        };
        let candidates: Vec<Candidate> = self
            .workers
            .usable()
            .filter(|(worker, _)| !tried.contains(&worker.id))
            .map(|(worker, load)| Candidate {
                worker: worker.id,
                device_blocks: hits.device_blocks(worker.id),
                load,
            })
            .collect();
        let prompt = Prompt {
            tokens: job.prompt.len(),
            block_tokens: self.block_tokens,
            store_blocks: hits.store_blocks,
        };
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let choice = policy::choose(&prompt, &candidates, &self.prices, turn)?;
        Some((Arc::clone(self.workers.get(choice.worker)?), choice))
    }
}

impl Generation {
    /// The next event. After [`Event::Finished`] or an error there is nothing more to read.
    pub(crate) async fn next(&mut self) -> Result<Event, DispatchError> {
        loop {
            let failure = match self.read().await? {
                Ok(event) => {
                    self.note(&event);
                    return Ok(event);
                }
                Err(failure) => self.dispatcher.note(self.assignment.worker(), failure)?,
            };
            if self.committed {
                return Err(DispatchError::Failed(failure.to_string()));
            }
            let (job, by) = (&self.job, self.first_token_by);
            let (stream, assignment, choice) = self.dispatcher.attempt(job, &mut self.tried, by, Some(failure)).await?;
            (self.stream, self.assignment, self.choice) = (stream, assignment, choice);
            self.token_seen = false;
        }
    }

    /// The worker that generates.
    pub(crate) fn worker_url(&self) -> &Arc<str> {
        &self.assignment.worker().url
    }

    /// One event of the current worker, or what it failed by; the outer error ends the generation.
    async fn read(&mut self) -> Result<Result<Event, CallError>, DispatchError> {
        let by = if self.token_seen {
            Instant::now() + self.dispatcher.idle_timeout
        } else {
            self.first_token_by
        };
        let next = tokio::select! {
            biased;
            () = self.dispatcher.cut.cancelled() => return Err(DispatchError::Stopping),
            next = timeout_at(by, self.stream.next()) => next,
        };
        match next {
            Ok(Ok(Some(event))) => Ok(Ok(event)),
            Ok(Ok(None)) => Ok(Err(CallError::Failed("it ended its answer in the middle".to_owned()))),
            Ok(Err(error)) => Ok(Err(error)),
            Err(_) if self.token_seen => Err(DispatchError::Silent(self.dispatcher.idle_timeout)),
            Err(_) => Err(DispatchError::FirstTokenLate(self.dispatcher.first_token_timeout)),
        }
    }

    fn note(&mut self, event: &Event) {
        match event {
            Event::Started(started) => {
                let expected = self.choice.device_tokens + self.choice.store_tokens;
                metrics::started(expected, started.cached_tokens);
            }
            Event::Text(text) => {
                self.assignment.answered();
                self.token_seen = true;
                self.committed |= !text.is_empty();
            }
            Event::Finished(finished) => {
                self.committed = true;
                metrics::finished(finished.prompt_tokens, finished.completion_tokens);
            }
        }
    }
}

/// The larger part of what the worker is expected to find.
fn expectation(choice: &Choice) -> &'static str {
    match (choice.device_tokens, choice.store_tokens) {
        (0, 0) => "nothing",
        (device, store) if device >= store => "device",
        _ => "store",
    }
}

fn reason(failure: &CallError) -> &'static str {
    match failure {
        CallError::Busy(_) => "busy",
        CallError::Refused(_) => "refused",
        CallError::Lost(_) => "lost",
        CallError::Failed(_) => "failed",
    }
}

#[cfg(test)]
mod tests;
