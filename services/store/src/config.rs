//! `[store]`: places and limits.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::Context;
use kvasir_cache::{AbsentDisk, Admission, CacheConfig, Credentials, DiskPath, ObjectConfig, StoreId};
use kvasir_proto::frame::BulkLimits;
use kvasir_runtime::{
    address::loopback_or_allowed,
    units::{ByteSize, HumanDuration},
};
use serde::{Deserialize, Serialize};

/// Which puts are written to disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskAdmission {
    /// All.
    #[default]
    Always,
    /// Those of blocks that were asked for before, and what is hit again in memory.
    Reuse,
}

impl From<DiskAdmission> for Admission {
    fn from(admission: DiskAdmission) -> Self {
        match admission {
            DiskAdmission::Always => Self::Always,
            DiskAdmission::Reuse => Self::Reuse,
        }
    }
}

/// One of several disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskPlace {
    /// Folder on it that the store has for itself.
    pub dir: PathBuf,
    /// Most bytes of segment files there; at least two segments.
    pub bytes_max: ByteSize,
}

impl DiskPlace {
    fn path(&self) -> DiskPath {
        DiskPath {
            dir: self.dir.clone(),
            bytes_max: self.bytes_max.as_u64(),
            io: None,
        }
    }
}

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
    /// Most bytes that a decode stream's account of the rows its caller keeps may take; a stream that wants a larger row cache
    /// gets none, and all rows travel.
    pub row_cache_bytes_max: ByteSize,
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
            object_credentials_file: PathBuf::new(),
            lease_max: HumanDuration::secs(60),
            leases_max: 16_384,
            contexts_max: 1024,
            context_bytes_max: ByteSize::gib(1),
            basis_bytes_max: ByteSize::mib(64),
            row_cache_bytes_max: ByteSize::mib(64),
            namespaces_max: 1024,
            event_queue_max: 65_536,
            subscribers_max: 256,
            streams_max: 1024,
            bulk_connections_max: 256,
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
    /// Checks what a type cannot: addresses, and limits that must fit each other.
    ///
    /// # Errors
    /// Names the key and says what to do.
    pub fn validate(&self) -> anyhow::Result<()> {
        loopback_or_allowed("store.listen", self.listen, "store.allow_remote", self.allow_remote)?;
        loopback_or_allowed(
            "store.admin_listen",
            self.admin_listen,
            "store.allow_remote",
            self.allow_remote,
        )?;
        loopback_or_allowed(
            "store.bulk_listen",
            self.bulk_listen,
            "store.allow_remote",
            self.allow_remote,
        )?;
        let counts = [
            ("streams_max", self.streams_max),
            ("bulk_connections_max", self.bulk_connections_max),
            (
                "bulk_idle_timeout",
                usize::from(!self.bulk_idle_timeout.get().is_zero()),
            ),
            (
                "bulk_stall_timeout",
                usize::from(!self.bulk_stall_timeout.get().is_zero()),
            ),
            ("hashes_max", self.hashes_max),
            ("disk_reads_max", self.disk_reads_max),
            ("reuse_entries", self.reuse_entries),
            ("io_threads", self.io_threads),
            ("retrieval_threads", self.retrieval_threads),
            ("message_timeout", usize::from(!self.message_timeout.get().is_zero())),
        ];
        if let Some((key, _)) = counts.iter().find(|(_, count)| *count == 0) {
            anyhow::bail!("store.{key} is 0: it must be more");
        }
        let largest = ByteSize::gib(1);
        if self.message_bytes_max < ByteSize::kib(64) || self.message_bytes_max > largest {
            anyhow::bail!(
                "store.message_bytes_max = {}: choose 64KiB to {largest}",
                self.message_bytes_max
            );
        }
        if self.put_bytes_max < self.message_bytes_max || self.put_bytes_max > ByteSize::gib(1024) {
            anyhow::bail!(
                "store.put_bytes_max = {}: must have room for one message, store.message_bytes_max = {}",
                self.put_bytes_max,
                self.message_bytes_max
            );
        }
        Ok(())
    }

    /// The part of it that the cache wants.
    pub(crate) fn cache(&self) -> CacheConfig {
        CacheConfig {
            host_bytes_max: self.host_bytes_max.as_u64(),
            disk_bytes_max: self.disk_bytes_max.as_u64(),
            segment_bytes: self.segment_bytes.as_u64(),
            flush_queue_bytes_max: self.flush_queue_bytes_max.as_u64(),
            disk_reads_max: self.disk_reads_max,
            disk_reads_waiting_max: self.disk_reads_waiting_max,
            disk_admission: self.disk_admission.into(),
            promote_after_reads: self.promote_after_reads,
            reuse_entries: self.reuse_entries,
            prefetch_layers: self.prefetch_layers,
            prefetch_bytes_max: self.prefetch_bytes_max.as_u64(),
            disks: self.disks.iter().map(DiskPlace::path).collect(),
            disk_absent: if self.disk_absent_ok {
                AbsentDisk::LeaveOut
            } else {
                AbsentDisk::Refuse
            },
            disk_free_bytes_min: self.disk_free_bytes_min.as_u64(),
            scrub_bytes_per_second: self.scrub_bytes_per_second.as_u64(),
            lease_max: self.lease_max.get(),
            leases_max: self.leases_max,
            contexts_max: self.contexts_max,
            context_blocks_max: self.hashes_max,
            context_bytes_max: self.context_bytes_max.as_u64(),
            basis_bytes_max: self.basis_bytes_max.as_u64(),
            namespaces_max: self.namespaces_max,
            event_queue_max: self.event_queue_max,
            subscribers_max: self.subscribers_max,
            ..CacheConfig::in_dir(&self.data_dir)
        }
    }

    /// The object tier, if one is configured. `store` names this store among those that share the bucket.
    ///
    /// # Errors
    /// When the credentials cannot be read.
    pub(crate) fn object(&self, store: StoreId) -> anyhow::Result<Option<ObjectConfig>> {
        if self.object_url.is_empty() {
            return Ok(None);
        }
        let mut object = ObjectConfig::new(&self.object_url, store);
        object.endpoint = (!self.object_endpoint.is_empty()).then(|| self.object_endpoint.clone());
        object.path_style = object.endpoint.is_some();
        object.region.clone_from(&self.object_region);
        object.allow_http = self.object_allow_http;
        if !self.object_credentials_file.as_os_str().is_empty() {
            let path = self.object_credentials_file.display();
            let text = std::fs::read_to_string(&self.object_credentials_file)
                .with_context(|| format!("store.object_credentials_file: cannot read {path}"))?;
            let mut lines = text
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty())
                .map(str::to_owned);
            let (Some(id), Some(secret)) = (lines.next(), lines.next()) else {
                anyhow::bail!(
                    "store.object_credentials_file: {path} must have an access key id and its secret, a line each"
                );
            };
            let token = lines.next();
            object.credentials = Credentials::Key { id, secret, token };
        }
        Ok(Some(object))
    }

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
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_survive_toml() {
        let config = StoreConfig::default();
        config.validate().expect("valid");
        let json = serde_json::to_string(&config).expect("serialises");
        assert_eq!(serde_json::from_str::<StoreConfig>(&json).expect("reads back"), config);
        let unknown = serde_json::from_str::<StoreConfig>(r#"{"host_byte_max": "1GiB"}"#);
        assert!(
            unknown
                .expect_err("unknown")
                .to_string()
                .contains("unknown field `host_byte_max`")
        );
    }

    #[test]
    fn what_cannot_work_names_the_key() {
        type Break = fn(&mut StoreConfig);
        let table: [(Break, &str); 9] = [
            (
                |c| c.listen = ([0, 0, 0, 0], 7401).into(),
                "store.listen = \"0.0.0.0:7401\"",
            ),
            (|c| c.admin_listen = ([10, 0, 0, 1], 1).into(), "store.admin_listen"),
            (|c| c.bulk_listen = ([0, 0, 0, 0], 7402).into(), "store.bulk_listen"),
            (|c| c.bulk_connections_max = 0, "store.bulk_connections_max is 0"),
            (|c| c.streams_max = 0, "store.streams_max is 0"),
            (|c| c.retrieval_threads = 0, "store.retrieval_threads is 0"),
            (
                |c| c.message_bytes_max = ByteSize::kib(1),
                "store.message_bytes_max = 1KiB",
            ),
            (
                |c| c.message_bytes_max = ByteSize::gib(4),
                "store.message_bytes_max = 4GiB",
            ),
            (|c| c.put_bytes_max = ByteSize::mib(1), "store.put_bytes_max = 1MiB"),
        ];
        for (damage, expected) in table {
            let mut config = StoreConfig::default();
            damage(&mut config);
            let error = config.validate().expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
