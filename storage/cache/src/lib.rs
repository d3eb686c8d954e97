//! The one facade that a store serves: put, get, match a prefix, retrieve.
//!
//! A [`BlockCache`] keeps layer blocks in host memory and on disk, knows which blocks are whole, pins what is leased,
//! tells subscribers what comes and goes, and verifies every byte it takes or gives. It is synchronous and thread-safe;
//! calls may wait for the disk, so async callers use a blocking pool. It knows no wire format, no configuration file and
//! no metrics registry: [`BlockCache::stats`] gives plain numbers.
//!
//! [`retrieve`] answers attention queries where the blocks lie: a [`retrieve::Context`] pins a chain of them, and
//! [`BlockCache::retrieve`] scans its verified keys and gives the best rows or a partial attention. Each answer comes with a
//! [`retrieve::Report`] of what it covers.
//!
//! Meet first: [`BlockCache`], [`CacheConfig`], [`GetOutcome`].
//!
//! ```
//! use bytes::Bytes;
//! use kvasir_block::{block_hashes, Checksum, Dtype, ExtraKeys, KvSchema, RopeStyle, Tenant};
//! use kvasir_cache::{BlockCache, CacheConfig, GetOutcome, PutOutcome};
//! # let dir = tempfile::tempdir().unwrap();
//! # let schema = KvSchema {
//! #     model: "m".into(), weights_sha256: [1; 32], tokenizer_sha256: [2; 32], adapter_sha256: None, layers: 1, kv_heads: 1,
//! #     head_dim: 4, block_tokens: 2, dtype: Dtype::F16, attention: "full".into(), rope_theta: 1e4, rope_dims: 4,
//! #     rope_style: RopeStyle::Halves, rope_scaling: "none".into(), tp_rank: 0, tp_world: 1, numerics: "n".into(),
//! # };
//! # let config = CacheConfig { disk_bytes_max: 1 << 20, segment_bytes: 1 << 16, ..CacheConfig::in_dir(dir.path()) };
//! let cache = BlockCache::open(config)?;
//! let namespace = cache.open_namespace(&Tenant::new("default").unwrap(), &schema)?;
//! let chain = block_hashes(&[11, 12, 13, 14], 2, &ExtraKeys::none());
//! let key = namespace.block(chain[0]).layer(0);
//! let payload = Bytes::from(vec![7; schema.layer_block_bytes()]);
//! assert_eq!(cache.put(key, payload.clone(), Checksum::of(&payload))?, PutOutcome::Stored);
//! assert_eq!(cache.match_prefix(namespace, &chain, None)?.hit_blocks, 1);
//! assert!(matches!(cache.get(key)?, GetOutcome::Hit { payload: got, .. } if got == payload));
//! cache.close()?;
//! # Ok::<(), kvasir_cache::CacheError>(())
//! ```
#![forbid(unsafe_code)]

mod ahead;
mod cache;
mod config;
mod error;
mod event;
pub mod indexes;
mod lease;
mod namespace;
pub mod retrieve;
mod reuse;
mod small_file;
mod stats;
#[cfg(test)]
mod testing;

pub use cache::{Admission, BlockCache, GetOptions, GetOutcome, PrefixMatch, PutBuffer, PutOutcome, PutPayload, Tier};
pub use config::CacheConfig;
pub use error::{CacheError, ErrorKind};
pub use event::{BlockEvent, EventKind, EventStep, Subscription};
pub use kvasir_tier::{
    AbsentDisk, BreakerConfig, BreakerState, Credentials, DiskPath, DiskStats, ObjectConfig, ObjectStats, StoreId,
};
pub use kvasir_tier::{HostPolicy, HugePages, Recovery, SEGMENT_FORMAT};
pub use lease::LeaseId;
pub use namespace::BasisId;
pub use stats::CacheStats;
