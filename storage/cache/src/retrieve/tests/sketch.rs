//! Retrieval through sketches, judged by the oracle and by the flat scan.

use kvasir_index::{Basis, Excluded, HeadBasis};

use super::*;

/// Three KV heads of 32 elements, four tokens a block.
pub(super) fn wide() -> KvSchema {
    KvSchema {
        head_dim: 32,
        rope_dims: 32,
        ..small()
    }
}

/// The axes as directions. KV head 2 is a streaming one.
pub(super) fn basis(schema: &KvSchema) -> Basis {
    let head_dim = usize::from(schema.head_dim);
    let axes = || -> Vec<f32> {
        let row = |at: usize| (0..head_dim).map(move |d| f32::from(u8::from(d == at)));
        (0..32).flat_map(row).collect()
    };
    let head = |at: usize| HeadBasis {
        mean: vec![0.0; head_dim],
        keys: axes(),
        queries: axes(),
        streaming: at % 3 == 2,
    };
    Basis {
        model: schema.model_fingerprint(),
        layers: schema.layers.into(),
        kv_heads: schema.kv_heads.into(),
        head_dim,
        rank: 32,
        heads: (0..usize::from(schema.layers * schema.kv_heads)).map(head).collect(),
    }
}

pub(super) fn sketched(dir: &Path, blocks: usize) -> (BlockCache, NamespaceId) {
    let (cache, namespace) = open(config(dir), &wide());
    cache.set_basis(namespace, &basis(&wide()).encode()).unwrap();
    fill(&cache, namespace, &wide(), blocks);
    (cache, namespace)
}

pub(super) fn attend(target_mass: f32, options: AttendOptions) -> Form {
    Form::Attend {
        target_mass,
        k_max: None,
        options,
    }
}

/// What a worker keeps of 200 blocks: 160 tokens are left to search.
const KEPT: [Range<u32>; 2] = [0..128, 288..800];

#[test]
fn everything_attended_is_the_oracle_and_streaming_heads_search_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), 200);
    let context = cache
        .open_context(namespace, &chain(200), 6, 0.35, IndexChoice::Best)
        .unwrap();
    let serving = context.serving();
    assert_eq!((serving.index, serving.reason), ("sketch", ""));
    assert_eq!(context.basis_id(), cache.basis_id(namespace));
    let q = queries(&wide(), 6, 1);
    let (o, lse, report) = attended(&cache, &context, &ask(&q, 1, 1.0, &KEPT));
    let positions: Vec<u32> = (128..288).collect();
    let expected = oracle(&wide(), &q, 1, 0.35, &positions);
    // Two of the three KV heads, two query heads each.
    assert_near(&o[..4 * 32], &expected.0[..4 * 32], "o");
    assert_near(&lse[..4], &expected.1[..4], "lse");
    assert!(o[4 * 32..].iter().all(|o| *o == 0.0) && lse[4..].iter().all(|lse| *lse == f32::NEG_INFINITY));
    assert_eq!((report.index, report.shortfall), ("sketch", None));
    assert_eq!(
        (report.keys_total, report.keys_scanned, report.keys_rescored),
        (320, 320, 320)
    );
    assert!(
        report.mass_covered.iter().all(|mass| (mass - 1.0).abs() < 1e-4),
        "{report:?}"
    );
    // Sketched once, held, and counted.
    let stats = cache.stats();
    assert_eq!(stats.sketched_blocks, 40);
    assert!(stats.context_bytes > 40 * 1536);
    attended(&cache, &context, &ask(&q, 1, 1.0, &KEPT));
    assert_eq!(cache.stats().sketched_blocks, 40);
    drop(context);
    assert_eq!(cache.stats().context_bytes, 0);
}

/// That a head streams was found with a sink and a window of a size: who keeps less is given what that head attends to.
#[test]
fn a_streaming_head_is_searched_for_who_keeps_less() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), 200);
    let context = cache
        .open_context(namespace, &chain(200), 6, 0.35, IndexChoice::Best)
        .unwrap();
    let q = queries(&wide(), 6, 4);
    let smaller: [&[Range<u32>]; 4] = [&[], &[0..127, 288..800], &[0..128, 289..800], &[0..128, 288..799]];
    for kept in smaller {
        let excluded = Excluded::new(kept);
        let positions: Vec<u32> = excluded.searched(0..800).flatten().collect();
        let (o, lse, report) = attended(&cache, &context, &ask(&q, 1, 1.0, kept));
        let expected = oracle(&wide(), &q, 1, 0.35, &positions);
        assert_near(&o[4 * 32..], &expected.0[4 * 32..], "o");
        assert_near(&lse[4..], &expected.1[4..], "lse");
        assert_eq!(report.keys_total, 3 * positions.len() as u64, "{kept:?}");
    }
}

#[test]
fn a_few_keys_and_a_tail_come_near_and_their_bound_holds() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), 100);
    let open = |index| cache.open_context(namespace, &chain(100), 6, 0.35, index).unwrap();
    let (context, flat) = (open(IndexChoice::Sketch), open(IndexChoice::Flat));
    assert_eq!((flat.index(), flat.basis_id()), ("flat", None));
    let mut held = 0;
    for seed in 0..8 {
        let q = queries(&wide(), 6, seed);
        let exact = attended(&cache, &flat, &ask(&q, 0, 1.0, &[])).1;
        let options = AttendOptions {
            tail: true,
            certificate: Certificate::Statistical,
            effort: 0.2,
            ..AttendOptions::default()
        };
        let query = Query {
            form: attend(0.9, options),
            ..ask(&q, 0, 1.0, &[])
        };
        let (_, lse, report) = attended(&cache, &context, &query);
        assert!(
            report.keys_rescored > 0 && report.keys_rescored < report.keys_scanned,
            "{report:?}"
        );
        assert_eq!(report.missed_mass_bound.len(), 6);
        for head in 0..4 {
            assert!(
                (lse[head] - exact[head]).abs() < 0.2,
                "{} is not near {}",
                lse[head],
                exact[head]
            );
        }
        let no_tail = Query {
            form: attend(0.9, AttendOptions { tail: false, ..options }),
            ..query.clone()
        };
        let (_, lse, report) = attended(&cache, &context, &no_tail);
        for head in 0..4 {
            let missed = 1.0 - (lse[head] - exact[head]).exp2();
            held += usize::from(missed <= report.missed_mass_bound[head] + 1e-4);
        }
    }
    assert!(held >= 31, "{held} of 32 bounds at three standard errors hold");
}

#[test]
fn what_sketches_cannot_give_the_flat_scan_gives() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), 10);
    let open = |index| cache.open_context(namespace, &chain(10), 6, 0.35, index).unwrap();
    let (context, flat) = (open(IndexChoice::Best), open(IndexChoice::Flat));
    let q = queries(&wide(), 6, 3);
    for options in [
        AttendOptions {
            unbiased: true,
            certificate: Certificate::Statistical,
            ..AttendOptions::default()
        },
        AttendOptions {
            unbiased: true,
            missed_mass_max: 0.1,
            ..AttendOptions::default()
        },
        AttendOptions {
            certificate: Certificate::Deterministic,
            ..AttendOptions::default()
        },
    ] {
        let query = Query {
            form: attend(0.8, options),
            ..ask(&q, 0, 1.0, &[])
        };
        let [mut through, exact] = [&context, &flat].map(|context| attended(&cache, context, &query));
        assert_eq!((through.2.index, exact.2.index_reason), ("flat", ""));
        assert!(through.2.index_reason.contains("a bound or no bias"));
        through.2.index_reason = "";
        assert_eq!(through, exact);
    }
}

/// Drawn keys stand for the others: over many queries the mass is right in the mean, from an eighth of the keys, and all of them are exact.
#[test]
fn what_is_to_have_no_bias_is_drawn_through_sketches() {
    const QUERIES: u64 = 100;
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), 200);
    let open = |index| cache.open_context(namespace, &chain(200), 6, 0.35, index).unwrap();
    let (context, flat) = (open(IndexChoice::Best), open(IndexChoice::Flat));
    let options = AttendOptions {
        unbiased: true,
        effort: 0.125,
        ..AttendOptions::default()
    };
    let (mut sum, mut squares) = (0.0_f64, 0.0_f64);
    for seed in 0..QUERIES {
        let q = queries(&wide(), 6, seed);
        let of = |target| Query {
            form: attend(target, options),
            ..ask(&q, 0, 1.0, &KEPT)
        };
        let (_, exact, _) = attended(&cache, &flat, &of(1.0));
        let (_, lse, report) = attended(&cache, &context, &of(0.9));
        assert_eq!((report.index, report.index_reason), ("sketch", ""));
        // An eighth of 160 keys for each of four query heads; the others are of a streaming head.
        assert_eq!((report.keys_attended, report.keys_total), (80, 320), "{report:?}");
        for head in 0..4 {
            let whole = f64::from((lse[head] - exact[head]).exp2());
            sum += whole - 1.0;
            squares += (whole - 1.0) * (whole - 1.0);
        }
        if seed == 0 {
            let (_, all, report) = attended(&cache, &context, &of(1.0));
            assert_eq!(report.keys_attended, 2 * report.keys_total);
            for (all, exact) in all.iter().zip(&exact).take(4) {
                assert!((all - exact).abs() < 1e-3, "{all} is not {exact}");
            }
            let again = attended(&cache, &context, &of(0.9)).1;
            assert_eq!(again, lse, "a function of what is asked");
            let few = Query {
                form: Form::Attend {
                    target_mass: 0.9,
                    k_max: Some(7),
                    options,
                },
                ..of(0.9)
            };
            let report = attended(&cache, &context, &few).2;
            assert_eq!(report.keys_attended, 4 * 7);
        }
    }
    let draws = (4 * QUERIES) as f64;
    let error = (squares / draws / draws).sqrt();
    assert!(
        (sum / draws).abs() < 4.0 * error,
        "{} is no chance, {error}",
        sum / draws
    );
}

#[test]
fn rows_are_among_the_best_and_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), 200);
    let open = |index| cache.open_context(namespace, &chain(200), 3, 0.35, index).unwrap();
    let (context, flat) = (open(IndexChoice::Best), open(IndexChoice::Flat));
    let mut same = 0;
    for seed in 0..10 {
        let q = queries(&wide(), 3, seed);
        let rows = Query {
            form: Form::Rows { k: 10 },
            ..ask(&q, 0, 1.0, &KEPT)
        };
        let both = [&context, &flat].map(|context| match cache.retrieve(context, &rows).unwrap().0 {
            Found::Rows(heads) => heads,
            Found::Attend { .. } => panic!("rows were asked for"),
        });
        assert!(both[0][2].positions.is_empty(), "a streaming head");
        for (found, exact) in both[0].iter().zip(&both[1]).take(2) {
            assert_eq!((found.positions.len(), found.keys.len()), (10, 640));
            same += found.positions.iter().filter(|at| exact.positions.contains(at)).count();
        }
    }
    assert!(same >= 170, "{same} of 200 are the best");
}

/// What the caller attends to by himself counts towards the mass he wants: where that is most of it, few keys are read.
#[test]
fn what_the_caller_attends_to_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, namespace) = sketched(dir.path(), 200);
    let open = |index| cache.open_context(namespace, &chain(200), 6, 0.35, index).unwrap();
    let (context, flat) = (open(IndexChoice::Best), open(IndexChoice::Flat));
    let q = queries(&wide(), 6, 1);
    let lse = attended(&cache, &flat, &ask(&q, 1, 1.0, &KEPT)).1;
    let options = AttendOptions {
        tail: true,
        effort: 0.9,
        ..AttendOptions::default()
    };
    let query = Query {
        form: attend(0.95, options),
        ..ask(&q, 1, 1.0, &KEPT)
    };
    let (_, plain_lse, plain) = attended(&cache, &context, &query);
    let mut before = plain.keys_attended;
    for more in [0.0, 2.0, 12.0] {
        let local: Vec<f32> = lse.iter().map(|lse| lse + more).collect();
        let beside = Query {
            local_lse: &local,
            ..query.clone()
        };
        let (_, found_lse, report) = attended(&cache, &context, &beside);
        assert!(report.keys_attended < before, "{more}: {report:?}");
        before = report.keys_attended;
        // The tail stands for what was not attended to.
        for (found, plain) in found_lse.iter().zip(&plain_lse).take(4) {
            assert!((found - plain).abs() < 0.3, "{more}: {found} is not about {plain}");
        }
    }
    assert_eq!(before, 0, "all that matters is with the caller");
    let mut wrong = lse.clone();
    wrong[2] = f32::INFINITY;
    for (local_lse, words) in [
        (&lse[1..], "local_lse: 5 numbers for 6"),
        (&wrong[..], "local_lse: element 2"),
    ] {
        let error = cache
            .retrieve(
                &context,
                &Query {
                    local_lse,
                    ..query.clone()
                },
            )
            .unwrap_err();
        assert!(error.to_string().starts_with(words), "{error}");
    }
}
