//! Limits and places. A plain struct: services parse configuration, this crate does not.

use std::{collections::HashMap, path::PathBuf, time::Duration};

use kvasir_block::{
    Tenant,
    planted::{Bug, planted},
};
use kvasir_tier::{AbsentDisk, DiskPath, HostPolicy, HugePages, ObjectConfig};

use crate::{Admission, CacheError, ErrorKind};

/// How much, how long, and where.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// Folder that this cache has for itself; made where missing.
    pub data_dir: PathBuf,
    /// Most bytes of the host tier: payloads in whole pages, and bookkeeping.
    pub host_bytes_max: u64,
    /// What the host tier evicts first.
    pub host_policy: HostPolicy,
    /// Whether to ask for pages of 2 MiB for the host tier.
    pub huge_pages: HugePages,
    /// Bytes of that memory that were never used which are kept ready, by a thread of its own. Putting a block into
    /// memory that is not costs several times as much. 0: none.
    pub host_ready_bytes: u64,
    /// Most bytes of the host tier for single tenants: each evicts its own blocks beyond it, and has its part of a full tier for
    /// itself (see [`kvasir_tier::Owner`]).
    pub tenant_host_bytes_max: HashMap<Tenant, u64>,
    /// The same for each tenant that is not named there; `None`: they share what there is.
    pub tenant_host_bytes_max_default: Option<u64>,
    /// Most bytes of segment files in `data_dir`, where no `disks` are named; at least two segments.
    pub disk_bytes_max: u64,
    /// The disks that keep blocks; none: `data_dir` does. Namespaces and the epoch are always there.
    pub disks: Vec<DiskPath>,
    /// What to do about one of them that is not there at the start.
    pub disk_absent: AbsentDisk,
    /// Free bytes that are left to others on each disk.
    pub disk_free_bytes_min: u64,
    /// Most bytes per second that each disk's scrub reads; 0 turns it off.
    pub scrub_bytes_per_second: u64,
    /// The object tier, if there is one.
    pub object: Option<ObjectConfig>,
    /// Bytes of one segment file: the unit in which disk space comes back.
    pub segment_bytes: u64,
    /// Most payload bytes accepted but not yet synced; beyond it puts are answered busy.
    pub flush_queue_bytes_max: u64,
    /// Most layer blocks read from disk at a time; beyond it gets wait.
    pub disk_reads_max: usize,
    /// Most layer blocks that wait to be read from disk; beyond it gets are answered busy.
    pub disk_reads_waiting_max: usize,
    /// Which puts are written to disk.
    pub disk_admission: Admission,
    /// How often a layer block must have been read from below memory, of late, to be kept in memory; 1 to 15.
    pub promote_after_reads: u32,
    /// Blocks, and layer blocks, whose reuse is told apart; 4 bytes for each.
    pub reuse_entries: usize,
    /// How many layers ahead of a reader with a lease are brought into memory; 0 for none.
    pub prefetch_layers: u16,
    /// Most bytes brought ahead and not read yet; beyond it nothing is brought.
    pub prefetch_bytes_max: u64,
    /// Most layers of leases that wait to be brought; beyond it they are not.
    pub prefetch_queue_max: usize,
    /// Longest lease granted; longer wishes are cut to it.
    pub lease_max: Duration,
    /// Most leases at a time, open contexts included; beyond it a match comes without a lease.
    pub leases_max: usize,
    /// Most contexts open for retrieval at a time.
    pub contexts_max: usize,
    /// Most blocks in one context's chain.
    pub context_blocks_max: usize,
    /// Most payload bytes that all open contexts hold verified; beyond it a query reads and verifies blocks anew, which is
    /// right but slower. Bytes that the host tier holds too are shared with it, and counted in both.
    pub context_bytes_max: u64,
    /// Most bytes of the files of sketch bases, each counted once however many namespaces have it.
    pub basis_bytes_max: u64,
    /// Most bytes of sketches that are kept in memory beside those that contexts hold; 0: keys are sketched when a query first
    /// wants them, and sketches are not kept over a restart.
    pub sketch_bytes_max: u64,
    /// Most layer blocks that wait to be sketched ahead; beyond it the first query sketches them. 0 as for `sketch_bytes_max`.
    pub sketch_queue_max: usize,
    /// Most layers of open contexts whose sketches wait to be clustered, which makes searches of them quicker; beyond it a later query
    /// asks again. 0: none are.
    pub cluster_queue_max: usize,
    /// Most bytes of query samples in memory, for indexes that are drawn by them; the oldest go first.
    pub query_bytes_max: u64,
    /// Most bytes of built indexes in memory; the least recently used go first, and are read again.
    pub index_bytes_max: u64,
    /// Most contexts that wait for an index to be built; each pins its blocks.
    pub build_queue_max: usize,
    /// Threads that build one index together.
    pub build_threads: usize,
    /// Most namespaces.
    pub namespaces_max: usize,
    /// Most events a subscriber may be behind; beyond it the subscription ends as lagged.
    pub event_queue_max: usize,
    /// Most subscribers at a time.
    pub subscribers_max: usize,
}

impl CacheConfig {
    /// Defaults for a small machine, in `data_dir`.
    pub fn in_dir(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            host_bytes_max: 1 << 30,
            host_policy: HostPolicy::default(),
            huge_pages: HugePages::Auto,
            host_ready_bytes: 0,
            tenant_host_bytes_max: HashMap::new(),
            tenant_host_bytes_max_default: None,
            disk_bytes_max: 16 << 30,
            disks: Vec::new(),
            disk_absent: AbsentDisk::Refuse,
            disk_free_bytes_min: 0,
            scrub_bytes_per_second: 8 << 20,
            object: None,
            segment_bytes: 256 << 20,
            flush_queue_bytes_max: 256 << 20,
            disk_reads_max: 64,
            disk_reads_waiting_max: 4096,
            disk_admission: Admission::Always,
            promote_after_reads: 1,
            reuse_entries: 1 << 20,
            prefetch_layers: 2,
            prefetch_bytes_max: 64 << 20,
            prefetch_queue_max: 1024,
            lease_max: Duration::from_secs(60),
            leases_max: 16_384,
            contexts_max: 1024,
            context_blocks_max: 65_536,
            context_bytes_max: 1 << 30,
            basis_bytes_max: 64 << 20,
            sketch_bytes_max: 64 << 20,
            sketch_queue_max: 16_384,
            cluster_queue_max: 4096,
            query_bytes_max: 128 << 20,
            index_bytes_max: 256 << 20,
            build_queue_max: 16,
            build_threads: 1,
            namespaces_max: 1024,
            event_queue_max: 65_536,
            subscribers_max: 256,
        }
    }

    /// The budget of a tenant in the host tier, if it has one.
    pub(crate) fn host_budget(&self, tenant: &Tenant) -> Option<u64> {
        if planted(Bug::TenantBudgetIgnored) {
            return None;
        }
        let own = self.tenant_host_bytes_max.get(tenant).copied();
        own.or(self.tenant_host_bytes_max_default)
    }

    pub(crate) fn validate(&self) -> Result<(), CacheError> {
        let positive = [
            ("disk_reads_max", self.disk_reads_max),
            ("reuse_entries", self.reuse_entries),
            ("leases_max", self.leases_max),
            ("contexts_max", self.contexts_max),
            ("context_blocks_max", self.context_blocks_max),
            ("namespaces_max", self.namespaces_max),
            ("build_threads", self.build_threads),
            ("event_queue_max", self.event_queue_max),
            ("subscribers_max", self.subscribers_max),
            ("lease_max", usize::from(!self.lease_max.is_zero())),
        ];
        if !(1..=15).contains(&self.promote_after_reads) {
            let message = format!(
                "promote_after_reads is {}: must be from 1 to 15",
                self.promote_after_reads
            );
            return Err(CacheError::new(ErrorKind::Config, message));
        }
        match positive.iter().find(|(_, value)| *value == 0) {
            Some((field, _)) => Err(CacheError::new(
                ErrorKind::Config,
                format!("{field} is 0: it must be more"),
            )),
            None => Ok(()),
        }
    }
}
