//! Indexes built over contexts: built when asked for, kept beside the blocks, used for what begins with theirs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::sleep,
};

use super::{sketch::basis, *};
use crate::indexes::{BuildState, BuiltIndex, IndexName, QuerySamples};

/// Blocks that are indexed, and all of them.
const COVERED: usize = 10;
const BLOCKS: usize = 14;
const Q_HEADS: usize = 6;

/// Three KV heads of 32 elements, 64 tokens a block.
fn long() -> KvSchema {
    KvSchema {
        head_dim: 32,
        rope_dims: 32,
        block_tokens: 64,
        ..small()
    }
}

fn roomy(dir: &Path) -> CacheConfig {
    CacheConfig {
        host_bytes_max: 64 << 20,
        disk_bytes_max: 64 << 20,
        segment_bytes: 4 << 20,
        flush_queue_bytes_max: 16 << 20,
        ..config(dir)
    }
}

fn filled(config: CacheConfig) -> (BlockCache, NamespaceId) {
    let (cache, namespace) = open(config, &long());
    fill(&cache, namespace, &long(), BLOCKS);
    (cache, namespace)
}

/// Samples of every fourth token.
fn put_samples(cache: &BlockCache, namespace: NamespaceId) {
    let tokens: Vec<u16> = (0..64).step_by(4).collect();
    for block in 0..COVERED {
        for layer in 0..LAYERS {
            let seed = 1000 + block as u64 * 2 + u64::from(layer);
            let rows = (0..tokens.len() as u64).flat_map(|i| queries(&long(), Q_HEADS, seed << 8 | i));
            let q: Vec<f16> = rows.map(f16::from_f32).collect();
            let samples = QuerySamples {
                layer,
                q_heads: Q_HEADS,
                tokens: &tokens,
                q: &q,
            };
            cache.put_queries(namespace, hash(block), &samples).unwrap();
        }
    }
}

fn wait_for(cache: &BlockCache, namespace: NamespaceId, kind: BuiltIndex, wanted: &BuildState) {
    let mut state = BuildState::Queued;
    for _ in 0..24_000 {
        state = cache.index_state(namespace, &chain(COVERED), kind).unwrap();
        if state == *wanted {
            return;
        }
        assert!(!matches!(state, BuildState::Absent(_)), "{state:?}");
        sleep(Duration::from_millis(5));
    }
    panic!("not within two minutes: {state:?}");
}

const READY: BuildState = BuildState::Ready { tokens: 640 };

fn built(cache: &BlockCache, namespace: NamespaceId, kind: BuiltIndex) {
    let state = cache.build_index(namespace, &chain(COVERED), kind).unwrap();
    assert_eq!(state, BuildState::Queued);
    wait_for(cache, namespace, kind, &READY);
}

fn context(cache: &BlockCache, namespace: NamespaceId, blocks: usize, index: IndexChoice) -> Context {
    cache
        .open_context(namespace, &chain(blocks), Q_HEADS, 0.35, index)
        .unwrap()
}

/// Everything attended to is the oracle, whatever the index covers; and a few keys come near.
fn assert_serves(cache: &BlockCache, context: &Context, name: &str) {
    let tokens = context.tokens() as u32;
    let excluded = [0..16, tokens - 32..tokens];
    let searched: Vec<u32> = (16..tokens - 32).collect();
    for seed in 0..4 {
        let q = queries(&long(), Q_HEADS, seed);
        let (o, lse, report) = attended(cache, context, &ask(&q, 1, 1.0, &excluded));
        let expected = oracle(&long(), &q, 1, 0.35, &searched);
        assert_near(&o, &expected.0, "o");
        assert_near(&lse, &expected.1, "lse");
        assert_eq!((report.index, report.index_reason, report.shortfall), (name, "", None));
        assert_eq!(
            (report.keys_total, report.keys_scanned),
            (u64::from(tokens - 48) * 3, report.keys_total)
        );
        assert!(
            report.mass_covered.iter().all(|mass| (mass - 1.0).abs() < 1e-3),
            "{report:?}"
        );

        let (_, lse, report) = attended(cache, context, &ask(&q, 1, 0.8, &excluded));
        for (head, (lse, exact)) in lse.iter().zip(&expected.1).enumerate() {
            let mass = (f64::from(*lse) - exact).exp2();
            assert!(mass > 0.7 && mass < 1.01, "head {head}: {mass}, {report:?}");
            assert!(
                f64::from(report.mass_covered[head]) < mass + 0.1,
                "head {head}: {mass}, {report:?}"
            );
        }
        assert!(report.keys_attended < report.keys_total * 2);
    }
}

#[test]
fn built_in_the_background_used_for_longer_contexts_and_kept_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, choice) in [
        (BuiltIndex::Roar, IndexChoice::Roar),
        (BuiltIndex::Wave, IndexChoice::Wave),
    ] {
        let dir = dir.path().join(kind.name());
        let (cache, namespace) = filled(roomy(&dir));
        let before = context(&cache, namespace, COVERED, choice);
        assert_eq!(before.index(), "flat");
        assert!(
            before.serving().reason.contains("BuildIndex"),
            "{}",
            before.serving().reason
        );
        put_samples(&cache, namespace);
        let samples = cache.stats().query_samples;
        put_samples(&cache, namespace);
        assert_eq!(
            (samples, cache.stats().query_samples),
            (320, 320),
            "the same again is no more"
        );
        built(&cache, namespace, kind);
        assert_eq!(cache.build_index(namespace, &chain(COVERED), kind).unwrap(), READY);
        // A context that was open before has it, and says so.
        let q = queries(&long(), Q_HEADS, 9);
        let report = attended(&cache, &before, &ask(&q, 0, 0.9, &[])).2;
        assert_eq!(
            (report.index, report.index_reason),
            (kind.name(), "it was built after this context was opened")
        );
        drop(before);

        let whole = context(&cache, namespace, COVERED, choice);
        assert_eq!((whole.index(), whole.serving().reason), (kind.name(), ""));
        assert_serves(&cache, &whole, kind.name());
        let longer = context(&cache, namespace, BLOCKS, choice);
        assert!(longer.serving().reason.contains("the keys behind are scanned"));
        assert_serves(&cache, &longer, kind.name());
        let shorter = context(&cache, namespace, COVERED - 1, choice);
        assert_eq!(shorter.index(), "flat", "an index of more blocks does not serve fewer");
        // Without a basis it is the best there is.
        let best = context(&cache, namespace, BLOCKS, IndexChoice::Best);
        assert_eq!(best.index(), kind.name());
        let stats = cache.stats();
        assert_eq!((stats.indexes_built, stats.index_builds_failed), (1, 0));
        assert!(stats.index_bytes > 0 && stats.index_bytes_written > 0);
        assert_eq!(stats.blocks, BLOCKS as u64, "an index is no block");
        drop((whole, longer, shorter, best));
        cache.close().unwrap();

        let (cache, namespace) = open(roomy(&dir), &long());
        assert_eq!(cache.index_state(namespace, &chain(COVERED), kind).unwrap(), READY);
        assert_serves(&cache, &context(&cache, namespace, BLOCKS, choice), kind.name());
    }
}

#[test]
fn rows_come_from_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = filled(roomy(dir.path()));
    put_samples(&cache, namespace);
    built(&cache, namespace, BuiltIndex::Roar);
    let (through, flat) = (
        context(&cache, namespace, BLOCKS, IndexChoice::Roar),
        context(&cache, namespace, BLOCKS, IndexChoice::Flat),
    );
    let mut same = 0;
    for seed in 0..8 {
        let q = queries(&long(), Q_HEADS, seed);
        let query = Query {
            form: Form::Rows { k: 40 },
            ..ask(&q, 0, 1.0, &[0..16, 880..896])
        };
        let [found, exact] = [&through, &flat].map(|context| match cache.retrieve(context, &query).unwrap() {
            (Found::Rows(heads), report) => (heads, report),
            (Found::Attend { .. }, _) => panic!("rows were asked for"),
        });
        assert_eq!(found.1.index, "roar");
        for (found, exact) in found.0.iter().zip(&exact.0) {
            assert!(found.positions.is_sorted() && found.positions.iter().any(|at| *at >= 640));
            assert!(found.positions.iter().all(|at| (16..880).contains(at)));
            assert_eq!(
                (found.keys.len(), found.values.len()),
                (found.positions.len() * 64, found.positions.len() * 64)
            );
            for (at, position) in found.positions.iter().enumerate() {
                if let Ok(there) = exact.positions.binary_search(position) {
                    same += 1;
                    assert_eq!(found.keys[at * 64..][..64], exact.keys[there * 64..][..64]);
                    assert_eq!(found.values[at * 64..][..64], exact.values[there * 64..][..64]);
                }
            }
        }
    }
    // Two heads of 40 share few of them; random keys in 32 dimensions are hard.
    assert!(same > 8 * 3 * 30, "{same} rows are among the best");
}

#[test]
fn a_bound_is_given_by_a_scan() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = filled(roomy(dir.path()));
    built(&cache, namespace, BuiltIndex::Wave);
    let context = context(&cache, namespace, COVERED, IndexChoice::Wave);
    let q = queries(&long(), Q_HEADS, 1);
    let options = AttendOptions {
        certificate: Certificate::Statistical,
        ..AttendOptions::default()
    };
    let query = Query {
        form: Form::Attend {
            target_mass: 0.9,
            k_max: None,
            options,
        },
        ..ask(&q, 0, 1.0, &[])
    };
    let report = attended(&cache, &context, &query).2;
    assert_eq!((report.index, report.missed_mass_bound.len()), ("flat", Q_HEADS));
    assert!(report.index_reason.contains("bound"), "{}", report.index_reason);
}

#[test]
fn clusters_estimate_what_they_do_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(roomy(dir.path()), &long());
    // A segment of 8,192 keys and a tail behind.
    let blocks = 130;
    fill(&cache, namespace, &long(), blocks);
    let hashes = chain(blocks);
    assert_eq!(
        cache.build_index(namespace, &hashes, BuiltIndex::Wave).unwrap(),
        BuildState::Queued
    );
    let ready = BuildState::Ready { tokens: 8320 };
    for _ in 0..24_000 {
        if cache.index_state(namespace, &hashes, BuiltIndex::Wave).unwrap() == ready {
            break;
        }
        sleep(Duration::from_millis(5));
    }
    let [wave, flat] = [IndexChoice::Wave, IndexChoice::Flat].map(|index| context(&cache, namespace, blocks, index));
    for seed in 0..3 {
        let q = queries(&long(), Q_HEADS, seed);
        let options = AttendOptions {
            tail: true,
            effort: 0.3,
            ..AttendOptions::default()
        };
        let query = Query {
            form: Form::Attend {
                target_mass: 0.99,
                k_max: None,
                options,
            },
            ..ask(&q, 1, 1.0, &[])
        };
        let (_, lse, report) = attended(&cache, &wave, &query);
        let exact = attended(&cache, &flat, &ask(&q, 1, 1.0, &[])).1;
        assert_eq!(report.index, "wave");
        assert!(report.keys_rescored < report.keys_scanned / 2, "{report:?}");
        for (lse, exact) in lse.iter().zip(exact) {
            // Clusters stand for no more than their keys.
            assert!(*lse <= exact + 1e-2 && *lse > exact - 1.0, "{lse} of {exact}");
        }
    }
}

#[test]
fn what_is_damaged_is_a_miss_and_built_again() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = filled(roomy(dir.path()));
    put_samples(&cache, namespace);
    built(&cache, namespace, BuiltIndex::Roar);
    cache.close().unwrap();
    let name = IndexName {
        end: namespace.block(hash(COVERED - 1)),
        kind: BuiltIndex::Roar,
    };
    // The file of the second layer's first head says what it was built from.
    let origin = name.origin(3).0;
    let mut damaged = 0;
    for entry in std::fs::read_dir(dir.path().join("segments")).unwrap().flatten() {
        let path = entry.path();
        let Ok(mut bytes) = std::fs::read(&path) else { continue };
        if let Some(at) = bytes.windows(32).position(|window| window == origin) {
            bytes[at + 200] ^= 16;
            std::fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
    }
    assert_eq!(damaged, 1);
    let (cache, namespace) = open(roomy(dir.path()), &long());
    let through = context(&cache, namespace, COVERED, IndexChoice::Roar);
    let q = queries(&long(), Q_HEADS, 2);
    let served = |layer| {
        let report = attended(&cache, &through, &ask(&q, layer, 0.9, &[])).2;
        (report.index, report.index_reason)
    };
    assert_eq!(served(0), ("roar", ""), "the first layer is whole");
    let (index, reason) = served(1);
    assert!(index == "flat" && reason.contains("damaged"), "{index}: {reason}");
    assert_eq!(cache.stats().indexes_unusable, 1);
    let state = cache.index_state(namespace, &chain(COVERED), BuiltIndex::Roar).unwrap();
    assert_eq!(state, BuildState::Absent("its files are gone or damaged".to_owned()));
    put_samples(&cache, namespace);
    built(&cache, namespace, BuiltIndex::Roar);
    assert_eq!(served(1), ("roar", ""));
}

#[test]
fn builds_give_way_and_wait_in_a_bounded_queue() {
    let dir = tempfile::tempdir().unwrap();
    let config = CacheConfig {
        build_queue_max: 1,
        ..roomy(dir.path())
    };
    let (cache, namespace) = filled(config);
    let busy = Arc::new(AtomicBool::new(true));
    let probe = Arc::clone(&busy);
    cache.set_busy(move || probe.load(Ordering::Relaxed));
    let build = |blocks: usize| cache.build_index(namespace, &chain(blocks), BuiltIndex::Wave);
    assert_eq!(build(COVERED).unwrap(), BuildState::Queued);
    let stuck = BuildState::Building { done: 0, of: 6 };
    wait_for(&cache, namespace, BuiltIndex::Wave, &stuck);
    assert_eq!(build(2).unwrap(), BuildState::Queued);
    assert_eq!(build(2).unwrap(), BuildState::Queued, "asked for twice, built once");
    let error = build(3).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitReached);
    assert!(error.to_string().contains("build_queue_max"), "{error}");
    assert_eq!(cache.stats().indexes_built, 0);
    busy.store(false, Ordering::Relaxed);
    wait_for(&cache, namespace, BuiltIndex::Wave, &READY);
    // Two builds and an open context pinned blocks; nothing is left of the builds.
    for _ in 0..24_000 {
        if cache.stats().indexes_built == 2 {
            break;
        }
        sleep(Duration::from_millis(5));
    }
    let stats = cache.stats();
    assert_eq!((stats.indexes_built, stats.index_builds_waiting), (2, 0));
}

#[test]
fn streaming_heads_build_no_index_and_find_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = filled(roomy(dir.path()));
    cache.set_basis(namespace, &basis(&long()).encode()).unwrap();
    put_samples(&cache, namespace);
    built(&cache, namespace, BuiltIndex::Roar);
    let name = IndexName {
        end: namespace.block(hash(COVERED - 1)),
        kind: BuiltIndex::Roar,
    };
    let has: Vec<bool> = (0..6)
        .map(|head| cache.shared.holds(name.file(head).unwrap()))
        .collect();
    assert_eq!(has, [true, true, false, true, true, false]);
    let through = context(&cache, namespace, BLOCKS, IndexChoice::Roar);
    let q = queries(&long(), Q_HEADS, 1);
    let kept = [0..128, 384..896];
    let (o, lse, report) = attended(&cache, &through, &ask(&q, 1, 1.0, &kept));
    assert_eq!((report.index, report.keys_total), ("roar", 2 * 256));
    assert!(o[4 * 32..].iter().all(|o| *o == 0.0) && lse[4..].iter().all(|lse| *lse == f32::NEG_INFINITY));
    let expected = oracle(&long(), &q, 1, 0.35, &(128..384).collect::<Vec<_>>());
    assert_near(&o[..4 * 32], &expected.0[..4 * 32], "o");
    // Who keeps less is given what such a head attends to, too.
    let (o, _, report) = attended(&cache, &through, &ask(&q, 1, 1.0, &[0..64]));
    let expected = oracle(&long(), &q, 1, 0.35, &(64..896).collect::<Vec<_>>());
    assert_near(&o, &expected.0, "o");
    assert_eq!(report.keys_total, 3 * 832);
}

#[test]
fn memory_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let config = CacheConfig {
        index_bytes_max: 100,
        // Samples of three blocks: 16 tokens in two layers each.
        query_bytes_max: 3 * 32 * (6 * 32 * 2 + 48),
        ..roomy(dir.path())
    };
    let (cache, namespace) = filled(config);
    put_samples(&cache, namespace);
    let stats = cache.stats();
    assert_eq!(stats.query_bytes, stats.query_bytes_max);
    let state = cache.build_index(namespace, &chain(2), BuiltIndex::Roar).unwrap();
    assert!(
        matches!(&state, BuildState::Absent(why) if why.contains("no query samples")),
        "the samples of the first blocks are gone: {state:?}"
    );
    built(&cache, namespace, BuiltIndex::Wave);
    let through = context(&cache, namespace, COVERED, IndexChoice::Wave);
    let q = queries(&long(), Q_HEADS, 1);
    let report = attended(&cache, &through, &ask(&q, 0, 1.0, &[])).2;
    assert!(
        report.index == "flat" && report.index_reason.contains("index_bytes_max"),
        "{report:?}"
    );
    let stats = cache.stats();
    assert_eq!((stats.index_bytes, stats.indexes_without_room), (0, 1));
}

#[test]
fn what_cannot_be_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = filled(roomy(dir.path()));
    let good = QuerySamples {
        layer: 0,
        q_heads: Q_HEADS,
        tokens: &[0],
        q: &[f16::ONE; Q_HEADS * 32],
    };
    let mut bad_q = [f16::ONE; Q_HEADS * 32];
    bad_q[7] = f16::NAN;
    for (samples, expected) in [
        (QuerySamples { layer: 2, ..good }, "layer: 2 does not exist"),
        (
            QuerySamples { q_heads: 4, ..good },
            "q_heads: 4 is not a multiple of the 3 KV heads",
        ),
        (QuerySamples { q_heads: 0, ..good }, "q_heads: 0 is not a multiple"),
        (
            QuerySamples { tokens: &[64], ..good },
            "tokens: 64: a block has 64 tokens",
        ),
        (
            QuerySamples {
                tokens: &[1, 2],
                ..good
            },
            "q: 192 elements, 384 are wanted",
        ),
        (QuerySamples { q: &bad_q, ..good }, "q: element 7 is not finite"),
    ] {
        let error = cache.put_queries(namespace, hash(0), &samples).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.to_string().starts_with(expected), "{error}");
    }
    cache.put_queries(namespace, hash(0), &good).unwrap();
    let other = QuerySamples {
        q_heads: 3,
        q: &[f16::ONE; 3 * 32],
        ..good
    };
    let error = cache.put_queries(namespace, hash(0), &other).unwrap_err();
    assert!(error.to_string().contains("the block has samples of 6"), "{error}");
    let nowhere = NamespaceId::from_bytes([9; 32]);
    assert_eq!(
        cache.put_queries(nowhere, hash(0), &good).unwrap_err().kind(),
        ErrorKind::UnknownNamespace
    );

    for (namespace, blocks, expected) in [
        (nowhere, 1, ErrorKind::UnknownNamespace),
        (namespace, 0, ErrorKind::InvalidArgument),
        (namespace, BLOCKS + 1, ErrorKind::NotHeld),
    ] {
        let error = cache
            .build_index(namespace, &chain(blocks), BuiltIndex::Wave)
            .unwrap_err();
        assert_eq!(error.kind(), expected, "{error}");
    }
    let state = cache.build_index(namespace, &chain(2), BuiltIndex::Roar).unwrap();
    assert!(
        matches!(&state, BuildState::Absent(why) if why.contains("layer 1 has no query samples")),
        "{state:?}"
    );
}
