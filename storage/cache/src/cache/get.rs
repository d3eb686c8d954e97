//! Get: from memory, or from disk and then into memory; verified either way.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use kvasir_block::{Checksum, LayerBlockKey};
use kvasir_tier::DiskRead;

use super::{BlockCache, Shared, Tier};
use crate::CacheError;

/// What became of a get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GetOutcome {
    /// The bytes as they were put, verified just now.
    Hit {
        /// Keys and values.
        payload: Bytes,
        /// The checksum they came with.
        checksum: Checksum,
        /// Where they were.
        tier: Tier,
    },
    /// Not held.
    Miss,
    /// Held, but a byte was wrong; dropped and counted. To the caller a miss.
    Corrupt,
    /// Shed because too many disk reads are running. Try later, or compute.
    Busy,
    /// The deadline passed before its turn.
    TooLate,
}

impl BlockCache {
    /// Reads a layer block. Bytes from the host tier are shared, not copied.
    ///
    /// # Errors
    /// `UnknownNamespace`; `InvalidArgument` for a layer that the schema lacks.
    pub fn get(&self, key: LayerBlockKey) -> Result<GetOutcome, CacheError> {
        self.shared.schema_of_layer(key)?;
        let outcome = self.shared.read(key);
        let counters = &self.shared.counters;
        match &outcome {
            GetOutcome::Hit { payload, tier, .. } => {
                let hits = match tier {
                    Tier::Host => &counters.get_hits_host,
                    Tier::Disk => &counters.get_hits_disk,
                };
                hits.add(1);
                counters.get_bytes.add(payload.len() as u64);
            }
            GetOutcome::Miss => counters.misses_absent.add(1),
            GetOutcome::Corrupt => counters.misses_corrupt.add(1),
            GetOutcome::Busy => counters.misses_busy.add(1),
            GetOutcome::TooLate => {}
        }
        Ok(outcome)
    }
}

impl Shared {
    /// Reads and verifies; what the disk had is promoted.
    pub(crate) fn read(&self, key: LayerBlockKey) -> GetOutcome {
        let in_host = self.state.lock().host.get(key);
        let mut corrupt = false;
        if let Some((payload, checksum)) = in_host {
            if checksum.verifies(&payload) {
                return GetOutcome::Hit {
                    payload,
                    checksum,
                    tier: Tier::Host,
                };
            }
            corrupt = true;
            self.drop_from_host(key);
        }
        let Some(_permit) = ReadPermit::take(&self.disk_reads, self.config.disk_reads_max) else {
            return GetOutcome::Busy;
        };
        match self.disk.get(key) {
            DiskRead::Hit { payload, checksum } => {
                let mut state = self.state.lock();
                self.insert_host(&mut state, key, payload.clone(), checksum);
                self.refresh(&mut state, key.block(), Tier::Host);
                GetOutcome::Hit {
                    payload,
                    checksum,
                    tier: Tier::Disk,
                }
            }
            DiskRead::Miss if corrupt => GetOutcome::Corrupt,
            DiskRead::Miss => GetOutcome::Miss,
            DiskRead::TooLate => GetOutcome::TooLate,
            DiskRead::Corrupt => {
                let mut state = self.state.lock();
                self.refresh(&mut state, key.block(), Tier::Disk);
                GetOutcome::Corrupt
            }
        }
    }

    fn drop_from_host(&self, key: LayerBlockKey) {
        tracing::warn!(?key, "layer block in memory is corrupt, dropping it");
        self.counters.host_corrupt.add(1);
        let mut state = self.state.lock();
        state.host.remove(key);
        self.refresh(&mut state, key.block(), Tier::Host);
    }
}

/// One of a bounded number of disk reads.
struct ReadPermit<'a>(&'a AtomicUsize);

impl<'a> ReadPermit<'a> {
    fn take(running: &'a AtomicUsize, max: usize) -> Option<Self> {
        let taken = running.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
            (count < max).then_some(count + 1)
        });
        taken.ok().map(|_| Self(running))
    }
}

impl Drop for ReadPermit<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
