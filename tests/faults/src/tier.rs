//! A disk tier by itself, on a device of the row's choosing.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use kvasir_block::{BlockKey, Checksum, LayerBlockKey};
use kvasir_device::FileIo;
use kvasir_tier::{DiskConfig, DiskPath, DiskRead, DiskTier, DiskWatch, Offer};

use crate::{Tally, Tier, corpus::Corpus, data::Read};

/// Lets go of everything.
struct FreeWatch;

impl DiskWatch for FreeWatch {
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut(&BlockKey)) {
        blocks.iter().for_each(forget);
    }
}

/// Small segments; no scrub, so that what is read is what the row reads.
pub(crate) fn open(dir: &Path, bytes_max: u64, io: Option<Arc<dyn FileIo>>) -> Result<DiskTier> {
    let config = DiskConfig {
        disks: vec![DiskPath {
            dir: dir.to_owned(),
            bytes_max,
            io,
        }],
        segment_bytes: 2 << 20,
        queue_bytes_max: 16 << 20,
        scrub_bytes_per_second: 0,
        rest_after_failures: Duration::from_millis(100),
        ..DiskConfig::in_dir(dir, bytes_max)
    };
    let tier = DiskTier::open(config).context("a tier must open whatever was done to its files")?;
    tier.start(Arc::new(FreeWatch))?;
    Ok(tier)
}

/// Offers everything; says what was not taken.
pub(crate) fn offer(tier: &DiskTier, corpus: &Corpus, keys: &[LayerBlockKey]) -> Result<u64> {
    let mut refused = 0;
    for &key in keys {
        let payload = corpus.payload(key);
        let checksum = Checksum::of(&payload);
        match tier.offer(key, payload, checksum) {
            Offer::Queued | Offer::Present => {}
            Offer::Full | Offer::Degraded => refused += 1,
            Offer::TooLarge => bail!("{key:?} is too large"),
        }
    }
    Ok(refused)
}

/// Reads `key` and counts what comes.
pub(crate) fn read(tally: &mut Tally, tier: &DiskTier, corpus: &Corpus, key: LayerBlockKey) -> Read {
    count(tally, corpus, key, &tier.get(key))
}

/// Counts what came of a read.
pub(crate) fn count(tally: &mut Tally, corpus: &Corpus, key: LayerBlockKey, read: &DiskRead) -> Read {
    match read {
        DiskRead::Hit { payload, .. } if corpus.is_right(key, payload) => {
            tally.hit(Tier::Disk);
            Read::Hit(Tier::Disk)
        }
        DiskRead::Hit { .. } => {
            tally.wrong(|| format!("{key:?}, from disk"));
            Read::Wrong
        }
        DiskRead::Miss => {
            tally.misses += 1;
            Read::Miss
        }
        DiskRead::Corrupt => {
            tally.corrupt += 1;
            Read::Corrupt
        }
        DiskRead::TooLate => {
            tally.shed += 1;
            Read::Shed
        }
    }
}
