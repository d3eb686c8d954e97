//! `PutBlocksRequest` and `GetBlocksReply`: the same wire form, a header in field 1 and the payload in field 15.
//!
//! Written with the header first and the payload last. Read in any order, unknown fields skipped, a repeated header merged
//! and of a repeated payload the last one taken, as protobuf has it.

use bytes::{Buf, BufMut, BytesMut};
use prost::{Message, decode_length_delimiter, encode_length_delimiter, length_delimiter_len};

use super::{FrameError, PREFIX_BYTES, Rope};
use crate::v1;

const HEADER: u32 = 1;
const PAYLOAD: u32 = 15;
/// Field of the entries inside the header.
const ENTRIES: u32 = 2;

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const LENGTH_DELIMITED: u8 = 2;
const GROUP_START: u8 = 3;
const GROUP_END: u8 = 4;
const FIXED32: u8 = 5;

/// Groups inside groups; nobody writes groups any more, so this is generous.
const GROUP_DEPTH_MAX: usize = 32;

/// Bounds that are checked before a header is decoded: decoded entries take several times their bytes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BulkLimits {
    /// Most bytes of the header.
    pub header_bytes_max: usize,
    /// Most entries in it.
    pub entries_max: usize,
}

impl Default for BulkLimits {
    /// Room for 4 MiB of layer blocks of 512 bytes, far smaller than real ones.
    fn default() -> Self {
        Self {
            header_bytes_max: 1 << 20,
            entries_max: 8192,
        }
    }
}

/// A header and the packed layer blocks it describes.
#[derive(Clone, Debug, Default)]
pub struct BulkMessage {
    /// Namespace, and one entry per layer block.
    pub header: v1::BlockBatch,
    /// The layer blocks back to back, in the header's order.
    pub payload: Rope,
}

impl BulkMessage {
    /// The gRPC message as body frames: prefix, header and the payload's tag in one small buffer, then the payload's own
    /// buffers.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] from 4 GiB on, which the prefix cannot express.
    pub fn encode(self) -> Result<Rope, FrameError> {
        let header_bytes = self.header.encoded_len();
        let payload_bytes = self.payload.len();
        let mut bytes = 1 + length_delimiter_len(header_bytes) + header_bytes;
        let head_bytes = PREFIX_BYTES + bytes + 1 + length_delimiter_len(payload_bytes);
        if payload_bytes > 0 {
            bytes += 1 + length_delimiter_len(payload_bytes) + payload_bytes;
        }
        let mut head = prefix(bytes, head_bytes)?;
        head.put_u8(key(HEADER, LENGTH_DELIMITED));
        head.put_slice(&self.header.encode_length_delimited_to_vec());
        if payload_bytes > 0 {
            head.put_u8(key(PAYLOAD, LENGTH_DELIMITED));
            encode_length_delimiter(payload_bytes, &mut head).map_err(|_| too_large(bytes))?;
        }
        let mut frames = Rope::from(head.freeze());
        frames.extend(self.payload);
        Ok(frames)
    }

    /// The message in `message` (without its gRPC prefix).
    ///
    /// # Errors
    /// [`FrameError::Malformed`] naming the field.
    pub fn parse(mut message: Rope, limits: &BulkLimits) -> Result<Self, FrameError> {
        let mut parsed = Self::default();
        let mut entries = 0;
        while message.has_remaining() {
            let (field, wire) = read_key("message", &mut message)?;
            match field {
                HEADER => {
                    let bytes = read_length("header", wire, &mut message)?;
                    if bytes > limits.header_bytes_max {
                        let problem = format!("has {bytes} bytes, at most {} are accepted", limits.header_bytes_max);
                        return Err(FrameError::malformed("header", problem));
                    }
                    let header = message.cut(bytes).ok_or_else(|| cut_short("header"))?;
                    entries += count_entries(&header)?;
                    if entries > limits.entries_max {
                        let problem = format!("more than {} in one message: send smaller batches", limits.entries_max);
                        return Err(FrameError::malformed("header.entries", problem));
                    }
                    let merged = parsed.header.merge(header);
                    merged.map_err(|error| FrameError::malformed("header", error.to_string()))?;
                }
                PAYLOAD => {
                    let bytes = read_length("payload", wire, &mut message)?;
                    parsed.payload = message.split(bytes).ok_or_else(|| cut_short("payload"))?;
                }
                _ => skip("message", field, wire, &mut message)?,
            }
        }
        Ok(parsed)
    }
}

/// Any message as body frames, for the small messages of the bulk calls.
///
/// # Errors
/// [`FrameError::TooLarge`] from 4 GiB on.
pub fn encode_message(message: &impl Message) -> Result<Rope, FrameError> {
    let body = message.encode_to_vec();
    let mut frame = prefix(body.len(), PREFIX_BYTES + body.len())?;
    frame.put_slice(&body);
    Ok(Rope::from(frame.freeze()))
}

fn prefix(bytes: usize, capacity: usize) -> Result<BytesMut, FrameError> {
    let announced = u32::try_from(bytes).map_err(|_| too_large(bytes))?;
    let mut head = BytesMut::with_capacity(capacity);
    head.put_u8(0);
    head.put_u32(announced);
    Ok(head)
}

fn too_large(bytes: usize) -> FrameError {
    FrameError::TooLarge {
        bytes,
        max: u32::MAX as usize,
    }
}

/// The one-byte key of a field below 16.
const fn key(field: u32, wire: u8) -> u8 {
    (field as u8) << 3 | wire
}

fn cut_short(field: &'static str) -> FrameError {
    FrameError::malformed(field, "is longer than the message that holds it")
}

fn read_varint(inside: &'static str, buf: &mut impl Buf) -> Result<usize, FrameError> {
    decode_length_delimiter(buf).map_err(|_| FrameError::malformed(inside, "is not protobuf: a number does not end"))
}

fn read_key(inside: &'static str, buf: &mut impl Buf) -> Result<(u32, u8), FrameError> {
    let key = read_varint(inside, buf)?;
    match u32::try_from(key >> 3) {
        Ok(field) if field > 0 => Ok((field, (key & 7) as u8)),
        _ => Err(FrameError::malformed(inside, "is not protobuf: a field has no number")),
    }
}

fn read_length(field: &'static str, wire: u8, buf: &mut impl Buf) -> Result<usize, FrameError> {
    if wire != LENGTH_DELIMITED {
        return Err(FrameError::malformed(
            field,
            format!("has wire type {wire}, must have {LENGTH_DELIMITED}"),
        ));
    }
    read_varint(field, buf)
}

/// Entries of an encoded header, without decoding them.
fn count_entries(mut header: &[u8]) -> Result<usize, FrameError> {
    let mut count = 0;
    while header.has_remaining() {
        let (field, wire) = read_key("header", &mut header)?;
        count += usize::from(field == ENTRIES);
        skip("header", field, wire, &mut header)?;
    }
    Ok(count)
}

/// Skips the value of a field.
fn skip(inside: &'static str, field: u32, wire: u8, buf: &mut impl Buf) -> Result<(), FrameError> {
    let mut open = Vec::new();
    let (mut field, mut wire) = (field, wire);
    loop {
        let bytes = match wire {
            VARINT => {
                // Not a length, but read alike; 64-bit values pass.
                read_varint(inside, buf)?;
                0
            }
            FIXED64 => 8,
            FIXED32 => 4,
            LENGTH_DELIMITED => read_varint(inside, buf)?,
            GROUP_START if open.len() < GROUP_DEPTH_MAX => {
                open.push(field);
                0
            }
            GROUP_END if open.pop() == Some(field) => 0,
            _ => {
                return Err(FrameError::malformed(
                    inside,
                    format!("is not protobuf: field {field} has wire type {wire}"),
                ));
            }
        };
        if bytes > buf.remaining() {
            return Err(FrameError::malformed(
                inside,
                format!("field {field} is longer than what holds it"),
            ));
        }
        buf.advance(bytes);
        if open.is_empty() {
            return Ok(());
        }
        (field, wire) = read_key(inside, buf)?;
    }
}
