//! Several disks, reads of many, fates, and the scrub.

use std::collections::HashSet;

use super::*;
use crate::disk::format::{PAGE, RECORD_HEADER_BYTES};

fn two_disks(dir: &Path) -> DiskConfig {
    let disk = |name: &str| DiskPath {
        dir: dir.join(name),
        bytes_max: 1 << 20,
        io: None,
    };
    DiskConfig {
        disks: vec![disk("one"), disk("two")],
        segment_bytes: 64 << 10,
        ..config(dir)
    }
}

#[test]
fn reads_of_many_come_back_in_order_into_the_room_that_was_given() {
    let dir = TempDir::new().unwrap();
    let tier = open(dir.path());
    put(&tier, 0..100);
    let wanted: Vec<u32> = (0..100).rev().chain(200..203).collect();
    let keys: Vec<_> = wanted.iter().map(|&i| key(i)).collect();
    let mut given = 0;
    let mut room = |bytes: usize| {
        given += 1;
        assert!(bytes.is_multiple_of(PAGE as usize) && bytes >= RECORD_HEADER_BYTES);
        (given % 2 == 0).then(|| Buffer::heap(bytes))
    };
    let reads = tier.get_many(&keys, &mut room, None);
    assert_eq!(given, 100, "only for what is here");
    for (&i, read) in wanted.iter().zip(reads) {
        assert_eq!(read, if i < 100 { hit(payload(i)) } else { DiskRead::Miss }, "key {i}");
    }
    let late = tier.get_many(&keys, &mut |_| None, Some(Instant::now()));
    let expected = |i: &u32| if *i < 100 { DiskRead::TooLate } else { DiskRead::Miss };
    assert_eq!(late, wanted.iter().map(expected).collect::<Vec<_>>());
    let stats = tier.stats();
    assert_eq!(stats.too_late, 100);
    assert!(tier.read_estimate(1 << 20) >= tier.read_estimate(1) && tier.read_estimate(1) > Duration::ZERO);
}

#[test]
fn a_disk_that_fails_leaves_its_part_to_the_other() {
    let dir = TempDir::new().unwrap();
    let io = Arc::new(Faulty::new(Arc::new(Psync), 1));
    let mut config = two_disks(dir.path());
    config.disks[1].io = Some(Arc::clone(&io) as Arc<dyn FileIo>);
    let tier = open_as(config.clone());
    for round in 0..20 {
        put(&tier, round * 10..round * 10 + 10);
    }
    io.add(Rule::new(Operation::Write, EIO));
    io.add(Rule::new(Operation::Sync, EIO));
    for round in 20..60 {
        put(&tier, round * 10..round * 10 + 10);
    }
    assert_hits(&tier, 0..600, "one disk takes nothing");
    assert_eq!(tier.stats().degraded, None);
    io.heal();
    drop(tier);
    assert_hits(&open_as(config), 0..600, "after a restart");
}

#[test]
fn a_disk_that_is_not_there_is_refused_or_left_out() {
    let dir = TempDir::new().unwrap();
    let config = two_disks(dir.path());
    let tier = open_as(config.clone());
    for i in 0..50 {
        put(&tier, [i]);
    }
    drop(tier);
    // A disk that is not mounted: not even the parent of the folder is there.
    let mut absent = config.clone();
    absent.disks[1].dir = dir.path().join("not-mounted/two");
    let error = DiskTier::open(absent.clone()).unwrap_err();
    assert!(
        matches!(&error, OpenError::Io { path, .. } if *path == absent.disks[1].dir),
        "{error}"
    );
    absent.absent = AbsentDisk::LeaveOut;
    let tier = open_as(absent);
    let stats = tier.stats();
    assert_eq!(stats.disks[0].absent, None);
    assert!(
        stats.disks[1]
            .absent
            .as_ref()
            .is_some_and(|why| why.contains("cannot make the folder"))
    );
    for i in 0..50 {
        let read = tier.get(key(i));
        assert!(read == DiskRead::Miss || read == hit(payload(i)), "key {i}");
    }
    put(&tier, 100..110);
    drop(tier);
    assert_hits(&open_as(config), (0..50).chain(100..110), "all disks are back");
}

/// Keeps some, demotes others.
#[derive(Default)]
struct Fates {
    demoted: Mutex<Vec<(LayerBlockKey, Bytes, Checksum)>>,
}

impl DiskWatch for Fates {
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut(&BlockKey)) {
        blocks.iter().for_each(forget);
    }

    fn fate(&self, block: &BlockKey) -> Fate {
        match block.hash.as_bytes()[0] % 8 {
            0 => Fate {
                heat: Heat::Warm(1),
                demote: false,
            },
            1 => Fate {
                heat: Heat::Cold,
                demote: true,
            },
            _ => Fate::default(),
        }
    }

    fn demote(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> bool {
        self.demoted.lock().push((key, payload, checksum));
        true
    }
}

#[test]
fn what_goes_is_forgotten_written_again_or_demoted() {
    let dir = TempDir::new().unwrap();
    let config = DiskConfig {
        segment_bytes: 64 << 10,
        ..DiskConfig::in_dir(dir.path(), 256 << 10)
    };
    let tier = DiskTier::open(config.clone()).unwrap();
    let watch = Arc::new(Fates::default());
    tier.start(Arc::clone(&watch) as Arc<dyn DiskWatch>).unwrap();
    // Two layers to a block: blocks 0, 8, 16, .. stay.
    for i in 0..500_u32 {
        put(&tier, [i]);
    }
    let stats = tier.stats();
    assert!(stats.reclaimed_segments > 10, "{stats:?}");
    // A segment may be going right now: what was told and what was counted agree when it has gone.
    let end = Instant::now() + Duration::from_secs(20);
    let demoted = loop {
        let demoted = watch.demoted.lock();
        if demoted.len() as u64 == tier.stats().demoted_layer_blocks {
            break demoted;
        }
        assert!(Instant::now() < end, "told of {}: {:?}", demoted.len(), tier.stats());
        drop(demoted);
        std::thread::yield_now();
    };
    assert!(demoted.len() > 10, "{stats:?}");
    for (key, payload, checksum) in demoted.iter() {
        assert!(key.hash.as_bytes()[0] % 8 == 1 && checksum.verifies(payload), "{key:?}");
    }
    assert!(stats.readmitted_layer_blocks > 10, "{stats:?}");
    assert!(stats.bytes <= stats.bytes_max, "{stats:?}");
    assert_hits(&tier, [0, 1], "written again whenever its segment went");
    assert_eq!(tier.get(key(2)), DiskRead::Miss);
    drop(tier);
    assert_hits(&open_as(config), [0, 1, 499], "after a restart");
}

/// Everything is warm, the lower its number the warmer; a slower tier takes every other layer block, or none.
struct AllWarm {
    takes: bool,
    demoted: Mutex<HashSet<LayerBlockKey>>,
}

impl DiskWatch for AllWarm {
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut(&BlockKey)) {
        blocks.iter().for_each(forget);
    }

    fn fate(&self, block: &BlockKey) -> Fate {
        let number = block
            .hash
            .as_bytes()
            .first_chunk()
            .map_or(0, |name| u32::from_le_bytes(*name));
        Fate {
            heat: Heat::Warm(1000 - number),
            demote: self.takes,
        }
    }

    fn demote(&self, key: LayerBlockKey, payload: Bytes, checksum: Checksum) -> bool {
        assert!(checksum.verifies(&payload));
        key.layer == 0 && self.demoted.lock().insert(key)
    }
}

/// Half a segment is written again for one that goes, of the warmest; the others are demoted, or forgotten and counted.
#[test]
fn of_what_is_warm_the_coldest_goes_first_and_is_demoted_or_counted() {
    for takes in [true, false] {
        let dir = TempDir::new().unwrap();
        let config = DiskConfig {
            segment_bytes: 64 << 10,
            ..DiskConfig::in_dir(dir.path(), 256 << 10)
        };
        let tier = DiskTier::open(config).unwrap();
        let watch = Arc::new(AllWarm {
            takes,
            demoted: Mutex::default(),
        });
        tier.start(Arc::clone(&watch) as Arc<dyn DiskWatch>).unwrap();
        for i in (0..600).step_by(2) {
            put(&tier, [i, i + 1]);
        }
        let stats = tier.stats();
        let demoted = watch.demoted.lock();
        assert!(
            stats.reclaimed_segments > 5 && stats.readmitted_layer_blocks > 10,
            "{stats:?}"
        );
        assert_eq!(stats.demoted_layer_blocks, demoted.len() as u64, "{stats:?}");
        assert_eq!(stats.bytes.max(256 << 10), 256 << 10, "{stats:?}");
        // What a slower tier took is not lost; the rest is said to be.
        assert_eq!(
            stats.reclaimed_layer_blocks - stats.demoted_layer_blocks,
            stats.forgotten_warm_layer_blocks,
            "{stats:?}"
        );
        assert_eq!(takes, !demoted.is_empty());
        let gone: Vec<u32> = (0..600).filter(|&i| !tier.contains(key(i))).collect();
        assert_eq!(gone.len() as u64, stats.reclaimed_layer_blocks);
        assert_hits(&tier, 0..8, "the warmest stay, however often their segment goes");
    }
}

#[test]
fn the_scrub_finds_what_nobody_asked_for() {
    let dir = TempDir::new().unwrap();
    put(&open(dir.path()), 0..20);
    let path = segment_file(dir.path());
    let mut bytes = fs::read(&path).unwrap();
    bytes[PAGE as usize + RECORD_HEADER_BYTES] ^= 1;
    fs::write(&path, bytes).unwrap();
    let tier = open_as(DiskConfig {
        scrub_bytes_per_second: u64::MAX,
        ..config(dir.path())
    });
    while tier.stats().scrub_corrupt == 0 {
        std::thread::yield_now();
    }
    assert_eq!((0..20).filter(|&i| !tier.contains(key(i))).count(), 1);
}

/// A round of the scrub goes on in the next life where the last one was stopped.
#[test]
fn the_scrub_goes_on_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let with_rate = |scrub_bytes_per_second| DiskConfig {
        segment_bytes: 64 << 10,
        scrub_bytes_per_second,
        ..config(dir.path())
    };
    let records = |range: std::ops::Range<u32>| -> u64 {
        range.map(|i| crate::disk::format::record_bytes(payload(i).len())).sum()
    };
    let verified = |bytes: u64| {
        let tier = open_as(with_rate(u64::MAX));
        while tier.stats().scrubbed_bytes < bytes {
            std::thread::yield_now();
        }
        // Between rounds it sleeps: what it has read by now is all that it wanted to read.
        std::thread::sleep(Duration::from_millis(50));
        tier.stats().scrubbed_bytes
    };
    put(&open_as(with_rate(0)), 0..30);
    assert_eq!(verified(records(0..30)), records(0..30), "a first round");
    // The first segment is full, and others follow.
    let tier = open_as(with_rate(0));
    for i in 30..200 {
        put(&tier, [i]);
    }
    let first = segment_files(dir.path()).len();
    assert!(first > 3, "{first} segments");
    let in_first: u64 = {
        let state = tier.shared.state.lock();
        let at = *state.table.segments.keys().next().unwrap();
        state.table.records_of(at).iter().map(|(_, at)| at.record_bytes()).sum()
    };
    drop(tier);
    let rest = records(0..200) - in_first;
    assert_eq!(verified(rest), rest, "only what no life before has verified");
}

/// The newest segment went just before a restart: its id is not used again.
#[test]
fn segment_ids_are_used_once() {
    let dir = TempDir::new().unwrap();
    let mut names = std::collections::BTreeSet::new();
    for i in 0..4 {
        put(&open(dir.path()), [i]);
        let path = segment_file(dir.path());
        assert!(names.insert(path.clone()), "{path:?} twice");
        fs::remove_file(path).unwrap();
    }
}

/// Bytes of another life of the same segment: the header names the generation.
#[test]
fn an_older_generation_is_never_served() {
    let (old, new) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    for dir in [&old, &new] {
        put(&open(dir.path()), [0]);
    }
    let tier = open(new.path());
    let (from, to) = (segment_file(old.path()), segment_file(new.path()));
    assert_eq!(from.file_name(), to.file_name());
    let bytes = fs::read(from).unwrap();
    fs::write(to, bytes).unwrap();
    assert_eq!(tier.get(key(0)), DiskRead::Corrupt);
}
