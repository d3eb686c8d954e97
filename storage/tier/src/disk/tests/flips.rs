//! Bits that flip at rest, at sampled places: never wrong bytes, never a loss beyond the record that was hit.

use std::{collections::BTreeSet, fs::OpenOptions, os::unix::fs::FileExt as _};

use super::*;
use crate::disk::format::{PAGE, RECORD_HEADER_BYTES, record_bytes};

const KEYS: u32 = 8;

/// Flips one bit of a file.
fn flip(path: &Path, bit: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8).unwrap();
}

/// Where the bytes of `key(0)` to `key(KEYS - 1)` lie that must be right, in the order they were put.
fn records() -> Vec<std::ops::Range<u64>> {
    let mut at = PAGE;
    let mut records = Vec::new();
    for i in 0..KEYS {
        let bytes = payload(i).len();
        records.push(at..at + (RECORD_HEADER_BYTES + bytes) as u64);
        // One to a batch, and a batch ends at a page.
        at += record_bytes(bytes).next_multiple_of(PAGE);
    }
    records
}

/// Reads every key twice after `what`: `hurt` is `first`, then a miss; the others hit.
fn check(tier: &DiskTier, hurt: Option<u32>, first: DiskRead, what: &str) {
    for i in 0..KEYS {
        if Some(i) == hurt {
            assert_eq!(tier.get(key(i)), first, "{what}: key {i}");
            assert_eq!(tier.get(key(i)), DiskRead::Miss, "{what}: key {i}, again");
            assert!(!tier.contains(key(i)), "{what}: key {i}");
        } else {
            assert_hits(tier, [i], what);
        }
    }
}

/// A place to flip: half the time in the header of some record, where a payload hides less.
fn sample(rng: &mut StdRng, file_bytes: u64) -> u64 {
    let byte = if rng.random() {
        let records = records();
        records[rng.random_range(0..records.len())].start + rng.random_range(0..RECORD_HEADER_BYTES as u64)
    } else {
        rng.random_range(0..file_bytes)
    };
    byte * 8 + rng.random_range(0..8)
}

#[test]
fn a_flipped_bit_costs_one_record() {
    let origin = TempDir::new().unwrap();
    // One record to a batch, so that they lie in the order of their keys.
    let tier = open(origin.path());
    (0..KEYS).for_each(|i| put(&tier, [i]));
    drop(tier);
    let file_bytes = segment_file(origin.path()).metadata().unwrap().len();
    let mut hurt_keys = BTreeSet::new();
    for seed in 0..60 {
        let bit = sample(&mut StdRng::seed_from_u64(seed), file_bytes);
        let hurt = records().iter().position(|record| record.contains(&(bit / 8)));
        let hurt = hurt.map(|i| i as u32);
        let what = format!("seed {seed}, bit {bit}");
        hurt_keys.extend(hurt);

        // Under an open tier.
        let dir = TempDir::new().unwrap();
        copy_dir(origin.path(), dir.path());
        let tier = open(dir.path());
        flip(&segment_file(dir.path()), bit);
        check(&tier, hurt, DiskRead::Corrupt, &what);
        assert_eq!(tier.stats().corrupt, u64::from(hurt.is_some()), "{what}");
        drop(tier);
        // It stays forgotten, and can be put again.
        let tier = open(dir.path());
        check(&tier, hurt, DiskRead::Miss, &what);
        if let Some(i) = hurt {
            put(&tier, [i]);
        }
        drop(tier);
        assert_hits(&open(dir.path()), 0..KEYS, &what);

        // Before the scan that makes a lost index again.
        let dir = TempDir::new().unwrap();
        copy_dir(&origin.path().join("segments"), &dir.path().join("segments"));
        flip(&segment_file(dir.path()), bit);
        let tier = open(dir.path());
        check(&tier, hurt, DiskRead::Miss, &format!("{what}, no index"));
        assert_eq!(
            tier.recovery().found_by_scan,
            u64::from(KEYS) - u64::from(hurt.is_some()),
            "{what}"
        );
    }
    assert!(
        hurt_keys.len() as u32 == KEYS,
        "the sample hits every record: {hurt_keys:?}"
    );
}

/// A whole page of the disk comes back as zeros, or as something else.
#[test]
fn overwritten_stretches_cost_only_what_they_cover() {
    let origin = TempDir::new().unwrap();
    let tier = open(origin.path());
    (0..KEYS).for_each(|i| put(&tier, [i]));
    drop(tier);
    let file_bytes = segment_file(origin.path()).metadata().unwrap().len();
    for seed in 0..12 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut junk = vec![0_u8; rng.random_range(1..=1500)];
        if rng.random() {
            rng.fill(&mut junk[..]);
        }
        let at = rng.random_range(0..file_bytes - junk.len() as u64);
        let stretch = at..at + junk.len() as u64;
        for index in [true, false] {
            let what = format!("seed {seed}, {stretch:?}, index {index}");
            let dir = TempDir::new().unwrap();
            copy_dir(origin.path(), dir.path());
            if !index {
                fs::remove_dir_all(dir.path().join("index")).unwrap();
            }
            let file = OpenOptions::new().write(true).open(segment_file(dir.path())).unwrap();
            file.write_all_at(&junk, at).unwrap();
            let tier = open(dir.path());
            for (i, record) in (0..).zip(records()) {
                let read = tier.get(key(i));
                if record.end <= stretch.start || stretch.end <= record.start {
                    assert_eq!(read, hit(payload(i)), "{what}: key {i}");
                } else {
                    let lost = if index { DiskRead::Corrupt } else { DiskRead::Miss };
                    // Zeros over zeros change nothing.
                    assert!(read == lost || read == hit(payload(i)), "{what}: key {i}: {read:?}");
                    assert!(!matches!(tier.get(key(i)), DiskRead::Corrupt), "{what}: key {i}");
                }
            }
        }
    }
}
