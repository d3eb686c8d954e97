//! What becomes of blocks when the disk makes room: leased and hot ones stay, cold ones go to the object tier or are forgotten.

use std::time::Duration;

use kvasir_tier::{ObjectConfig, StoreId};

use super::{
    flow::{keys, tiers},
    *,
};

/// An object tier in a folder whose packs are small and soon written.
pub(super) fn folder(dir: &Path) -> ObjectConfig {
    ObjectConfig {
        object_bytes: 16 << 10,
        open_age_max: Duration::from_millis(20),
        ..ObjectConfig::new(format!("file://{}", dir.display()), StoreId::from_u64(1))
    }
}

/// No memory, and a disk of three segments.
fn small_disk(dir: &Path, object: Option<ObjectConfig>) -> CacheConfig {
    CacheConfig {
        host_bytes_max: 0,
        disk_bytes_max: 3 << 16,
        object,
        ..config(dir)
    }
}

/// Puts more than the disk holds, several times over; little at a time, so that there is room for what must stay.
fn churn(cache: &BlockCache, namespace: NamespaceId) {
    for i in (1000..1600).step_by(4) {
        put_blocks(cache, namespace, i..i + 4);
        cache.flush().unwrap();
    }
}

fn ask(
    cache: &BlockCache,
    namespace: NamespaceId,
    blocks: std::ops::Range<u32>,
    lease: Option<Duration>,
) -> PrefixMatch {
    let hashes: Vec<BlockHash> = blocks.map(hash).collect();
    cache.match_prefix(namespace, &hashes, lease).unwrap()
}

/// Leased, asked for twice, and never asked for.
const KINDS: [std::ops::Range<u32>; 3] = [0..4, 10..14, 20..24];

#[test]
fn leased_and_hot_blocks_are_written_again_and_cold_ones_go_to_the_bucket() {
    let (dir, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (cache, namespace) = open_with(small_disk(dir.path(), Some(folder(bucket.path()))));
    let [leased, hot, cold] = KINDS;
    for blocks in [&leased, &hot, &cold] {
        put_blocks(&cache, namespace, blocks.clone());
    }
    cache.flush().unwrap();
    let lease = ask(&cache, namespace, leased.clone(), Some(Duration::from_secs(60))).lease;
    for _ in 0..2 {
        assert_eq!(ask(&cache, namespace, hot.clone(), None).disk_blocks, 4);
    }
    churn(&cache, namespace);
    let stats = cache.stats();
    assert!(
        stats.disk.reclaimed_segments > 5 && stats.disk.bytes <= 3 << 16,
        "{stats:?}"
    );
    assert!(
        stats.disk.readmitted_layer_blocks >= 24 && stats.demoted > 100,
        "{stats:?}"
    );
    let whole = |found: PrefixMatch| (found.hit_blocks, found.disk_blocks, found.object_blocks);
    assert_eq!(whole(ask(&cache, namespace, cold.clone(), None)), (4, 0, 4));
    assert_eq!(whole(ask(&cache, namespace, hot.clone(), None)), (4, 4, 0));
    assert_eq!(whole(ask(&cache, namespace, leased.clone(), None)), (4, 4, 0));
    for (blocks, tier) in [(leased, Tier::Disk), (hot, Tier::Disk), (cold.clone(), Tier::Object)] {
        for layer in 0..LAYERS {
            let found = tiers(&cache, &keys(namespace, blocks.clone(), layer), &GetOptions::default());
            assert_eq!(found, vec![Ok(tier); 4], "{blocks:?} layer {layer}");
        }
    }
    assert_eq!(cache.stats().get_hits_object, 4 * u64::from(LAYERS));
    cache.release(lease.unwrap());
    cache.close().unwrap();

    // Another store on the same bucket, with nothing of its own, serves what was demoted.
    let elsewhere = tempfile::tempdir().unwrap();
    let object = ObjectConfig {
        store: StoreId::from_u64(2),
        ..folder(bucket.path())
    };
    let (cache, namespace) = open_with(small_disk(elsewhere.path(), Some(object)));
    let known = cache.shared.object.as_ref().unwrap();
    assert!(known.refresh(namespace, Instant::now() + Duration::from_secs(60)));
    assert_eq!(whole(ask(&cache, namespace, cold.clone(), None)), (4, 0, 4));
    for layer in 0..LAYERS {
        let found = tiers(&cache, &keys(namespace, cold.clone(), layer), &GetOptions::default());
        assert_eq!(found, vec![Ok(Tier::Object); 4], "layer {layer}");
    }
}

#[test]
fn without_a_bucket_cold_blocks_are_forgotten_and_the_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open_with(small_disk(dir.path(), None));
    let [leased, hot, cold] = KINDS;
    for blocks in [&leased, &hot, &cold] {
        put_blocks(&cache, namespace, blocks.clone());
    }
    cache.flush().unwrap();
    let lease = ask(&cache, namespace, leased.clone(), Some(Duration::from_secs(60))).lease;
    for _ in 0..2 {
        ask(&cache, namespace, hot.clone(), None);
    }
    churn(&cache, namespace);
    let found = [leased.clone(), hot, cold].map(|blocks| ask(&cache, namespace, blocks, None).hit_blocks);
    assert_eq!(found, [4, 4, 0]);
    // Asked for once, and leased no more.
    cache.release(lease.unwrap());
    assert_eq!(cache.stats().demoted, 0);
    churn(&cache, namespace);
    assert_eq!(
        tiers(&cache, &keys(namespace, 20..24, 0), &GetOptions::default()),
        vec![Err(GetOutcome::Miss); 4]
    );
}

/// More is hot than half of each segment holds: what does not fit goes to the bucket, or is forgotten and counted as what it was.
#[test]
fn hot_blocks_that_do_not_fit_go_to_the_bucket_or_are_counted() {
    for has_bucket in [true, false] {
        let (dir, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let object = has_bucket.then(|| folder(bucket.path()));
        let (cache, namespace) = open_with(small_disk(dir.path(), object));
        let hot = 0..200;
        for block in hot.clone() {
            put_blocks(&cache, namespace, block..block + 1);
            for _ in 0..2 {
                ask(&cache, namespace, block..block + 1, None);
            }
            cache.flush().unwrap();
        }
        churn(&cache, namespace);
        let is_here = |block: &u32| ask(&cache, namespace, *block..*block + 1, None).hit_blocks == 1;
        let here = hot.clone().filter(is_here).count();
        let stats = cache.stats().disk;
        assert!(stats.readmitted_layer_blocks > 0, "{stats:?}");
        assert_eq!(here == hot.len(), has_bucket, "{here} of {} are here", hot.len());
        assert_eq!(stats.forgotten_warm_layer_blocks == 0, has_bucket, "{stats:?}");
    }
}
