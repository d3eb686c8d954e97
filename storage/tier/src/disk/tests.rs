//! The disk tier against real files and the real index. Every payload is made from its key, so any reader can tell wrong
//! bytes, and tests that damage files need no copy of what was there.

mod crash;
mod damage;
mod flips;
mod many;
mod room;

use kvasir_block::{BlockHash, Checksum, NamespaceId};
use kvasir_device::{
    Psync,
    faulty::{EIO, Fault, Faulty, Operation, Rule},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use tempfile::TempDir;

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::*;

/// Lets go of everything.
struct FreeWatch;

impl DiskWatch for FreeWatch {
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut(&BlockKey)) {
        blocks.iter().for_each(forget);
    }
}

fn config(dir: &Path) -> DiskConfig {
    DiskConfig {
        segment_bytes: 1 << 20,
        queue_bytes_max: 4 << 20,
        scrub_bytes_per_second: 0,
        ..DiskConfig::in_dir(dir, 16 << 20)
    }
}

fn open_as(config: DiskConfig) -> DiskTier {
    let tier = DiskTier::open(config).unwrap();
    tier.start(Arc::new(FreeWatch)).unwrap();
    tier
}

fn open(dir: &Path) -> DiskTier {
    open_as(config(dir))
}

/// Two layers to a block: `key(0)` and `key(1)` are layers of one block.
fn key(i: u32) -> LayerBlockKey {
    let mut hash = [7; 32];
    hash[..4].copy_from_slice(&(i / 2).to_le_bytes());
    NamespaceId::from_bytes([9; 32])
        .block(BlockHash::from_bytes(hash))
        .layer((i % 2) as u16)
}

/// The one right payload of `key(i)`, 1 to 2000 bytes.
fn payload(i: u32) -> Bytes {
    let mut rng = StdRng::seed_from_u64(u64::from(i));
    let bytes = rng.random_range(1..=2000);
    payload_of(i, bytes)
}

fn payload_of(i: u32, bytes: usize) -> Bytes {
    let mut out = vec![0; bytes];
    StdRng::seed_from_u64(!u64::from(i)).fill(&mut out[..]);
    Bytes::from(out)
}

fn offer(tier: &DiskTier, i: u32) -> Offer {
    tier.offer(key(i), payload(i), Checksum::of(&payload(i)))
}

/// [`config`] on a disk that fails on purpose.
fn faulty(dir: &Path, seed: u64) -> (Arc<Faulty>, DiskConfig) {
    let io = Arc::new(Faulty::new(Arc::new(Psync), seed));
    let mut config = config(dir);
    config.disks[0].io = Some(Arc::clone(&io) as Arc<dyn FileIo>);
    (io, config)
}

/// 512 bytes of payload: 640 bytes on disk.
fn offer_512(tier: &DiskTier, i: u32) -> Offer {
    let payload = payload_of(i, 512);
    tier.offer(key(i), payload.clone(), Checksum::of(&payload))
}

fn put(tier: &DiskTier, keys: impl IntoIterator<Item = u32>) {
    for i in keys {
        assert_eq!(offer(tier, i), Offer::Queued, "key {i}");
    }
    tier.flush().unwrap();
}

fn hit(payload: Bytes) -> DiskRead {
    let checksum = Checksum::of(&payload);
    DiskRead::Hit { payload, checksum }
}

#[track_caller]
fn assert_hits(tier: &DiskTier, keys: impl IntoIterator<Item = u32>, what: &str) {
    for i in keys {
        assert_eq!(tier.get(key(i)), hit(payload(i)), "{what}: key {i}");
    }
}

/// The only segment file in `dir`.
fn segment_file(dir: &Path) -> PathBuf {
    let mut files = segment_files(dir);
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

/// Segment files, oldest first.
fn segment_files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir.join("segments")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = paths.filter(|path| path.extension() == Some("seg".as_ref())).collect();
    files.sort();
    files
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[test]
fn what_was_flushed_comes_back_equal() {
    let dir = TempDir::new().unwrap();
    let tier = open(dir.path());
    put(&tier, 0..100);
    assert_hits(&tier, 0..100, "before the restart");
    assert_eq!(offer(&tier, 3), Offer::Present);
    assert_eq!(tier.get(key(100)), DiskRead::Miss);
    let before = tier.stats();
    drop(tier);

    let tier = open(dir.path());
    let expected = Recovery {
        segments: before.segments,
        layer_blocks: 100,
        ..Recovery::default()
    };
    assert_eq!(tier.recovery(), expected, "a clean stop leaves nothing to repair");
    assert_hits(&tier, 0..100, "after the restart");
    assert_eq!(tier.stats().bytes, before.bytes);
    let on_disk: u64 = segment_files(dir.path())
        .iter()
        .map(|path| path.metadata().unwrap().len())
        .sum();
    assert_eq!(on_disk, before.bytes, "what is counted is what the files take");
    put(&tier, 100..110);
    assert_hits(&tier, 0..110, "appended to the same segment");
    assert_eq!(tier.stats().segments, before.segments);
}

#[test]
fn the_smallest_and_a_large_payload() {
    let dir = TempDir::new().unwrap();
    let sizes = [0, 1, 63, 64, 65, 3 << 20];
    let tier = open(dir.path());
    for (i, bytes) in (0..).zip(sizes) {
        let payload = payload_of(i, bytes);
        assert_eq!(
            tier.offer(key(i), payload.clone(), Checksum::of(&payload)),
            Offer::Queued
        );
    }
    tier.stop().unwrap();
    drop(tier);
    let tier = open(dir.path());
    for (i, bytes) in (0..).zip(sizes) {
        assert_eq!(tier.get(key(i)), hit(payload_of(i, bytes)), "{bytes} bytes");
    }
}

#[test]
fn queued_layer_blocks_are_readable_before_they_are_written() {
    let dir = TempDir::new().unwrap();
    let tier = DiskTier::open(config(dir.path())).unwrap();
    for i in 0..10 {
        assert_eq!(offer(&tier, i), Offer::Queued);
    }
    assert_eq!(offer(&tier, 0), Offer::Present);
    assert_hits(&tier, 0..10, "queued");
    let stats = tier.stats();
    let queue_bytes = (0..10).map(|i| payload(i).len() as u64).sum();
    assert_eq!(
        (
            stats.queued_layer_blocks,
            stats.queue_bytes,
            stats.layer_blocks,
            stats.bytes
        ),
        (10, queue_bytes, 0, 0)
    );
    let mut layers = Vec::new();
    tier.visit_layers(&key(4).block(), |layer| layers.push(layer));
    assert_eq!(layers, [0, 1]);

    tier.start(Arc::new(FreeWatch)).unwrap();
    tier.flush().unwrap();
    let stats = tier.stats();
    assert_eq!(
        (stats.queued_layer_blocks, stats.queue_bytes, stats.layer_blocks),
        (0, 0, 10)
    );
    assert_hits(&tier, 0..10, "stored");
    let mut blocks = Vec::new();
    tier.visit_blocks(|block, layers| blocks.push((*block, layers)));
    blocks.sort_by_key(|(block, _)| block.hash.as_bytes()[0]);
    assert_eq!(blocks, (0..5).map(|i| (key(2 * i).block(), 2)).collect::<Vec<_>>());
    assert!(tier.start(Arc::new(FreeWatch)).is_err(), "one flusher is enough");
    // The refusal must not lose sight of the threads that run.
    let shared = Arc::downgrade(&tier.shared);
    drop(tier);
    assert_eq!(shared.strong_count(), 0, "a thread outlived its tier");
}

#[test]
fn nobody_waits_for_a_flusher_that_does_not_run() {
    let dir = TempDir::new().unwrap();
    let tier = DiskTier::open(config(dir.path())).unwrap();
    tier.flush().unwrap();
    offer(&tier, 0);
    assert_eq!(tier.flush().unwrap_err().queued, 1, "before the start");
    tier.start(Arc::new(FreeWatch)).unwrap();
    tier.flush().unwrap();
    tier.stop().unwrap();
    tier.flush().unwrap();
    assert_eq!(offer(&tier, 1), Offer::Degraded, "after the stop");
    assert_hits(&tier, [0], "after the stop");
}

#[test]
fn wrong_bytes_in_the_queue_are_never_served_nor_kept() {
    let dir = TempDir::new().unwrap();
    let tier = DiskTier::open(config(dir.path())).unwrap();
    tier.offer(key(0), payload(0), Checksum::of(b"of other bytes"));
    offer(&tier, 1);
    assert_eq!(tier.get(key(0)), DiskRead::Corrupt);
    assert_eq!(tier.get(key(0)), DiskRead::Miss);
    assert_eq!(offer(&tier, 0), Offer::Queued, "the right bytes may follow");
    tier.start(Arc::new(FreeWatch)).unwrap();
    tier.flush().unwrap();
    drop(tier);
    assert_hits(&open(dir.path()), 0..2, "after the restart");
}

#[test]
fn one_process_per_folder() {
    let dir = TempDir::new().unwrap();
    let first = open(dir.path());
    match DiskTier::open(config(dir.path())) {
        Err(OpenError::Locked { owner, .. }) => assert_eq!(owner, format!("process {}", std::process::id())),
        other => panic!("{other:?}"),
    }
    put(&first, 0..2);
    drop(first);
    assert_hits(&open(dir.path()), 0..2, "the lock is given back");
}

#[test]
fn a_newer_format_stops_the_start_and_keeps_its_hands_off() {
    let dir = TempDir::new().unwrap();
    put(&open(dir.path()), 0..2);
    let path = segment_file(dir.path());
    let old = fs::read(&path).unwrap();
    let mut newer = old.clone();
    newer[8..12].copy_from_slice(&(SEGMENT_FORMAT + 1).to_le_bytes());
    let crc = Checksum::of(&newer[..60]).to_u32().to_le_bytes();
    newer[60..64].copy_from_slice(&crc);
    fs::write(&path, &newer).unwrap();
    let error = DiskTier::open(config(dir.path())).unwrap_err();
    assert!(
        matches!(&error, OpenError::NewerFormat { path: at, found } if *at == path && *found == SEGMENT_FORMAT + 1),
        "{error}"
    );
    assert_eq!(fs::read(&path).unwrap(), newer, "untouched");
    fs::write(&path, old).unwrap();
    assert_hits(&open(dir.path()), 0..2, "and the older version reads on");
}

#[test]
fn sizes_that_cannot_work_are_refused() {
    let cases: [(u64, u64, &str); 6] = [
        (16 << 20, 0, "segment_bytes"),
        (16 << 20, 12 << 10, "segment_bytes"),
        (16 << 20, (1 << 20) + 64, "segment_bytes"),
        (u64::MAX, (1 << 30) + 1, "segment_bytes"),
        (2 * 16384 - 1, 16384, "disk_bytes_max"),
        (0, 16384, "disk_bytes_max"),
    ];
    for (bytes_max, segment_bytes, wrong) in cases {
        let dir = TempDir::new().unwrap();
        let config = DiskConfig {
            segment_bytes,
            ..DiskConfig::in_dir(dir.path(), bytes_max)
        };
        let error = DiskTier::open(config).unwrap_err();
        assert!(
            matches!(&error, OpenError::Config { field, .. } if *field == wrong),
            "{bytes_max}/{segment_bytes}: {error}"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was made");
    }
}
