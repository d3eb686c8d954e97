//! Limits: the space on disk, the queue, and a disk that takes nothing.

use std::collections::HashSet;

use super::*;

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
    fn reclaim(&self, blocks: &[BlockKey], forget: &mut dyn FnMut()) -> bool {
        let pinned = self.0.lock();
        let free = blocks.iter().all(|block| !pinned.contains(block));
        if free {
            forget();
        }
        free
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
        assert!(held.len() as u32 >= (i + 1).min(3 * PER_SEGMENT), "key {i}: {held:?}");
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
    (0..4 * PER_SEGMENT).for_each(|i| put_512(&tier, [i]));
    assert_eq!([offer_512(&tier, 30), offer_512(&tier, 31)], [Offer::Queued; 2]);
    let error = tier.flush().unwrap_err();
    assert_eq!(error.queued, 2);
    assert!(error.reason.contains("every segment holds a leased block"), "{error}");
    assert_eq!(
        offer_512(&tier, 32),
        Offer::Degraded,
        "the queue is full and the disk may not move"
    );
    assert_eq!(
        held(&tier, 0..40),
        (0..24).chain([30, 31]).collect::<Vec<_>>(),
        "nothing was lost"
    );
    assert!(tier.stats().degraded.is_some());

    watch.0.lock().clear();
    tier.flush().unwrap();
    assert_eq!((tier.stats().degraded, tier.stats().queued_layer_blocks), (None, 0));
    assert_eq!(held(&tier, 0..40), (6..24).chain([30, 31]).collect::<Vec<_>>());
    put_512(&tier, [32]);
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
    for fault in ["disk_full", "sync_fails"] {
        let dir = TempDir::new().unwrap();
        let config = DiskConfig {
            queue_bytes_max: 1024,
            ..config(dir.path())
        };
        let tier = open_as(config.clone());
        put_512(&tier, [0]);
        put_512(&tier, [1]);
        let faults = &tier.shared.faults;
        let (switch, reason) = match fault {
            "disk_full" => (
                &faults.disk_full,
                std::io::Error::from(std::io::ErrorKind::StorageFull).to_string(),
            ),
            _ => (&faults.sync_fails, "injected sync failure".to_owned()),
        };
        switch.store(true, Ordering::Relaxed);
        assert_eq!(
            [offer_512(&tier, 10), offer_512(&tier, 11)],
            [Offer::Queued; 2],
            "{fault}"
        );
        for _ in 0..20 {
            let expected = FlushError {
                queued: 2,
                reason: reason.clone(),
            };
            assert_eq!(tier.flush(), Err(expected), "{fault}");
        }
        assert_eq!(offer_512(&tier, 12), Offer::Degraded, "{fault}");
        let stats = tier.stats();
        assert!(
            stats.failures >= 20 && stats.degraded == Some(reason),
            "{fault}: {stats:?}"
        );
        assert!(
            stats.segments <= 2,
            "{fault}: failed attempts leave no files behind: {stats:?}"
        );
        assert_eq!(segment_files(dir.path()).len() as u64, stats.segments, "{fault}");
        assert_eq!(held(&tier, 10..13), [10, 11], "{fault}: served from the queue");
        // A full disk costs the oldest segment, once: a cache gives way before it gives up.
        let kept: &[u32] = if fault == "disk_full" { &[] } else { &[0, 1] };
        assert_eq!(held(&tier, 0..2), kept, "{fault}");

        switch.store(false, Ordering::Relaxed);
        tier.flush().unwrap();
        assert_eq!(tier.stats().degraded, None, "{fault}");
        put_512(&tier, [12]);
        drop(tier);
        let tier = open_as(config);
        assert_eq!(held(&tier, 10..13), [10, 11, 12], "{fault}: after a restart");
        assert_eq!(held(&tier, 0..2), kept, "{fault}: after a restart");
        assert_eq!((tier.recovery().corrupt, tier.recovery().torn_bytes), (0, 0), "{fault}");
    }
}

#[test]
fn a_disk_that_fails_to_the_end_says_what_is_lost() {
    let dir = TempDir::new().unwrap();
    let tier = open(dir.path());
    put(&tier, 0..3);
    tier.shared.faults.sync_fails.store(true, Ordering::Relaxed);
    assert_eq!(offer(&tier, 3), Offer::Queued);
    let error = tier.stop().unwrap_err();
    assert_eq!((error.queued, error.reason.as_str()), (1, "injected sync failure"));
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
        bytes_max: 256 << 10,
        segment_bytes: 32 << 10,
        queue_bytes_max: 64 << 10,
        ..config(dir.path())
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
