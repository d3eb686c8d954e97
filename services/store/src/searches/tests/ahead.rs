//! Searches that hints begin.

use std::time::Duration;

use kvasir_cache::retrieve::Certificate;
use kvasir_index::HeadBasis;
use tokio::time::sleep;

use super::*;
use crate::ahead::Asking;

const HEAD_DIM: usize = 32;

fn wide() -> KvSchema {
    KvSchema {
        head_dim: HEAD_DIM as u16,
        rope_dims: HEAD_DIM as u16,
        ..schema()
    }
}

/// The axes as directions.
fn basis() -> Basis {
    let axes = || -> Vec<f32> {
        let row = |at: usize| (0..HEAD_DIM).map(move |d| f32::from(u8::from(d == at)));
        (0..HEAD_DIM).flat_map(row).collect()
    };
    let head = || HeadBasis {
        mean: vec![0.0; HEAD_DIM],
        keys: axes(),
        queries: axes(),
        streaming: false,
    };
    Basis {
        model: wide().model_fingerprint(),
        layers: 1,
        kv_heads: 2,
        head_dim: HEAD_DIM,
        rank: 32,
        heads: vec![head(), head()],
    }
}

fn setup(dir: &Path) -> (Arc<BlockCache>, Arc<Context>) {
    let (cache, mut contexts) = cache_of(dir, &wide(), Some(&basis()), (60, 1));
    (cache, contexts.remove(0))
}

fn wide_asked(seed: u64) -> Asked {
    let mut random = SmallRng::seed_from_u64(seed);
    Asked {
        q: (0..4 * HEAD_DIM).map(|_| random.random_range(-2.0..2.0)).collect(),
        form: Form::Attend {
            target_mass: 0.9,
            k_max: None,
            options: AttendOptions {
                tail: true,
                certificate: Certificate::Statistical,
                effort: 0.1,
                ..AttendOptions::default()
            },
        },
        ..asked(seed, 0.9)
    }
}

fn forecast(of: &Asked) -> Forecast {
    Forecast {
        layer: of.layer,
        q: of.q.clone(),
        local_lse: of.local_lse.clone(),
        asking: Some(Asking {
            form: of.form,
            excluded: of.excluded.clone(),
        }),
    }
}

async fn idle(searches: &Searches) {
    while searches.door.load().2 > 0 {
        sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_query_takes_what_its_hint_found() {
    let dir = tempfile::tempdir().expect("a folder");
    let (cache, context) = setup(dir.path());
    let searches = Searches::new(2, ROOM);
    for seed in 0..3 {
        let hint = forecast(&wide_asked(seed));
        let ahead = searches
            .hint(Arc::clone(&cache), Arc::clone(&context), hint)
            .expect("a query could ask this");
        assert!(ahead.is_some(), "a thread is idle");
        idle(&searches).await;
        assert!(searches.rooms.bytes() > 0, "it waits for its query");
        let answer = searches
            .answer(Arc::clone(&cache), Arc::clone(&context), wide_asked(seed), ahead)
            .await
            .expect("open")
            .expect("answered");
        assert_eq!((answer.report.heads_ahead, answer.report.heads_too_far), (2, 0));
        let Times { search, hidden, .. } = answer.times;
        assert!(
            hidden > Duration::ZERO && hidden < search,
            "all of it was done before the query"
        );
        assert_eq!(searches.rooms.bytes(), 0, "and is given back");
        let (plain, report) = cache.retrieve(&context, &wide_asked(seed).query()).expect("answered");
        assert_eq!(answer.report.keys_total, report.keys_total);
        let (Found::Attend { lse, .. }, Found::Attend { lse: plain, .. }) = (&answer.found, &plain) else {
            panic!("attend was asked for");
        };
        for (lse, plain) in lse.iter().zip(plain) {
            assert!((lse - plain).abs() < 0.3, "{lse} is not about {plain}");
        }
    }
    searches.door.drain().await;
}

/// The query comes while its search is under way: it waits for that rather than beginning another one, which with one
/// thread it could not.
#[tokio::test]
async fn a_query_waits_for_a_search_that_is_under_way() {
    let dir = tempfile::tempdir().expect("a folder");
    let (cache, context) = setup(dir.path());
    let searches = Searches::new(1, ROOM);
    let ahead = searches
        .hint(Arc::clone(&cache), Arc::clone(&context), forecast(&wide_asked(1)))
        .expect("a query could ask this");
    assert!(ahead.is_some(), "the thread is idle");
    let answer = searches
        .answer(Arc::clone(&cache), Arc::clone(&context), wide_asked(1), ahead)
        .await
        .expect("open")
        .expect("answered");
    assert_eq!(answer.report.heads_ahead, 2);
    assert_eq!(cache.stats().retrieve_queries, 1, "one search, one answer");
    searches.door.drain().await;
}

#[tokio::test]
async fn hints_are_dropped_first() {
    let dir = tempfile::tempdir().expect("a folder");
    let (cache, context) = setup(dir.path());
    let hint = |searches: &Searches| {
        let hint = forecast(&wide_asked(1));
        searches.hint(Arc::clone(&cache), Arc::clone(&context), hint)
    };
    // No thread.
    let searches = Searches::new(1, ROOM);
    let (go, wait) = mpsc::channel::<()>();
    assert!(searches.door.start_if_idle(move || assert!(wait.recv().is_ok())));
    assert!(hint(&searches).expect("a query could ask this").is_none());
    go.send(()).expect("a receiver");
    idle(&searches).await;
    // No memory.
    let small = Searches::new(1, 100);
    let ahead = hint(&small).expect("a query could ask this");
    idle(&small).await;
    let answer = small
        .answer(Arc::clone(&cache), Arc::clone(&context), wide_asked(1), ahead)
        .await
        .expect("open")
        .expect("answered all the same");
    assert_eq!((answer.report.heads_ahead, answer.times.hidden), (0, Duration::ZERO));
    // What no query can be.
    let mut bad = forecast(&wide_asked(1));
    bad.q[7] = f32::NAN;
    let refused = searches.hint(Arc::clone(&cache), Arc::clone(&context), bad);
    let error = refused.expect_err("not a number").to_string();
    assert!(error.starts_with("q: element 7 is not finite"), "{error}");
    // Before the first query nobody knows what will be asked: its blocks are read.
    let unknown = Forecast {
        asking: None,
        ..forecast(&wide_asked(1))
    };
    let read = searches.hint(Arc::clone(&cache), Arc::clone(&context), unknown);
    assert!(read.expect("fine").is_none());
    idle(&searches).await;
    assert!(context.is_warm(0));
    // Whose stream ends leaves nothing behind.
    drop(hint(&searches).expect("a query could ask this"));
    idle(&searches).await;
    assert_eq!(searches.rooms.bytes(), 0);
    searches.door.drain().await;
    small.door.drain().await;
}

#[tokio::test]
async fn a_query_that_asks_otherwise_is_searched_for() {
    let dir = tempfile::tempdir().expect("a folder");
    let (cache, context) = setup(dir.path());
    let searches = Searches::new(2, ROOM);
    let mut other = wide_asked(5);
    other.excluded.push(4..9);
    let mut far = wide_asked(1);
    far.q.iter_mut().for_each(|q| *q = -*q);
    for (asked, too_far) in [(other, 0), (far, 2)] {
        let ahead = searches
            .hint(Arc::clone(&cache), Arc::clone(&context), forecast(&wide_asked(1)))
            .expect("a query could ask this");
        let (plain, mut report) = cache.retrieve(&context, &asked.query()).expect("answered");
        let answer = searches
            .answer(Arc::clone(&cache), Arc::clone(&context), asked, ahead)
            .await
            .expect("open")
            .expect("answered");
        report.heads_too_far = too_far;
        assert_eq!((answer.found, answer.report), (plain, report));
        assert_eq!(answer.times.hidden, Duration::ZERO);
    }
    searches.door.drain().await;
}
