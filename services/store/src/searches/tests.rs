use std::{path::Path, sync::mpsc};

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum, Dtype, KvSchema, RopeStyle, Tenant};
use kvasir_cache::{
    CacheConfig, PutOutcome,
    retrieve::{AttendOptions, IndexChoice},
};
use kvasir_index::Basis;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;

/// More than any search here parks.
const ROOM: u64 = 1 << 20;

fn schema() -> KvSchema {
    KvSchema {
        model: "test".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: 1,
        kv_heads: 2,
        head_dim: 8,
        block_tokens: 16,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 1e5,
        rope_dims: 8,
        rope_style: RopeStyle::Halves,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "test/1".to_owned(),
    }
}

/// A cache with one chain of `blocks`, and `contexts` contexts over it.
fn cache(dir: &Path, blocks: u8, contexts: usize) -> (Arc<BlockCache>, Vec<Arc<Context>>) {
    cache_of(dir, &schema(), None, (blocks, contexts))
}

/// The same of another schema, with a basis for its sketches.
fn cache_of(
    dir: &Path,
    schema: &KvSchema,
    basis: Option<&Basis>,
    (blocks, contexts): (u8, usize),
) -> (Arc<BlockCache>, Vec<Arc<Context>>) {
    let cache = BlockCache::open(CacheConfig {
        disk_bytes_max: 64 << 20,
        segment_bytes: 8 << 20,
        ..CacheConfig::in_dir(dir)
    })
    .expect("a cache");
    let tenant = Tenant::new("default").expect("not empty");
    let namespace = cache.open_namespace(&tenant, schema).expect("a namespace");
    if let Some(basis) = basis {
        cache.set_basis(namespace, &basis.encode()).expect("taken");
    }
    let chain: Vec<BlockHash> = (0..blocks).map(|at| BlockHash::from_bytes([at; 32])).collect();
    let mut random = SmallRng::seed_from_u64(1);
    for hash in &chain {
        let halves = (0..schema.layer_block_bytes() / 2).map(|_| half::f16::from_f32(random.random_range(-1.0..1.0)));
        let payload: Bytes = halves.flat_map(half::f16::to_le_bytes).collect();
        let key = namespace.block(*hash).layer(0);
        let put = cache.put(key, payload.clone(), Checksum::of(&payload));
        assert_eq!(put.expect("taken"), PutOutcome::Stored);
    }
    let open = |_| {
        let context = cache.open_context(namespace, &chain, 4, 0.5, IndexChoice::Best);
        Arc::new(context.expect("a context"))
    };
    let contexts = (0..contexts).map(open).collect();
    (Arc::new(cache), contexts)
}

fn asked(seed: u64, target_mass: f32) -> Asked {
    let mut random = SmallRng::seed_from_u64(seed);
    Asked {
        layer: 0,
        q: (0..4 * 8).map(|_| random.random_range(-2.0..2.0)).collect(),
        form: Form::Attend {
            target_mass,
            k_max: None,
            options: AttendOptions::default(),
        },
        excluded: std::iter::once(0..3).collect(),
        deadline: None,
        local_lse: Vec::new(),
    }
}

#[tokio::test]
async fn those_that_wait_at_the_same_moment_share_a_scan() {
    let dir = tempfile::tempdir().expect("a folder");
    let (cache, contexts) = cache(dir.path(), 5, 20);
    let searches = Arc::new(Searches::new(1, ROOM));
    let (go, wait) = mpsc::channel::<()>();
    assert!(searches.door.start_if_idle(move || assert!(wait.recv().is_ok())));
    // 17 join, which is more than one scan takes; one asks for something else, one cannot be answered, one leaves.
    let tasks: Vec<_> = contexts
        .iter()
        .enumerate()
        .map(|(at, context)| {
            let mut asked = asked(at as u64, if at == 4 { 0.5 } else { 1.0 });
            if at == 7 {
                asked.q[3] = f32::NAN;
            }
            let (searches, cache, context) = (Arc::clone(&searches), Arc::clone(&cache), Arc::clone(context));
            tokio::spawn(async move { searches.answer(cache, context, asked, None).await })
        })
        .collect();
    while searches.waiting.lock().len() < 19 {
        tokio::task::yield_now().await;
    }
    let left = 11;
    tasks[left].abort();
    while searches.waiting.lock().len() > 18 {
        tokio::task::yield_now().await;
    }
    go.send(()).expect("a receiver");
    for (at, task) in tasks.into_iter().enumerate() {
        if at == left {
            continue;
        }
        let answer = task.await.expect("no panic").expect("the door is open");
        if at == 7 {
            let error = answer.expect_err("not a number").to_string();
            assert!(error.starts_with("q: element 3 is not finite"), "{error}");
            continue;
        }
        let answer = answer.expect("answered");
        let alone = asked(at as u64, if at == 4 { 0.5 } else { 1.0 });
        let (found, report) = cache.retrieve(&contexts[at], &alone.query()).expect("answered");
        assert_eq!(answer.found, found, "{at}");
        assert_eq!(answer.report.mass_covered, report.mass_covered, "{at}");
    }
    // 16 in the first scan, and then one alone.
    assert_eq!(cache.stats().retrieve_joined, 16);
    assert!(searches.waiting.lock().is_empty());
}

#[tokio::test]
async fn threads_share_a_large_scan() {
    let dir = tempfile::tempdir().expect("a folder");
    let large = KvSchema {
        block_tokens: 256,
        ..schema()
    };
    let (cache, contexts) = cache_of(dir.path(), &large, None, (200, 1));
    assert!(contexts[0].tokens() * 2 > HELP_KEYS);
    let alone = asked(3, 0.9);
    let (found, report) = cache.retrieve(&contexts[0], &alone.query()).expect("answered");
    for threads in [1, 2, 5] {
        let searches = Searches::new(threads, ROOM);
        let answer = searches
            .answer(Arc::clone(&cache), Arc::clone(&contexts[0]), asked(3, 0.9), None)
            .await
            .expect("open")
            .expect("answered");
        assert_eq!(
            (answer.found, answer.report),
            (found.clone(), report.clone()),
            "{threads} threads"
        );
        searches.door.drain().await;
    }
}

mod ahead;
