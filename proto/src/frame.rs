//! The bulk path by hand: `PutBlocksRequest` and `GetBlocksReply` as gRPC frames without the codec's copies.
//!
//! A gRPC codec encodes a message into one buffer and decodes it from one buffer, so each payload byte is copied once on
//! each side. Here a message leaves as a small buffer (the five-byte gRPC prefix, the protobuf header, the payload's tag
//! and length) followed by the payload's own buffers, each a body frame of its own; and what arrives is kept as the frames
//! that the transport delivered ([`Rope`]), from which layer blocks are cut without copying where one lies in one frame.
//! On the wire it is ordinary gRPC: a generated client or server on the other side sees no difference.
//!
//! Meet first [`BulkMessage`], then [`FramedBody`] (what is sent) and [`Incoming`] (what is received). The parsing is pure
//! ([`Decoder`], [`BulkMessage::parse`]); lengths are checked before anything is kept for them.
//!
//! Not here: compression (KV is noise to it; refused with `UNIMPLEMENTED`) and interceptors (tower layers do their work).

mod body;
mod bulk;
mod decode;
mod rope;

pub use body::{CONTENT_TYPE, FramedBody, Incoming, StreamError, response};
pub use bulk::{BulkLimits, BulkMessage, encode_message};
pub use decode::Decoder;
pub use rope::Rope;

/// Bytes before each gRPC message: a flag and a length.
const PREFIX_BYTES: usize = 5;

/// Bytes that are not the gRPC message they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The announced message is longer than accepted.
    #[error("a message of {bytes} bytes, at most {max} are accepted: send smaller batches")]
    TooLarge {
        /// Announced length.
        bytes: usize,
        /// Accepted length.
        max: usize,
    },
    /// The message is compressed.
    #[error("the message is compressed: send bulk messages uncompressed, KV does not get smaller")]
    Compressed,
    /// The first byte of a message is neither 0 nor 1.
    #[error("byte {0:#04x} where a gRPC message must begin with 0x00: this is not gRPC, or a length was wrong")]
    NotGrpc(u8),
    /// The stream ended inside a message.
    #[error("the stream ended inside a message, {missing} bytes before its end: the sender was cut off")]
    Truncated {
        /// Bytes that did not come; of the prefix while it is incomplete.
        missing: usize,
    },
    /// Not protobuf, or not the message that it should be.
    #[error("{field}: {problem}")]
    Malformed {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl FrameError {
    fn malformed(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Malformed {
            field,
            problem: problem.into(),
        }
    }
}

/// How a server says it.
impl From<FrameError> for tonic::Status {
    fn from(error: FrameError) -> Self {
        let text = error.to_string();
        match error {
            FrameError::TooLarge { .. } => Self::resource_exhausted(text),
            FrameError::Compressed => Self::unimplemented(text),
            FrameError::NotGrpc(_) | FrameError::Truncated { .. } | FrameError::Malformed { .. } => {
                Self::invalid_argument(text)
            }
        }
    }
}

#[cfg(test)]
mod tests;
