//! The other side: another process's arena, to read.

use std::{any::Any, fmt, io, ops::Range, os::fd::OwnedFd, sync::Arc};

use bytes::Bytes;

use super::memory::{Memory, ViewProblem};

/// Why a descriptor is not taken for an arena.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// Its size could change under a mapping, or others could write to it.
    #[error("the descriptor is not sealed as an arena is: whoever sent it is not a store of this version")]
    NotSealed,
    /// It is not what was announced.
    #[error("the descriptor has {found} bytes where an arena of {announced} was announced")]
    Size {
        /// Bytes it has.
        found: u64,
        /// Bytes it should have.
        announced: u64,
    },
    /// The system said no.
    #[error("cannot {what} of a received arena: {source}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A mapping, for reading, of an arena that belongs to another process.
///
/// The seals are checked before anything is mapped, so a read can never meet a missing page. That a range does not change while it is
/// read is the word of the arena's owner: it holds for ranges it has leased, until the lease ends. Only they may be asked for, with a
/// guard that keeps the lease; and since a lease can end by its time, verify the checksum before use where that could happen.
#[derive(Clone)]
pub struct ArenaView {
    memory: Arc<Memory>,
}

impl ArenaView {
    /// Maps an arena of `bytes`, the size that its owner announced ([`super::Arena::capacity`]).
    ///
    /// # Errors
    /// [`ViewError`]; nothing is mapped then.
    pub fn map(fd: OwnedFd, bytes: u64) -> Result<Self, ViewError> {
        let memory = Memory::view(fd, bytes).map_err(|problem| match problem {
            ViewProblem::NotSealed => ViewError::NotSealed,
            ViewProblem::Size { found } => ViewError::Size {
                found,
                announced: bytes,
            },
            ViewProblem::Io(what, source) => ViewError::Io { what, source },
        })?;
        Ok(Self {
            memory: Arc::new(memory),
        })
    }

    /// Bytes of the arena.
    pub fn capacity(&self) -> u64 {
        self.memory.len()
    }

    /// A leased range, without copying; `None` when it is not within the arena. `lease` lives until the last clone is gone, and so
    /// does the mapping.
    pub fn bytes(&self, range: Range<u64>, lease: Arc<dyn Any + Send + Sync>) -> Option<Bytes> {
        if range.start > range.end || range.end > self.memory.len() {
            return None;
        }
        Some(Bytes::from_owner(Leased {
            memory: Arc::clone(&self.memory),
            start: range.start as usize,
            len: (range.end - range.start) as usize,
            _lease: lease,
        }))
    }
}

impl fmt::Debug for ArenaView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ArenaView({} bytes)", self.memory.len())
    }
}

struct Leased {
    memory: Arc<Memory>,
    start: usize,
    len: usize,
    _lease: Arc<dyn Any + Send + Sync>,
}

impl AsRef<[u8]> for Leased {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: within the mapping, checked in `bytes`; this process has it mapped for reading only, and the owner does not write to
        // a leased range (the type's contract).
        unsafe { self.memory.slice(self.start, self.len) }
    }
}
