//! Prefetch: the next layers of a leased chain are brought into memory before their reader asks.
//!
//! A lease names a chain that will be read layer after layer. When it is granted, its first layers are asked for; when layer *l*
//! is read, the `prefetch_layers` after it. One thread does the work, in small batches, and only while nobody waits for the disk
//! and half of its places are free: a demand read never stands behind more than one small batch. Nothing is brought beyond
//! `prefetch_bytes_max` unread bytes, nor where the host tier has no room that is not leased: then it is dropped, and the reader
//! reads for itself. What a lease asked for ends with the lease.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use kvasir_block::{BlockKey, LayerBlockKey};
use kvasir_tier::DiskRead;
use parking_lot::{Condvar, Mutex};

use super::{
    GetOutcome, Shared, Tier,
    flights::{Lead, Seat},
};
use crate::LeaseId;

/// Layer blocks of a batch: what a demand read may have to wait for.
const BATCH_READS: usize = 8;
/// How long one look at a busy disk lasts before it is asked again whether anybody still wants this.
const LOOK: Duration = Duration::from_millis(20);

/// Layers that leases want, oldest wish first.
#[derive(Debug)]
pub(crate) struct Prefetch {
    queue_max: usize,
    queue: Mutex<Queue>,
    wake: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Queue {
    wishes: VecDeque<Wish>,
    /// Whether the thread is at one that it took.
    running: bool,
    stop: bool,
}

/// A layer of all blocks of a lease.
#[derive(Clone, Copy, Debug)]
struct Wish {
    lease: LeaseId,
    layer: u16,
}

impl Prefetch {
    pub(crate) fn new(queue_max: usize) -> Self {
        Self {
            queue_max,
            queue: Mutex::default(),
            wake: Condvar::new(),
            thread: Mutex::default(),
        }
    }

    /// Starts the thread; once.
    pub(crate) fn start(self: &Arc<Self>, shared: Weak<Shared>) -> std::io::Result<()> {
        let prefetch = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name("kv-prefetch".to_owned())
            .spawn(move || {
                while let Some(wish) = prefetch.next() {
                    let Some(shared) = shared.upgrade() else { return };
                    shared.bring(wish);
                }
            })?;
        *self.thread.lock() = Some(thread);
        Ok(())
    }

    /// Ends the thread after its current batch; what is queued is dropped.
    pub(crate) fn stop(&self) {
        self.queue.lock().stop = true;
        self.wake.notify_all();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the prefetch thread panicked");
        }
    }

    /// Wishes that are being granted (one or none), and that wait.
    pub(crate) fn load(&self) -> (usize, usize) {
        let queue = self.queue.lock();
        (usize::from(queue.running), queue.wishes.len())
    }

    /// Queues a wish; false if the queue is full.
    fn wish(&self, wish: Wish) -> bool {
        let mut queue = self.queue.lock();
        if queue.wishes.len() >= self.queue_max {
            return false;
        }
        queue.wishes.push_back(wish);
        self.wake.notify_one();
        true
    }

    fn next(&self) -> Option<Wish> {
        let mut queue = self.queue.lock();
        queue.running = false;
        loop {
            if queue.stop {
                return None;
            }
            match queue.wishes.pop_front() {
                Some(wish) => {
                    queue.running = true;
                    return Some(wish);
                }
                None => self.wake.wait(&mut queue),
            }
        }
    }

    fn is_stopping(&self) -> bool {
        self.queue.lock().stop
    }
}

impl Shared {
    /// A reader with `lease` got `keys`: asks for the layers after them.
    pub(super) fn look_ahead(&self, lease: LeaseId, keys: &[LayerBlockKey]) {
        let Some(last) = keys.iter().max_by_key(|key| key.layer) else {
            return;
        };
        let (depth, Some(layers)) = (self.config.prefetch_layers, self.namespaces.layers(last.namespace)) else {
            return;
        };
        if depth == 0 {
            return;
        }
        let wanted = {
            let mut state = self.state.lock();
            if !state.leases.is_live(lease) {
                return;
            }
            // A schema has at most u16::MAX layers.
            state.ahead.want(lease, last.layer, depth, layers as u16)
        };
        for layer in wanted {
            self.wish(Wish { lease, layer });
        }
    }

    /// A lease was granted on blocks that are not all in memory: asks for their first layers.
    pub(super) fn look_ahead_first(&self, lease: LeaseId, layers: usize) {
        let wanted = self
            .state
            .lock()
            .ahead
            .want_first(lease, self.config.prefetch_layers, layers as u16);
        for layer in wanted {
            self.wish(Wish { lease, layer });
        }
    }

    fn wish(&self, wish: Wish) {
        if !self.prefetch.wish(wish) {
            self.counters.prefetch_dropped.add(1);
        }
    }

    /// Brings what a wish lacks in memory.
    fn bring(&self, wish: Wish) {
        let Some(blocks) = self.leased(wish.lease) else { return };
        let absent: Vec<LayerBlockKey> = {
            let state = self.state.lock();
            let keys = blocks.iter().map(|block| block.layer(wish.layer));
            keys.filter(|key| !state.host.contains(*key)).collect()
        };
        let mut absent: VecDeque<LayerBlockKey> = absent.into_iter().filter(|key| self.disk.contains(*key)).collect();
        while !absent.is_empty() {
            if self.prefetch.is_stopping() || self.leased(wish.lease).is_none() {
                self.counters.prefetch_dropped.add(absent.len() as u64);
                return;
            }
            let reads = absent.len().min(BATCH_READS);
            let bytes: u64 = absent.iter().take(reads).map(|key| self.layer_block_bytes(*key)).sum();
            if self.state.lock().ahead.bytes() + bytes > self.config.prefetch_bytes_max {
                self.counters.prefetch_dropped.add(absent.len() as u64);
                return;
            }
            let Some(pass) = self.disk_gate.enter_idle(reads, bytes, LOOK) else {
                continue;
            };
            let batch: Vec<LayerBlockKey> = absent.drain(..reads).collect();
            // What somebody reads already is not read twice.
            let seats = batch.into_iter().map(|key| self.flights.board(key));
            let leads: Vec<Lead<'_>> = seats
                .filter_map(|seat| match seat {
                    Seat::Lead(lead) => Some(lead),
                    Seat::Follow(_) => None,
                })
                .collect();
            let keys: Vec<LayerBlockKey> = leads.iter().map(Lead::key).collect();
            if keys.is_empty() {
                continue;
            }
            self.counters.prefetch_issued.add(keys.len() as u64);
            let reads = self.read_disk(&keys, None, true, pass);
            let dropped = self.land_ahead(wish.lease, leads, reads);
            if dropped > 0 {
                self.counters.prefetch_dropped.add((dropped + absent.len()) as u64);
                return;
            }
        }
    }

    /// Keeps what was read ahead and hands it to those who came to want it meanwhile; how much found no room.
    fn land_ahead(&self, lease: LeaseId, leads: Vec<Lead<'_>>, reads: Vec<DiskRead>) -> usize {
        let mut dropped = 0;
        for (lead, read) in leads.into_iter().zip(reads) {
            let key = lead.key();
            match read {
                DiskRead::Hit { payload, checksum } => {
                    let bytes = payload.len() as u64;
                    if self.promote(&[(key, payload.clone(), checksum)], &[]) == 1 {
                        self.state.lock().ahead.brought(key, lease, bytes);
                    } else {
                        dropped += 1;
                    }
                    lead.land(GetOutcome::Hit {
                        payload,
                        checksum,
                        tier: Tier::Disk,
                    });
                }
                DiskRead::Corrupt => {
                    self.promote(&[], &[key.block()]);
                    lead.land(GetOutcome::Corrupt);
                }
                // Its readers look for themselves.
                _ => drop(lead),
            }
        }
        dropped
    }

    /// The blocks of a lease that has not ended.
    fn leased(&self, lease: LeaseId) -> Option<Arc<[BlockKey]>> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.leases.expire(Instant::now());
        let leases = &state.leases;
        state.ahead.sweep(|lease| leases.is_live(lease));
        leases.blocks(lease)
    }
}
