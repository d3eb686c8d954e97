use std::path::Path;

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum};

use super::*;
use crate::{
    EventKind, EventStep,
    testing::{payload, schema},
};

mod flow;
mod model;
mod reclaim;

const LAYERS: u16 = 3;

fn config(dir: &Path) -> CacheConfig {
    CacheConfig {
        host_bytes_max: 1 << 20,
        disk_bytes_max: 1 << 20,
        segment_bytes: 1 << 16,
        flush_queue_bytes_max: 1 << 20,
        ..CacheConfig::in_dir(dir)
    }
}

fn open(dir: &Path) -> (BlockCache, NamespaceId) {
    open_with(config(dir))
}

fn open_with(config: CacheConfig) -> (BlockCache, NamespaceId) {
    let cache = BlockCache::open(config).unwrap();
    let namespace = cache
        .open_namespace(&Tenant::new("default").unwrap(), &schema(LAYERS))
        .unwrap();
    (cache, namespace)
}

fn hash(i: u32) -> BlockHash {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&i.to_le_bytes());
    BlockHash::from_bytes(bytes)
}

fn chain(blocks: u32) -> Vec<BlockHash> {
    (0..blocks).map(hash).collect()
}

fn right(key: LayerBlockKey) -> Bytes {
    payload(key, schema(LAYERS).layer_block_bytes())
}

fn put(cache: &BlockCache, key: LayerBlockKey) -> PutOutcome {
    let payload = right(key);
    cache.put(key, payload.clone(), Checksum::of(&payload)).unwrap()
}

fn put_blocks(cache: &BlockCache, namespace: NamespaceId, blocks: std::ops::Range<u32>) {
    for i in blocks {
        for layer in 0..LAYERS {
            assert_eq!(
                put(cache, namespace.block(hash(i)).layer(layer)),
                PutOutcome::Stored,
                "block {i} layer {layer}"
            );
        }
    }
}

/// Where a key was found, or what came instead; never wrong bytes.
fn check(cache: &BlockCache, key: LayerBlockKey) -> Result<Tier, GetOutcome> {
    match cache.get(key).unwrap() {
        GetOutcome::Hit {
            payload,
            checksum,
            tier,
        } => {
            assert_eq!(payload, right(key), "{key:?}");
            assert_eq!(checksum, Checksum::of(&payload));
            Ok(tier)
        }
        other => Err(other),
    }
}

fn hit_blocks(cache: &BlockCache, namespace: NamespaceId, blocks: u32) -> usize {
    cache.match_prefix(namespace, &chain(blocks), None).unwrap().hit_blocks
}

#[test]
fn what_is_put_is_found_when_all_its_layers_are() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(dir.path());
    put_blocks(&cache, namespace, 0..2);
    for layer in [0, 2] {
        assert_eq!(put(&cache, namespace.block(hash(2)).layer(layer)), PutOutcome::Stored);
    }
    assert_eq!(put(&cache, namespace.block(hash(1)).layer(0)), PutOutcome::Present);
    assert_eq!(hit_blocks(&cache, namespace, 4), 2, "the third block lacks a layer");
    assert_eq!(put(&cache, namespace.block(hash(2)).layer(1)), PutOutcome::Stored);
    assert_eq!(hit_blocks(&cache, namespace, 4), 3);
    assert_eq!(check(&cache, namespace.block(hash(2)).layer(1)), Ok(Tier::Host));
    assert_eq!(check(&cache, namespace.block(hash(3)).layer(0)), Err(GetOutcome::Miss));
    let stats = cache.stats();
    assert_eq!((stats.blocks, stats.put_blocks, stats.put_present), (3, 9, 1));
    assert_eq!((stats.get_hits_host, stats.misses_absent), (1, 1));
}

#[test]
fn wrong_calls_are_refused_with_words() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(dir.path());
    let key = namespace.block(hash(0)).layer(0);
    let good = right(key);
    let cases: [(LayerBlockKey, Bytes, ErrorKind, &str); 4] = [
        (
            key,
            good.slice(1..),
            ErrorKind::InvalidArgument,
            "payload has 511 bytes, the schema says 512",
        ),
        (key, Bytes::new(), ErrorKind::InvalidArgument, "payload has 0 bytes"),
        (
            namespace.block(hash(0)).layer(3),
            good.clone(),
            ErrorKind::InvalidArgument,
            "layer 3 does not exist",
        ),
        (
            NamespaceId::from_bytes([9; 32]).block(hash(0)).layer(0),
            good.clone(),
            ErrorKind::UnknownNamespace,
            "is not open here",
        ),
    ];
    for (key, payload, kind, words) in cases {
        let error = cache.put(key, payload.clone(), Checksum::of(&payload)).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    assert_eq!(
        cache.put(key, good, Checksum::from_u32(1)).unwrap(),
        PutOutcome::ChecksumMismatch
    );
    assert_eq!(check(&cache, key), Err(GetOutcome::Miss));
    assert_eq!(cache.stats().put_checksum_mismatch, 1);
}

#[test]
fn warm_after_close_and_open() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(dir.path());
    let epoch = cache.epoch();
    put_blocks(&cache, namespace, 0..10);
    cache.close().unwrap();
    let cache = BlockCache::open(config(dir.path())).unwrap();
    assert!(cache.epoch() > epoch);
    assert_eq!(*cache.schema(namespace).unwrap(), schema(LAYERS));
    let found = cache.match_prefix(namespace, &chain(12), None).unwrap();
    assert_eq!((found.hit_blocks, found.host_blocks), (10, 0));
    for i in 0..10 {
        for layer in 0..LAYERS {
            assert_eq!(check(&cache, namespace.block(hash(i)).layer(layer)), Ok(Tier::Disk));
        }
    }
    assert_eq!(
        check(&cache, namespace.block(hash(0)).layer(0)),
        Ok(Tier::Host),
        "promoted"
    );
    assert_eq!(cache.match_prefix(namespace, &chain(12), None).unwrap().host_blocks, 10);
}

#[test]
fn one_process_per_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, _) = open(dir.path());
    let error = BlockCache::open(config(dir.path())).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(
        error.to_string().contains(&format!("process {}", std::process::id())),
        "{error}"
    );
    cache.close().unwrap();
    open(dir.path());
}

type Spoil = fn(&mut CacheConfig);

#[test]
fn limits_that_cannot_work_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, Spoil); 7] = [
        ("segment_bytes", |c| c.segment_bytes = 100),
        ("segment_bytes", |c| c.segment_bytes = 2 << 30),
        ("disk_bytes_max", |c| c.disk_bytes_max = c.segment_bytes),
        ("leases_max", |c| c.leases_max = 0),
        ("namespaces_max", |c| c.namespaces_max = 0),
        ("event_queue_max", |c| c.event_queue_max = 0),
        ("lease_max", |c| c.lease_max = std::time::Duration::ZERO),
    ];
    for (field, spoil) in cases {
        let mut config = config(dir.path());
        spoil(&mut config);
        let error = BlockCache::open(config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().starts_with(field), "{error}");
    }
}

#[test]
fn leases_keep_blocks_through_eviction_and_reclaim() {
    let dir = tempfile::tempdir().unwrap();
    // Memory for a few blocks, disk for some forty.
    let (cache, namespace) = open_with(CacheConfig {
        host_bytes_max: 110_000,
        disk_bytes_max: 1 << 17,
        ..config(dir.path())
    });
    put_blocks(&cache, namespace, 0..4);
    let minute = std::time::Duration::from_secs(60);
    let found = cache.match_prefix(namespace, &chain(4), Some(10 * minute)).unwrap();
    assert_eq!((found.hit_blocks, found.lease_for), (4, minute), "cut to lease_max");
    let lease = found.lease.unwrap();
    for i in 100..400 {
        put_blocks(&cache, namespace, i..i + 1);
        if i % 10 == 0 {
            cache.flush().unwrap();
        }
    }
    assert_eq!(hit_blocks(&cache, namespace, 4), 4);
    for layer in 0..LAYERS {
        assert!(check(&cache, namespace.block(hash(3)).layer(layer)).is_ok());
    }
    let stats = cache.stats();
    assert!(stats.host_bytes <= 110_000 && stats.disk.bytes <= 1 << 17, "{stats:?}");
    assert!(
        stats.disk.reclaimed_segments > 0 && stats.host_evicted_blocks > 0,
        "{stats:?}"
    );
    assert_eq!((stats.leases, stats.pinned_blocks), (1, 4));
    cache.release(lease);
    put_blocks(&cache, namespace, 500..700);
    cache.flush().unwrap();
    assert_eq!(hit_blocks(&cache, namespace, 4), 0, "no lease, no promise");
}

#[test]
fn a_match_without_room_for_its_lease_still_matches() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open_with(CacheConfig {
        leases_max: 1,
        ..config(dir.path())
    });
    put_blocks(&cache, namespace, 0..1);
    let minute = Some(std::time::Duration::from_secs(60));
    assert!(
        cache
            .match_prefix(namespace, &chain(1), minute)
            .unwrap()
            .lease
            .is_some()
    );
    let second = cache.match_prefix(namespace, &chain(1), minute).unwrap();
    assert_eq!((second.hit_blocks, second.lease), (1, None));
    assert_eq!(cache.stats().leases_refused, 1);
    assert_eq!(
        cache.match_prefix(namespace, &[hash(77)], minute).unwrap(),
        PrefixMatch::default()
    );
    assert_eq!(
        cache.match_prefix(namespace, &[], minute).unwrap(),
        PrefixMatch::default()
    );
}

#[test]
fn events_tell_what_comes_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open_with(CacheConfig {
        host_bytes_max: 0,
        disk_bytes_max: 1 << 17,
        ..config(dir.path())
    });
    put_blocks(&cache, namespace, 0..2);
    let watch = cache.subscribe(Some(namespace)).unwrap();
    put_blocks(&cache, namespace, 2..200);
    cache.flush().unwrap();
    let (mut held, mut removed, mut last) = (std::collections::HashSet::new(), 0, 0);
    while let Some(EventStep::Event(event)) = watch.next(std::time::Duration::ZERO) {
        assert!(event.sequence >= last && event.epoch == cache.epoch());
        last = event.sequence;
        for hash in event.hashes {
            match event.kind {
                EventKind::Snapshot | EventKind::Stored => assert!(held.insert(hash), "said twice"),
                EventKind::Removed => {
                    removed += 1;
                    assert!(held.remove(&hash), "never said");
                }
                EventKind::SnapshotEnd => {}
            }
        }
    }
    assert!(removed > 0);
    assert_eq!(held.len() as u64, cache.stats().blocks);
    for i in 0..200 {
        let block = namespace.block(hash(i));
        assert_eq!(
            (0..LAYERS).all(|layer| check(&cache, block.layer(layer)).is_ok()),
            held.contains(&block.hash),
            "{i}"
        );
    }
    cache.close().unwrap();
    assert_eq!(watch.next(std::time::Duration::ZERO), Some(EventStep::Closed));
}

#[test]
fn a_lost_namespace_file_costs_nothing_but_a_declaration() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(dir.path());
    put_blocks(&cache, namespace, 0..3);
    cache.close().unwrap();
    std::fs::remove_dir_all(dir.path().join("namespaces")).unwrap();
    let cache = BlockCache::open(config(dir.path())).unwrap();
    assert_eq!(
        cache.match_prefix(namespace, &chain(3), None).unwrap_err().kind(),
        ErrorKind::UnknownNamespace
    );
    cache
        .open_namespace(&Tenant::new("default").unwrap(), &schema(LAYERS))
        .unwrap();
    assert_eq!(hit_blocks(&cache, namespace, 3), 3);
    assert_eq!(check(&cache, namespace.block(hash(2)).layer(2)), Ok(Tier::Disk));
}
