//! From body frames, cut anywhere, to gRPC messages.
//!
//! Invariants: nothing is kept for a message before its announced length was checked; what is kept is at most one message
//! and the frame that completed it, in at most two bookkeeping entries per [`SMALL_BYTES`].

use bytes::{Buf, Bytes, BytesMut};

use super::{FrameError, PREFIX_BYTES, Rope};

/// Frames below this are copied together: a frame costs a bookkeeping entry, and a peer may send them with one byte each.
const SMALL_BYTES: usize = 4096;

/// Cuts a byte stream into gRPC messages. Pure: [`Self::push`] what arrives, ask for [`Self::next_message`].
#[derive(Debug)]
pub struct Decoder {
    message_bytes_max: usize,
    rope: Rope,
    /// Small frames that follow what is in `rope`.
    tail: BytesMut,
    /// Length of the message whose prefix was read.
    announced: Option<usize>,
}

impl Decoder {
    /// A decoder that refuses messages above `message_bytes_max`.
    pub fn new(message_bytes_max: usize) -> Self {
        Self {
            message_bytes_max,
            rope: Rope::new(),
            tail: BytesMut::new(),
            announced: None,
        }
    }

    /// Takes the next bytes of the stream.
    pub fn push(&mut self, data: Bytes) {
        if data.len() < SMALL_BYTES {
            self.tail.extend_from_slice(&data);
        } else {
            self.join_tail();
            self.rope.push(data);
        }
    }

    /// Length of the message that comes next, once its prefix is there.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`], [`FrameError::Compressed`], [`FrameError::NotGrpc`]; the stream cannot go on.
    pub fn announced(&mut self) -> Result<Option<usize>, FrameError> {
        if self.announced.is_none() && self.buffered() >= PREFIX_BYTES {
            self.join_tail();
            let flag = self.rope.get_u8();
            let bytes = self.rope.get_u32() as usize;
            match flag {
                0 => {}
                1 => return Err(FrameError::Compressed),
                other => return Err(FrameError::NotGrpc(other)),
            }
            if bytes > self.message_bytes_max {
                return Err(FrameError::TooLarge {
                    bytes,
                    max: self.message_bytes_max,
                });
            }
            self.announced = Some(bytes);
        }
        Ok(self.announced)
    }

    /// The next message without its prefix, once all of it is there.
    ///
    /// # Errors
    /// As [`Self::announced`].
    pub fn next_message(&mut self) -> Result<Option<Rope>, FrameError> {
        match self.announced()? {
            Some(bytes) if self.buffered() >= bytes => {
                self.join_tail();
                self.announced = None;
                Ok(self.rope.split(bytes))
            }
            _ => Ok(None),
        }
    }

    /// Says that the stream ended here.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] inside a message.
    pub fn end(&self) -> Result<(), FrameError> {
        let wanted = match self.announced {
            Some(bytes) => bytes,
            None if self.buffered() == 0 => return Ok(()),
            None => PREFIX_BYTES,
        };
        Err(FrameError::Truncated {
            missing: wanted.saturating_sub(self.buffered()),
        })
    }

    fn buffered(&self) -> usize {
        self.rope.len() + self.tail.len()
    }

    fn join_tail(&mut self) {
        if !self.tail.is_empty() {
            self.rope.push(self.tail.split().freeze());
        }
    }
}
