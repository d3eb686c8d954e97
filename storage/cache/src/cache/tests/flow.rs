//! What moves between memory and disk: one flight per layer block, promotion, admission, prefetch, and the order of shedding.

use std::time::{Duration, Instant};

use super::{
    super::gate::{Entry, Patience},
    *,
};

const MINUTE: Duration = Duration::from_secs(60);

/// A cache whose blocks `0..blocks` are on disk and not in memory.
fn cold(dir: &Path, blocks: u32, config: CacheConfig) -> (BlockCache, NamespaceId) {
    let (cache, namespace) = open(dir);
    put_blocks(&cache, namespace, 0..blocks);
    cache.close().unwrap();
    open_with(config)
}

pub(super) fn keys(namespace: NamespaceId, blocks: std::ops::Range<u32>, layer: u16) -> Vec<LayerBlockKey> {
    blocks.map(|i| namespace.block(hash(i)).layer(layer)).collect()
}

/// Takes every place before the disk.
fn close_gate(cache: &BlockCache) -> super::super::gate::Pass<'_> {
    let gate = &cache.shared.disk_gate;
    match gate.enter(gate.reads_max(), 0, Patience::default()) {
        Entry::In(pass) => pass,
        other => panic!("{other:?}"),
    }
}

/// Waits for what other threads do; the test fails if they never do it.
pub(super) fn eventually(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + MINUTE;
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(super) fn tiers(cache: &BlockCache, keys: &[LayerBlockKey], options: &GetOptions) -> Vec<Result<Tier, GetOutcome>> {
    let outcomes = cache.get_many(keys, options).unwrap();
    let judge = |(key, outcome): (&LayerBlockKey, GetOutcome)| match outcome {
        GetOutcome::Hit { payload, tier, .. } => {
            assert_eq!(payload, right(*key), "{key:?}");
            Ok(tier)
        }
        other => Err(other),
    };
    keys.iter().zip(outcomes).map(judge).collect()
}

#[test]
fn many_are_answered_in_order_wherever_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = cold(dir.path(), 3, config(dir.path()));
    put_blocks(&cache, namespace, 10..12);
    let wanted: Vec<LayerBlockKey> = [0, 10, 99, 1, 11, 0]
        .map(|i| namespace.block(hash(i)).layer(1))
        .to_vec();
    let all = tiers(&cache, &wanted, &GetOptions::default());
    let disk = || Ok(Tier::Disk);
    assert_eq!(
        all,
        [
            disk(),
            Ok(Tier::Host),
            Err(GetOutcome::Miss),
            disk(),
            Ok(Tier::Host),
            disk()
        ]
    );
    let stats = cache.stats();
    assert_eq!(
        (stats.disk_reads, stats.reads_shared),
        (2, 1),
        "asked for twice in one call, read once"
    );
    assert_eq!(
        tiers(&cache, &wanted[..1], &GetOptions::default()),
        [Ok(Tier::Host)],
        "promoted"
    );
    let strange = namespace.block(hash(0)).layer(LAYERS);
    let error = cache
        .get_many(&[wanted[0], strange], &GetOptions::default())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn readers_of_the_same_layer_block_share_one_read() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = cold(dir.path(), 2, config(dir.path()));
    let wanted = keys(namespace, 0..2, 0);
    let disk = close_gate(&cache);
    std::thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                assert_eq!(
                    tiers(&cache, &wanted, &GetOptions::default()),
                    [Ok(Tier::Disk), Ok(Tier::Disk)]
                );
            });
        }
        let late = GetOptions {
            deadline: Some(Instant::now() + Duration::from_millis(20)),
            ..GetOptions::default()
        };
        eventually("four follow one", || cache.shared.flights.followers(wanted[0]) == 4);
        let outcomes = tiers(&cache, &wanted, &late);
        assert_eq!(
            outcomes,
            [Err(GetOutcome::TooLate), Err(GetOutcome::TooLate)],
            "each with its own deadline"
        );
        drop(disk);
    });
    let stats = cache.stats();
    assert_eq!((stats.disk_reads, stats.reads_shared, stats.misses_late), (2, 8, 2));
    assert_eq!(cache.shared.flights.len(), 0);
}

#[test]
fn a_reader_that_was_late_does_not_fail_those_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = cold(dir.path(), 1, config(dir.path()));
    let wanted = keys(namespace, 0..1, 0);
    let disk = close_gate(&cache);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let options = GetOptions {
                deadline: Some(Instant::now() + Duration::from_millis(30)),
                ..GetOptions::default()
            };
            tiers(&cache, &wanted, &options)
        });
        eventually("the first leads", || cache.shared.flights.len() == 1);
        let second = scope.spawn(|| tiers(&cache, &wanted, &GetOptions::default()));
        assert_eq!(first.join().unwrap(), [Err(GetOutcome::TooLate)]);
        drop(disk);
        assert_eq!(second.join().unwrap(), [Ok(Tier::Disk)]);
    });
}

#[test]
fn a_deadline_is_looked_at_before_the_disk_and_not_before_memory() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = cold(dir.path(), 1, config(dir.path()));
    put_blocks(&cache, namespace, 5..6);
    let options = GetOptions {
        deadline: Some(Instant::now()),
        ..GetOptions::default()
    };
    let wanted = [0, 5, 77].map(|i| namespace.block(hash(i)).layer(0));
    assert_eq!(
        tiers(&cache, &wanted, &options),
        [Err(GetOutcome::TooLate), Ok(Tier::Host), Err(GetOutcome::Miss)]
    );
    let stats = cache.stats();
    assert_eq!(
        (stats.disk_reads, stats.misses_late, stats.misses_late_estimated),
        (0, 1, 0)
    );
}

#[test]
fn slower_than_computing_is_too_late_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = cold(dir.path(), 4, config(dir.path()));
    let computing = |recompute| GetOptions {
        recompute: Some(recompute),
        ..GetOptions::default()
    };
    let first = keys(namespace, 0..1, 0);
    assert_eq!(
        tiers(&cache, &first, &computing(Duration::from_nanos(3))),
        [Ok(Tier::Disk)],
        "no read was timed yet"
    );
    let second = keys(namespace, 1..3, 0);
    let too_late = || Err(GetOutcome::TooLate);
    assert_eq!(
        tiers(&cache, &second, &computing(Duration::from_nanos(3))),
        [too_late(), too_late()]
    );
    assert_eq!(
        tiers(&cache, &second, &computing(MINUTE)),
        [Ok(Tier::Disk), Ok(Tier::Disk)]
    );
    let stats = cache.stats();
    assert_eq!(
        (stats.disk_reads, stats.misses_late, stats.misses_late_estimated),
        (3, 2, 2)
    );
}

#[test]
fn gets_wait_for_the_disk_and_are_busy_only_when_too_many_do() {
    let dir = tempfile::tempdir().unwrap();
    let config = CacheConfig {
        disk_reads_max: 2,
        disk_reads_waiting_max: 2,
        ..config(dir.path())
    };
    let (cache, namespace) = cold(dir.path(), 6, config);
    let disk = close_gate(&cache);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let wanted = keys(namespace, 0..2, 0);
            assert_eq!(
                tiers(&cache, &wanted, &GetOptions::default()),
                [Ok(Tier::Disk), Ok(Tier::Disk)]
            );
        });
        eventually("two wait", || cache.stats().disk_reads_waiting == 2);
        assert_eq!(cache.stats().disk_reads_running, 2);
        let third = keys(namespace, 3..4, 0);
        assert_eq!(tiers(&cache, &third, &GetOptions::default()), [Err(GetOutcome::Busy)]);
        drop(disk);
    });
    let all = tiers(&cache, &keys(namespace, 0..6, 1), &GetOptions::default());
    assert!(
        all.iter().all(|tier| *tier == Ok(Tier::Disk)),
        "in batches of two: {all:?}"
    );
    assert_eq!(cache.stats().misses_busy, 1);
}

#[test]
fn kept_in_memory_from_the_second_read_on() {
    let dir = tempfile::tempdir().unwrap();
    let config = CacheConfig {
        promote_after_reads: 2,
        ..config(dir.path())
    };
    let (cache, namespace) = cold(dir.path(), 4, config);
    let key = namespace.block(hash(2)).layer(1);
    let found: Vec<_> = (0..4).map(|_| check(&cache, key)).collect();
    assert_eq!(found, [Ok(Tier::Disk), Ok(Tier::Disk), Ok(Tier::Host), Ok(Tier::Host)]);
    assert_eq!(cache.stats().promoted, 1);
}

#[test]
fn a_scan_does_not_flush_what_is_read_often() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open_with(CacheConfig {
        disk_bytes_max: 16 << 20,
        flush_queue_bytes_max: 16 << 20,
        ..config(dir.path())
    });
    put_blocks(&cache, namespace, 0..1000);
    cache.close().unwrap();
    let (cache, namespace) = open_with(CacheConfig {
        // Forty blocks or so.
        host_bytes_max: 40 * 13_000,
        disk_bytes_max: 16 << 20,
        promote_after_reads: 2,
        ..config(dir.path())
    });
    for _ in 0..3 {
        for layer in 0..LAYERS {
            tiers(&cache, &keys(namespace, 0..10, layer), &GetOptions::default());
        }
    }
    for i in 10..1000 {
        tiers(&cache, &keys(namespace, i..i + 1, 0), &GetOptions::default());
    }
    let hot = tiers(&cache, &keys(namespace, 0..10, 0), &GetOptions::default());
    assert!(hot.iter().all(|tier| *tier == Ok(Tier::Host)), "{hot:?}");
}

#[test]
fn with_admission_by_reuse_one_hit_blocks_cost_no_disk_write() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open_with(CacheConfig {
        disk_admission: Admission::Reuse,
        ..config(dir.path())
    });
    let ask = |blocks| hit_blocks(&cache, namespace, blocks);
    assert_eq!(ask(2), 0);
    put_blocks(&cache, namespace, 0..2);
    cache.flush().unwrap();
    let stats = cache.stats();
    assert_eq!(
        (stats.disk.layer_blocks, stats.admission_skipped, stats.blocks),
        (0, 6, 2),
        "{stats:?}"
    );
    // Asked for again, and read: worth a write now.
    assert_eq!(ask(2), 2);
    assert_eq!(check(&cache, namespace.block(hash(0)).layer(0)), Ok(Tier::Host));
    assert_eq!(check(&cache, namespace.block(hash(0)).layer(0)), Ok(Tier::Host));
    cache.flush().unwrap();
    let stats = cache.stats();
    assert_eq!((stats.disk.layer_blocks, stats.saved), (1, 1));
    // A chain that was asked for twice before it came is written when it comes.
    assert_eq!((ask(4), ask(4)), (2, 2));
    put_blocks(&cache, namespace, 2..4);
    cache.flush().unwrap();
    assert_eq!(cache.stats().disk.layer_blocks, 7);
    assert_eq!(cache.stats().admission_skipped, 6);
    cache.close().unwrap();
    let (cache, namespace) = open(dir.path());
    assert_eq!(
        cache.stats().blocks,
        2,
        "what was never written is gone, and not said to be held"
    );
    assert_eq!(check(&cache, namespace.block(hash(3)).layer(2)), Ok(Tier::Disk));
    assert_eq!(check(&cache, namespace.block(hash(1)).layer(0)), Err(GetOutcome::Miss));
}

#[test]
fn what_only_memory_held_is_forgotten_with_its_eviction() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open_with(CacheConfig {
        disk_admission: Admission::Reuse,
        host_bytes_max: 100_000,
        ..config(dir.path())
    });
    put_blocks(&cache, namespace, 0..100);
    let stats = cache.stats();
    assert!(stats.blocks < 10 && stats.host_evicted_blocks > 90, "{stats:?}");
    let kept = cache.shared.state.lock().unsaved.len();
    assert_eq!(kept as u64, stats.host_layer_blocks);
}

#[test]
fn the_next_layers_of_a_lease_are_brought_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let config = CacheConfig {
        prefetch_layers: 1,
        ..config(dir.path())
    };
    let (cache, namespace) = cold(dir.path(), 20, config);
    let found = cache.match_prefix(namespace, &chain(20), Some(MINUTE)).unwrap();
    assert_eq!((found.hit_blocks, found.host_blocks, found.disk_blocks), (20, 0, 20));
    eventually("the first layer comes by itself", || {
        cache.stats().prefetch_issued == 20
    });
    eventually("and no more", || cache.stats().prefetch_waiting == 0);
    let options = GetOptions {
        lease: found.lease,
        ..GetOptions::default()
    };
    let from_memory = vec![Ok(Tier::Host); 20];
    eventually("all is in memory", || {
        cache.shared.state.lock().ahead.bytes() == 20 * 512
    });
    assert_eq!(tiers(&cache, &keys(namespace, 0..20, 0), &options), from_memory);
    eventually("the second layer", || {
        cache.shared.state.lock().ahead.bytes() == 20 * 512
    });
    assert_eq!(cache.stats().disk_reads, 40);
    assert_eq!(tiers(&cache, &keys(namespace, 0..5, 1), &options), from_memory[..5]);
    eventually("the third", || cache.stats().prefetch_issued == 60);
    eventually("the third is in memory", || {
        cache.shared.state.lock().ahead.bytes() == 35 * 512
    });
    cache.release(found.lease.unwrap());
    let stats = cache.stats();
    assert_eq!(
        (stats.prefetch_useful, stats.prefetch_wasted, stats.prefetch_bytes),
        (25, 35, 0)
    );
    assert_eq!((stats.prefetch_dropped, stats.disk_reads), (0, 60));
}

#[test]
fn prefetch_gives_way_to_readers_and_ends_with_its_lease() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = cold(dir.path(), 8, config(dir.path()));
    let disk = close_gate(&cache);
    let found = cache.match_prefix(namespace, &chain(8), Some(MINUTE)).unwrap();
    eventually("it waits for the disk to be idle", || {
        cache.stats().prefetch_waiting < 2
    });
    assert_eq!(cache.stats().prefetch_issued, 0);
    cache.release(found.lease.unwrap());
    eventually("nobody wants it", || cache.stats().prefetch_dropped == 8);
    drop(disk);
    eventually("the other layer neither", || cache.stats().prefetch_waiting == 0);
    assert_eq!(cache.stats().prefetch_issued, 0);
}

#[test]
fn nothing_is_brought_where_everything_must_stay_or_beyond_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let small = CacheConfig {
        prefetch_bytes_max: 4 * 512,
        ..config(dir.path())
    };
    let (cache, namespace) = cold(dir.path(), 30, small);
    cache.match_prefix(namespace, &chain(30), Some(MINUTE)).unwrap();
    eventually("dropped", || cache.stats().prefetch_dropped > 0);
    assert!(cache.stats().prefetch_bytes <= 4 * 512);
    cache.close().unwrap();
    let full = CacheConfig {
        host_bytes_max: 60_000,
        ..config(dir.path())
    };
    let (cache, namespace) = open_with(full);
    // Four blocks fill memory and are leased.
    for i in 0..4 {
        for layer in 0..LAYERS {
            assert!(check(&cache, namespace.block(hash(i)).layer(layer)).is_ok());
        }
    }
    let first = cache.match_prefix(namespace, &chain(4), Some(MINUTE)).unwrap();
    cache.match_prefix(namespace, &chain(30), Some(MINUTE)).unwrap();
    eventually("no room", || cache.stats().prefetch_dropped > 0);
    let stats = cache.stats();
    assert!(stats.host_bytes <= 60_000, "{stats:?}");
    assert_eq!(
        cache.match_prefix(namespace, &chain(4), None).unwrap().host_blocks,
        first.host_blocks
    );
}
