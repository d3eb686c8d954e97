//! Sketches made ahead of the first query: when, where they are kept, and what happens to those that are not whole.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::sleep,
};

use kvasir_index::Basis;

use super::{
    sketch::{basis, wide},
    *,
};
use crate::{CacheStats, retrieve::encode_layer};

const BLOCKS: usize = 20;
/// Layer blocks of all of them.
const ALL: u64 = BLOCKS as u64 * LAYERS as u64;

fn ahead(dir: &Path) -> CacheConfig {
    CacheConfig {
        sketch_bytes_max: 1 << 20,
        ..config(dir)
    }
}

/// What the numbers are once they are so.
pub(super) fn wait(cache: &BlockCache, until: impl Fn(&CacheStats) -> bool) -> CacheStats {
    for _ in 0..24_000 {
        let stats = cache.stats();
        if until(&stats) {
            return stats;
        }
        sleep(Duration::from_millis(5));
    }
    panic!("not within two minutes: {:?}", cache.stats());
}

fn opened(config: CacheConfig, basis: &Basis) -> (BlockCache, NamespaceId) {
    let (cache, namespace) = open(config, &wide());
    cache.set_basis(namespace, &basis.encode()).unwrap();
    (cache, namespace)
}

fn answer(cache: &BlockCache, namespace: NamespaceId) -> (Vec<f32>, Vec<f32>) {
    let context = cache
        .open_context(namespace, &chain(BLOCKS), 6, 0.35, IndexChoice::Best)
        .unwrap();
    let q = queries(&wide(), 6, 5);
    let query = Query {
        form: Form::Attend {
            target_mass: 0.9,
            k_max: None,
            options: AttendOptions {
                tail: true,
                effort: 0.2,
                ..AttendOptions::default()
            },
        },
        ..ask(&q, 1, 1.0, &[])
    };
    let (o, lse, report) = attended(cache, &context, &query);
    assert_eq!(report.index, "sketch");
    assert_ne!(report.shortfall, Some(Shortfall::MissingBlocks));
    (o, lse)
}

/// What is answered where every sketch is made by the query.
fn expected() -> (Vec<f32>, Vec<f32>) {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = opened(config(dir.path()), &basis(&wide()));
    fill(&cache, namespace, &wide(), BLOCKS);
    let answer = answer(&cache, namespace);
    let stats = cache.stats();
    assert_eq!((stats.sketched_blocks, stats.sketched_ahead), (BLOCKS as u64, 0));
    answer
}

#[test]
fn made_after_the_put_and_kept_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = opened(ahead(dir.path()), &basis(&wide()));
    fill(&cache, namespace, &wide(), BLOCKS);
    let stats = wait(&cache, |stats| stats.sketched_ahead == ALL);
    assert_eq!(
        (stats.sketches_dropped, stats.sketches_running + stats.sketches_waiting),
        (0, 0)
    );
    assert!(stats.sketch_cpu_micros > 0 && stats.sketch_bytes > 0);
    assert_eq!(answer(&cache, namespace), expected());
    assert_eq!(cache.stats().sketched_blocks, ALL, "none was made by the query");
    cache.close().unwrap();

    let (cache, namespace) = open(ahead(dir.path()), &wide());
    assert_eq!(cache.stats().blocks, BLOCKS as u64, "sketches are no blocks");
    assert_eq!(answer(&cache, namespace), expected());
    let stats = cache.stats();
    assert_eq!((stats.sketches_loaded, stats.sketched_blocks), (BLOCKS as u64, 0));
}

#[test]
fn those_of_another_basis_are_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut other = basis(&wide());
    other.heads.iter_mut().for_each(|head| head.mean[0] = 0.5);
    let (cache, namespace) = opened(ahead(dir.path()), &other);
    fill(&cache, namespace, &wide(), BLOCKS);
    wait(&cache, |stats| stats.sketched_ahead == ALL);
    cache.close().unwrap();
    std::fs::remove_file(dir.path().join(format!("namespaces/{namespace}.basis"))).unwrap();

    let (cache, namespace) = opened(ahead(dir.path()), &basis(&wide()));
    assert_eq!(answer(&cache, namespace), expected());
    let stats = cache.stats();
    assert_eq!((stats.sketches_loaded, stats.sketched_blocks), (0, BLOCKS as u64));
}

#[test]
fn a_damaged_one_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = opened(ahead(dir.path()), &basis(&wide()));
    fill(&cache, namespace, &wide(), BLOCKS);
    wait(&cache, |stats| stats.sketched_ahead == ALL);
    cache.close().unwrap();
    let layout = wide().layout();
    let sketch = encode_layer(&halves(&wide(), 3, 1), &layout, &basis(&wide()), 1).unwrap();
    let mut damaged = 0;
    for entry in std::fs::read_dir(dir.path().join("segments")).unwrap().flatten() {
        let path = entry.path();
        let Ok(mut bytes) = std::fs::read(&path) else { continue };
        if let Some(at) = bytes.windows(sketch.len()).position(|window| window == sketch) {
            bytes[at + 100] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
    }
    assert_eq!(damaged, 1, "the sketch lies in one segment file");

    let (cache, namespace) = open(ahead(dir.path()), &wide());
    assert_eq!(answer(&cache, namespace), expected());
    let stats = cache.stats();
    assert_eq!(
        (stats.sketches_loaded, stats.sketches_unusable, stats.sketched_blocks),
        (BLOCKS as u64 - 1, 1, 1)
    );
}

#[test]
fn nothing_is_begun_while_callers_wait_and_the_query_does_without() {
    let dir = tempfile::tempdir().unwrap();
    let config = CacheConfig {
        sketch_queue_max: 8,
        ..ahead(dir.path())
    };
    let (cache, namespace) = opened(config, &basis(&wide()));
    let busy = Arc::new(AtomicBool::new(true));
    let probe = Arc::clone(&busy);
    cache.set_busy(move || probe.load(Ordering::Relaxed));
    fill(&cache, namespace, &wide(), BLOCKS);
    let stats = wait(&cache, |stats| stats.background_aside > 0);
    // One is in the thread's hands.
    assert!(
        stats.sketches_waiting <= 8 && stats.sketches_dropped >= ALL - 9,
        "{stats:?}"
    );
    assert_eq!((stats.sketched_ahead, stats.sketched_blocks), (0, 0));
    assert_eq!(answer(&cache, namespace), expected());
    assert_eq!(cache.stats().sketched_blocks, BLOCKS as u64, "made by the query");
    busy.store(false, Ordering::Relaxed);
    wait(&cache, |stats| stats.sketched_ahead == ALL - stats.sketches_dropped);
}

#[test]
fn they_are_kept_within_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let each = encode_layer(&halves(&wide(), 0, 0), &wide().layout(), &basis(&wide()), 0)
        .unwrap()
        .len() as u64;
    let config = CacheConfig {
        sketch_bytes_max: 5 * each + 1,
        ..ahead(dir.path())
    };
    let (cache, namespace) = opened(config, &basis(&wide()));
    fill(&cache, namespace, &wide(), BLOCKS);
    let stats = wait(&cache, |stats| stats.sketched_ahead == ALL);
    assert_eq!(stats.sketch_bytes, 5 * each);
    assert_eq!(answer(&cache, namespace), expected());
    // The others came from the disk, or its queue.
    assert_eq!(cache.stats().sketched_blocks, ALL);
}
