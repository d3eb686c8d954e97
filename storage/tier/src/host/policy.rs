//! Which block goes next: three answers behind one small trait.
//!
//! A policy knows blocks by their place in the tier's table and sees what happens to them; it neither holds bytes nor counts them. A
//! search costs the victims it finds and the blocks it passes over, which it puts where the next search will not meet them
//! first.

mod lru;
mod prefix;
mod queue;
mod s3_fifo;

use std::fmt;

use kvasir_block::BlockKey;

/// How the host tier chooses what to evict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostPolicy {
    /// Least recently matched first.
    Lru,
    /// Small, main and ghost queue (Yang and others, "FIFO queues are all you need for cache eviction", SOSP 2023): what is never
    /// matched again passes through a tenth of the blocks.
    S3Fifo,
    /// Never a block before its descendants that are here: what is left of a chain is a prefix, and can be hit. Among
    /// those without descendants, least recently matched first.
    #[default]
    Prefix,
}

impl HostPolicy {
    /// All of them, to compare.
    pub const ALL: [Self; 3] = [Self::Lru, Self::S3Fifo, Self::Prefix];

    /// Its name in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::S3Fifo => "s3-fifo",
            Self::Prefix => "prefix",
        }
    }

    /// The policy of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }

    pub(super) fn build(self) -> Box<dyn Policy> {
        match self {
            Self::Lru => Box::new(lru::Lru::default()),
            Self::S3Fifo => Box::new(s3_fifo::S3Fifo::default()),
            Self::Prefix => Box::new(prefix::Prefix::default()),
        }
    }
}

/// A block's place in the tier's table.
pub(super) type Place = u32;

/// What the tier says of a block that a policy would evict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Evict,
    /// Leased, being read, or about to grow: look further.
    Spare,
    /// Enough has been passed over.
    Stop,
}

pub(super) trait Policy: fmt::Debug + Send {
    /// A block came.
    fn added(&mut self, place: Place, key: &BlockKey);
    /// A block was matched.
    fn touched(&mut self, place: Place);
    /// A block went otherwise than as a victim.
    fn removed(&mut self, place: Place);
    /// The next block to evict, now forgotten here; `None` if there is none or the tier said stop.
    fn victim(&mut self, judge: &mut dyn FnMut(Place) -> Verdict) -> Option<Place>;
    /// A victim is not evicted after all; `victim`s come back in the reverse of their order.
    fn restored(&mut self, place: Place, key: &BlockKey);
    /// `child` continues `parent`; both are here. Links never form a ring: the tier links by rising depth.
    fn linked(&mut self, _child: Place, _parent: Place) {}
    /// Whether [`Self::linked`] matters.
    fn wants_links(&self) -> bool {
        false
    }
    /// Blocks known here.
    #[cfg(test)]
    fn len(&self) -> usize;
}

/// A short name of a block for queues of what is gone: a wrong match costs a poor choice, nothing else.
fn fingerprint(key: &BlockKey) -> u64 {
    let part = |bytes: &[u8]| bytes[..8].iter().fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte));
    part(key.hash.as_bytes()) ^ part(key.namespace.as_bytes()).rotate_left(32)
}
