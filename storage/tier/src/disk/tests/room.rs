//! Limits: the space on disk, the queue, and a disk that takes nothing.

use std::collections::HashSet;

use super::*;
use crate::disk::format::PAGE;

/// Three batches of one [`offer_512`] fill a segment behind the page of its header; four segments fit.
fn small(dir: &Path) -> DiskConfig {
    let mut config = DiskConfig {
        segment_bytes: 16 << 10,
        ..config(dir)
    };
    config.disks[0].bytes_max = 4 * config.segment_bytes;
    config
}

const PER_SEGMENT: u32 = 3;

fn put_512(tier: &DiskTier, keys: impl IntoIterator<Item = u32>) {
    for i in keys {
        assert_eq!(offer_512(tier, i), Offer::Queued, "key {i}");
    }
    tier.flush().unwrap();
}

fn held(tier: &DiskTier, keys: std::ops::Range<u32>) -> Vec<u32> {
    keys.filter(|&i| match tier.get(key(i)) {
        DiskRead::Miss => false,
        read => {
            assert_eq!(read, hit(payload_of(i, 512)), "key {i}");
            true
        }
    })
    .collect()
}

/// Says no while one of its blocks would go.
#[derive(Default)]
struct Pinned(Mutex<HashSet<BlockKey>>);

impl Pinned {
    fn pin(&self, keys: impl IntoIterator<Item = u32>) {
        self.0.lock().extend(keys.into_iter().map(|i| key(i).block()));
    }
}

impl DiskWatch for Pinned {
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut(&BlockKey)) {
        let pinned = self.0.lock();
        blocks.iter().filter(|block| !pinned.contains(*block)).for_each(forget);
    }
}

#[test]
fn room_is_made_by_dropping_the_oldest_segment_whole() {
    let dir = TempDir::new().unwrap();
    let tier = open_as(small(dir.path()));
    for i in 0..60 {
        put_512(&tier, [i]);
        let stats = tier.stats();
        assert!(stats.bytes <= stats.bytes_max, "key {i}: {stats:?}");
        let on_disk: u64 = segment_files(dir.path())
            .iter()
            .map(|path| path.metadata().unwrap().len())
            .sum();
        assert_eq!(on_disk, stats.bytes, "key {i}");
        // Everything since some multiple of a segment, and at least two whole ones once there were as many.
        let held = held(&tier, 0..i + 1);
        let first = held[0];
        assert_eq!(held, (first..=i).collect::<Vec<_>>(), "no gaps");
        assert_eq!(first % PER_SEGMENT, 0, "whole segments go");
        assert!(held.len() as u32 >= (i + 1).min(2 * PER_SEGMENT), "key {i}: {held:?}");
        assert_eq!(
            (stats.layer_blocks, stats.reclaimed_layer_blocks),
            (held.len() as u64, u64::from(first))
        );
        assert_eq!(stats.reclaimed_segments, u64::from(first / PER_SEGMENT));
    }
    let before = held(&tier, 0..60);
    drop(tier);
    let tier = open_as(small(dir.path()));
    assert_eq!(held(&tier, 0..60), before, "what went stays gone, what stayed is there");
    assert_eq!((tier.recovery().dangling, tier.recovery().found_by_scan), (0, 0));
}

/// A segment's file becomes the next one: what it has in it counts for nothing, after a kill either, and is not called torn.
#[test]
fn files_of_dropped_segments_are_used_again() {
    let dir = TempDir::new().unwrap();
    let config = DiskConfig {
        segment_bytes: 64 << 10,
        ..DiskConfig::in_dir(dir.path(), 256 << 10)
    };
    let tier = open_as(config);
    let inode = |path: &PathBuf| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let mut seen: Vec<HashSet<u64>> = Vec::new();
    for i in 0..400 {
        put(&tier, [i]);
        let names = fs::read_dir(dir.path().join("segments")).unwrap().count();
        let bytes: u64 = fs::read_dir(dir.path().join("segments"))
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(names <= 5 && bytes <= 256 << 10, "{names} files of {bytes} bytes");
        seen.push(segment_files(dir.path()).iter().map(inode).collect());
    }
    let stats = tier.stats();
    assert!(stats.reclaimed_segments > 10 && stats.corrupt == 0, "{stats:?}");
    let inodes: HashSet<u64> = seen.into_iter().flatten().collect();
    assert!(
        inodes.len() <= 8,
        "{} files for {} segments",
        inodes.len(),
        stats.reclaimed_segments
    );
    let here: Vec<u32> = (0..400).filter(|&i| tier.contains(key(i))).collect();

    // As a kill leaves it, with an index and without.
    for index in [true, false] {
        let image = TempDir::new().unwrap();
        copy_dir(dir.path(), image.path());
        if !index {
            fs::remove_dir_all(image.path().join("index")).unwrap();
        }
        let tier = open_as(DiskConfig {
            segment_bytes: 64 << 10,
            ..DiskConfig::in_dir(image.path(), 256 << 10)
        });
        let recovery = tier.recovery();
        assert_hits(&tier, here.iter().copied(), "after a kill");
        assert_eq!(tier.stats().layer_blocks, here.len() as u64, "{recovery:?}");
        assert_eq!((recovery.corrupt, recovery.dangling), (0, 0), "index {index}");
        assert!(recovery.torn_bytes <= 4096, "index {index}: {recovery:?}");
        put(&tier, 1000..1100);
        assert_hits(&tier, 1090..1100, "and it writes on");
    }
}

#[test]
fn what_is_leased_stays_and_another_segment_goes() {
    let dir = TempDir::new().unwrap();
    let watch = Arc::new(Pinned::default());
    let tier = DiskTier::open(small(dir.path())).unwrap();
    tier.start(Arc::clone(&watch) as Arc<dyn DiskWatch>).unwrap();
    watch.pin([0]);
    for i in 0..60 {
        put_512(&tier, [i]);
    }
    let held = held(&tier, 0..60);
    assert_eq!(held[..2], [0, 1], "what is leased stays, and only that");
    assert_eq!(held[2..], ((60 - held.len() as u32 + 2)..60).collect::<Vec<_>>());
    assert!(tier.stats().readmitted_layer_blocks > 2, "it moved more than once");
}

#[test]
fn with_everything_leased_nothing_is_taken_until_a_lease_ends() {
    let dir = TempDir::new().unwrap();
    let watch = Arc::new(Pinned::default());
    let config = DiskConfig {
        queue_bytes_max: 1024,
        ..small(dir.path())
    };
    let tier = DiskTier::open(config).unwrap();
    tier.start(Arc::clone(&watch) as Arc<dyn DiskWatch>).unwrap();
    watch.pin(0..100);
    let mut put = 0;
    let error = loop {
        assert_eq!(offer_512(&tier, put), Offer::Queued);
        put += 1;
        if let Err(error) = tier.flush() {
            break error;
        }
    };
    assert!(put > 2 * PER_SEGMENT, "{put}");
    assert_eq!(error.queued, 1);
    assert!(error.reason.contains("every segment holds a leased block"), "{error}");
    assert_eq!(offer_512(&tier, put), Offer::Queued);
    assert_eq!(
        offer_512(&tier, 50),
        Offer::Degraded,
        "the queue is full and the disk may not move"
    );
    assert_eq!(held(&tier, 0..60), (0..=put).collect::<Vec<_>>(), "nothing was lost");
    assert!(tier.stats().degraded.is_some());

    watch.0.lock().clear();
    tier.flush().unwrap();
    assert_eq!((tier.stats().degraded, tier.stats().queued_layer_blocks), (None, 0));
    assert!(held(&tier, 0..60).contains(&put));
    put_512(&tier, [50]);
}

#[test]
fn a_full_queue_takes_nothing_more() {
    let dir = TempDir::new().unwrap();
    let config = DiskConfig {
        queue_bytes_max: 1024,
        ..config(dir.path())
    };
    // Not started: a disk as slow as can be.
    let tier = DiskTier::open(config).unwrap();
    let giant = payload_of(9, 5000);
    assert_eq!(
        tier.offer(key(9), giant.clone(), Checksum::of(&giant)),
        Offer::Queued,
        "an empty queue takes any one"
    );
    assert_eq!(offer_512(&tier, 0), Offer::Full);
    assert_eq!(tier.get(key(0)), DiskRead::Miss);
    assert_eq!(tier.stats().refused, 1);
    tier.start(Arc::new(FreeWatch)).unwrap();
    tier.flush().unwrap();
    assert_eq!(offer_512(&tier, 0), Offer::Queued);
    assert_eq!(tier.get(key(9)), hit(giant));
}

#[test]
fn a_failing_disk_degrades_and_recovers() {
    for fault in ["disk full", "sync fails", "write fails"] {
        let dir = TempDir::new().unwrap();
        let (io, mut config) = faulty(dir.path(), 1);
        config.queue_bytes_max = 1024;
        config.rest_after_failures = Duration::ZERO;
        let tier = open_as(config.clone());
        put_512(&tier, [0]);
        put_512(&tier, [1]);
        let reason = match fault {
            "disk full" => {
                // No byte more, and what was allocated takes nothing either.
                io.set_space(0);
                io.add(Rule::new(Operation::Write, Fault::Error(io::ErrorKind::StorageFull)));
                io::Error::from(io::ErrorKind::StorageFull).to_string()
            }
            "sync fails" => {
                io.add(Rule::new(Operation::Sync, EIO));
                "Input/output error".to_owned()
            }
            _ => {
                io.add(Rule::new(Operation::Write, EIO));
                "Input/output error".to_owned()
            }
        };
        assert_eq!(
            [offer_512(&tier, 10), offer_512(&tier, 11)],
            [Offer::Queued; 2],
            "{fault}"
        );
        for _ in 0..20 {
            let error = tier.flush().unwrap_err();
            assert_eq!(error.queued, 2, "{fault}");
            assert!(error.reason.contains(&reason), "{fault}: {error}");
        }
        assert_eq!(offer_512(&tier, 12), Offer::Degraded, "{fault}");
        let stats = tier.stats();
        assert!(
            stats.failures >= 20 && stats.degraded.as_ref().is_some_and(|why| why.contains(&reason)),
            "{fault}: {stats:?}"
        );
        assert!(
            stats.segments <= 2,
            "{fault}: failed attempts leave no files behind: {stats:?}"
        );
        assert_eq!(segment_files(dir.path()).len() as u64, stats.segments, "{fault}");
        assert_eq!(held(&tier, 10..13), [10, 11], "{fault}: served from the queue");
        assert_eq!(held(&tier, 0..2), [0, 1], "{fault}: what was synced stays");

        io.heal();
        tier.flush().unwrap();
        assert_eq!(tier.stats().degraded, None, "{fault}");
        put_512(&tier, [12]);
        drop(tier);
        let tier = open_as(config);
        assert_eq!(held(&tier, 10..13), [10, 11, 12], "{fault}: after a restart");
        assert_eq!(held(&tier, 0..2), [0, 1], "{fault}: after a restart");
        assert_eq!((tier.recovery().corrupt, tier.recovery().torn_bytes), (0, 0), "{fault}");
    }
}

/// A cache gives way before it gives up, but not with what is newest: the disk refuses a write inside a segment whose space
/// was allocated, and what lies in that segment stays.
#[test]
fn a_full_disk_costs_the_oldest_segment_once() {
    let dir = TempDir::new().unwrap();
    let (io, faulty_config) = faulty(dir.path(), 8);
    let mut config = small(dir.path());
    config.disks[0].io = faulty_config.disks[0].io.clone();
    let tier = open_as(config.clone());
    for i in 0..2 * PER_SEGMENT + 1 {
        put_512(&tier, [i]);
    }
    io.set_space(0);
    io.add(Rule::new(Operation::Write, Fault::Error(io::ErrorKind::StorageFull)));
    assert_eq!(offer_512(&tier, 10), Offer::Queued);
    for _ in 0..5 {
        tier.flush().unwrap_err();
    }
    let kept: Vec<u32> = (PER_SEGMENT..2 * PER_SEGMENT + 1).chain([10]).collect();
    assert_eq!(held(&tier, 0..11), kept);
    assert_eq!(tier.stats().retired_segments, 0, "nothing is wrong with it");
    io.heal();
    tier.flush().unwrap();
    drop(tier);
    assert_eq!(held(&open_as(config), 0..11), kept, "after a restart");
}

/// The file whose sync failed is never synced again, and what it was to hold lies elsewhere.
#[test]
fn a_failed_sync_retires_its_segment() {
    let dir = TempDir::new().unwrap();
    let (io, config) = faulty(dir.path(), 2);
    let tier = open_as(config.clone());
    put_512(&tier, [0]);
    let first = segment_file(dir.path());
    io.add(Rule::new(Operation::Sync, EIO).on(first.file_name().unwrap().to_str().unwrap()));
    assert_eq!(offer_512(&tier, 1), Offer::Queued);
    while tier.flush().is_err() {}
    let faults = io.faults();
    put_512(&tier, 2..40);
    assert_eq!((io.faults(), faults, tier.stats().retired_segments), (1, 1, 1));
    assert_eq!(held(&tier, 0..40), (0..40).collect::<Vec<_>>());
    assert_eq!(segment_files(dir.path()).len(), 2);
    assert_eq!(
        first.metadata().unwrap().len(),
        2 * PAGE,
        "only what was synced is left of it"
    );
    drop(tier);
    assert_eq!(held(&open_as(config), 0..40), (0..40).collect::<Vec<_>>());
}

#[test]
fn three_failed_segments_send_a_disk_to_rest() {
    let dir = TempDir::new().unwrap();
    let (io, mut config) = faulty(dir.path(), 3);
    config.rest_after_failures = Duration::from_secs(3600);
    let tier = open_as(config);
    put_512(&tier, [0]);
    io.add(Rule::new(Operation::Sync, EIO));
    assert_eq!(offer_512(&tier, 1), Offer::Queued);
    let reasons: Vec<String> = (0..5).map(|_| tier.flush().unwrap_err().reason).collect();
    let rests = "three segments failed within a minute, the next try is in 3600 s";
    assert!(reasons[4].contains(rests) && !reasons[0].contains(rests), "{reasons:?}");
    let stats = tier.stats();
    assert_eq!(
        (stats.failures, stats.disks[0].degraded.as_ref()),
        (3, Some(&reasons[4]))
    );
    assert_eq!(held(&tier, 0..2), [0, 1], "reads go on");
    io.heal();
    tier.stop().unwrap();
    assert_eq!(
        tier.stats().queued_layer_blocks,
        0,
        "the end of the process does not wait"
    );
}

#[test]
fn reads_that_fail_are_misses_and_retire_the_segment() {
    let dir = TempDir::new().unwrap();
    let (io, config) = faulty(dir.path(), 4);
    let tier = open_as(config);
    put_512(&tier, 0..20);
    io.add(Rule::new(Operation::Read, EIO).times(3));
    for i in 0..3 {
        assert_eq!(tier.get(key(i)), DiskRead::Corrupt);
        assert_eq!(tier.get(key(i)), DiskRead::Miss);
    }
    let stats = tier.stats();
    assert_eq!((stats.read_errors, stats.corrupt, stats.retired_segments), (3, 3, 1));
    put_512(&tier, 0..3);
    assert_eq!(held(&tier, 0..20), (0..20).collect::<Vec<_>>());
    assert_eq!(
        segment_files(dir.path()).len(),
        2,
        "nothing more went to the failing one"
    );
}

#[test]
fn the_floor_of_free_space_is_left_to_others() {
    let dir = TempDir::new().unwrap();
    let (io, mut config) = faulty(dir.path(), 5);
    config.free_bytes_min = 10 << 20;
    io.set_space(10 << 20);
    let tier = open_as(config);
    assert_eq!(offer_512(&tier, 0), Offer::Queued);
    let error = tier.flush().unwrap_err();
    assert!(
        error.reason.contains("free_bytes_min leaves 10485760 to others"),
        "{error}"
    );
    io.heal();
    tier.flush().unwrap();
    assert_eq!(held(&tier, 0..1), [0]);
}

#[test]
fn payloads_that_no_segment_holds_are_refused() {
    let dir = TempDir::new().unwrap();
    let tier = open_as(small(dir.path()));
    for (bytes, offered) in [
        (56 << 10, Offer::Queued),
        (64 << 10, Offer::TooLarge),
        (65 << 20, Offer::TooLarge),
    ] {
        let payload = Bytes::from(vec![1; bytes]);
        assert_eq!(
            tier.offer(key(bytes as u32), payload.clone(), Checksum::of(&payload)),
            offered,
            "{bytes}"
        );
        tier.flush().unwrap();
        let read = tier.get(key(bytes as u32));
        assert_eq!(
            matches!(read, DiskRead::Hit { .. }),
            offered == Offer::Queued,
            "{bytes}"
        );
    }
}

#[test]
fn a_disk_that_fails_to_the_end_says_what_is_lost() {
    let dir = TempDir::new().unwrap();
    let (io, config) = faulty(dir.path(), 6);
    let tier = open_as(config);
    put(&tier, 0..3);
    io.add(Rule::new(Operation::Sync, EIO));
    assert_eq!(offer(&tier, 3), Offer::Queued);
    let error = tier.stop().unwrap_err();
    assert!(
        error.queued == 1 && error.reason.contains("Input/output error"),
        "{error}"
    );
    assert_hits(&tier, 0..4, "reads go on");
    drop(tier);
    let tier = open(dir.path());
    assert_hits(&tier, 0..3, "after a restart");
    assert_eq!(tier.get(key(3)), DiskRead::Miss);
}

/// Writers, readers and reclaim at once: a read is right or a miss, and what a flush promised in a quiet tier is there.
#[test]
fn many_at_once_never_see_wrong_bytes() {
    let dir = TempDir::new().unwrap();
    let config = DiskConfig {
        segment_bytes: 32 << 10,
        queue_bytes_max: 64 << 10,
        ..DiskConfig::in_dir(dir.path(), 256 << 10)
    };
    let tier = open_as(config.clone());
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let tier = &tier;
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed);
                for step in 0..600 {
                    let i = rng.random_range(0..400);
                    if rng.random_ratio(1, 50) {
                        tier.flush().unwrap();
                    } else if rng.random() {
                        let taken = offer(tier, i);
                        assert_ne!(taken, Offer::Degraded, "seed {seed}, step {step}");
                    } else {
                        let read = tier.get(key(i));
                        let right = read == DiskRead::Miss || read == hit(payload(i));
                        assert!(right, "seed {seed}, step {step}, key {i}: {read:?}");
                    }
                }
            });
        }
    });
    tier.flush().unwrap();
    let stats = tier.stats();
    assert!(
        stats.reclaimed_segments > 0 && stats.bytes <= stats.bytes_max,
        "{stats:?}"
    );
    assert_eq!((stats.corrupt, stats.queue_bytes, stats.failures), (0, 0, 0));
    let here: Vec<u32> = (0..400).filter(|&i| tier.contains(key(i))).collect();
    assert_eq!(here.len() as u64, stats.layer_blocks);
    drop(tier);
    let tier = open_as(config);
    assert_hits(&tier, here, "after a restart");
    assert_eq!(tier.stats().layer_blocks, stats.layer_blocks);
}
