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
            took: None,
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
    // Of two KV heads one is far off: the other takes what was found for it.
    let mut half = wide_asked(1);
    half.q[..2 * HEAD_DIM].iter_mut().for_each(|q| *q = -*q);
    let ahead = searches
        .hint(Arc::clone(&cache), Arc::clone(&context), forecast(&wide_asked(1)))
        .expect("a query could ask this");
    let answer = searches
        .answer(Arc::clone(&cache), Arc::clone(&context), half, ahead)
        .await
        .expect("open")
        .expect("answered");
    assert_eq!((answer.report.heads_ahead, answer.report.heads_too_far), (1, 1));
    for asked in [other, far] {
        let ahead = searches
            .hint(Arc::clone(&cache), Arc::clone(&context), forecast(&wide_asked(1)))
            .expect("a query could ask this");
        let (plain, report) = cache.retrieve(&context, &asked.query()).expect("answered");
        let answer = searches
            .answer(Arc::clone(&cache), Arc::clone(&context), asked, ahead)
            .await
            .expect("open")
            .expect("answered");
        assert_eq!((answer.found, answer.report), (plain, report));
        assert_eq!(answer.times.hidden, Duration::ZERO);
    }
    searches.door.drain().await;
}

/// On a thread of the stream's own: in the place of an idle one, or where there is none as everybody else.
#[test]
fn a_thread_of_its_own_searches_in_the_place_of_an_idle_one() {
    let dir = tempfile::tempdir().expect("a folder");
    let (cache, context) = setup(dir.path());
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let searches = Searches::new(1, ROOM);
    let hint = |searches: &Searches, is_asked: &dyn Fn() -> bool| {
        let hint = forecast(&wide_asked(2));
        searches.hint_here(runtime.handle(), &cache, &context, hint, is_asked)
    };
    let answer = |ahead| {
        let (cache, context) = (Arc::clone(&cache), Arc::clone(&context));
        let answer = searches.answer_here(runtime.handle(), cache, context, wide_asked(2), ahead);
        answer.expect("open").expect("answered")
    };
    let plain = answer(None);
    assert_eq!(plain.report.heads_ahead, 0);
    let ahead = hint(&searches, &|| false).expect("a query could ask this");
    assert!(ahead.is_some() && searches.rooms.bytes() > 0);
    let hinted = answer(ahead);
    assert_eq!((hinted.report.heads_ahead, searches.rooms.bytes()), (2, 0));
    let Times { search, hidden, .. } = hinted.times;
    assert!(
        hidden > Duration::ZERO && hidden < search,
        "all of it was done before the query"
    );
    // A query that comes while the first KV head is searched takes that one, and waits for no other.
    let ahead = hint(&searches, &|| true).expect("a query could ask this");
    let waited = answer(ahead);
    assert_eq!((waited.report.heads_ahead, waited.times.hidden), (1, Duration::ZERO));
    // Nobody knows what will be asked: a thread of the runtime reads the blocks.
    let unknown = Forecast {
        asking: None,
        ..forecast(&wide_asked(2))
    };
    let read = searches.hint_here(runtime.handle(), &cache, &context, unknown, &|| false);
    assert!(read.expect("fine").is_none());
    runtime.block_on(idle(&searches));
    // The only thread is taken: hints are dropped, queries wait.
    let (go, wait) = mpsc::channel::<()>();
    {
        let _runtime = runtime.enter();
        assert!(searches.door.start_if_idle(move || assert!(wait.recv().is_ok())));
    }
    assert!(hint(&searches, &|| false).expect("a query could ask this").is_none());
    std::thread::scope(|threads| {
        let waiting = threads.spawn(|| answer(None));
        while searches.waiting.lock().is_empty() {
            std::thread::yield_now();
        }
        go.send(()).expect("a receiver");
        let late = waiting.join().expect("no panic");
        assert_eq!(late.found, plain.found);
    });
    // What no query can be.
    let mut bad = forecast(&wide_asked(1));
    bad.q[7] = f32::NAN;
    assert!(
        searches
            .hint_here(runtime.handle(), &cache, &context, bad, &|| false)
            .is_err()
    );
    runtime.block_on(searches.door.drain());
    let closed = searches.answer_here(
        runtime.handle(),
        Arc::clone(&cache),
        Arc::clone(&context),
        wide_asked(1),
        None,
    );
    assert_eq!(closed.err(), Some(Lost::Closed));
}
