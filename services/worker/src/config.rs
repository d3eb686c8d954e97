//! `[worker]`: every key with its meaning, unit and default.

mod attention;
mod device;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use kvasir_block::Tenant;
use kvasir_runtime::{
    address::loopback_or_allowed,
    units::{ByteSize, HumanDuration},
};
use serde::{Deserialize, Serialize};

pub use attention::{AttentionConfig, AttentionMode, Certificate, IndexWanted};
pub use device::{DeviceKind, GpuConfig};

/// Configuration of a worker. Fill in what differs and leave the rest to `..Default::default()`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// Address of the gRPC service `kvasir.v1.Worker`; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Address of `/metrics`, `/healthz` and `/readyz`; port 0 picks a free one.
    pub admin_listen: SocketAddr,
    /// Whether addresses that other machines can reach are allowed. There is no authentication yet.
    pub allow_remote: bool,
    /// Where the store is, as in `http://127.0.0.1:7401`; empty works without a store.
    pub store_url: String,
    /// Owner of the blocks that this worker makes and looks for: part of their identity.
    pub tenant: String,
    /// What computes: `cpu` or `gpu`.
    pub device: DeviceKind,
    /// Which GPU and where its compiler is, with `device = "gpu"`.
    pub gpu: GpuConfig,
    /// Threads that share each kernel on a CPU; 0 takes one per core.
    pub threads: usize,
    /// Tokens of a block. Must be the same at the router and at every worker of a store.
    pub block_tokens: u16,
    /// Bytes of the page pool (the device tier), in the memory of the device that computes; rounded down to whole pages.
    pub kv_bytes_max: ByteSize,
    /// Most tokens computed in one step, over all sequences. More is faster for one prompt and makes the tokens of
    /// others come in larger gaps. 256 on a CPU; `kvasir` takes 2,048 where `worker.device` is a GPU.
    pub step_tokens_max: usize,
    /// Most sequences that are computed at a time.
    pub sequences_max: usize,
    /// Most requests that wait for their turn; beyond it they are answered RESOURCE_EXHAUSTED.
    pub waiting_max: usize,
    /// New tokens of a request that does not say how many it wants.
    pub max_tokens: u32,
    /// Most bytes of layer blocks that wait to be pushed; beyond it blocks are dropped and counted. 256 MiB on a CPU; `kvasir` takes
    /// three quarters of `worker.gpu.pinned_bytes` on a GPU.
    pub offload_queue_bytes_max: ByteSize,
    /// Streams over which they are pushed at a time, each with a connection of its own. One on a CPU; `kvasir` takes 4 where
    /// `worker.device` is a GPU.
    pub offload_streams: usize,
    /// Longest wait for an answer to a prefix match, and for each next layer block while loading; after it the rest is
    /// computed.
    pub onboard_timeout: HumanDuration,
    /// Longest wait until the store holds a prompt that is to be retrieved from, and has opened it; after it the request
    /// goes on with full attention.
    pub context_timeout: HumanDuration,
    /// Longest wait for the reply of one layer while decoding with retrieval; after it the request goes on with full
    /// attention.
    pub retrieval_timeout: HumanDuration,
    /// Lease asked for on matched blocks: long enough to queue and load.
    pub lease: HumanDuration,
    /// Basis of the sketches that the store makes of this model's keys, a file of `kvasir calibrate`; empty takes the one
    /// beside the model file (`.basis` behind its name), else the one that comes with the program, else none.
    pub basis: PathBuf,
    /// Patterns by which prompts are attended sparsely, a file of `kvasir search-heads` or one of MInference's; `off` attends
    /// to everything. Takes effect on whole blocks, and pays with blocks of 256 tokens and more; on a GPU with larger ones, of 128
    /// or a multiple, and from `worker.gpu.dense_up_to` on. KV made with it has another namespace than KV made without it, or
    /// with other patterns.
    pub sparse_prefill: PathBuf,
    /// How long stopping waits for running requests, and then again for the offload queue.
    pub drain_grace: HumanDuration,
    /// What a request's attention is when it does not say.
    pub attention: AttentionConfig,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7402)),
            admin_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 7412)),
            allow_remote: false,
            store_url: "http://127.0.0.1:7401".to_owned(),
            tenant: "default".to_owned(),
            device: DeviceKind::Cpu,
            gpu: GpuConfig::default(),
            threads: 0,
            block_tokens: 64,
            kv_bytes_max: ByteSize::gib(1),
            step_tokens_max: DeviceKind::Cpu.step_tokens(),
            sequences_max: 16,
            waiting_max: 128,
            max_tokens: 256,
            offload_queue_bytes_max: ByteSize::mib(256),
            offload_streams: DeviceKind::Cpu.offload_streams(),
            onboard_timeout: HumanDuration::secs(2),
            context_timeout: HumanDuration::secs(10),
            retrieval_timeout: HumanDuration::millis(500),
            lease: HumanDuration::secs(30),
            basis: PathBuf::new(),
            sparse_prefill: PathBuf::from("off"),
            drain_grace: HumanDuration::secs(10),
            attention: AttentionConfig::default(),
        }
    }
}

/// A value that a worker cannot work with; the message names the key and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct InvalidConfig {
    /// The dotted key.
    pub key: String,
    /// What is wrong and what to do.
    pub problem: String,
}

impl InvalidConfig {
    pub(crate) fn new(key: &str, problem: impl Into<String>) -> Self {
        Self {
            key: key.to_owned(),
            problem: problem.into(),
        }
    }
}

/// Most threads: beyond any machine this runs on, and small enough that a typo starts no thousands.
const THREADS_MAX: usize = 1024;

impl WorkerConfig {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// [`InvalidConfig`] for the first key that does not fit.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        for (key, addr) in [
            ("worker.listen", self.listen),
            ("worker.admin_listen", self.admin_listen),
        ] {
            loopback_or_allowed(key, addr, "worker.allow_remote", self.allow_remote)
                .map_err(|error| InvalidConfig::new(key, error.to_string()))?;
        }
        let url = self.store_url.as_str();
        if !url.is_empty() && !url.starts_with("http://") {
            let problem = format!("{url:?} is not a store's address: write http://HOST:PORT, or nothing for no store");
            return Err(InvalidConfig::new("worker.store_url", problem));
        }
        if Tenant::new(self.tenant.as_str()).is_none() {
            let problem = format!("{:?} is not a tenant's name: \"default\" is a good one", self.tenant);
            return Err(InvalidConfig::new("worker.tenant", problem));
        }
        if self.threads > THREADS_MAX {
            let problem = format!("{}: at most {THREADS_MAX}, 0 takes one per core", self.threads);
            return Err(InvalidConfig::new("worker.threads", problem));
        }
        let positive = [
            ("worker.block_tokens", u64::from(self.block_tokens)),
            ("worker.step_tokens_max", self.step_tokens_max as u64),
            ("worker.sequences_max", self.sequences_max as u64),
            ("worker.waiting_max", self.waiting_max as u64),
            ("worker.max_tokens", u64::from(self.max_tokens)),
            ("worker.offload_streams", self.offload_streams as u64),
            ("worker.kv_bytes_max", self.kv_bytes_max.as_u64()),
            (
                "worker.onboard_timeout",
                self.onboard_timeout.get().as_millis().min(1) as u64,
            ),
            (
                "worker.context_timeout",
                self.context_timeout.get().as_millis().min(1) as u64,
            ),
            (
                "worker.retrieval_timeout",
                self.retrieval_timeout.get().as_millis().min(1) as u64,
            ),
            ("worker.lease", self.lease.get().as_millis().min(1) as u64),
        ];
        let (pinned, queue) = (self.gpu.pinned_bytes, self.offload_queue_bytes_max);
        if self.device == DeviceKind::Gpu && !url.is_empty() && pinned < queue {
            let problem = format!(
                "{pinned} is less than worker.offload_queue_bytes_max = {queue}: what waits to be pushed lies there, so take a quarter more than that"
            );
            return Err(InvalidConfig::new("worker.gpu.pinned_bytes", problem));
        }
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(InvalidConfig::new(key, "must be more than nothing"));
        }
        if self.step_tokens_max < self.sequences_max {
            let problem = format!(
                "{} is less than worker.sequences_max = {}: a step must have a token for every sequence",
                self.step_tokens_max, self.sequences_max
            );
            return Err(InvalidConfig::new("worker.step_tokens_max", problem));
        }
        if self.sparse_prefill_file().is_some() {
            let least = usize::from(self.block_tokens) + self.sequences_max;
            if self.step_tokens_max < least {
                let problem = format!(
                    "{} is less than worker.block_tokens + worker.sequences_max = {least}: with worker.sparse_prefill a step \
                     must have room for a whole block beside every sequence",
                    self.step_tokens_max
                );
                return Err(InvalidConfig::new("worker.step_tokens_max", problem));
            }
        }
        self.attention.validate("worker.attention")
    }

    /// The file of patterns, where prompts are to be attended sparsely.
    pub(crate) fn sparse_prefill_file(&self) -> Option<&Path> {
        let path = self.sparse_prefill.as_path();
        (path != Path::new("off") && path != Path::new("")).then_some(path)
    }

    /// Threads to start.
    pub(crate) fn threads_or_cores(&self) -> usize {
        if self.threads > 0 {
            return self.threads;
        }
        std::thread::available_parallelism().map_or(1, usize::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_key() {
        fn with(change: impl FnOnce(&mut WorkerConfig)) -> WorkerConfig {
            let mut config = WorkerConfig::default();
            change(&mut config);
            config
        }
        let table = [
            (
                with(|c| c.listen = SocketAddr::from(([0, 0, 0, 0], 7402))),
                "worker.listen",
            ),
            (with(|c| c.store_url = "localhost:1".into()), "worker.store_url"),
            (with(|c| c.tenant = String::new()), "worker.tenant"),
            (with(|c| c.threads = 5000), "worker.threads"),
            (with(|c| c.block_tokens = 0), "worker.block_tokens"),
            (with(|c| c.offload_streams = 0), "worker.offload_streams"),
            (
                with(|c| {
                    c.device = DeviceKind::Gpu;
                    c.offload_queue_bytes_max = ByteSize::gib(3);
                }),
                "worker.gpu.pinned_bytes",
            ),
            (with(|c| c.step_tokens_max = 8), "worker.step_tokens_max"),
            (
                with(|c| c.retrieval_timeout = HumanDuration::millis(0)),
                "worker.retrieval_timeout",
            ),
            (
                with(|c| c.attention.target_mass = f32::NAN),
                "worker.attention.target_mass",
            ),
            (with(|c| c.attention.target_mass = 1.5), "worker.attention.target_mass"),
            (with(|c| c.attention.k = 0), "worker.attention.k"),
            (with(|c| c.attention.effort = 1.5), "worker.attention.effort"),
            (with(|c| c.attention.effort = f32::NAN), "worker.attention.effort"),
            (
                with(|c| {
                    c.sparse_prefill = "heads.json".into();
                    c.block_tokens = 256;
                }),
                "worker.step_tokens_max",
            ),
            (
                // Without a certificate there is no bound to compare with.
                with(|c| c.attention.missed_mass_max = 0.1),
                "worker.attention.missed_mass_max",
            ),
        ];
        for (config, key) in table {
            assert_eq!(config.validate().expect_err(key).key, key);
        }
        let remote = with(|c| {
            c.listen = SocketAddr::from(([0, 0, 0, 0], 7402));
            c.allow_remote = true;
            c.store_url = String::new();
        });
        assert_eq!(remote.validate(), Ok(()));
        assert_eq!(WorkerConfig::default().validate(), Ok(()));
    }
}
