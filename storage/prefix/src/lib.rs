//! Which holder has how much of a prefix.
//!
//! A [`PrefixMap`] remembers which holders (stores, workers) have which blocks and answers, for the chain of a prompt,
//! how many blocks from its start each holder has without a gap. It is a view made from events: bounded, it forgets the
//! oldest blocks first, and forgetting costs a routing decision, never a wrong token. It does no I/O, reads no clock and
//! does not know what a holder is.
//!
//! ```
//! use kvasir_block::{BlockHash, NamespaceId};
//! use kvasir_prefix::PrefixMap;
//! let namespace = NamespaceId::from_bytes([7; 32]);
//! let chain: Vec<BlockHash> = (0..3).map(|i| BlockHash::from_bytes([i; 32])).collect();
//! let mut map = PrefixMap::new(1000);
//! map.insert(namespace.block(chain[0]), "worker-a");
//! map.insert(namespace.block(chain[1]), "worker-a");
//! map.insert(namespace.block(chain[0]), "worker-b");
//! assert_eq!(map.longest_prefix(namespace, &chain), [("worker-a", 2), ("worker-b", 1)]);
//! ```
#![forbid(unsafe_code)]

mod prefix_map;

pub use prefix_map::PrefixMap;
