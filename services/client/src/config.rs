//! Where the store is, and how long to wait for it.

use std::time::Duration;

/// Settings of a [`crate::StoreClient`]; start from [`ClientConfig::to`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// The store's URL, as in `http://127.0.0.1:7401`.
    pub url: String,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Deadline of one unary call, its retries included; also the longest wait for a stream to open or to move.
    pub call_timeout: Duration,
    /// Tries of one unary call, the first included. Only calls that may be repeated are, and only when the store was
    /// not reachable.
    pub attempts_max: u32,
    /// Most payload bytes of a put stream without an outcome; beyond it [`crate::PutStream::put`] waits.
    pub in_flight_bytes_max: usize,
    /// Payload bytes after which a put stream sends what it has batched.
    pub batch_bytes: usize,
    /// Seed of the jitter of pauses between tries; clients with different seeds do not return in step.
    pub jitter_seed: u64,
}

impl ClientConfig {
    /// Defaults for a store on this machine or beside it: 1 s to connect, 5 s per call, 3 tries, 16 MiB in flight in
    /// batches of 1 MiB.
    pub fn to(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            connect_timeout: Duration::from_secs(1),
            call_timeout: Duration::from_secs(5),
            attempts_max: 3,
            in_flight_bytes_max: 16 << 20,
            batch_bytes: 1 << 20,
            jitter_seed: u64::from(std::process::id()),
        }
    }
}
