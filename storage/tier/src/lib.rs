//! Where layer blocks are kept: host memory, disk and a bucket.
//!
//! [`HostTier`] is a bounded map in shared memory that evicts whole blocks by a policy of choice. [`DiskTier`] appends
//! records to segment files behind a bounded queue, finds them through a RocksDB index, verifies every byte it reads and
//! comes back warm after a crash; `FORMAT.md` has its bytes. [`ObjectTier`] packs them into objects of an S3-compatible
//! bucket that all stores of a namespace share; `FORMAT-OBJECT.md` has its bytes. None knows tenants, leases or prefixes:
//! the owner says what must stay, through a closure (host) or a [`DiskWatch`] (disk).
//!
//! Payloads are immutable: the same key always names the same bytes. Meet first: [`HostTier`], [`DiskTier`], [`ObjectTier`].
//!
//! ```
//! use bytes::Bytes;
//! use kvasir_block::{BlockHash, Checksum, NamespaceId};
//! use kvasir_tier::{HostConfig, HostPolicy, HostTier, Owner};
//! let key = NamespaceId::from_bytes([1; 32]).block(BlockHash::from_bytes([2; 32])).layer(0);
//! let payload = Bytes::from_static(b"keys and values");
//! let config = HostConfig { bytes_max: 1 << 20, policy: HostPolicy::default(), huge_pages: Default::default() };
//! let mut host = HostTier::new(config)?;
//! host.insert(key, payload.clone(), Checksum::of(&payload), Owner::default(), |_| false)?;
//! assert_eq!(host.get(key).expect("just put").0, payload);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod disk;
mod host;
mod object;

pub use disk::{
    AbsentDisk, DiskConfig, DiskPath, DiskRead, DiskStats, DiskTier, DiskWatch, Fate, FlushError, Heat, Offer,
    OneDiskStats, OpenError, Recovery, SEGMENT_FORMAT,
};
pub use host::{HostConfig, HostPolicy, HostStats, HostTier, NoRoom, Owner};
pub use kvasir_device::HugePages;
pub use object::{
    BreakerConfig, BreakerState, Credentials, FailureCounts, ObjectConfig, ObjectError, ObjectFailure,
    ObjectFlushError, ObjectRead, ObjectStats, ObjectTier, PACK_FORMAT, StoreId,
};
