//! Layers of open contexts that are clustered: what is answered before and after, and what ends it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use super::{
    ahead::wait,
    sketch::{attend, basis, wide},
    *,
};
use crate::CacheStats;

/// Two segments of 1,024 tokens and half of one.
const BLOCKS: usize = 40;
const TOKENS: u32 = 64 * BLOCKS as u32;

/// What a worker keeps: the first two blocks and the last eight.
const KEPT: [Range<u32>; 2] = [0..128, TOKENS - 512..TOKENS];

/// How often the thread may ask before it finds that callers wait: once for a layer, then once for each segment.
#[derive(Clone, Default)]
struct Gate(Arc<AtomicUsize>);

impl Gate {
    fn open(&self, times: usize) {
        self.0.store(times, Ordering::Relaxed);
    }
}

fn blocks_of_64() -> KvSchema {
    KvSchema {
        block_tokens: 64,
        ..wide()
    }
}

fn roomy(dir: &Path) -> CacheConfig {
    CacheConfig {
        host_bytes_max: 16 << 20,
        disk_bytes_max: 16 << 20,
        segment_bytes: 4 << 20,
        flush_queue_bytes_max: 16 << 20,
        ..config(dir)
    }
}

fn opened(config: CacheConfig) -> (BlockCache, NamespaceId, Gate) {
    let (cache, namespace) = open(config, &blocks_of_64());
    cache.set_basis(namespace, &basis(&blocks_of_64()).encode()).unwrap();
    let gate = Gate::default();
    let left = gate.clone();
    let take = |left: usize| left.checked_sub(1);
    cache.set_busy(move || left.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err());
    (cache, namespace, gate)
}

fn filled(dir: &Path) -> (BlockCache, NamespaceId, Gate) {
    let (cache, namespace, gate) = opened(roomy(dir));
    fill(&cache, namespace, &blocks_of_64(), BLOCKS);
    (cache, namespace, gate)
}

fn context(cache: &BlockCache, namespace: NamespaceId, index: IndexChoice) -> Context {
    cache.open_context(namespace, &chain(BLOCKS), 6, 0.35, index).unwrap()
}

fn idle(stats: &CacheStats) -> bool {
    stats.clusters_running + stats.clusters_waiting == 0
}

fn approximate(tail: bool) -> Form {
    let options = AttendOptions {
        tail,
        certificate: Certificate::Statistical,
        effort: 0.1,
        ..AttendOptions::default()
    };
    attend(0.9, options)
}

fn query(q: &[f32]) -> Query<'_> {
    Query {
        form: approximate(true),
        ..ask(q, 0, 1.0, &KEPT)
    }
}

#[test]
fn before_and_after_answers_are_near_exact_attention() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace, gate) = filled(dir.path());
    let through = context(&cache, namespace, IndexChoice::Best);
    let flat = context(&cache, namespace, IndexChoice::Flat);
    let check = |when: &str| {
        let searched: Vec<u32> = (128..TOKENS - 512).collect();
        let q = queries(&blocks_of_64(), 6, 1);
        let (o, lse, report) = attended(&cache, &through, &ask(&q, 0, 1.0, &KEPT));
        let expected = oracle(&blocks_of_64(), &q, 0, 0.35, &searched);
        // One KV head of three streams.
        assert_near(&o[..4 * 32], &expected.0[..4 * 32], when);
        assert_near(&lse[..4], &expected.1[..4], when);
        assert_eq!(report.shortfall, None);
        let mut held = 0;
        for seed in 0..8 {
            let q = queries(&blocks_of_64(), 6, seed);
            let exact = attended(&cache, &flat, &ask(&q, 0, 1.0, &KEPT)).1;
            let (_, lse, report) = attended(&cache, &through, &query(&q));
            assert!(report.keys_rescored < report.keys_scanned, "{when}: {report:?}");
            for head in 0..4 {
                let off = (lse[head] - exact[head]).abs();
                assert!(off < 0.2, "{when}: {} is not near {}", lse[head], exact[head]);
            }
            let no_tail = Query {
                form: approximate(false),
                ..query(&q)
            };
            let (_, lse, report) = attended(&cache, &through, &no_tail);
            for head in 0..4 {
                let missed = 1.0 - (lse[head] - exact[head]).exp2();
                held += usize::from(missed <= report.missed_mass_bound[head] + 1e-4);
            }
        }
        assert!(held >= 31, "{when}: {held} of 32 bounds hold");
    };
    check("before");
    let stats = cache.stats();
    assert_eq!(
        (stats.clusters_running + stats.clusters_waiting, stats.clustered_layers),
        (1, 0)
    );
    assert_eq!(
        stats.sketched_blocks,
        BLOCKS as u64 - 10,
        "what is kept is not sketched"
    );
    let before = stats.context_bytes;
    gate.open(usize::MAX);
    let stats = wait(&cache, idle);
    assert_eq!((stats.clustered_layers, stats.clusters_dropped), (1, 0));
    assert!(stats.cluster_cpu_micros > 0);
    // Two segments of two KV heads.
    let more = 2 * 2 * 64 * kvasir_index::Column::CLUSTERED_GROUP_BYTES as u64;
    assert_eq!(stats.context_bytes, before + more);
    assert_eq!(
        stats.sketched_blocks,
        BLOCKS as u64 - 8,
        "segments are whole: with their sinks"
    );
    check("after");
    // Those who keep less find what they want.
    let q = queries(&blocks_of_64(), 6, 2);
    let all: Vec<u32> = (0..TOKENS).collect();
    let (o, lse, report) = attended(&cache, &through, &ask(&q, 0, 1.0, &[]));
    let expected = oracle(&blocks_of_64(), &q, 0, 0.35, &all);
    assert_eq!(report.shortfall, None);
    assert_near(&o, &expected.0, "o of all");
    assert_near(&lse, &expected.1, "lse of all");
    // Once.
    assert_eq!(wait(&cache, idle).clustered_layers, 1);
    drop(flat);
    drop(through);
    assert_eq!(cache.stats().context_bytes, 0);
}

#[test]
fn what_was_parked_before_is_searched_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace, gate) = filled(dir.path());
    let context = context(&cache, namespace, IndexChoice::Best);
    let q = queries(&blocks_of_64(), 6, 3);
    let forms = [approximate(true), Form::Rows { k: 10 }];
    let park = |form| {
        let query = Query { form, ..query(&q) };
        let search = cache.search_ahead(&context, &query, &Arc::default()).unwrap().unwrap();
        search.work();
        (query, search.wait().expect("all blocks are there"))
    };
    let parked = forms.map(park);
    gate.open(usize::MAX);
    assert_eq!(wait(&cache, idle).clustered_layers, 1);
    for (query, parked) in parked {
        assert!(parked.is_for(&context, &query));
        let (found, report) = cache.retrieve_parked(&context, &query, parked).unwrap();
        assert_eq!((report.heads_ahead, report.heads_too_far), (0, 0));
        assert_eq!((found, report), cache.retrieve(&context, &query).unwrap());
    }
    for form in forms {
        let (query, parked) = park(form);
        let (_, report) = cache.retrieve_parked(&context, &query, parked).unwrap();
        assert_eq!(
            (report.heads_ahead, report.heads_too_far),
            (2, 0),
            "of one that is clustered"
        );
    }
}

/// While the thread is in the middle of a layer, with its copy made.
fn in_the_middle(cache: &BlockCache, context: &Context, gate: &Gate) -> u64 {
    let q = queries(&blocks_of_64(), 6, 4);
    cache.retrieve(context, &query(&q)).unwrap();
    let before = cache.stats().context_bytes;
    let asked = cache.stats().background_aside;
    gate.open(2);
    let stats = wait(cache, |stats| {
        stats.background_aside > asked && stats.context_bytes > before
    });
    assert_eq!((stats.clusters_running, stats.clustered_layers), (1, 0));
    stats.context_bytes - before
}

#[test]
fn a_context_that_is_closed_meanwhile_is_gone_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace, gate) = filled(dir.path());
    let closed = context(&cache, namespace, IndexChoice::Best);
    let copy = in_the_middle(&cache, &closed, &gate);
    drop(closed);
    let stats = cache.stats();
    assert_eq!((stats.contexts, stats.leases, stats.context_bytes), (0, 0, copy));
    gate.open(usize::MAX);
    let stats = wait(&cache, idle);
    assert_eq!(
        (stats.clustered_layers, stats.clusters_dropped, stats.context_bytes),
        (0, 1, 0)
    );
    // The chain is another one when it is opened again.
    let again = context(&cache, namespace, IndexChoice::Best);
    let q = queries(&blocks_of_64(), 6, 4);
    cache.retrieve(&again, &query(&q)).unwrap();
    assert_eq!(wait(&cache, idle).clustered_layers, 1);
}

#[test]
fn a_stop_in_the_middle_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace, gate) = filled(dir.path());
    let context = context(&cache, namespace, IndexChoice::Best);
    in_the_middle(&cache, &context, &gate);
    cache.close().unwrap();
}

#[test]
fn queries_go_on_meanwhile_and_what_they_add_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace, gate) = filled(dir.path());
    let context = context(&cache, namespace, IndexChoice::Best);
    let copy = in_the_middle(&cache, &context, &gate);
    let q = queries(&blocks_of_64(), 6, 5);
    // This one sketches what the others kept.
    let everything = ask(&q, 0, 1.0, &[]);
    let before = attended(&cache, &context, &everything);
    assert_eq!(before.2.shortfall, None);
    let held = cache.stats().context_bytes - copy;
    gate.open(usize::MAX);
    let stats = wait(&cache, idle);
    assert_eq!(
        (stats.clustered_layers, stats.clusters_dropped, stats.context_bytes),
        (0, 1, held)
    );
    assert_eq!(attended(&cache, &context, &everything), before);
    // That one asked again.
    assert_eq!(wait(&cache, idle).clustered_layers, 1);
    let after = attended(&cache, &context, &everything);
    assert_eq!((after.2.shortfall, after.2.keys_scanned), (None, before.2.keys_scanned));
}

#[test]
fn without_room_columns_stay_until_there_is_some() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace, gate) = filled(dir.path());
    let q = queries(&blocks_of_64(), 6, 6);
    // A shorter chain whose layer is clustered, then the longer one with a closed gate.
    let both = |cache: &BlockCache, namespace: NamespaceId, gate: &Gate| {
        let chain = chain(BLOCKS - 1);
        let shorter = cache
            .open_context(namespace, &chain, 6, 0.35, IndexChoice::Best)
            .unwrap();
        gate.open(usize::MAX);
        cache.retrieve(&shorter, &query(&q)).unwrap();
        assert_eq!(wait(cache, idle).clustered_layers, 1);
        gate.open(0);
        let open = context(cache, namespace, IndexChoice::Best);
        (cache.retrieve(&open, &query(&q)).unwrap(), shorter, open)
    };
    let contexts = both(&cache, namespace, &gate);
    let held = cache.stats().context_bytes;
    drop(contexts);
    cache.close().unwrap();

    // For all of that, and not for the other's copy.
    let tight = CacheConfig {
        context_bytes_max: held + 1000,
        ..roomy(dir.path())
    };
    let (cache, namespace, gate) = opened(tight);
    let (before, shorter, open) = both(&cache, namespace, &gate);
    gate.open(usize::MAX);
    let stats = wait(&cache, idle);
    assert_eq!((stats.clustered_layers, stats.clusters_without_room), (1, 1));
    assert_eq!(stats.context_bytes, held);
    assert_eq!(cache.retrieve(&open, &query(&q)).unwrap(), before);
    assert_eq!(wait(&cache, idle).clusters_without_room, 1, "not tried in vain");
    drop(shorter);
    cache.retrieve(&open, &query(&q)).unwrap();
    let stats = wait(&cache, idle);
    assert_eq!((stats.clustered_layers, stats.clusters_without_room), (2, 1));
}

#[test]
fn with_a_block_that_is_not_to_be_had_nothing_changes() {
    let dir = tempfile::tempdir().unwrap();
    let no_memory = CacheConfig {
        host_bytes_max: 0,
        ..roomy(dir.path())
    };
    let (cache, namespace, _) = opened(no_memory.clone());
    fill(&cache, namespace, &blocks_of_64(), BLOCKS);
    cache.close().unwrap();
    let wanted: Vec<u8> = halves(&blocks_of_64(), 1, 0)
        .iter()
        .flat_map(|half| half.to_le_bytes())
        .collect();
    let mut damaged = 0;
    for entry in std::fs::read_dir(dir.path().join("segments")).unwrap().flatten() {
        let mut bytes = std::fs::read(entry.path()).unwrap();
        if let Some(at) = bytes.windows(wanted.len()).position(|window| window == wanted) {
            bytes[at + 300] ^= 4;
            std::fs::write(entry.path(), bytes).unwrap();
            damaged += 1;
        }
    }
    assert_eq!(damaged, 1);

    let (cache, namespace, gate) = opened(no_memory);
    let open = context(&cache, namespace, IndexChoice::Best);
    let q = queries(&blocks_of_64(), 6, 7);
    let before = cache.retrieve(&open, &query(&q)).unwrap();
    assert_ne!(
        before.1.shortfall,
        Some(Shortfall::MissingBlocks),
        "the damaged block is the caller's"
    );
    let held = cache.stats().context_bytes;
    gate.open(usize::MAX);
    let stats = wait(&cache, idle);
    assert_eq!(
        (stats.clustered_layers, stats.clusters_dropped, stats.context_bytes),
        (0, 1, held)
    );
    assert_eq!(cache.retrieve(&open, &query(&q)).unwrap(), before);
    assert_eq!(wait(&cache, idle).clusters_dropped, 1, "not tried again");
    let (_, _, report) = attended(&cache, &open, &ask(&q, 0, 1.0, &[]));
    assert_eq!(report.shortfall, Some(Shortfall::MissingBlocks));
}

#[test]
fn a_full_queue_and_none_at_all() {
    for queue in [0, 1] {
        let dir = tempfile::tempdir().unwrap();
        let config = CacheConfig {
            cluster_queue_max: queue,
            ..roomy(dir.path())
        };
        let (cache, namespace, gate) = opened(config);
        fill(&cache, namespace, &blocks_of_64(), BLOCKS);
        let open = context(&cache, namespace, IndexChoice::Best);
        let q = queries(&blocks_of_64(), 6, 8);
        let both = || (0..LAYERS).for_each(|layer| drop(cache.retrieve(&open, &Query { layer, ..query(&q) }).unwrap()));
        both();
        gate.open(usize::MAX);
        let done = |layers| wait(&cache, |stats| idle(stats) && stats.clustered_layers == layers);
        if queue == 0 {
            assert_eq!(done(0).clusters_dropped, 0);
            continue;
        }
        // One layer may have been in the thread's hands already; the other is asked for again.
        wait(&cache, idle);
        both();
        done(LAYERS.into());
    }
}
