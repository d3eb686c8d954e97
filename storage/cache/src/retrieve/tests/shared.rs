//! Contexts over one chain, queries that share a scan, and threads that share a search.

use super::*;

fn context(cache: &BlockCache, namespace: NamespaceId, chain: &[BlockHash]) -> Context {
    cache
        .open_context(namespace, chain, 6, 0.35, IndexChoice::Best)
        .unwrap()
}

#[test]
fn contexts_over_one_chain_are_pinned_and_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(config(dir.path()), &small());
    fill(&cache, namespace, &small(), 6);
    let q = queries(&small(), 6, 1);
    let (first, second) = (
        context(&cache, namespace, &chain(4)),
        context(&cache, namespace, &chain(4)),
    );
    let longer = context(&cache, namespace, &chain(6));
    assert!(first.joins(&second) && !first.joins(&longer));
    let other_heads = cache
        .open_context(namespace, &chain(4), 3, 0.35, IndexChoice::Best)
        .unwrap();
    assert!(!first.joins(&other_heads), "a group of another size");
    drop(other_heads);
    let stats = cache.stats();
    assert_eq!((stats.contexts, stats.leases), (3, 2));
    attended(&cache, &first, &ask(&q, 0, 1.0, &[]));
    let one = cache.stats().context_bytes;
    assert_eq!(one, 4 * 384);
    attended(&cache, &second, &ask(&q, 0, 1.0, &[]));
    assert_eq!(cache.stats().context_bytes, one, "held once for both");
    // What is left of the two keeps it all.
    drop(first);
    assert_eq!((cache.stats().context_bytes, cache.stats().leases), (one, 2));
    assert_eq!(attended(&cache, &second, &ask(&q, 0, 1.0, &[])).2.shortfall, None);
    drop(second);
    assert_eq!((cache.stats().context_bytes, cache.stats().leases), (0, 1));
    let again = context(&cache, namespace, &chain(4));
    assert!(
        again.joins(&context(&cache, namespace, &chain(4))),
        "and it can be opened anew"
    );
    // A chain that ends in the same block without being the same one shares nothing.
    let mut forged = chain(4);
    forged.swap(0, 1);
    let forged = context(&cache, namespace, &forged);
    assert!(!forged.joins(&again));
    drop((forged, again, longer));
    let stats = cache.stats();
    assert_eq!((stats.contexts, stats.leases, stats.context_bytes), (0, 0, 0));
}

#[test]
fn an_answer_does_not_depend_on_who_shares_the_scan() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(config(dir.path()), &small());
    fill(&cache, namespace, &small(), 5);
    let context = context(&cache, namespace, &chain(5));
    let many: Vec<Vec<f32>> = (0..7).map(|seed| queries(&small(), 6, seed)).collect();
    for (target_mass, excluded) in [(1.0, vec![]), (0.9, vec![0..2, 17..20]), (0.5, vec![0..20])] {
        let asked: Vec<Query<'_>> = many.iter().map(|q| ask(q, 1, target_mass, &excluded)).collect();
        let search = cache.search(&context, &asked).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| search.work());
            }
        });
        let answers = search.wait();
        assert_eq!(answers.len(), asked.len());
        for (query, (found, report)) in asked.iter().zip(answers) {
            let (alone, alone_report) = cache.retrieve(&context, query).unwrap();
            assert_eq!(found, alone, "the same bits");
            let share = Report {
                bytes_read: report.bytes_read,
                ..alone_report.clone()
            };
            assert_eq!(report, share);
            // Keys are read once for all seven; values as far as the seven want different ones.
            assert!(report.bytes_read <= alone_report.bytes_read, "{report:?}");
        }
    }
    let joined = cache.stats().retrieve_joined;
    assert_eq!(joined, 3 * 7);
}

#[test]
fn only_queries_that_differ_in_nothing_else_share_a_scan() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(config(dir.path()), &small());
    fill(&cache, namespace, &small(), 2);
    let context = context(&cache, namespace, &chain(2));
    let q = queries(&small(), 6, 1);
    let good = ask(&q, 0, 0.9, &[]);
    let attend = |k_max, missed_mass_max| Form::Attend {
        target_mass: 0.9,
        k_max,
        options: AttendOptions {
            missed_mass_max,
            ..AttendOptions::default()
        },
    };
    let with = |form| Query { form, ..good.clone() };
    for (a, b, joins) in [
        (good.clone(), good.clone(), true),
        (good.clone(), ask(&q, 1, 0.9, &[]), false),
        (good.clone(), ask(&q, 0, 0.8, &[]), false),
        (good.clone(), ask(&q, 0, 0.9, &[1..2]), false),
        (with(attend(Some(3), 0.0)), with(attend(Some(3), 0.0)), false),
        (with(attend(None, 0.1)), with(attend(None, 0.1)), false),
        (with(Form::Rows { k: 2 }), with(Form::Rows { k: 2 }), false),
    ] {
        assert_eq!(a.joins(&b), joins, "{a:?} {b:?}");
        let searched = cache.search(&context, &[a, b]);
        assert_eq!(searched.is_ok(), joins);
    }
    let none = cache.search(&context, &[]).unwrap_err();
    assert!(none.to_string().starts_with("queries: there are none"), "{none}");
}

#[test]
fn a_certificate_holds_and_a_demand_is_met() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(config(dir.path()), &small());
    fill(&cache, namespace, &small(), 8);
    let context = context(&cache, namespace, &chain(8));
    let q = queries(&small(), 6, 4);
    let everything = attended(&cache, &context, &ask(&q, 0, 1.0, &[])).1;
    let table = [
        // k_max, demand, escalated
        (None, 0.0, false),
        (Some(2), 0.0, false),
        (Some(2), 0.2, true),
        (None, 0.01, true),
        (None, 0.9, false),
    ];
    for (k_max, missed_mass_max, escalated) in table {
        let form = Form::Attend {
            target_mass: 0.6,
            k_max,
            options: AttendOptions {
                certificate: Certificate::Deterministic,
                missed_mass_max,
                ..AttendOptions::default()
            },
        };
        let query = Query {
            form,
            ..ask(&q, 0, 1.0, &[])
        };
        let (_, lse, report) = attended(&cache, &context, &query);
        assert_eq!(report.escalated, escalated, "{k_max:?} {missed_mass_max}");
        assert_eq!(report.missed_mass_bound.len(), 6);
        for (head, bound) in report.missed_mass_bound.iter().enumerate() {
            let missed = 1.0 - (lse[head] - everything[head]).exp2();
            assert!((missed - bound).abs() < 1e-4, "{missed} is bounded by {bound}");
            assert!(missed_mass_max == 0.0 || *bound <= missed_mass_max, "{bound}");
        }
    }
    let late = Query {
        form: Form::Attend {
            target_mass: 1.0,
            k_max: None,
            options: AttendOptions {
                certificate: Certificate::Statistical,
                ..AttendOptions::default()
            },
        },
        deadline: Some(Instant::now()),
        ..ask(&q, 0, 1.0, &[])
    };
    let report = attended(&cache, &context, &late).2;
    assert_eq!(report.shortfall, Some(Shortfall::Deadline));
    assert_eq!(
        report.missed_mass_bound, [1.0; 6],
        "of what was not reached nothing is known"
    );
    assert!(
        attended(&cache, &context, &ask(&q, 0, 0.6, &[]))
            .2
            .missed_mass_bound
            .is_empty()
    );
}

#[test]
fn a_warm_layer_is_not_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = open(config(dir.path()), &small());
    fill(&cache, namespace, &small(), 4);
    let context = context(&cache, namespace, &chain(4));
    assert!(!context.is_warm(1));
    cache.warm(&context, 1);
    assert!(context.is_warm(1) && !context.is_warm(0) && !context.is_warm(LAYERS));
    assert_eq!(cache.stats().context_bytes, 4 * 384);
    cache.warm(&context, LAYERS);
    assert_eq!(cache.stats().context_bytes, 4 * 384, "no such layer");
    let q = queries(&small(), 6, 1);
    assert_eq!(attended(&cache, &context, &ask(&q, 1, 1.0, &[])).2.shortfall, None);
    assert_eq!(cache.stats().context_bytes, 4 * 384);
}
