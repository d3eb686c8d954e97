//! The bulk path's frames: blocks over a plain connection, without HTTP in between.
//!
//! A connection opens with a [`Greeting`], which shows the token of the store's offer, and is answered with a [`Welcome`]. Then
//! the client sends requests and the store answers them in their order; several may be on their way. A request is a
//! [`RequestHead`], a table with one row per block, and for a put the payloads back to back. A reply is one frame or more, each a
//! [`ReplyHead`], a table with one row per block, and for a get the payloads of the hits back to back; [`ReplyHead::last`] ends
//! it. Over a Unix socket a hit may be a place in shared memory instead of bytes ([`GetRow::place`]).
//!
//! All numbers are little-endian and all heads have fixed sizes. Heads and tables carry a CRC-32C of their own, so a length is
//! believed only when it is whole; the payload's own checksum is in its row. Every length is bounded before anything is kept for
//! it. `FORMAT.md` in the folder beside this file has the bytes.
//!
//! Pure: bytes in, values out. Sockets are the store's and the client's.

mod hello;
mod reply;
mod request;
mod wire;

use kvasir_block::{
    Checksum,
    planted::{Bug, planted},
};

pub use hello::{Greeting, Refusal, TOKEN_BYTES, Welcome};
pub use reply::{GetRow, Place, ReplyHead, Status, put_reply_rows, put_rows, reply_text};
pub use request::{Op, PutRow, RequestHead};
pub use wire::{hash_rows, hash_table, key_rows, key_table, number_rows, number_table, presence_rows, presence_table};

/// Version of the frames; another one is refused in the greeting.
pub const VERSION: u16 = 1;

/// Most rows in a request, and in a frame of a reply.
pub const ROWS_MAX: usize = 65_536;

/// Longest text of a refusal, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;

/// Payload bytes after which a frame of a get is closed: small enough that the first one comes soon and the bytes are still in
/// the processor's cache when they are sent on, large enough that heads do not count.
pub const FRAME_BYTES: usize = 1 << 20;

/// Bytes that are not the frame that they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BulkError {
    /// The first bytes are others.
    #[error("{what} begins with {found:02x?}: this is not Kvasir's bulk path, or a length was wrong")]
    Magic {
        /// Which frame was expected.
        what: &'static str,
        /// Its first four bytes.
        found: [u8; 4],
    },
    /// The frame's own checksum is wrong.
    #[error("{what} was damaged on its way: its checksum is wrong")]
    Damaged {
        /// Which part.
        what: &'static str,
    },
    /// A field has a value that it cannot have.
    #[error("{field}: {problem}")]
    Field {
        /// Which one.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl BulkError {
    fn field(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Field {
            field,
            problem: problem.into(),
        }
    }
}

/// Whether `table` is the one that a head announced.
///
/// # Errors
/// [`BulkError::Damaged`] when not.
pub fn check_table(table: &[u8], checksum: Checksum) -> Result<(), BulkError> {
    if checksum.verifies(table) || planted(Bug::TableChecksumSkipped) {
        Ok(())
    } else {
        Err(BulkError::Damaged { what: "the table" })
    }
}

/// Whether `message` has the checksum that a head announced.
fn check_message(message: &[u8], announced: u64) -> Result<(), BulkError> {
    if u64::from(Checksum::of(message).to_u32()) == announced {
        Ok(())
    } else {
        Err(BulkError::Damaged { what: "the message" })
    }
}

#[cfg(test)]
mod tests;
