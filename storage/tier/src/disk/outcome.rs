//! What callers of the disk tier say and hear.

use bytes::Bytes;
use kvasir_block::{BlockKey, Checksum, LayerBlockKey};

/// Not everything accepted is durable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{queued} layer blocks are not on disk yet ({reason}): they stay queued and are tried again")]
pub struct FlushError {
    /// Layer blocks accepted and not durable.
    pub queued: u64,
    /// What stands in the way.
    pub reason: String,
}

/// What became of an offered layer block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Taken; durable after the next flush.
    Queued,
    /// Was here already.
    Present,
    /// The queue is full because the disks are slower than the writers: not taken, try later.
    Full,
    /// Not taken: the tier is closed, or the queue is full and no disk takes anything.
    /// [`DiskStats::degraded`](super::DiskStats::degraded) says why.
    Degraded,
    /// Larger than a record may be (64 MiB, or what fits under the limit of each disk): never taken.
    TooLarge,
}

/// What became of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskRead {
    /// The bytes as they were put, verified.
    Hit {
        /// Keys and values.
        payload: Bytes,
        /// The checksum they came with.
        checksum: Checksum,
    },
    /// Not here.
    Miss,
    /// Was here, but a byte was wrong or unreadable; forgotten.
    Corrupt,
    /// The deadline passed before its turn; it may be here.
    TooLate,
}

/// How much a block wants to stay where it is; rises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Heat {
    /// Nobody asks for it.
    #[default]
    Cold,
    /// It was asked for so often, of late.
    Warm(u32),
    /// It is promised to someone and must not go.
    Leased,
}

/// What becomes of a block whose segment is reclaimed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// The hottest are written again first, as many as there is room for; cold ones never are.
    pub heat: Heat,
    /// Where it does not stay, its layers are handed to [`DiskWatch::demote`] before they are forgotten.
    pub demote: bool,
}

/// Has a say in what the tier forgets to make room. Called by the threads that write, never under a lock of the tier but
/// where it says so.
pub trait DiskWatch: Send + Sync {
    /// The tier wants to forget what one segment holds of `blocks`, a few at a time. Calls `forget` once for each of them that may
    /// go, under the lock that guards the decision; those that it is not called for stay, and are written again: a lease does
    /// not stop reclaim.
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut(&BlockKey));

    /// What should become of `block` when its segment goes.
    fn fate(&self, block: &BlockKey) -> Fate {
        let _ = block;
        Fate::default()
    }

    /// Takes a verified layer block that the tier is about to forget; false if it is not taken. Should not block for long: the
    /// disk's writer waits.
    fn demote(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> bool {
        let _ = (key, payload, checksum);
        false
    }
}
