//! Load: a closed or an open loop over some connections, counted and timed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use kvasir_client::{ClientError, GetOutcome, Namespace, PutOutcome, StoreClient};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{DataSet, Zipf, lane::Lane};

/// Most requests of an open loop that are under way; beyond it a due request is not sent and counted as such.
const UNDER_WAY_MAX: usize = 1024;

/// What is asked for, over and over.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    /// A stream that gets one context's blocks.
    Get,
    /// A stream that puts one new context's blocks and waits for their outcomes.
    Put,
    /// How much of one context is held.
    Match,
    /// Which blocks of one context are held; over streams as `Match`.
    Exists,
    /// Gets, with puts between them.
    Mix {
        /// Share of gets.
        read_share: f64,
    },
}

/// A load, ready to be applied.
pub(super) struct Load {
    pub(super) clients: Vec<StoreClient>,
    /// Blocking connections; where there are any, they carry the load and the clients do not.
    pub(super) lanes: Mutex<Vec<Lane>>,
    pub(super) namespace: Namespace,
    pub(super) data: DataSet,
    pub(super) operation: Operation,
    /// Requests under way per connection, closed loop.
    pub(super) depth: usize,
    /// Requests per second over all connections, open loop; `None` is the closed loop.
    pub(super) rate: Option<f64>,
    pub(super) time: Duration,
    pub(super) zipf: f64,
    pub(super) seed: u64,
    /// The next context that a put makes; never the same twice, or a put would be of blocks that are there.
    pub(super) next_new: Arc<AtomicU64>,
}

/// What happened.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    pub(super) elapsed: Duration,
    pub(super) operations: u64,
    /// Blocks that were got, stored, or found held.
    pub(super) blocks: u64,
    /// Payload bytes of those that travelled.
    pub(super) bytes: u64,
    /// Blocks that were not: absent, busy, too late.
    pub(super) refused: u64,
    /// Requests of an open loop that were due and not sent, because too many were under way.
    pub(super) not_sent: u64,
    /// Nanoseconds.
    pub(super) latency: Histogram<u64>,
}

/// Of one request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Done {
    pub(super) blocks: u64,
    pub(super) bytes: u64,
    pub(super) refused: u64,
}

/// What all requests share.
pub(super) struct Shared {
    pub(super) namespace: Namespace,
    pub(super) data: DataSet,
    pub(super) operation: Operation,
    pub(super) zipf: Zipf,
    pub(super) next_new: Arc<AtomicU64>,
}

impl Load {
    /// Applies it for `time`.
    pub(super) async fn apply(&self, time: Duration) -> Result<Tally> {
        let shared = Arc::new(Shared {
            namespace: self.namespace.clone(),
            data: self.data.clone(),
            operation: self.operation,
            zipf: Zipf::new(self.data.contexts, self.zipf),
            next_new: Arc::clone(&self.next_new),
        });
        let begun = Instant::now();
        let lanes = std::mem::take(&mut *self.lanes.lock());
        let mut tally = match self.rate {
            _ if !lanes.is_empty() => self.blocking(lanes, &shared, time).await?,
            None => self.closed(&shared, begun + time).await?,
            Some(rate) => self.open(&shared, begun, time, rate).await?,
        };
        tally.elapsed = begun.elapsed();
        Ok(tally)
    }

    async fn closed(&self, shared: &Arc<Shared>, until: Instant) -> Result<Tally> {
        let mut loops = JoinSet::new();
        for (at, client) in self.clients.iter().enumerate() {
            for lane in 0..self.depth {
                let (client, shared) = (client.clone(), Arc::clone(shared));
                let seed = self.seed ^ ((at * self.depth + lane) as u64).wrapping_mul(0x2545_F491_4F6C_DD1D);
                loops.spawn(async move {
                    let mut rng = SmallRng::seed_from_u64(seed);
                    let mut tally = Tally::empty()?;
                    while Instant::now() < until {
                        let due = Instant::now();
                        let done = shared.once(&client, &mut rng).await?;
                        tally.add(done, due.elapsed());
                    }
                    anyhow::Ok(tally)
                });
            }
        }
        let mut all = Tally::empty()?;
        while let Some(tally) = loops.join_next().await {
            all.join(&tally.context("a loop of the load broke")??);
        }
        Ok(all)
    }

    /// A closed loop on a thread for each lane.
    async fn blocking(&self, lanes: Vec<Lane>, shared: &Arc<Shared>, time: Duration) -> Result<Tally> {
        let mut loops = JoinSet::new();
        for (at, mut lane) in lanes.into_iter().enumerate() {
            let shared = Arc::clone(shared);
            let seed = self.seed ^ (at as u64).wrapping_mul(0x2545_F491_4F6C_DD1D);
            loops.spawn_blocking(move || {
                let mut rng = SmallRng::seed_from_u64(seed);
                let mut tally = Tally::empty()?;
                let until = Instant::now() + time;
                while Instant::now() < until {
                    let due = Instant::now();
                    let done = lane.once(&shared, &mut rng)?;
                    tally.add(done, due.elapsed());
                }
                anyhow::Ok((lane, tally))
            });
        }
        let mut all = Tally::empty()?;
        while let Some(done) = loops.join_next().await {
            let (lane, tally) = done.context("a loop of the load broke")??;
            all.join(&tally);
            self.lanes.lock().push(lane);
        }
        Ok(all)
    }

    async fn open(&self, shared: &Arc<Shared>, begun: Instant, time: Duration, rate: f64) -> Result<Tally> {
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let mut under_way = JoinSet::new();
        let mut tally = Tally::empty()?;
        let mut due = begun;
        for at in 0.. {
            // Poisson arrivals: what independent users look like.
            due += Duration::from_secs_f64(-(1.0 - rng.random::<f64>()).ln() / rate);
            if due > begun + time {
                break;
            }
            sleep_until(due).await;
            while let Some(done) = under_way.try_join_next() {
                let (done, latency) = done.context("a request of the load broke")??;
                tally.add(done, latency);
            }
            if under_way.len() >= UNDER_WAY_MAX {
                tally.not_sent += 1;
                continue;
            }
            let client = self.clients[at % self.clients.len()].clone();
            let (shared, mut rng) = (Arc::clone(shared), SmallRng::seed_from_u64(rng.random()));
            under_way.spawn(async move {
                let done = shared.once(&client, &mut rng).await?;
                Ok::<_, ClientError>((done, due.elapsed()))
            });
        }
        while let Some(done) = under_way.join_next().await {
            let (done, latency) = done.context("a request of the load broke")??;
            tally.add(done, latency);
        }
        Ok(tally)
    }
}

impl Shared {
    /// One request.
    async fn once(&self, client: &StoreClient, rng: &mut SmallRng) -> Result<Done, ClientError> {
        let context = self.zipf.draw(rng) as u64;
        match self.operation {
            Operation::Get => self.get(client, context).await,
            Operation::Put => self.put(client).await,
            Operation::Match | Operation::Exists => {
                let held = client
                    .match_prefix(self.namespace.id, &self.data.chain(context), None)
                    .await?;
                Ok(Done {
                    blocks: held.hit_blocks as u64,
                    refused: (self.data.blocks - held.hit_blocks) as u64,
                    bytes: 0,
                })
            }
            Operation::Mix { read_share } => {
                if rng.random::<f64>() < read_share {
                    self.get(client, context).await
                } else {
                    self.put(client).await
                }
            }
        }
    }

    async fn get(&self, client: &StoreClient, context: u64) -> Result<Done, ClientError> {
        let chain = self.data.chain(context);
        let mut gets = client.get_blocks(&self.namespace, &chain, 0..1, None, None).await?;
        let mut done = Done::default();
        while let Some(block) = gets.next().await? {
            match (block.outcome, block.payload) {
                (GetOutcome::Hit, Some(payload)) => {
                    done.blocks += 1;
                    done.bytes += payload.len() as u64;
                }
                _ => done.refused += 1,
            }
        }
        Ok(done)
    }

    async fn put(&self, client: &StoreClient) -> Result<Done, ClientError> {
        let context = self.next_new.fetch_add(1, Ordering::Relaxed);
        let mut puts = client.put_blocks(&self.namespace).await?;
        for name in self.data.new_chain(context) {
            puts.put(self.data.payloads.block(name)).await?;
        }
        let mut done = Done::default();
        for (_, _, outcome) in puts.finish().await? {
            match outcome {
                PutOutcome::Stored | PutOutcome::Present => {
                    done.blocks += 1;
                    done.bytes += self.namespace.layer_block_bytes as u64;
                }
                _ => done.refused += 1,
            }
        }
        Ok(done)
    }
}

impl Tally {
    fn empty() -> Result<Self> {
        Ok(Self {
            elapsed: Duration::ZERO,
            operations: 0,
            blocks: 0,
            bytes: 0,
            refused: 0,
            not_sent: 0,
            // 1 us to 100 s at three digits.
            latency: Histogram::new_with_bounds(1_000, 100_000_000_000, 3).context("a histogram of these bounds")?,
        })
    }

    fn add(&mut self, done: Done, latency: Duration) {
        self.operations += 1;
        self.blocks += done.blocks;
        self.bytes += done.bytes;
        self.refused += done.refused;
        self.latency.saturating_record(latency.as_nanos() as u64);
    }

    fn join(&mut self, other: &Self) {
        self.operations += other.operations;
        self.blocks += other.blocks;
        self.bytes += other.bytes;
        self.refused += other.refused;
        self.not_sent += other.not_sent;
        // Both have the same bounds, so nothing can fall outside.
        let _same_bounds = self.latency.add(&other.latency);
    }
}
