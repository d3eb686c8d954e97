//! The put path by itself, for who computes steps without a worker and wants to know what pushing costs.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use kvasir_block::{BlockHash, KvSchema};
use kvasir_model::PageId;
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{compute::Store, config::WorkerConfig, offload::PushStep, worker::connect};

/// Longest wait for the store, until it is there, and until it has what it was given.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// A worker's queue to its store (`worker.store_url`), and the tasks that empty it.
#[derive(Debug)]
pub struct Pusher {
    store: Store,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// What became of what was pushed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pushed {
    /// Seconds until the store had answered everything.
    pub settled: Duration,
    /// Blocks that the store holds.
    pub held: usize,
    /// Blocks that it does not: there was no room in the queue, on the way to it, or at the store.
    pub dropped: usize,
}

impl Pusher {
    /// Starts the tasks, and waits until the store is there. On a tokio runtime.
    ///
    /// # Errors
    /// No store is configured, or it did not answer.
    pub async fn start(config: &WorkerConfig, schema: &KvSchema) -> anyhow::Result<Self> {
        config.validate()?;
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let store = connect(config, schema, Bytes::new(), &tasks, &stop)?.context("worker.store_url names no store")?;
        let out = Self { store, tasks, stop };
        let connected = timeout(WAIT_MAX, out.store.session.connected()).await;
        ensure!(connected.is_ok(), "the store was not there within {WAIT_MAX:?}");
        Ok(out)
    }

    /// Offers the blocks that a step completes; those that the queue has room for are pushed layer by layer.
    pub fn step(&self, completed: impl IntoIterator<Item = (BlockHash, PageId)>) -> PushStep<'_> {
        let mut step = PushStep::new(&self.store.offload);
        for (hash, page) in completed {
            step.offer(hash, page);
        }
        step
    }

    /// Waits until everything was answered, and says what of `chain` the store took.
    ///
    /// # Errors
    /// It took too long.
    pub async fn settle(&self, chain: &[BlockHash]) -> anyhow::Result<Pushed> {
        let begun = Instant::now();
        let idle = timeout(WAIT_MAX, self.store.offload.idle()).await;
        ensure!(
            idle.is_ok(),
            "the store did not take what was pushed within {WAIT_MAX:?}"
        );
        let dropped = self.store.offload.standing(chain).missing.len();
        Ok(Pushed {
            settled: begun.elapsed(),
            held: chain.len() - dropped,
            dropped,
        })
    }

    /// Ends the tasks.
    pub async fn stop(self) {
        self.store.offload.close();
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
