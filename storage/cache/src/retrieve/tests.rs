#![expect(
    clippy::single_range_in_vec_init,
    reason = "one excluded range is a case like any other"
)]

use std::{path::Path, time::Duration};

use half::f16;
use kvasir_block::{Checksum, KvSchema, Tenant};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;
use crate::{CacheConfig, PutOutcome, testing::schema};

const LAYERS: u16 = 2;

/// Three KV heads of eight elements, four tokens a block: 384 bytes per layer block.
fn small() -> KvSchema {
    KvSchema {
        kv_heads: 3,
        block_tokens: 4,
        ..schema(LAYERS)
    }
}

fn config(dir: &Path) -> CacheConfig {
    CacheConfig {
        host_bytes_max: 4 << 20,
        disk_bytes_max: 4 << 20,
        segment_bytes: 1 << 17,
        flush_queue_bytes_max: 1 << 20,
        // So that what is counted depends on the queries alone; `tests/ahead.rs` turns it on.
        sketch_bytes_max: 0,
        ..CacheConfig::in_dir(dir)
    }
}

fn hash(i: usize) -> BlockHash {
    let mut bytes = [7; 32];
    bytes[..8].copy_from_slice(&(i as u64).to_le_bytes());
    BlockHash::from_bytes(bytes)
}

fn chain(blocks: usize) -> Vec<BlockHash> {
    (0..blocks).map(hash).collect()
}

fn open(config: CacheConfig, schema: &KvSchema) -> (BlockCache, NamespaceId) {
    let cache = BlockCache::open(config).unwrap();
    let namespace = cache.open_namespace(&Tenant::new("default").unwrap(), schema).unwrap();
    (cache, namespace)
}

/// Random halves in [-2, 2), the same for the same block and layer.
fn halves(schema: &KvSchema, block: usize, layer: u16) -> Vec<f16> {
    let mut rng = SmallRng::seed_from_u64((block as u64) << 16 | u64::from(layer));
    (0..schema.layout().elements())
        .map(|_| f16::from_f32(rng.random_range(-2.0..2.0)))
        .collect()
}

fn fill(cache: &BlockCache, namespace: NamespaceId, schema: &KvSchema, blocks: usize) {
    for block in 0..blocks {
        for layer in 0..schema.layers {
            let payload: Bytes = halves(schema, block, layer)
                .iter()
                .flat_map(|half| half.to_le_bytes())
                .collect();
            let put = cache.put(
                namespace.block(hash(block)).layer(layer),
                payload.clone(),
                Checksum::of(&payload),
            );
            assert_eq!(put.unwrap(), PutOutcome::Stored);
        }
    }
}

fn queries(schema: &KvSchema, q_heads: usize, seed: u64) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..q_heads * usize::from(schema.head_dim))
        .map(|_| rng.random_range(-2.0..2.0))
        .collect()
}

fn ask<'a>(q: &'a [f32], layer: u16, target_mass: f32, excluded: &'a [Range<u32>]) -> Query<'a> {
    Query {
        layer,
        q,
        form: Form::Attend {
            target_mass,
            k_max: None,
            options: AttendOptions::default(),
        },
        excluded,
        deadline: None,
        local_lse: &[],
    }
}

fn attended(cache: &BlockCache, context: &Context, query: &Query<'_>) -> (Vec<f32>, Vec<f32>, Report) {
    match cache.retrieve(context, query).unwrap() {
        (Found::Attend { o, lse }, report) => (o, lse, report),
        (Found::Rows(_), _) => panic!("attend was asked for"),
    }
}

fn assert_near(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let found = f64::from(*found);
        assert!(
            found == *expected || (found - expected).abs() < 1e-3,
            "{what}: element {at} is {found}, not {expected}"
        );
    }
}

/// Attention of all query heads over exactly `positions`.
fn oracle(schema: &KvSchema, q: &[f32], layer: u16, scale: f32, positions: &[u32]) -> (Vec<f64>, Vec<f64>) {
    let (layout, dim) = (schema.layout(), usize::from(schema.head_dim));
    let q_heads = q.len() / dim;
    let blocks: Vec<_> = (0..positions.last().map_or(0, |&at| at as usize / layout.block_tokens + 1))
        .map(|block| halves(schema, block, layer))
        .collect();
    let (mut o, mut lse) = (Vec::new(), Vec::new());
    for (head, q) in q.chunks_exact(dim).enumerate() {
        let kv_head = head / (q_heads / layout.kv_heads);
        let row = |at: u32, of: Range<usize>| {
            &blocks[at as usize / layout.block_tokens][of][at as usize % layout.block_tokens * dim..][..dim]
        };
        let seen: Vec<_> = positions
            .iter()
            .map(|&at| (row(at, layout.keys(kv_head)), row(at, layout.values(kv_head))))
            .collect();
        let (out, total) = kvasir_reference::attend(q, &seen, scale);
        o.extend(out);
        lse.push(total);
    }
    (o, lse)
}

#[test]
fn full_mass_is_full_attention_and_partials_merge_to_it() {
    let mut rng = SmallRng::seed_from_u64(1);
    for seed in 0..16 {
        let dir = tempfile::tempdir().unwrap();
        let schema = KvSchema {
            kv_heads: rng.random_range(1..4),
            head_dim: [8, 20, 64][rng.random_range(0..3)],
            block_tokens: rng.random_range(1..17),
            ..schema(LAYERS)
        };
        let (blocks, group) = (rng.random_range(1..9), rng.random_range(1..5));
        let q_heads = usize::from(schema.kv_heads) * group;
        let (cache, namespace) = open(config(dir.path()), &schema);
        fill(&cache, namespace, &schema, blocks);
        let scale = 1.0 / f32::from(schema.head_dim).sqrt();
        let context = cache
            .open_context(namespace, &chain(blocks), q_heads, scale, IndexChoice::Best)
            .unwrap();
        let tokens = context.tokens() as u32;
        let q = queries(&schema, q_heads, seed);
        let layer = rng.random_range(0..LAYERS);
        let everything: Vec<u32> = (0..tokens).collect();
        let (o, lse) = oracle(&schema, &q, layer, scale, &everything);

        let whole = attended(&cache, &context, &ask(&q, layer, 1.0, &[]));
        assert_near(&whole.0, &o, "o");
        assert_near(&whole.1, &lse, "lse");
        assert_eq!(whole.2.mass_covered, vec![1.0; q_heads]);

        // What the worker does: attend to the sink and window itself, and merge.
        let (sink, window) = (tokens / 5, tokens - tokens / 3);
        let excluded = [window..tokens + 100, 0..sink];
        let (found_o, found_lse, report) = attended(&cache, &context, &ask(&q, layer, 1.0, &excluded));
        let local: Vec<u32> = (0..sink).chain(window..tokens).collect();
        let (local_o, local_lse) = oracle(&schema, &q, layer, scale, &local);
        let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
        let mut merged = kvasir_simd::Partial {
            o: found_o,
            lse: found_lse,
        };
        let local = kvasir_simd::Partial {
            o: narrow(local_o),
            lse: narrow(local_lse),
        };
        kvasir_simd::merge(&mut merged, &local, usize::from(schema.head_dim));
        assert_near(&merged.o, &o, "merged o");
        assert_near(&merged.lse, &lse, "merged lse");
        assert_eq!(report.keys_total, u64::from(window - sink) * u64::from(schema.kv_heads));
        assert_eq!((report.keys_scanned, report.shortfall), (report.keys_total, None));
    }
}

#[test]
fn golden_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(config(dir.path()), &small());
    fill(&cache, namespace, &small(), 5);
    let context = cache
        .open_context(namespace, &chain(5), 6, 0.35, IndexChoice::Best)
        .unwrap();
    let q = queries(&small(), 6, 3);
    // 20 tokens, 3 KV heads, 2 query heads each, rows of 16 bytes.
    let report = attended(&cache, &context, &ask(&q, 0, 1.0, &[])).2;
    assert_eq!(
        (report.keys_scanned, report.keys_total, report.keys_attended),
        (60, 60, 120)
    );
    assert_eq!(report.bytes_read, 2 * 60 * 16);
    let report = attended(&cache, &context, &ask(&q, 0, 1.0, &[3..6, 18..19])).2;
    assert_eq!(
        (report.keys_scanned, report.keys_total, report.keys_attended),
        (48, 48, 96)
    );
    let k_max = Form::Attend {
        target_mass: 1.0,
        k_max: Some(2),
        options: AttendOptions::default(),
    };
    let report = attended(
        &cache,
        &context,
        &Query {
            form: k_max,
            ..ask(&q, 0, 1.0, &[])
        },
    )
    .2;
    assert_eq!((report.keys_attended, report.shortfall), (12, Some(Shortfall::KMax)));
    assert!(
        report.mass_covered.iter().all(|mass| (0.0..1.0).contains(mass)),
        "{report:?}"
    );
    let stats = cache.stats();
    assert_eq!((stats.retrieve_queries, stats.retrieve_keys_scanned), (3, 168));
    assert_eq!(
        (stats.contexts, stats.context_bytes),
        (1, 5 * 384),
        "one layer is held, once"
    );
    drop(context);
    let stats = cache.stats();
    assert_eq!(
        (stats.contexts, stats.context_bytes, stats.leases, stats.pinned_blocks),
        (0, 0, 0, 0)
    );
}

#[test]
fn rows_are_the_bytes_that_were_put() {
    let dir = tempfile::tempdir().unwrap();
    let (schema, layout) = (small(), small().layout());
    let (cache, namespace) = open(config(dir.path()), &schema);
    fill(&cache, namespace, &schema, 5);
    let context = cache
        .open_context(namespace, &chain(5), 6, 0.35, IndexChoice::Best)
        .unwrap();
    let q = queries(&schema, 6, 4);
    let query = Query {
        form: Form::Rows { k: 3 },
        ..ask(&q, 1, 1.0, &[0..2, 9..11])
    };
    let (found, report) = cache.retrieve(&context, &query).unwrap();
    let Found::Rows(heads) = found else {
        panic!("rows were asked for")
    };
    assert_eq!(heads.len(), 3);
    for (kv_head, rows) in heads.iter().enumerate() {
        assert!((3..=6).contains(&rows.positions.len()) && rows.positions.is_sorted());
        assert!(
            !rows.positions.iter().any(|at| [0, 1, 9, 10].contains(at)),
            "excluded positions came back"
        );
        for (i, &at) in rows.positions.iter().enumerate() {
            let block = halves(&schema, at as usize / 4, 1);
            let row = |of: Range<usize>| {
                block[of][at as usize % 4 * 8..][..8]
                    .iter()
                    .flat_map(|half| half.to_le_bytes())
                    .collect::<Vec<u8>>()
            };
            assert_eq!(rows.keys[i * 16..][..16], row(layout.keys(kv_head)));
            assert_eq!(rows.values[i * 16..][..16], row(layout.values(kv_head)));
        }
    }
    let union: usize = heads.iter().map(|rows| rows.positions.len()).sum();
    assert_eq!(report.keys_attended as usize, 2 * union);
    assert_eq!(report.bytes_read as usize, (3 * 16 + union) * 16);
}

#[test]
fn nothing_left_to_search_is_an_empty_answer() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(config(dir.path()), &small());
    fill(&cache, namespace, &small(), 2);
    let context = cache
        .open_context(namespace, &chain(2), 3, 0.35, IndexChoice::Best)
        .unwrap();
    let q = queries(&small(), 3, 5);
    let (o, lse, report) = attended(&cache, &context, &ask(&q, 0, 0.9, &[0..8]));
    assert!(o.iter().all(|value| *value == 0.0) && lse.iter().all(|lse| *lse == f32::NEG_INFINITY));
    assert_eq!(
        report,
        Report {
            mass_covered: vec![1.0; 3],
            index: FLAT,
            ..Report::default()
        }
    );
    assert_eq!(cache.stats().context_bytes, 0, "what is excluded is not read");
    let rows = Query {
        form: Form::Rows { k: 3 },
        ..ask(&q, 0, 0.9, &[4..9, 0..4])
    };
    let (found, _) = cache.retrieve(&context, &rows).unwrap();
    let empty = HeadRows {
        positions: vec![],
        keys: Bytes::new(),
        values: Bytes::new(),
    };
    assert_eq!(found, Found::Rows(vec![empty; 3]));
}

#[test]
fn wrong_questions_are_refused_by_field() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(config(dir.path()), &small());
    fill(&cache, namespace, &small(), 2);
    let (chain, q) = (chain(3), queries(&small(), 3, 5));
    let refused = |blocks: usize, q_heads, scale| {
        let error = cache
            .open_context(namespace, &chain[..blocks], q_heads, scale, IndexChoice::Best)
            .unwrap_err();
        (error.kind(), error.to_string())
    };
    use ErrorKind::{InvalidArgument, LimitReached, NotHeld, Unsupported};
    for (got, kind, words) in [
        (refused(0, 3, 0.3), InvalidArgument, "hashes: ".to_owned()),
        (refused(2, 0, 0.3), InvalidArgument, "q_heads: ".to_owned()),
        (
            refused(2, 4, 0.3),
            InvalidArgument,
            "q_heads: 4 is not a multiple of the 3".to_owned(),
        ),
        (refused(2, 3, f32::NAN), InvalidArgument, "softmax_scale: ".to_owned()),
        (refused(2, 3, 0.0), InvalidArgument, "softmax_scale: ".to_owned()),
        (refused(3, 3, 0.3), NotHeld, format!("block 2 of 3 ({})", chain[2])),
    ] {
        assert!(got.0 == kind && got.1.starts_with(&words), "{got:?}");
    }
    for schema in [
        KvSchema {
            dtype: Dtype::Bf16,
            ..small()
        },
        KvSchema {
            attention: "sliding/4".to_owned(),
            ..small()
        },
    ] {
        let other = cache.open_namespace(&Tenant::new("default").unwrap(), &schema).unwrap();
        assert_eq!(
            cache
                .open_context(other, &chain[..1], 3, 0.3, IndexChoice::Best)
                .unwrap_err()
                .kind(),
            Unsupported
        );
    }
    let context = cache
        .open_context(namespace, &chain[..2], 3, 0.3, IndexChoice::Best)
        .unwrap();
    let mut nan = q.clone();
    nan[7] = f32::NAN;
    let (many, good) = (vec![0..1; Query::EXCLUDED_MAX + 1], ask(&q, 0, 0.5, &[]));
    let reversed = [Range { start: 5, end: 4 }];
    let k_max = Form::Attend {
        target_mass: 0.5,
        k_max: Some(0),
        options: AttendOptions::default(),
    };
    for (query, words) in [
        (ask(&q, LAYERS, 0.5, &[]), "layer: 2 does not exist"),
        (ask(&q[1..], 0, 0.5, &[]), "q: 23 elements, 24 are wanted"),
        (ask(&nan, 0, 0.5, &[]), "q: element 7 is not finite"),
        (ask(&q, 0, 0.0, &[]), "target_mass: 0 "),
        (ask(&q, 0, 1.1, &[]), "target_mass: 1.1 "),
        (ask(&q, 0, f32::NAN, &[]), "target_mass: NaN "),
        (ask(&q, 0, 0.5, &many), "excluded: 1025 ranges"),
        (ask(&q, 0, 0.5, &reversed), "excluded: 5..4 ends"),
        (
            Query {
                form: k_max,
                ..good.clone()
            },
            "k_max: 0 ",
        ),
        (
            Query {
                form: Form::Rows { k: 0 },
                ..good
            },
            "k: 0 ",
        ),
    ] {
        let error = cache.retrieve(&context, &query).unwrap_err();
        assert!(
            error.kind() == InvalidArgument && error.to_string().starts_with(words),
            "{error}"
        );
    }
    drop(context);
    let other_dir = tempfile::tempdir().unwrap();
    let limits = CacheConfig {
        contexts_max: 1,
        context_blocks_max: 2,
        ..config(other_dir.path())
    };
    let (other, _) = open(limits, &small());
    fill(&other, namespace, &small(), 3);
    let context = other
        .open_context(namespace, &chain[..2], 3, 0.3, IndexChoice::Best)
        .unwrap();
    assert_eq!(
        other
            .open_context(namespace, &chain[..1], 3, 0.3, IndexChoice::Best)
            .unwrap_err()
            .kind(),
        LimitReached
    );
    assert!(
        cache
            .retrieve(&context, &ask(&q, 0, 0.5, &[]))
            .unwrap_err()
            .to_string()
            .starts_with("context: ")
    );
    drop(context);
    assert_eq!(
        other
            .open_context(namespace, &chain, 3, 0.3, IndexChoice::Best)
            .unwrap_err()
            .kind(),
        LimitReached
    );
    assert!(
        other
            .open_context(namespace, &chain[..1], 3, 0.3, IndexChoice::Best)
            .is_ok(),
        "a dropped context makes place"
    );
}

#[test]
fn a_context_opens_after_a_restart_and_a_full_budget_only_costs_time() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(config(dir.path()), &small());
    fill(&cache, namespace, &small(), 6);
    let context = cache
        .open_context(namespace, &chain(6), 3, 0.35, IndexChoice::Best)
        .unwrap();
    let q = queries(&small(), 3, 9);
    let before = attended(&cache, &context, &ask(&q, 1, 0.9, &[2..3]));
    cache.close().unwrap();
    drop(context);
    // Room to hold two blocks of one layer, and nothing in memory.
    let tight = CacheConfig {
        context_bytes_max: 2 * 384,
        host_bytes_max: 0,
        ..config(dir.path())
    };
    let cache = BlockCache::open(tight).unwrap();
    let context = cache
        .open_context(namespace, &chain(6), 3, 0.35, IndexChoice::Best)
        .unwrap();
    for _ in 0..2 {
        assert_eq!(attended(&cache, &context, &ask(&q, 1, 0.9, &[2..3])), before);
        assert_eq!(cache.stats().context_bytes, 2 * 384);
    }
}

#[test]
fn eviction_and_reclaim_leave_a_context_alone() {
    let dir = tempfile::tempdir().unwrap();
    let small_tiers = CacheConfig {
        host_bytes_max: 110_000,
        disk_bytes_max: 1 << 18,
        ..config(dir.path())
    };
    let (cache, namespace) = open(small_tiers, &small());
    fill(&cache, namespace, &small(), 4);
    let context = cache
        .open_context(namespace, &chain(4), 3, 0.35, IndexChoice::Best)
        .unwrap();
    for block in 100..1000 {
        for layer in 0..LAYERS {
            let payload: Bytes = halves(&small(), block, layer)
                .iter()
                .flat_map(|half| half.to_le_bytes())
                .collect();
            cache
                .put(
                    namespace.block(hash(block)).layer(layer),
                    payload.clone(),
                    Checksum::of(&payload),
                )
                .unwrap();
        }
        if block % 50 == 0 {
            cache.flush().unwrap();
        }
    }
    let stats = cache.stats();
    assert!(
        stats.disk.reclaimed_segments > 0 && stats.host_evicted_blocks > 0,
        "{stats:?}"
    );
    let q = queries(&small(), 3, 9);
    for layer in 0..LAYERS {
        let (o, _, report) = attended(&cache, &context, &ask(&q, layer, 1.0, &[]));
        assert_eq!(report.shortfall, None);
        assert_near(
            &o,
            &oracle(&small(), &q, layer, 0.35, &(0..16).collect::<Vec<_>>()).0,
            "o",
        );
    }
}

#[test]
fn a_corrupt_block_is_missing_and_not_covered() {
    let dir = tempfile::tempdir().unwrap();
    let no_memory = CacheConfig {
        host_bytes_max: 0,
        ..config(dir.path())
    };
    let (cache, namespace) = open(no_memory.clone(), &small());
    fill(&cache, namespace, &small(), 4);
    cache.close().unwrap();
    // Flip one bit of a value of block 2 in layer 0, found by its bytes.
    let segment = std::fs::read_dir(dir.path().join("segments"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mut bytes = std::fs::read(&segment).unwrap();
    let wanted: Vec<u8> = halves(&small(), 2, 0)
        .iter()
        .flat_map(|half| half.to_le_bytes())
        .collect();
    let at = bytes.windows(wanted.len()).position(|window| window == wanted).unwrap();
    bytes[at + 300] ^= 4;
    std::fs::write(&segment, bytes).unwrap();

    let cache = BlockCache::open(no_memory).unwrap();
    let context = cache
        .open_context(namespace, &chain(4), 3, 0.35, IndexChoice::Best)
        .unwrap();
    let q = queries(&small(), 3, 9);
    let (o, lse, report) = attended(&cache, &context, &ask(&q, 0, 1.0, &[]));
    let rest: Vec<u32> = (0..8).chain(12..16).collect();
    let expected = oracle(&small(), &q, 0, 0.35, &rest);
    assert_near(&o, &expected.0, "o of the rest");
    assert_near(&lse, &expected.1, "lse of the rest");
    assert_eq!(report.shortfall, Some(Shortfall::MissingBlocks));
    assert_eq!((report.keys_scanned, report.keys_total), (36, 48));
    assert_eq!(report.mass_covered, vec![0.75; 3]);
    assert_eq!(
        attended(&cache, &context, &ask(&q, 1, 1.0, &[])).2.shortfall,
        None,
        "the other layer is whole"
    );
    assert_eq!(cache.stats().retrieve_missing, 1);
    assert_eq!(
        cache
            .open_context(namespace, &chain(4), 3, 0.35, IndexChoice::Best)
            .unwrap_err()
            .kind(),
        ErrorKind::NotHeld
    );
}

#[test]
fn a_deadline_that_passed_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(config(dir.path()), &small());
    fill(&cache, namespace, &small(), 4);
    let context = cache
        .open_context(namespace, &chain(4), 3, 0.35, IndexChoice::Best)
        .unwrap();
    let q = queries(&small(), 3, 9);
    let late = Query {
        deadline: Some(Instant::now()),
        ..ask(&q, 0, 1.0, &[])
    };
    let (o, lse, report) = attended(&cache, &context, &late);
    assert!(o.iter().all(|value| *value == 0.0) && lse.iter().all(|lse| *lse == f32::NEG_INFINITY));
    assert_eq!(report.shortfall, Some(Shortfall::Deadline));
    assert_eq!((report.keys_scanned, report.keys_total, report.bytes_read), (0, 48, 0));
    assert_eq!(report.mass_covered, vec![0.0; 3]);
    let in_time = Query {
        deadline: Some(Instant::now() + Duration::from_secs(3600)),
        ..late
    };
    assert_eq!(attended(&cache, &context, &in_time).2.shortfall, None);
    assert_eq!(cache.stats().retrieve_late, 1);
}

mod ahead;
mod clusters;
mod indexes;
mod parked;
mod shared;
mod sketch;
