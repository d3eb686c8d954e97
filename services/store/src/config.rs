//! `[store]`: places and limits.

mod cache;
mod kinds;
mod validate;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use kvasir_cache::HostPolicy;
use kvasir_device::stream::BusyPoll;
use kvasir_proto::frame::BulkLimits;
use kvasir_runtime::units::{ByteSize, HumanDuration};
use serde::{Deserialize, Serialize};

pub use self::kinds::{DiskAdmission, DiskPlace};

/// Configuration of a store. Every queue, pool and map of the store has its bound here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Address of the gRPC services. Port 0 picks a free one.
    pub listen: SocketAddr,
    /// Address of `/metrics`, `/healthz` and `/readyz`.
    pub admin_listen: SocketAddr,
    /// Address of the bulk path, which moves blocks outside of gRPC. Clients learn it when they open a namespace, so port 0, a
    /// free one, does; a fixed port is for firewalls.
    pub bulk_listen: SocketAddr,
    /// Path of the Unix socket that passes the store's memory, for reading, to processes of this machine; below `data_dir` unless it
    /// is absolute, empty for none. Who is let in reads all blocks of all tenants.
    pub local_socket: PathBuf,
    /// Users, by number, that are let in beside the store's own.
    pub local_uids: Vec<u32>,
    /// Most bytes of the store's memory that a local connection may hold; beyond it blocks come over the socket. All of them together
    /// hold half of `host_bytes_max` at most.
    pub local_bytes_max: ByteSize,
    /// Most layer blocks in them.
    pub local_places_max: usize,
    /// Whether the addresses may be reachable from other machines. There is no authentication and no encryption yet.
    pub allow_remote: bool,
    /// Folder of the blocks and their index; the store has it for itself.
    pub data_dir: PathBuf,
    /// Most bytes of blocks kept in memory, bookkeeping included.
    pub host_bytes_max: ByteSize,
    /// Which blocks leave memory first: `prefix` (never a block before those that continue it, then least recently matched),
    /// `lru` (least recently matched), or `s3-fifo` (what is matched once passes through a tenth of the memory).
    #[serde(with = "kinds::host_policy")]
    pub host_policy: HostPolicy,
    /// Ask the system for pages of 2 MiB for the blocks in memory; where it has none, they are of 4 KiB.
    pub huge_pages: bool,
    /// Memory for blocks that is taken from the system before it is needed, by a thread of its own; 0 for none. Putting
    /// a block into memory that is not ready costs the store several times as much processor time.
    pub host_ready_bytes: ByteSize,
    /// Most bytes in memory for single tenants, by name: each evicts its own blocks beyond it, and no other takes from what it
    /// has a right to.
    pub tenant_host_bytes_max: BTreeMap<String, ByteSize>,
    /// The same for each tenant that is not named there; 0: they share what is left.
    pub tenant_host_bytes_max_default: ByteSize,
    /// Most bytes of segment files; at least two segments.
    pub disk_bytes_max: ByteSize,
    /// Bytes of one segment file: the unit in which disk space comes back.
    pub segment_bytes: ByteSize,
    /// Most payload bytes accepted but not yet synced; beyond it puts are answered `BUSY`.
    pub flush_queue_bytes_max: ByteSize,
    /// Most layer blocks read from disk at a time; beyond it gets wait.
    pub disk_reads_max: usize,
    /// Most layer blocks that wait to be read from disk; beyond it gets are answered `BUSY`.
    pub disk_reads_waiting_max: usize,
    /// Which puts are written to disk: `always` (what was answered `STORED` is durable after the next flush), or `reuse` (only
    /// blocks that were asked for before, or are hit again; spares the disk what nobody asks for twice).
    pub disk_admission: DiskAdmission,
    /// How often a layer block must have been read from disk or bucket, of late, to be kept in memory; 1 to 15.
    pub promote_after_reads: u32,
    /// Blocks whose reuse is told apart, for admission and promotion; 4 bytes for each.
    pub reuse_entries: usize,
    /// How many layers ahead of a reader with a lease are brought into memory; 0 for none.
    pub prefetch_layers: u16,
    /// Most bytes brought ahead and not read yet; beyond it nothing is brought.
    pub prefetch_bytes_max: ByteSize,
    /// Disks that keep blocks, each a folder of its own with its own limit; none: `data_dir` does, within `disk_bytes_max`.
    pub disks: Vec<DiskPlace>,
    /// Start without a disk of `disks` that is not there; its blocks are misses. Otherwise the store does not start.
    pub disk_absent_ok: bool,
    /// Free bytes that are left to others on each disk: nothing is written that would go below.
    pub disk_free_bytes_min: ByteSize,
    /// Most bytes per second of each disk that are read and verified in the background; 0 turns it off.
    pub scrub_bytes_per_second: ByteSize,
    /// Bucket that several stores share: `s3://bucket/prefix` or `file:///folder`; empty for none.
    pub object_url: String,
    /// Server of an S3-compatible service, `https://host:port`; empty for AWS.
    pub object_endpoint: String,
    /// Region that requests to the bucket are signed for.
    pub object_region: String,
    /// Accept an `http://` endpoint: blocks then cross the network in the clear.
    pub object_allow_http: bool,
    /// Bytes of one object in the bucket, about: what the disks forget is gathered until there is so much of it.
    pub object_pack_bytes: ByteSize,
    /// How long it is gathered at most; until it is written it is in memory only.
    pub object_pack_age_max: HumanDuration,
    /// File with the bucket's access key: id, secret and, for a temporary key, session token, a line each. Empty: unsigned.
    pub object_credentials_file: PathBuf,
    /// Longest lease granted; longer wishes are cut to it.
    pub lease_max: HumanDuration,
    /// Most leases at a time, open contexts included; beyond it a match comes without a lease.
    pub leases_max: usize,
    /// Most contexts open for retrieval at a time; beyond it a decode stream is refused with `RESOURCE_EXHAUSTED`.
    pub contexts_max: usize,
    /// Most bytes of blocks that open contexts hold verified, so that a query is a scan; beyond it queries read and verify
    /// anew. Bytes that are in memory anyway are shared.
    pub context_bytes_max: ByteSize,
    /// Most bytes of sketch bases, each counted once however many namespaces have it; a namespace opened with one more is
    /// refused with `RESOURCE_EXHAUSTED`.
    pub basis_bytes_max: ByteSize,
    /// Most bytes of sketches that are kept in memory beside those of open contexts; they are made after each put, in the background,
    /// and kept on disk beside their blocks. 0: keys are sketched when a query first wants them, and again after a restart.
    pub sketch_bytes_max: ByteSize,
    /// Most layer blocks that wait to be sketched; what finds no place is sketched by its first query. 0 as for
    /// `sketch_bytes_max`.
    pub sketch_queue_max: usize,
    /// Most layers of open contexts that wait for their sketches to be put in clusters, in the background, so that searches read fewer;
    /// what finds no place is asked for again by a later query. 0: sketches are scanned in the order of tokens.
    pub cluster_queue_max: usize,
    /// Most bytes of query samples that are kept for building `roar` indexes; the oldest go first. 0 takes none.
    pub query_bytes_max: ByteSize,
    /// Most bytes of built indexes (`roar`, `wave`) in memory; what is not there is read when a query wants it.
    pub index_bytes_max: ByteSize,
    /// Most contexts that wait for an index to be built; one more is refused with `RESOURCE_EXHAUSTED`.
    pub build_queue_max: usize,
    /// Threads that build one index together, at the lowest priority.
    pub build_threads: usize,
    /// Most bytes that a decode stream's account of the rows its caller keeps may take; a stream that wants a larger row cache
    /// gets none, and all rows travel.
    pub row_cache_bytes_max: ByteSize,
    /// Most bytes of searches that hints began and that wait for their queries, over all streams; beyond it hints are dropped and
    /// their queries searched for when they come. 0 drops all.
    pub parked_bytes_max: ByteSize,
    /// Most namespaces.
    pub namespaces_max: usize,
    /// Most events that a watcher may be behind; beyond it its watch ends with `RESOURCE_EXHAUSTED`.
    pub event_queue_max: usize,
    /// Most watchers at a time.
    pub subscribers_max: usize,
    /// Most put, get and decode streams at a time; beyond it a call is refused with `RESOURCE_EXHAUSTED`. An open stream
    /// holds at most three messages of about 1 MiB.
    pub streams_max: usize,
    /// Most bulk connections at a time, each with a thread; one more is told so and closed.
    pub bulk_connections_max: usize,
    /// How long a thread of a bulk connection looks for the next bytes before it sleeps; 0 to sleep at once. It
    /// halves the time of a small request and more where waking a thread is slow.
    pub bulk_poll: HumanDuration,
    /// How long a bulk connection may do nothing before it is closed; clients connect again by themselves.
    pub bulk_idle_timeout: HumanDuration,
    /// How long a frame of about 1 MiB may take to leave on a bulk connection; then its reader is given up.
    pub bulk_stall_timeout: HumanDuration,
    /// Most bytes of put messages that are being received or stored, over all streams; beyond it clients wait.
    pub put_bytes_max: ByteSize,
    /// How long a put waits for a thread and for room in the flush queue; then its blocks are answered `BUSY`.
    pub put_wait_max: HumanDuration,
    /// Largest put message accepted.
    pub message_bytes_max: ByteSize,
    /// How long a message may take to arrive once it began.
    pub message_timeout: HumanDuration,
    /// Most block hashes in one request, which also bounds the blocks of a context.
    pub hashes_max: usize,
    /// Threads for work on blocks: puts, gets, the disk.
    pub io_threads: usize,
    /// Threads for retrieval, which is bound by the processor.
    pub retrieval_threads: usize,
    /// Largest retrieval reply; a query whose rows could exceed it is refused.
    pub reply_bytes_max: ByteSize,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7401)),
            admin_listen: SocketAddr::from(([127, 0, 0, 1], 7411)),
            bulk_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            local_socket: PathBuf::from("local.sock"),
            local_uids: Vec::new(),
            local_bytes_max: ByteSize::mib(256),
            local_places_max: 16_384,
            allow_remote: false,
            data_dir: PathBuf::from("kvasir-data/store"),
            host_bytes_max: ByteSize::gib(1),
            host_policy: HostPolicy::default(),
            huge_pages: true,
            host_ready_bytes: ByteSize::mib(64),
            tenant_host_bytes_max: BTreeMap::new(),
            tenant_host_bytes_max_default: ByteSize::bytes(0),
            disk_bytes_max: ByteSize::gib(16),
            segment_bytes: ByteSize::mib(256),
            flush_queue_bytes_max: ByteSize::mib(256),
            disk_reads_max: 64,
            disk_reads_waiting_max: 4096,
            disk_admission: DiskAdmission::Always,
            promote_after_reads: 1,
            reuse_entries: 1 << 20,
            prefetch_layers: 2,
            prefetch_bytes_max: ByteSize::mib(64),
            disks: Vec::new(),
            disk_absent_ok: false,
            disk_free_bytes_min: ByteSize::bytes(0),
            scrub_bytes_per_second: ByteSize::mib(8),
            object_url: String::new(),
            object_endpoint: String::new(),
            object_region: "us-east-1".to_owned(),
            object_allow_http: false,
            object_pack_bytes: ByteSize::mib(32),
            object_pack_age_max: HumanDuration::secs(30),
            object_credentials_file: PathBuf::new(),
            lease_max: HumanDuration::secs(60),
            leases_max: 16_384,
            contexts_max: 1024,
            context_bytes_max: ByteSize::gib(1),
            basis_bytes_max: ByteSize::mib(64),
            sketch_bytes_max: ByteSize::mib(64),
            sketch_queue_max: 16_384,
            cluster_queue_max: 4096,
            query_bytes_max: ByteSize::mib(128),
            index_bytes_max: ByteSize::mib(256),
            build_queue_max: 16,
            build_threads: 1,
            row_cache_bytes_max: ByteSize::mib(64),
            parked_bytes_max: ByteSize::mib(64),
            namespaces_max: 1024,
            event_queue_max: 65_536,
            subscribers_max: 256,
            streams_max: 1024,
            bulk_connections_max: 256,
            bulk_poll: HumanDuration::micros(BusyPoll::DEFAULT.as_micros() as u64),
            bulk_idle_timeout: HumanDuration::secs(300),
            bulk_stall_timeout: HumanDuration::secs(120),
            put_bytes_max: ByteSize::mib(64),
            put_wait_max: HumanDuration::secs(2),
            message_bytes_max: ByteSize::mib(8),
            message_timeout: HumanDuration::secs(30),
            hashes_max: 16_384,
            io_threads: 16,
            retrieval_threads: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
            reply_bytes_max: ByteSize::mib(32),
        }
    }
}

impl StoreConfig {
    /// Largest request that carries hashes rather than blocks. Decoded hashes take no more than their bytes on the wire
    /// and bookkeeping of the same size, so this bounds both.
    pub(crate) fn control_bytes_max(&self) -> usize {
        const HASH_ON_WIRE: usize = 34;
        (2 * HASH_ON_WIRE * self.hashes_max + (64 << 10)).max(1 << 20)
    }

    /// Largest request to open a namespace, which carries a basis.
    pub(crate) fn open_bytes_max(&self) -> usize {
        self.control_bytes_max().saturating_add(self.basis_bytes_max.as_usize())
    }

    /// Bounds of the header of a put message.
    pub(crate) fn bulk_limits(&self) -> BulkLimits {
        BulkLimits::default()
    }
}

#[cfg(test)]
mod tests;
