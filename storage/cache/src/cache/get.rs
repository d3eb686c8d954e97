//! Get: what a reader asks for and what it gets. How the tiers are asked is in `read.rs`.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kvasir_block::{Checksum, LayerBlockKey};

use super::{BlockCache, Shared, Tier};
use crate::{CacheError, LeaseId};

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
    /// Shed because too many reads of a slower tier are waiting. Try later, or compute.
    Busy,
    /// Held, and not worth waiting for: the deadline passed before its turn or would have passed, or computing it is quicker.
    TooLate,
}

/// How a get of many is done.
#[derive(Clone, Copy, Debug)]
pub struct GetOptions {
    /// What was not read by then is answered [`GetOutcome::TooLate`]; looked at before each read of a slower tier, together
    /// with how long the reads before it will take.
    pub deadline: Option<Instant>,
    /// The lease that covers the blocks: it is then known that more of them will be asked for soon, and they are brought into
    /// memory ahead.
    pub lease: Option<LeaseId>,
    /// Whether bytes from memory are verified here. Off only where the receiver verifies them, which it says; bytes from
    /// slower tiers are always verified.
    pub verify: bool,
    /// How long computing a block (all of its layers) takes the caller. What would take longer to read is answered
    /// [`GetOutcome::TooLate`] at once. `None` where it is not known.
    pub recompute: Option<Duration>,
}

impl Default for GetOptions {
    fn default() -> Self {
        Self {
            deadline: None,
            lease: None,
            verify: true,
            recompute: None,
        }
    }
}

impl BlockCache {
    /// Reads a layer block. Bytes from the host tier are shared, not copied.
    ///
    /// # Errors
    /// `UnknownNamespace`; `InvalidArgument` for a layer that the schema lacks.
    pub fn get(&self, key: LayerBlockKey) -> Result<GetOutcome, CacheError> {
        self.shared.schema_of_layer(key)?;
        let outcome = self.shared.read(key);
        self.shared.count(&outcome);
        Ok(outcome)
    }

    /// Reads many layer blocks, one outcome each, in their order. What is in memory is found under one lock, the rest is read
    /// from disk in batches and then from the object tier. May wait for the disk.
    ///
    /// # Errors
    /// `UnknownNamespace`; `InvalidArgument` for a layer that the schema lacks.
    pub fn get_many(&self, keys: &[LayerBlockKey], options: &GetOptions) -> Result<Vec<GetOutcome>, CacheError> {
        let mut checked: Option<(kvasir_block::NamespaceId, u16)> = None;
        for key in keys {
            if checked.is_none_or(|(namespace, layers)| namespace != key.namespace || key.layer >= layers) {
                let schema = self.shared.schema_of_layer(*key)?;
                checked = Some((key.namespace, schema.layers));
            }
        }
        let outcomes = self.shared.read_many(keys, options);
        for outcome in &outcomes {
            self.shared.count(outcome);
        }
        Ok(outcomes)
    }

    /// [`Self::get_many`] for a caller who has gone once the deadline has passed: then everything is too late, also what is in
    /// memory.
    ///
    /// # Errors
    /// As [`Self::get_many`].
    pub fn get_in_time(&self, keys: &[LayerBlockKey], options: &GetOptions) -> Result<Vec<GetOutcome>, CacheError> {
        if options.deadline.is_none_or(|deadline| Instant::now() < deadline) {
            return self.get_many(keys, options);
        }
        self.shared.counters.misses_late.add(keys.len() as u64);
        Ok(vec![GetOutcome::TooLate; keys.len()])
    }
}

impl Shared {
    /// Counts an answer that a caller gets.
    fn count(&self, outcome: &GetOutcome) {
        let counters = &self.counters;
        match outcome {
            GetOutcome::Hit { payload, tier, .. } => {
                let hits = match tier {
                    Tier::Host => &counters.get_hits_host,
                    Tier::Disk => &counters.get_hits_disk,
                    Tier::Object => &counters.get_hits_object,
                };
                hits.add(1);
                counters.get_bytes.add(payload.len() as u64);
            }
            GetOutcome::Miss => counters.misses_absent.add(1),
            GetOutcome::Corrupt => counters.misses_corrupt.add(1),
            GetOutcome::Busy => counters.misses_busy.add(1),
            GetOutcome::TooLate => counters.misses_late.add(1),
        }
    }
}
