//! Memory and files as the tiers want them: an arena of shared memory, aligned buffers, direct I/O.
//!
//! Knows bytes, offsets and descriptors; nothing of blocks, keys or tiers. All `unsafe` of the storage side is here, each block
//! with the fact that makes it sound.
//!
//! Meet first: [`Buffer`], exclusive memory that becomes shared and immutable; [`FileIo`], which reads and writes files, and
//! [`faulty`], which does it wrong on purpose.
//!
//! ```
//! use kvasir_device::Buffer;
//! let mut buffer = Buffer::heap(5);
//! buffer.as_mut_slice().copy_from_slice(b"bytes");
//! assert_eq!(buffer.freeze(1..4), "yte");
//! ```
#![expect(
    unsafe_code,
    reason = "hands aligned memory to the kernel and maps memory that other processes share"
)]

mod buffer;
mod file;

pub use buffer::{Buffer, PAGE_BYTES};
pub use file::{BlockFile, FileIo, Psync, ReadAt, ReadOutcome, Uring, WriteAt, best_io, faulty, takes_direct_io};
