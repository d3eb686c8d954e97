//! [`BlockCache`]: what a store serves, and the state that its parts share.
//!
//! Invariants:
//! - A block is in `available` if and only if the tiers together hold all its layers (and its namespace is known).
//! - What a lease pins is neither evicted from the host tier nor reclaimed from disk: both decide under the state's lock.
//! - Locks are taken in one order: state, then the disk's table or the namespaces or a mailbox. No I/O under the state's lock.

mod availability;
mod epoch;
mod get;
mod match_prefix;
mod put;
mod reserve;

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize},
    },
    time::Instant,
};

use kvasir_block::{BlockKey, KvSchema, LayerBlockKey, NamespaceId, Tenant};
use kvasir_device::Arena;
use kvasir_tier::{DiskConfig, DiskTier, DiskWatch, HostConfig, HostTier};
use parking_lot::Mutex;

use self::availability::Available;
pub use self::{
    get::GetOutcome,
    match_prefix::PrefixMatch,
    put::PutOutcome,
    reserve::{GetOptions, PutBuffer},
};
use crate::{
    CacheConfig, CacheError, CacheStats, ErrorKind, LeaseId, Subscription,
    event::Hub,
    lease::Leases,
    namespace::{BasisId, Namespaces},
    retrieve::{ContextBudget, Registry},
    stats::Counters,
};

/// Where bytes were, or are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Memory.
    Host,
    /// Segment files, or the queue before them.
    Disk,
}

/// Layer blocks of many namespaces, in memory and on disk. See the crate's documentation.
///
/// Dropping it flushes too, but only [`Self::close`] tells whether that worked.
#[derive(Debug)]
pub struct BlockCache {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) config: CacheConfig,
    pub(crate) epoch: u64,
    started: Instant,
    pub(crate) namespaces: Namespaces,
    disk: DiskTier,
    /// The host tier's memory, to look things up in without its lock.
    arena: Arena,
    /// Bytes of puts that are received outside the arena.
    heap_reserved: Arc<AtomicU64>,
    pub(crate) state: Mutex<State>,
    pub(crate) counters: Counters,
    disk_reads: AtomicUsize,
    pub(crate) contexts: ContextBudget,
    pub(crate) chains: Registry,
}

pub(crate) struct State {
    pub(crate) host: HostTier,
    pub(crate) leases: Leases,
    pub(crate) available: Available,
    events: Hub,
}

impl BlockCache {
    /// Opens the data folder and recovers what it holds.
    ///
    /// # Errors
    /// `Locked` when another process has it open, `Config` for limits that cannot work, `Unsupported` for files of a newer
    /// version, `Disk` when the file system or the index fails.
    pub fn open(config: CacheConfig) -> Result<Self, CacheError> {
        config.validate()?;
        // First of all: it takes the folder's lock.
        let disk = DiskTier::open(DiskConfig {
            dir: config.data_dir.clone(),
            bytes_max: config.disk_bytes_max,
            segment_bytes: config.segment_bytes,
            queue_bytes_max: config.flush_queue_bytes_max,
        })?;
        let namespaces = Namespaces::open(
            config.data_dir.join("namespaces"),
            config.namespaces_max,
            config.basis_bytes_max,
        )?;
        let epoch = epoch::next(&config.data_dir.join("epoch"))?;
        let mut available = Available::default();
        disk.visit_blocks(|block, layers| {
            if namespaces.layers(block.namespace) == Some(layers) {
                available.insert(*block);
            }
        });
        let recovery = disk.recovery();
        tracing::info!(
            epoch,
            namespaces = namespaces.len(),
            blocks = available.len(),
            segments = recovery.segments,
            found_by_scan = recovery.found_by_scan,
            corrupt = recovery.corrupt,
            torn_bytes = recovery.torn_bytes,
            index_rebuilt = recovery.index_rebuilt,
            "block cache is open"
        );
        let mut host = HostTier::new(HostConfig {
            bytes_max: config.host_bytes_max,
            policy: config.host_policy,
            huge_pages: config.huge_pages,
        })
        .map_err(|error| CacheError::because(ErrorKind::Config, format!("host_bytes_max: {error}"), error))?;
        for (tenant, owner) in namespaces.tenants() {
            if let Some(bytes_max) = config.host_budget(&tenant) {
                host.set_budget(owner, bytes_max);
            }
        }
        let arena = host.arena().clone();
        tracing::info!(bytes = arena.capacity(), pages = ?arena.page_kind(), "host tier has its memory");
        let state = State {
            host,
            leases: Leases::new(config.leases_max, epoch),
            available,
            events: Hub::new(epoch, config.event_queue_max, config.subscribers_max),
        };
        let contexts = ContextBudget::new(config.contexts_max, config.context_bytes_max);
        let shared = Arc::new(Shared {
            config,
            epoch,
            started: Instant::now(),
            namespaces,
            disk,
            arena,
            heap_reserved: Arc::default(),
            state: Mutex::new(state),
            counters: Counters::default(),
            disk_reads: AtomicUsize::new(0),
            contexts,
            chains: Registry::default(),
        });
        let watch = Arc::new(ReclaimWatch(Arc::downgrade(&shared)));
        shared.disk.start(watch).map_err(|error| {
            CacheError::because(
                ErrorKind::Disk,
                format!("cannot start the flusher thread: {error}"),
                error,
            )
        })?;
        Ok(Self { shared })
    }

    /// Changes when the cache starts anew; rises.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch
    }

    /// The limits it was opened with.
    pub fn config(&self) -> &CacheConfig {
        &self.shared.config
    }

    /// Declares a namespace; the same tenant and schema always give the same id. Durable when it returns.
    ///
    /// # Errors
    /// `InvalidArgument` for a schema that cannot be served, `SchemaMismatch`, `LimitReached`, `Disk`.
    pub fn open_namespace(&self, tenant: &Tenant, schema: &KvSchema) -> Result<NamespaceId, CacheError> {
        let (id, new) = self.shared.namespaces.declare(tenant, schema)?;
        if new {
            if let Some(bytes_max) = self.shared.config.host_budget(tenant) {
                let owner = self.shared.namespaces.owner(id);
                self.shared.state.lock().host.set_budget(owner, bytes_max);
            }
            // Its file was lost, perhaps, but not its blocks.
            let mut found = Vec::new();
            self.shared.disk.visit_blocks(|block, _| {
                if block.namespace == id {
                    found.push(*block);
                }
            });
            let mut state = self.shared.state.lock();
            for block in found {
                self.shared.refresh(&mut state, block, Tier::Disk);
            }
        }
        Ok(id)
    }

    /// Keeps the file of a model's sketch basis with a namespace, durably; gives its id. The same one again is no change.
    ///
    /// # Errors
    /// `UnknownNamespace`; `InvalidArgument` for bytes that are no basis or one of another model; `BasisMismatch` when the namespace
    /// has another one; `LimitReached`; `Disk`.
    pub fn set_basis(&self, namespace: NamespaceId, file: &[u8]) -> Result<BasisId, CacheError> {
        self.shared.schema_of(namespace)?;
        self.shared.namespaces.set_basis(namespace, file)
    }

    /// Id of a namespace's sketch basis, if it has one.
    pub fn basis_id(&self, namespace: NamespaceId) -> Option<BasisId> {
        self.shared.namespaces.basis(namespace).map(|basis| basis.id())
    }

    /// The schema of a namespace, if it is known here.
    pub fn schema(&self, namespace: NamespaceId) -> Option<Arc<KvSchema>> {
        self.shared.namespaces.get(namespace)
    }

    /// Gives a lease back early. Unknown leases are ignored: they may have expired.
    pub fn release(&self, lease: LeaseId) {
        self.shared.state.lock().leases.release(lease);
    }

    /// Watches which blocks are available: a snapshot first, then changes. See [`Subscription`].
    ///
    /// # Errors
    /// `LimitReached` when there are too many subscribers.
    pub fn subscribe(&self, namespace: Option<NamespaceId>) -> Result<Subscription, CacheError> {
        let mut state = self.shared.state.lock();
        let State { available, events, .. } = &mut *state;
        events
            .subscribe(namespace, available.by_namespace(namespace))
            .ok_or_else(|| {
                let message = format!(
                    "{} subscribers are watching, subscribers_max allows no more",
                    self.shared.config.subscribers_max
                );
                CacheError::new(ErrorKind::LimitReached, message)
            })
    }

    /// Waits until everything accepted so far is durable.
    ///
    /// # Errors
    /// `Disk` when the disk did not take it: it stays queued and served from memory.
    pub fn flush(&self) -> Result<(), CacheError> {
        self.shared.disk.flush().map_err(flush_failed)
    }

    /// Counts and sizes.
    pub fn stats(&self) -> CacheStats {
        let shared = &self.shared;
        let counters = &shared.counters;
        let disk = shared.disk.stats();
        let (with_basis, basis_bytes) = shared.namespaces.bases();
        let mut state = shared.state.lock();
        state.leases.expire(Instant::now());
        CacheStats {
            epoch: shared.epoch,
            uptime: shared.started.elapsed(),
            namespaces: shared.namespaces.len() as u64,
            namespaces_with_basis: with_basis as u64,
            basis_bytes,
            basis_bytes_max: shared.config.basis_bytes_max,
            blocks: state.available.len() as u64,
            host_bytes: state.host.bytes(),
            host_bytes_max: state.host.bytes_max(),
            host_layer_blocks: state.host.layer_blocks(),
            host_evicted_blocks: state.host.evicted_blocks(),
            disk,
            recovery: shared.disk.recovery(),
            put_blocks: counters.put_blocks.get(),
            put_bytes: counters.put_bytes.get(),
            put_present: counters.put_present.get(),
            put_busy: counters.put_busy.get(),
            put_checksum_mismatch: counters.put_checksum_mismatch.get(),
            put_host_only: counters.put_host_only.get(),
            get_hits_host: counters.get_hits_host.get(),
            get_hits_disk: counters.get_hits_disk.get(),
            get_bytes: counters.get_bytes.get(),
            misses_absent: counters.misses_absent.get(),
            misses_corrupt: counters.misses_corrupt.get(),
            misses_busy: counters.misses_busy.get(),
            host_corrupt: counters.host_corrupt.get(),
            leases: state.leases.len() as u64,
            leases_max: shared.config.leases_max as u64,
            leases_refused: state.leases.refused,
            pinned_blocks: state.leases.pinned_blocks() as u64,
            contexts: shared.contexts.open(),
            contexts_max: shared.config.contexts_max as u64,
            context_bytes: shared.contexts.bytes(),
            context_bytes_max: shared.config.context_bytes_max,
            retrieve_queries: counters.retrieve_queries.get(),
            retrieve_joined: counters.retrieve_joined.get(),
            retrieve_late: counters.retrieve_late.get(),
            retrieve_keys_scanned: counters.retrieve_keys_scanned.get(),
            retrieve_bytes: counters.retrieve_bytes.get(),
            retrieve_missing: counters.retrieve_missing.get(),
            sketched_blocks: counters.sketched_blocks.get(),
            subscribers: state.events.subscribers() as u64,
            subscribers_lagged: state.events.lagged,
        }
    }

    /// Ends subscriptions, flushes, and closes the data folder.
    ///
    /// # Errors
    /// `Disk` when not everything could be written; what could not is lost with this process.
    pub fn close(self) -> Result<(), CacheError> {
        self.shared.shut()
    }
}

impl Drop for BlockCache {
    fn drop(&mut self) {
        // After `close` there is nothing left to do, and a failure was logged by the tier.
        let _ = self.shared.shut();
    }
}

impl Shared {
    fn shut(&self) -> Result<(), CacheError> {
        self.state.lock().events.close();
        self.disk.stop().map_err(flush_failed)
    }

    pub(crate) fn schema_of(&self, namespace: NamespaceId) -> Result<Arc<KvSchema>, CacheError> {
        self.namespaces.get(namespace).ok_or_else(|| {
            let message = format!("namespace {namespace} is not open here: open it with its schema first");
            CacheError::new(ErrorKind::UnknownNamespace, message)
        })
    }

    /// The schema of a key whose layer it has.
    fn schema_of_layer(&self, key: LayerBlockKey) -> Result<Arc<KvSchema>, CacheError> {
        let schema = self.schema_of(key.namespace)?;
        if key.layer >= schema.layers {
            let message = format!(
                "layer {} does not exist: the schema has {} layers, from 0",
                key.layer, schema.layers
            );
            return Err(CacheError::new(ErrorKind::InvalidArgument, message));
        }
        Ok(schema)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("data_dir", &self.config.data_dir)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

fn flush_failed(error: kvasir_tier::FlushError) -> CacheError {
    CacheError::because(ErrorKind::Disk, error.to_string(), error)
}

/// Says what the disk tier may forget: what is not leased.
struct ReclaimWatch(Weak<Shared>);

impl DiskWatch for ReclaimWatch {
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut()) -> bool {
        let Some(shared) = self.0.upgrade() else { return false };
        let mut state = shared.state.lock();
        state.leases.expire(Instant::now());
        if blocks.iter().any(|block| state.leases.is_pinned(block)) {
            return false;
        }
        forget();
        for block in blocks {
            shared.refresh(&mut state, *block, Tier::Disk);
        }
        true
    }
}

#[cfg(test)]
mod tests;
