//! [`BlockCache`]: what a store serves, and the state that its parts share.
//!
//! Invariants:
//! - A block is in `available` if and only if the tiers together hold all its layers (and its namespace is known).
//! - What a lease pins is neither evicted from the host tier nor reclaimed from disk: both decide under the state's lock.
//! - Locks are taken in one order: state, then the disk's table or the namespaces or a mailbox. No I/O under the state's lock.

mod availability;
mod contains;
mod epoch;
mod flights;
mod gate;
mod get;
mod match_prefix;
mod numbers;
mod policy;
mod prefetch;
mod put;
mod read;
mod reserve;

use std::{
    collections::HashSet,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use kvasir_block::{KvSchema, LayerBlockKey, NamespaceId, Tenant};
use kvasir_device::{Arena, Ready};
use kvasir_tier::{DiskConfig, DiskTier, HostConfig, HostTier, ObjectTier};
use parking_lot::Mutex;

use self::{availability::Available, flights::Flights, gate::ReadGate, policy::ReclaimWatch, prefetch::Prefetch};
pub use self::{
    get::{GetOptions, GetOutcome},
    match_prefix::PrefixMatch,
    policy::Admission,
    put::PutOutcome,
    reserve::{PutBuffer, PutPayload},
};
use crate::{
    CacheConfig, CacheError, ErrorKind, LeaseId, Subscription,
    ahead::Ahead,
    event::Hub,
    indexes::Indexes,
    lease::Leases,
    namespace::{BasisId, Namespaces},
    retrieve::{ContextBudget, Registry},
    reuse::Reuse,
    stats::Counters,
};

/// How long closing waits for what is on its way to the bucket; what is not there then is lost from the object tier.
const OBJECT_STOP_MAX: Duration = Duration::from_secs(10);

/// Where bytes were, or are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Memory.
    Host,
    /// Segment files, or the queue before them.
    Disk,
    /// A bucket that several stores share.
    Object,
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
    pub(crate) disk: DiskTier,
    pub(crate) object: Option<ObjectTier>,
    /// The host tier's memory, to look things up in without its lock.
    arena: Arena,
    /// Makes that memory before it is needed.
    _ready: Option<Ready>,
    /// Bytes of puts that are received outside the arena.
    heap_reserved: Arc<AtomicU64>,
    pub(crate) state: Mutex<State>,
    pub(crate) counters: Counters,
    disk_gate: ReadGate,
    flights: Flights,
    prefetch: Arc<Prefetch>,
    pub(crate) contexts: ContextBudget,
    pub(crate) chains: Registry,
    pub(crate) indexes: Indexes,
}

pub(crate) struct State {
    pub(crate) host: HostTier,
    pub(crate) leases: Leases,
    pub(crate) available: Available,
    events: Hub,
    reuse: Reuse,
    ahead: Ahead,
    /// In memory and not on disk, though puts of it were accepted.
    unsaved: HashSet<LayerBlockKey>,
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
        let mut disk_config = DiskConfig {
            absent: config.disk_absent,
            segment_bytes: config.segment_bytes,
            queue_bytes_max: config.flush_queue_bytes_max,
            free_bytes_min: config.disk_free_bytes_min,
            scrub_bytes_per_second: config.scrub_bytes_per_second,
            ..DiskConfig::in_dir(&config.data_dir, config.disk_bytes_max)
        };
        if !config.disks.is_empty() {
            disk_config.disks.clone_from(&config.disks);
        }
        let disk = DiskTier::open(disk_config)?;
        let object = config.object.clone().map(ObjectTier::open).transpose();
        let object =
            object.map_err(|error| CacheError::because(ErrorKind::Config, format!("object: {error}"), error))?;
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
            reuse: Reuse::new(config.reuse_entries),
            ahead: Ahead::default(),
            unsaved: HashSet::new(),
        };
        let disk_gate = ReadGate::new(config.disk_reads_max, config.disk_reads_waiting_max);
        let prefetch = Arc::new(Prefetch::new(config.prefetch_queue_max));
        let contexts = ContextBudget::new(config.contexts_max, config.context_bytes_max);
        let indexes = Indexes::new(&config);
        let ready_bytes = config.host_ready_bytes;
        let ready = (ready_bytes > 0).then(|| arena.keep_ready(ready_bytes));
        let shared = Arc::new(Shared {
            config,
            epoch,
            started: Instant::now(),
            namespaces,
            disk,
            object,
            _ready: ready,
            arena,
            heap_reserved: Arc::default(),
            state: Mutex::new(state),
            counters: Counters::default(),
            disk_gate,
            flights: Flights::default(),
            prefetch,
            contexts,
            chains: Registry::default(),
            indexes,
        });
        let no_thread = |error: std::io::Error| {
            CacheError::because(ErrorKind::Disk, format!("cannot start a thread: {error}"), error)
        };
        let cache = Self { shared };
        let shared = &cache.shared;
        if let Some(object) = &shared.object {
            for namespace in shared.namespaces.ids() {
                object.open_namespace(namespace);
            }
        }
        for namespace in shared.namespaces.ids() {
            shared.open_derived(namespace);
        }
        shared.disk.start(ReclaimWatch::of(shared)).map_err(no_thread)?;
        shared.indexes.start(shared).map_err(no_thread)?;
        shared.prefetch.start(Arc::downgrade(shared)).map_err(no_thread)?;
        Ok(cache)
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
        if let Some(object) = &self.shared.object {
            object.open_namespace(id);
        }
        self.shared.open_derived(id);
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
        let basis = self.shared.namespaces.set_basis(namespace, file)?;
        self.shared.open_derived(namespace);
        Ok(basis)
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
        self.prefetch.stop();
        self.indexes.stop();
        // The disk first: what it reclaims while it writes its last may go to the bucket.
        let stopped = self.disk.stop();
        if let Some(object) = &self.object
            && let Err(error) = object.stop(Instant::now() + OBJECT_STOP_MAX)
        {
            tracing::warn!(%error, "closed with layer blocks that are not in the bucket");
        }
        stopped.map_err(flush_failed)
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

#[cfg(test)]
mod tests;
