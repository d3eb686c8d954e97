//! How a connection opens.

use super::{
    BulkError, VERSION,
    wire::{Reader, Writer},
};

const GREETING: [u8; 4] = *b"KVB1";
const WELCOME: [u8; 4] = *b"KVW1";

/// Bytes of the token that a store offers with its address.
pub const TOKEN_BYTES: usize = 16;

/// The first bytes of a client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// [`VERSION`] of the client.
    pub version: u16,
    /// The epoch that the store's offer came with.
    pub epoch: u64,
    /// The token of that offer.
    pub token: [u8; TOKEN_BYTES],
}

impl Greeting {
    /// Bytes of it.
    pub const BYTES: usize = 48;

    /// A greeting of this version.
    pub const fn new(epoch: u64, token: [u8; TOKEN_BYTES]) -> Self {
        Self {
            version: VERSION,
            epoch,
            token,
        }
    }

    /// As bytes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let writer = Writer::new(GREETING).u16(self.version).u16(0).u64(self.epoch);
        writer.bytes(&self.token).finish()
    }

    /// Reads it back.
    ///
    /// # Errors
    /// Bytes that are no greeting.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, BulkError> {
        let mut reader = Reader::new(bytes, GREETING, "the greeting")?;
        let version = reader.u16();
        reader.u16();
        Ok(Self {
            version,
            epoch: reader.u64(),
            token: reader.array(),
        })
    }
}

/// Without the token: logs are read by others than the store's clients.
impl std::fmt::Debug for Greeting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Greeting")
            .field("version", &self.version)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

/// Why a store lets nobody in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another version of the frames.
    #[error("the store speaks another version of the bulk path: use gRPC, or the store's version of the client")]
    Version,
    /// The epoch or the token is not that of this start of the store.
    #[error("the store has started anew since its offer: open the namespace again")]
    Stale,
    /// All places are taken.
    #[error("all bulk connections are taken, store.bulk_connections_max allows no more: use gRPC, or try later")]
    Full,
    /// It is going away.
    #[error("the store is stopping: try again later, or go on without it")]
    Stopping,
    /// The caller is another user of the machine.
    #[error("the local socket is for the store's own user and those of store.local_uids: use the TCP path")]
    Foreign,
}

impl Refusal {
    const ALL: [(u16, Self); 5] = [
        (1, Self::Version),
        (2, Self::Stale),
        (3, Self::Full),
        (4, Self::Stopping),
        (5, Self::Foreign),
    ];
}

/// The store's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Its epoch.
    pub epoch: u64,
    /// Most rows in a request.
    pub rows_max: u32,
    /// Most payload bytes of a put.
    pub payload_bytes_max: u64,
    /// Bytes of the shared memory whose descriptor came along with this answer; 0 when none did.
    pub arena_bytes: u64,
}

impl Welcome {
    /// Bytes of it.
    pub const BYTES: usize = 48;

    /// As bytes; or those that refuse.
    pub fn encode(answer: Result<Self, Refusal>) -> [u8; Self::BYTES] {
        let writer = Writer::new(WELCOME).u16(VERSION);
        match answer {
            Ok(welcome) => writer
                .u16(0)
                .u64(welcome.epoch)
                .u32(welcome.rows_max)
                .u32(0)
                .u64(welcome.payload_bytes_max)
                .u64(welcome.arena_bytes)
                .finish(),
            Err(refusal) => {
                let code = Refusal::ALL.iter().find(|(_, kind)| *kind == refusal);
                writer.u16(code.map_or(u16::MAX, |(code, _)| *code)).finish()
            }
        }
    }

    /// Reads it back: a welcome or a refusal.
    ///
    /// # Errors
    /// Bytes that are neither.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Result<Self, Refusal>, BulkError> {
        let mut reader = Reader::new(bytes, WELCOME, "the welcome")?;
        let (version, code) = (reader.u16(), reader.u16());
        if code != 0 {
            let refusal = Refusal::ALL.iter().find(|(value, _)| *value == code);
            return match refusal {
                Some((_, refusal)) => Ok(Err(*refusal)),
                None => Err(BulkError::field(
                    "code",
                    format!("{code} is no reason of version {VERSION}"),
                )),
            };
        }
        if version != VERSION {
            return Ok(Err(Refusal::Version));
        }
        let (epoch, rows_max) = (reader.u64(), reader.u32());
        reader.u32();
        Ok(Ok(Self {
            epoch,
            rows_max,
            payload_bytes_max: reader.u64(),
            arena_bytes: reader.u64(),
        }))
    }
}
