//! The compute thread: owner of the model, the page pool, and every sequence.
//!
//! Nothing else touches pages, so nothing here is locked. What happens outside comes as a [`Command`] through one
//! bounded channel; the thread looks at it between steps, and sleeps on it when nobody can compute. It waits for the
//! outside in two places only: for a layer of a sequence that loads alone, and for the replies of sequences that
//! retrieve. Both waits are bounded.

mod admit;
mod finish;
mod step;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_model::{Model, PagePool, Tokenizer};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
};
use tracing::Span;

use crate::{
    device_tier::DeviceTier,
    events::EventHub,
    load::{Load, Ticket},
    metrics::{ComputeMetrics, StoreMetrics},
    offload::Offload,
    onboard::{Onboard, StoreHit},
    outbox::{Failure, Outbox},
    request::Request,
    retrieval::{Experience, Link, LinkShape, QuerySamples},
    sequence::{Phase, Sequence},
    sparse::Blocks,
    store_session::StoreSession,
};

/// Names a sequence while the worker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SequenceId(u64);

/// A checked request on its way to the compute thread.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) request: Request,
    pub(crate) outbox: Outbox,
    pub(crate) ticket: Ticket,
    pub(crate) span: Span,
    pub(crate) submitted: Instant,
}

/// What the compute thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// A new request.
    Submit(Box<Submission>),
    /// The store has answered for a waiting sequence.
    Matched(SequenceId, StoreHit),
    /// A context was opened for retrieval, or why not.
    Opened(SequenceId, Result<Box<Link>, String>),
    /// Blocks of a sequence, by index, are to be offered to the store again.
    Offer(SequenceId, Vec<usize>),
    /// Something else has changed: look.
    Wake,
    /// Take no new requests, end when the last one ends.
    Drain,
    /// End now.
    Stop,
}

/// Where commands go. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct ComputeHandle(mpsc::Sender<Command>);

/// Commands that wait for the compute thread. Requests are bounded by the door; the rest are a few per running sequence.
const COMMANDS_MAX: usize = 1024;

/// The handle, and what [`Compute`] reads from.
pub(crate) fn channel() -> (ComputeHandle, mpsc::Receiver<Command>) {
    let (sender, receiver) = mpsc::channel(COMMANDS_MAX);
    (ComputeHandle(sender), receiver)
}

impl ComputeHandle {
    /// Sends a command; false when the compute thread has ended.
    pub(crate) async fn send(&self, command: Command) -> bool {
        self.0.send(command).await.is_ok()
    }

    pub(crate) async fn wake(&self) {
        self.send(Command::Wake).await;
    }

    /// Wakes without waiting. A full channel wakes by itself.
    pub(crate) fn nudge(&self) {
        let _full_or_ended = self.0.try_send(Command::Wake);
    }

    pub(crate) async fn offer(&self, sequence: SequenceId, blocks: Vec<usize>) {
        self.send(Command::Offer(sequence, blocks)).await;
    }
}

/// The store, where one is configured.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    pub(crate) session: Arc<StoreSession>,
    pub(crate) offload: Arc<Offload>,
    pub(crate) metrics: StoreMetrics,
    pub(crate) experience: Arc<Experience>,
}

/// What of the configuration the compute thread needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) block_tokens: usize,
    pub(crate) step_tokens_max: usize,
    pub(crate) sequences_max: usize,
    pub(crate) onboard_timeout: Duration,
    pub(crate) context_timeout: Duration,
    pub(crate) retrieval_timeout: Duration,
    pub(crate) lease: Duration,
    pub(crate) hint_from_layer: usize,
    pub(crate) row_cache_bytes: usize,
    pub(crate) query_sample_bytes: usize,
    /// Which blocks are computed sparsely, where any are.
    pub(crate) sparse: Option<Blocks>,
}

/// What the compute thread shares with the rest of the worker.
pub(crate) struct Surroundings {
    pub(crate) settings: Settings,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) store: Option<Store>,
    pub(crate) hub: Arc<EventHub>,
    pub(crate) load: watch::Sender<Load>,
    pub(crate) metrics: ComputeMetrics,
    pub(crate) handle: ComputeHandle,
    pub(crate) runtime: Handle,
}

/// State of the compute thread.
pub(crate) struct Compute {
    model: Model,
    pool: PagePool,
    tier: DeviceTier,
    /// In order of arrival; sequences that fell back stand first.
    waiting: VecDeque<Sequence>,
    /// In order of admission.
    running: Vec<Sequence>,
    /// Loads of running sequences in [`Phase::Onboarding`].
    onboards: HashMap<SequenceId, Onboard>,
    /// Streams of running sequences that retrieve.
    links: HashMap<SequenceId, Link>,
    /// Query samples of sequences that ask for an index drawn by them.
    samples: HashMap<SequenceId, QuerySamples>,
    link_shape: LinkShape,
    commands: mpsc::Receiver<Command>,
    around: Surroundings,
    next_id: u64,
    draining: bool,
    stopped: bool,
}

impl Compute {
    pub(crate) fn new(
        model: Model,
        pool: PagePool,
        commands: mpsc::Receiver<Command>,
        surroundings: Surroundings,
    ) -> Self {
        Self {
            tier: DeviceTier::new(pool.pages()),
            link_shape: LinkShape::new(model.shape(), model.softmax_scale()),
            model,
            pool,
            waiting: VecDeque::new(),
            running: Vec::new(),
            onboards: HashMap::new(),
            links: HashMap::new(),
            samples: HashMap::new(),
            commands,
            around: surroundings,
            next_id: 0,
            draining: false,
            stopped: false,
        }
    }

    /// Runs until drained or stopped. Every sequence has had its last word when this returns.
    pub(crate) fn run(mut self) {
        loop {
            while let Ok(command) = self.commands.try_recv() {
                self.handle(command);
            }
            self.leave_abandoned();
            self.pump();
            self.admit();
            let progressed = !self.is_over() && self.step();
            self.publish();
            if self.is_over() {
                break;
            }
            if !progressed {
                match self.commands.blocking_recv() {
                    Some(command) => self.handle(command),
                    None => break,
                }
            }
        }
        let left = std::mem::take(&mut self.running)
            .into_iter()
            .chain(std::mem::take(&mut self.waiting));
        for sequence in left {
            sequence.fail(Failure::Stopping);
        }
        // Requests whose command had not been looked at fail the same way.
        self.commands.close();
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(submission) = command {
                submission.outbox.fail(Failure::Stopping);
            }
        }
    }

    fn is_over(&self) -> bool {
        self.stopped || (self.draining && self.running.is_empty() && self.waiting.is_empty())
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(submission) if self.draining => submission.outbox.fail(Failure::Stopping),
            Command::Submit(submission) => self.submit(*submission),
            Command::Matched(id, hit) => {
                // A sequence that has left meanwhile gives the lease back by dropping it.
                if let Some(sequence) = self.waiting.iter_mut().find(|sequence| sequence.id == id) {
                    sequence.phase = Phase::Queued(hit);
                }
            }
            Command::Opened(id, Ok(link)) => self.begin_retrieval(id, *link),
            Command::Opened(id, Err(why)) => self.give_up_retrieval(id, why),
            Command::Offer(id, blocks) => self.offer_again(id, &blocks),
            Command::Wake => {}
            Command::Drain => self.draining = true,
            Command::Stop => self.stopped = true,
        }
    }

    /// Tells routers and dashboards how things stand.
    fn publish(&mut self) {
        self.around.hub.publish(&self.tier.take_changes());
        let waiting = self.waiting.iter().map(Sequence::remaining);
        let prefilling = self
            .running
            .iter()
            .map(Sequence::remaining)
            .filter(|remaining| *remaining > 1);
        let pages = self.tier.pages().max(1) as f32;
        let load = Load {
            running: self.running.len(),
            waiting: self.waiting.len(),
            prefill_tokens_waiting: waiting.chain(prefilling).sum(),
            kv_usage: 1.0 - self.tier.available() as f32 / pages,
            draining: self.draining,
        };
        self.around.metrics.load(&load);
        self.around.load.send_if_modified(|known| {
            let changed = *known != load;
            *known = load;
            changed
        });
    }

    fn running_index(&self, id: SequenceId) -> Option<usize> {
        self.running.iter().position(|sequence| sequence.id == id)
    }
}
