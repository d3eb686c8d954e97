//! A cache in this process, its folder, and the damage that is done to its files.

use std::{
    fs::{self, OpenOptions},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use kvasir_block::{Checksum, LayerBlockKey};
use kvasir_cache::{BlockCache, CacheConfig, GetOutcome, PutOutcome};
use rand::{Rng, rngs::StdRng};

use crate::{Tally, Tier, corpus::Corpus};

/// Sizes that make faults cheap: small segments, a small memory.
pub(crate) fn config(dir: &Path) -> CacheConfig {
    CacheConfig {
        host_bytes_max: 2 << 20,
        disk_bytes_max: 256 << 20,
        segment_bytes: 4 << 20,
        flush_queue_bytes_max: 16 << 20,
        // What is damaged is to be found by the row's own reads.
        scrub_bytes_per_second: 0,
        ..CacheConfig::in_dir(dir)
    }
}

/// Opens a cache, and a corpus's namespace in it.
pub(crate) fn open(config: CacheConfig, corpora: &[&Corpus]) -> Result<BlockCache> {
    let cache = BlockCache::open(config).context("a store must open whatever was done to its files")?;
    for corpus in corpora {
        let namespace = cache.open_namespace(&corpus.tenant, &corpus.schema)?;
        if namespace != corpus.namespace {
            bail!("namespace {namespace} instead of {}", corpus.namespace);
        }
    }
    Ok(cache)
}

/// Puts `keys` and waits until they are durable.
pub(crate) fn put(cache: &BlockCache, corpus: &Corpus, keys: impl IntoIterator<Item = LayerBlockKey>) -> Result<()> {
    for key in keys {
        let payload = corpus.payload(key);
        let checksum = Checksum::of(&payload);
        let mut outcome = cache.put(key, payload.clone(), checksum)?;
        if outcome == PutOutcome::Busy {
            cache.flush()?;
            outcome = cache.put(key, payload, checksum)?;
        }
        if !matches!(outcome, PutOutcome::Stored | PutOutcome::Present) {
            bail!("a put of {key:?} came to {outcome:?}");
        }
    }
    cache.flush()?;
    Ok(())
}

/// How a read ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// With the right bytes.
    Hit(Tier),
    /// With wrong bytes: counted, and the end of the run.
    Wrong,
    /// With nothing: not there.
    Miss,
    /// With nothing: damage was met.
    Corrupt,
    /// With nothing for now.
    Shed,
}

/// Reads `key` and counts what comes.
pub(crate) fn read(tally: &mut Tally, cache: &BlockCache, corpus: &Corpus, key: LayerBlockKey) -> Result<Read> {
    let outcome = cache.get(key).with_context(|| format!("reading {key:?}"))?;
    Ok(count(tally, corpus, key, &outcome))
}

/// Counts what came of a read.
pub(crate) fn count(tally: &mut Tally, corpus: &Corpus, key: LayerBlockKey, outcome: &GetOutcome) -> Read {
    match outcome {
        GetOutcome::Hit { payload, tier, .. } => {
            if !corpus.is_right(key, payload) {
                tally.wrong(|| format!("{key:?} of tenant {}, from {tier:?}", corpus.tenant.as_str()));
                return Read::Wrong;
            }
            let tier = match tier {
                kvasir_cache::Tier::Host => Tier::Host,
                kvasir_cache::Tier::Disk => Tier::Disk,
                kvasir_cache::Tier::Object => Tier::Object,
            };
            tally.hit(tier);
            Read::Hit(tier)
        }
        GetOutcome::Miss => {
            tally.misses += 1;
            Read::Miss
        }
        GetOutcome::Corrupt => {
            tally.corrupt += 1;
            Read::Corrupt
        }
        GetOutcome::Busy | GetOutcome::TooLate => {
            tally.shed += 1;
            Read::Shed
        }
    }
}

/// Files below `dir` that `wanted` likes, sorted.
pub(crate) fn files(dir: &Path, wanted: impl Fn(&Path) -> bool + Copy) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path, wanted)?);
        } else if wanted(&path) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Segment files, oldest first.
pub(crate) fn segments(dir: &Path) -> Result<Vec<PathBuf>> {
    files(dir, |path| path.extension().is_some_and(|extension| extension == "seg"))
}

/// Takes the index away: the next start must make it anew from the segments.
pub(crate) fn remove_index(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() && path.file_name().is_some_and(|name| name == "index") {
            fs::remove_dir_all(&path)?;
        } else if path.is_dir() {
            remove_index(&path)?;
        }
    }
    Ok(())
}

/// Copies a folder's files and folders.
pub(crate) fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Where a payload lies on disk.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) key: LayerBlockKey,
    pub(crate) file: PathBuf,
    pub(crate) bytes: Range<u64>,
}

/// Finds the payloads of `corpus` in the segments of `dir`, by their bytes; in the order of the files.
pub(crate) fn locate(dir: &Path, corpus: &Corpus) -> Result<Vec<Place>> {
    /// Payloads are random, so their first bytes are a name; records are aligned to no less than this.
    const NAME: usize = 16;
    let length = corpus.schema.layer_block_bytes();
    let names: std::collections::HashMap<[u8; NAME], LayerBlockKey> = corpus
        .keys()
        .filter_map(|key| corpus.payload(key).first_chunk().map(|name| (*name, key)))
        .collect();
    let mut places = Vec::new();
    for file in segments(dir)? {
        let bytes = fs::read(&file)?;
        let mut at = 0;
        while let Some(name) = bytes.get(at..).and_then(<[u8]>::first_chunk::<NAME>) {
            match names.get(name) {
                Some(&key)
                    if bytes
                        .get(at..at + length)
                        .is_some_and(|found| corpus.is_right(key, found)) =>
                {
                    places.push(Place {
                        key,
                        file: file.clone(),
                        bytes: at as u64..(at + length) as u64,
                    });
                    at += length;
                }
                _ => at += NAME,
            }
        }
    }
    Ok(places)
}

/// How bytes at rest go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    /// One bit.
    Bit,
    /// 2 to 64 bytes, each to another value.
    Burst,
    /// A page of 4 KiB reads as zeros.
    ZeroPage,
}

impl Damage {
    pub(crate) const ALL: [Self; 3] = [Self::Bit, Self::Burst, Self::ZeroPage];

    /// Does it to a random place inside `target`; says which bytes of the file are no longer what they were.
    pub(crate) fn inflict(self, rng: &mut StdRng, file: &Path, target: &Range<u64>) -> Result<Range<u64>> {
        const PAGE: u64 = 4096;
        let handle = OpenOptions::new().read(true).write(true).open(file)?;
        let end = handle.metadata()?.len();
        let at = rng.random_range(target.clone());
        let hurt = match self {
            Self::Bit => at..at + 1,
            Self::Burst => at..(at + rng.random_range(2..=64)).min(target.end),
            Self::ZeroPage => at / PAGE * PAGE..((at / PAGE + 1) * PAGE).min(end),
        };
        let mut bytes = vec![0; (hurt.end - hurt.start) as usize];
        handle.read_exact_at(&mut bytes, hurt.start)?;
        match self {
            Self::Bit => bytes[0] ^= 1 << rng.random_range(0..8),
            Self::Burst => bytes.iter_mut().for_each(|byte| *byte ^= rng.random_range(1..=255u8)),
            Self::ZeroPage => bytes.fill(0),
        }
        handle.write_all_at(&bytes, hurt.start)?;
        Ok(hurt)
    }
}

/// Whether two ranges share a byte.
pub(crate) fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
