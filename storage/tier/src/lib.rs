//! Where layer blocks are kept: host memory, disk and a bucket.
//!
//! [`HostTier`] is a bounded map in memory that evicts whole blocks, least recently used first. [`DiskTier`] appends
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
//! use kvasir_tier::HostTier;
//! let key = NamespaceId::from_bytes([1; 32]).block(BlockHash::from_bytes([2; 32])).layer(0);
//! let payload = Bytes::from_static(b"keys and values");
//! let mut host = HostTier::new(1 << 20);
//! host.insert(key, payload.clone(), Checksum::of(&payload), |_| false).unwrap();
//! assert_eq!(host.get(key).unwrap().0, payload);
//! ```
#![forbid(unsafe_code)]

mod disk;
mod host;
mod object;

pub use disk::{
    DiskConfig, DiskRead, DiskStats, DiskTier, DiskWatch, FlushError, Offer, OpenError, Recovery, SEGMENT_FORMAT,
};
pub use host::{HostTier, NoRoom};
pub use object::{
    BreakerConfig, BreakerState, Credentials, FailureCounts, ObjectConfig, ObjectError, ObjectFailure,
    ObjectFlushError, ObjectRead, ObjectStats, ObjectTier, PACK_FORMAT, StoreId,
};
