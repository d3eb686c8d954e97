//! What the services share: the cache, the doors, and the bounds.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use kvasir_cache::{BlockCache, CacheError};
use kvasir_proto::bulk::TOKEN_BYTES;
use parking_lot::RwLock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    StoreConfig,
    door::{Door, Lost},
    searches::Searches,
};

/// Where the bulk path is.
#[derive(Debug)]
pub(crate) struct BulkPlaces {
    /// Of the TCP listener.
    pub(crate) addr: SocketAddr,
    /// Path of the Unix socket; `None` where there is none.
    pub(crate) local_socket: Option<String>,
}

pub(crate) struct Served {
    pub(crate) config: StoreConfig,
    /// What a bulk connection must show.
    pub(crate) bulk_token: [u8; TOKEN_BYTES],
    /// Where the bulk path is, once it is.
    pub(crate) bulk_offer: OnceLock<BulkPlaces>,
    /// `None` once the store has stopped, even where a connection that would not end still holds its services.
    cache: RwLock<Option<Arc<BlockCache>>>,
    pub(crate) io: Door,
    pub(crate) searches: Searches,
    /// Cancelled when streams should end.
    pub(crate) stopping: CancellationToken,
    streams: Arc<Semaphore>,
    put_bytes: Arc<Semaphore>,
}

/// A place among the open streams, given back on drop.
#[derive(Debug)]
pub(crate) struct StreamSlot {
    _permit: OwnedSemaphorePermit,
}

impl Served {
    pub(crate) fn new(
        config: StoreConfig,
        cache: BlockCache,
        bulk_token: [u8; TOKEN_BYTES],
        stopping: CancellationToken,
    ) -> Self {
        // A permit is a KiB, since the semaphore hands out u32 at a time; rounded up, so that the largest message fits.
        let put_kib = config.put_bytes_max.as_usize().div_ceil(1024);
        let (io, searches) = (
            Door::new("io", config.io_threads),
            Searches::new(config.retrieval_threads, config.parked_bytes_max.as_u64()),
        );
        let doors = [io.clone(), searches.door.clone()];
        cache.set_busy(move || doors.iter().any(Door::has_queue));
        Self {
            io,
            searches,
            streams: Arc::new(Semaphore::new(config.streams_max.min(Semaphore::MAX_PERMITS))),
            put_bytes: Arc::new(Semaphore::new(put_kib.min(Semaphore::MAX_PERMITS))),
            cache: RwLock::new(Some(Arc::new(cache))),
            config,
            bulk_token,
            bulk_offer: OnceLock::new(),
            stopping,
        }
    }

    /// The cache, while the store runs.
    pub(crate) fn cache(&self) -> Result<Arc<BlockCache>, Lost> {
        self.cache.read().clone().ok_or(Lost::Closed)
    }

    /// Does `work` with the cache on an I/O thread.
    pub(crate) async fn with_cache<T: Send + 'static>(
        &self,
        work: impl FnOnce(&BlockCache) -> T + Send + 'static,
    ) -> Result<T, Lost> {
        let cache = self.cache()?;
        self.io.run(move || work(&cache)).await
    }

    /// A place for one more stream; `None` when all are taken.
    pub(crate) fn stream_slot(&self) -> Option<StreamSlot> {
        let permit = Arc::clone(&self.streams).try_acquire_owned().ok()?;
        Some(StreamSlot { _permit: permit })
    }

    /// Room for a put message of `bytes`, waiting for it.
    pub(crate) async fn put_room(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Lost> {
        let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
        Arc::clone(&self.put_bytes)
            .acquire_many_owned(kib)
            .await
            .map_err(|_| Lost::Closed)
    }

    /// Open streams, and bytes of put messages at hand.
    pub(crate) fn load(&self) -> (usize, usize) {
        let streams = self.config.streams_max.saturating_sub(self.streams.available_permits());
        let put_kib = self
            .config
            .put_bytes_max
            .as_usize()
            .div_ceil(1024)
            .saturating_sub(self.put_bytes.available_permits());
        (streams, put_kib << 10)
    }

    /// Takes no more work, and waits for what is under way.
    pub(crate) async fn drain(&self) {
        self.io.drain().await;
        self.searches.door.drain().await;
    }

    /// Waits for work that is under way, then flushes and closes the cache.
    pub(crate) async fn close(&self) -> anyhow::Result<()> {
        self.drain().await;
        let Some(cache) = self.cache.write().take() else {
            return Ok(());
        };
        tokio::task::spawn_blocking(move || shut(cache)).await??;
        Ok(())
    }
}

/// Without the token.
impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Closes the cache; nobody takes it any more, but a call that was being answered may hold it for a moment.
fn shut(cache: Arc<BlockCache>) -> Result<(), CacheError> {
    match Arc::try_unwrap(cache) {
        Ok(cache) => cache.close(),
        // Its last holder closes it by dropping it; what was accepted is safe by then.
        Err(cache) => cache.flush(),
    }
}
