//! Memory and files as the tiers want them: an arena of shared memory, aligned buffers, direct I/O.
//!
//! Knows bytes, offsets and descriptors; nothing of blocks, keys or tiers. All `unsafe` of the storage side is here, each block
//! with the fact that makes it sound.
//!
//! Meet first: [`Buffer`], exclusive memory that becomes shared and immutable; [`Arena`], where a bounded amount of it comes from;
//! [`ArenaView`], the same memory seen by another process, to which [`socket`] carries it; [`stream`], bytes between two processes; [`FileIo`], which reads and writes
//! files, and [`faulty`], which does it wrong on purpose; [`thread`], a thread that steps back.
//!
//! ```
//! use kvasir_device::{Arena, ArenaConfig, HugePages};
//! let arena = Arena::new(ArenaConfig { bytes: 1 << 20, huge_pages: HugePages::Auto })?;
//! let mut buffer = arena.try_reserve(5).expect("nothing is in it yet");
//! buffer.as_mut_slice().copy_from_slice(b"bytes");
//! let bytes = buffer.freeze(1..4);
//! assert_eq!(bytes, "yte");
//! assert_eq!((arena.locate(&bytes), arena.used()), (Some(1..4), 4096));
//! drop(bytes);
//! assert_eq!(arena.used(), 0);
//! # Ok::<(), kvasir_device::ArenaError>(())
//! ```
#![expect(
    unsafe_code,
    reason = "hands aligned memory to the kernel and maps memory that other processes share"
)]

mod arena;
mod buffer;
mod file;
pub mod socket;
pub mod stream;
pub mod thread;

pub use arena::{Arena, ArenaConfig, ArenaError, ArenaView, Fence, Held, HugePages, PageKind, Ready, ViewError};
pub use buffer::{Buffer, PAGE_BYTES};
pub use file::{
    BlockFile, FileIo, PIECE_BYTES, Psync, ReadAt, ReadOutcome, Uring, WriteAt, best_io, faulty, takes_direct_io,
};
