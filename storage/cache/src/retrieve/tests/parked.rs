//! Searches that begin with predicted queries, judged by those that do not, and by the oracle.

use std::sync::{Arc, atomic::AtomicBool};

use super::{
    sketch::{attend, sketched, wide},
    *,
};
use crate::retrieve::{ParkedSearch, SearchAhead};

const BLOCKS: usize = 200;

/// What a worker keeps of them: 160 tokens are left to search.
const KEPT: [Range<u32>; 2] = [0..128, 288..800];

fn opened(cache: &BlockCache, namespace: NamespaceId) -> Context {
    cache
        .open_context(namespace, &chain(BLOCKS), 6, 0.35, IndexChoice::Best)
        .unwrap()
}

fn ahead(cache: &BlockCache, context: &Context, predicted: &Query<'_>) -> Option<SearchAhead> {
    let search = cache.search_ahead(context, predicted, &Arc::default()).unwrap();
    if let Some(search) = &search {
        search.work();
    }
    search
}

fn parked(cache: &BlockCache, context: &Context, predicted: &Query<'_>) -> ParkedSearch {
    let search = ahead(cache, context, predicted).expect("a prediction gains something");
    let parked = search.wait().expect("all blocks are there");
    assert!(
        parked.bytes() > 0 && parked.bytes() <= search.bytes_max(),
        "{} of {}",
        parked.bytes(),
        search.bytes_max()
    );
    parked
}

fn finished(cache: &BlockCache, context: &Context, query: &Query<'_>, parked: ParkedSearch) -> (Found, Report) {
    cache.retrieve_parked(context, query, parked).unwrap()
}

fn forms() -> [Form; 3] {
    let options = AttendOptions {
        tail: true,
        certificate: Certificate::Statistical,
        effort: 0.1,
        ..AttendOptions::default()
    };
    let no_tail = AttendOptions { tail: false, ..options };
    [attend(0.9, options), attend(0.9, no_tail), Form::Rows { k: 10 }]
}

#[test]
fn a_right_prediction_finds_what_a_search_without_one_finds() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), BLOCKS);
    let context = opened(&cache, namespace);
    let flat = cache
        .open_context(namespace, &chain(BLOCKS), 6, 0.35, IndexChoice::Flat)
        .unwrap();
    for seed in 0..4 {
        let q = queries(&wide(), 6, seed);
        let everything = attended(&cache, &flat, &ask(&q, 1, 1.0, &KEPT)).1;
        for form in forms() {
            let query = Query {
                form,
                ..ask(&q, 1, 1.0, &KEPT)
            };
            let (plain, plain_report) = cache.retrieve(&context, &query).unwrap();
            let (found, report) = finished(&cache, &context, &query, parked(&cache, &context, &query));
            assert_eq!(
                (report.heads_ahead, report.heads_too_far),
                (2, 0),
                "one of three streams"
            );
            assert_eq!(plain_report.heads_ahead, 0);
            assert_eq!(
                (report.keys_total, report.keys_scanned),
                (plain_report.keys_total, plain_report.keys_scanned)
            );
            match (found, plain) {
                // More candidates are parked than a search looks at: what is found is as good or better.
                (Found::Rows(heads), Found::Rows(plain)) => {
                    for (head, plain) in heads.iter().zip(&plain) {
                        assert_eq!(head.positions.len(), head.keys.len() / 64);
                        let same = head.positions.iter().filter(|at| plain.positions.contains(at)).count();
                        assert!(
                            same * 10 >= plain.positions.len() * 8,
                            "{same} of {}",
                            plain.positions.len()
                        );
                    }
                }
                (
                    Found::Attend { o, lse },
                    Found::Attend {
                        o: plain_o,
                        lse: plain_lse,
                    },
                ) => {
                    for head in 0..4 {
                        assert!(
                            (lse[head] - plain_lse[head]).abs() < 0.3,
                            "{} {}",
                            lse[head],
                            plain_lse[head]
                        );
                        let of = |o: &[f32]| o[head * 32..(head + 1) * 32].to_vec();
                        assert!(apart(&of(&o), &of(&plain_o)) < 0.5);
                        if !matches!(form, Form::Attend { options, .. } if options.tail) {
                            let missed = 1.0 - (lse[head] - everything[head]).exp2();
                            assert!(missed <= report.missed_mass_bound[head] + 1e-4, "{missed} {report:?}");
                        }
                    }
                }
                _ => panic!("another form than was asked"),
            }
        }
    }
}

/// Length of the difference, relative to the first.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>();
    (square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut a.iter().copied())).sqrt()
}

#[test]
fn a_wrong_prediction_is_searched_for_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), BLOCKS);
    let context = opened(&cache, namespace);
    let q = queries(&wide(), 6, 1);
    let mut half = q.clone();
    // The second KV head's first query only.
    half[64..96].iter_mut().for_each(|q| *q = -*q);
    for form in forms() {
        let query = Query {
            form,
            ..ask(&q, 0, 1.0, &KEPT)
        };
        let plain = cache.retrieve(&context, &query).unwrap();
        let other = queries(&wide(), 6, 2);
        let wrong = Query {
            q: &other,
            ..query.clone()
        };
        let (found, mut report) = finished(&cache, &context, &query, parked(&cache, &context, &wrong));
        assert_eq!((report.heads_ahead, report.heads_too_far), (0, 2));
        report.heads_too_far = 0;
        assert_eq!((found, report), plain, "as without a prediction, to the bit");

        let wrong = Query {
            q: &half,
            ..query.clone()
        };
        let (_, report) = finished(&cache, &context, &query, parked(&cache, &context, &wrong));
        assert_eq!(
            (report.heads_ahead, report.heads_too_far),
            (1, 1),
            "each KV head for itself"
        );
    }
}

#[test]
fn what_is_asked_otherwise_than_was_predicted_is_searched_for_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), BLOCKS);
    let (context, again) = (opened(&cache, namespace), opened(&cache, namespace));
    let shorter = cache
        .open_context(namespace, &chain(BLOCKS - 1), 6, 0.35, IndexChoice::Best)
        .unwrap();
    let q = queries(&wide(), 6, 1);
    let predicted = Query {
        form: forms()[0],
        ..ask(&q, 0, 1.0, &KEPT)
    };
    let effort = |effort| {
        let options = AttendOptions {
            tail: true,
            certificate: Certificate::Statistical,
            effort,
            ..AttendOptions::default()
        };
        attend(0.9, options)
    };
    let with = |excluded| Query {
        excluded,
        ..predicted.clone()
    };
    // One key more or less that the caller holds itself, and what lies behind the context, which changes nothing.
    let (more, less, behind) = (
        [0..129, 288..800],
        [0..128, 289..800],
        [288..900, 0..70, 60..128, 900..910],
    );
    let same = parked(&cache, &context, &predicted);
    for (query, is_for) in [
        (predicted.clone(), true),
        (with(&behind), true),
        (with(&more), false),
        (with(&less), false),
        (
            Query {
                form: effort(0.2),
                ..predicted.clone()
            },
            false,
        ),
        (
            Query {
                form: forms()[2],
                ..predicted.clone()
            },
            false,
        ),
        (
            Query {
                layer: 1,
                ..predicted.clone()
            },
            false,
        ),
    ] {
        assert_eq!(same.is_for(&context, &query), is_for, "{query:?}");
        let (found, report) = finished(&cache, &context, &query, parked(&cache, &context, &predicted));
        assert_eq!(report.heads_ahead, if is_for { 2 } else { 0 });
        if !is_for {
            assert_eq!((found, report), cache.retrieve(&context, &query).unwrap());
        }
    }
    assert!(same.is_for(&again, &predicted), "contexts over one chain share blocks");
    assert!(!same.is_for(&shorter, &predicted));
    drop((context, again));
    assert!(!same.is_for(&shorter, &predicted));
}

#[test]
fn where_a_prediction_gains_nothing_none_is_searched_for() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), BLOCKS);
    let context = opened(&cache, namespace);
    let flat = cache
        .open_context(namespace, &chain(BLOCKS), 6, 0.35, IndexChoice::Flat)
        .unwrap();
    let q = queries(&wide(), 6, 1);
    let query = Query {
        form: forms()[0],
        ..ask(&q, 0, 1.0, &KEPT)
    };
    let exact = AttendOptions {
        certificate: Certificate::Deterministic,
        ..AttendOptions::default()
    };
    assert!(ahead(&cache, &flat, &query).is_none());
    for form in [
        attend(1.0, AttendOptions::default()),
        attend(0.9, exact),
        Form::Rows { k: 800 },
    ] {
        let all = Query { form, ..query.clone() };
        assert!(ahead(&cache, &context, &all).is_none(), "{form:?}");
    }
    let mut bad = q.clone();
    bad[5] = f32::NAN;
    let refused = cache.search_ahead(
        &context,
        &Query {
            q: &bad,
            ..query.clone()
        },
        &Arc::default(),
    );
    let error = refused.unwrap_err().to_string();
    assert!(error.starts_with("q: element 5 is not finite"), "{error}");

    let dropped = Arc::new(AtomicBool::new(true));
    let search = cache
        .search_ahead(&context, &query, &dropped)
        .unwrap()
        .expect("a search");
    search.work();
    assert!(search.wait().is_none(), "whoever wanted it is gone");
}
