//! Where the store is, how blocks get from and to it, and how long to wait for it.

use std::time::Duration;

/// The way that blocks take between a store and its client: streams of puts and gets. Everything else is gRPC always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DataPath {
    /// The fastest that the store offers and that works: where it is on this machine its memory, then bulk TCP, then gRPC.
    #[default]
    Auto,
    /// gRPC, which any network and any proxy carries.
    Grpc,
    /// Bulk TCP or not at all.
    Bulk,
    /// As by `Auto`, since a stream may be of a store elsewhere; a [`crate::LocalConnection`] wants it or `Auto`.
    Local,
}

/// Settings of a [`crate::StoreClient`]; start from [`ClientConfig::to`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// The store's URL, as in `http://127.0.0.1:7401`.
    pub url: String,
    /// How blocks travel.
    pub path: DataPath,
    /// Whether the checksum of each block received is verified. Off only for measurements, or where the memory and the way
    /// are trusted: a store that serves a bulk path does not verify what lies in its memory when its reader says it will, and
    /// then nobody does. Over gRPC blocks are verified always.
    pub verify: bool,
    /// How long computing a block, all of its layers, takes this client. A store answers a get with too late, at once, where
    /// reading the block would take longer. `None` where it is not known.
    pub recompute_per_block: Option<Duration>,
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
    /// Most bulk connections at a time, one per open stream; streams beyond it go by gRPC.
    pub bulk_connections_max: usize,
    /// How long a thread that waits for the reply to a query over a bulk connection ([`crate::BulkDecode`]) looks for it before it sleeps;
    /// zero is to sleep at once. At most half as many threads of a process look at a time as there are processors.
    pub decode_poll: Duration,
    /// Seed of the jitter of pauses between tries; clients with different seeds do not return in step.
    pub jitter_seed: u64,
}

impl ClientConfig {
    /// Defaults for a store on this machine or beside it: 1 s to connect, 5 s per call, 3 tries, 16 MiB in flight in
    /// batches of 1 MiB, the fastest path, up to 8 bulk connections, and 50 us to look for a reply.
    pub fn to(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            path: DataPath::Auto,
            verify: true,
            recompute_per_block: None,
            connect_timeout: Duration::from_secs(1),
            call_timeout: Duration::from_secs(5),
            attempts_max: 3,
            in_flight_bytes_max: 16 << 20,
            batch_bytes: 1 << 20,
            bulk_connections_max: 8,
            decode_poll: Duration::from_micros(50),
            jitter_seed: u64::from(std::process::id()),
        }
    }
}
