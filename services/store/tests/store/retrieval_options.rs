//! What a decode stream may ask beside its queries: a row cache, hints, certificates; and the basis of a namespace.

use std::collections::HashMap;

use bytes::Bytes;
use kvasir_client::{
    AttendOptions, Certificate, DecodeStream, ErrorKind, Form, Found, HeadRows, Hint, IndexChoice, OpenContext,
};
use kvasir_index::{Basis, HeadBasis};

use crate::{
    retrieval::{Q_HEADS, SCALE, open, put, query},
    support::{LAYERS, Setup, chain, client, config, schema, tenant},
};

const ROW_BYTES: usize = 64;

async fn rows(stream: &mut DecodeStream, sequence: u64, k: u32) -> (Vec<HeadRows>, usize) {
    let layer = (sequence % 2) as u16;
    stream
        .send(query(sequence, layer, Form::Rows { k }))
        .await
        .expect("sent");
    let reply = stream.receive().await.expect("a reply");
    match reply.found {
        Found::Rows(heads) => (heads, reply.wire_bytes),
        Found::Attend { .. } => panic!("asked for rows"),
    }
}

/// What a caller keeps of one layer and head, in the plainest way: the most recently used last.
#[derive(Default)]
struct Kept(Vec<(u32, Bytes, Bytes)>);

impl Kept {
    fn complete(&mut self, reply: &HeadRows, rows_max: usize) -> (Bytes, Bytes) {
        let sent = reply.sent.as_ref().expect("the stream has a row cache");
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (at, position) in reply.positions.iter().enumerate() {
            let held = self.0.iter().find(|row| row.0 == *position).cloned();
            let row = match sent.binary_search(&(at as u32)) {
                Ok(row) => {
                    assert!(held.is_none(), "{position} travels though it is kept");
                    let part = row * ROW_BYTES..(row + 1) * ROW_BYTES;
                    (*position, reply.keys.slice(part.clone()), reply.values.slice(part))
                }
                Err(_) => held.expect("what does not travel is kept"),
            };
            keys.extend_from_slice(&row.1);
            values.extend_from_slice(&row.2);
            // Those of the reply count as used now, in rising order; none goes before all are in.
            self.0.retain(|kept| kept.0 != *position);
            self.0.push(row);
        }
        let over = self.0.len().saturating_sub(rows_max);
        self.0.drain(..over);
        (keys.into(), values.into())
    }
}

#[tokio::test]
async fn a_row_cache_saves_bytes_and_changes_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(60, 4);
    put(&setup, &chain).await;
    let mut plain = open(&setup, &chain).await;
    for rows_max in [1, 30, 1000] {
        let context = OpenContext {
            chain: chain.clone(),
            q_heads: Q_HEADS,
            softmax_scale: SCALE,
            index: IndexChoice::Flat,
            row_cache_rows: rows_max,
        };
        let mut caching = setup.client.decode(&setup.namespace, context).await.expect("a context");
        let mut kept: HashMap<(u64, usize), Kept> = HashMap::new();
        let (mut whole_bytes, mut bytes) = (0, 0);
        for sequence in 0..12 {
            let (whole, count) = rows(&mut plain, sequence, 6).await;
            whole_bytes += count;
            let (heads, count) = rows(&mut caching, sequence, 6).await;
            bytes += count;
            for (kv_head, (whole, head)) in whole.iter().zip(&heads).enumerate() {
                assert_eq!((&whole.positions, &whole.sent), (&head.positions, &None));
                let kept = kept.entry((sequence % 2, kv_head)).or_default();
                let found = kept.complete(head, rows_max as usize);
                assert_eq!(found, (whole.keys.clone(), whole.values.clone()));
            }
        }
        assert!(
            rows_max == 1 || bytes < whole_bytes * 3 / 4,
            "{rows_max}: {bytes} of {whole_bytes}"
        );
    }
    drop(plain);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn a_row_cache_beyond_the_limit_is_declined() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut small = config(dir.path());
    small.row_cache_bytes_max = kvasir_runtime::units::ByteSize::kib(1);
    let setup = Setup::with(&small).await;
    let chain = chain(61, 4);
    put(&setup, &chain).await;
    let context = OpenContext {
        chain: chain.clone(),
        q_heads: Q_HEADS,
        softmax_scale: SCALE,
        index: IndexChoice::Best,
        row_cache_rows: 50,
    };
    let mut stream = setup.client.decode(&setup.namespace, context).await.expect("a context");
    for _ in 0..2 {
        let (heads, _) = rows(&mut stream, 1, 6).await;
        assert!(heads.iter().all(|head| head.sent.is_none()), "all rows travel, always");
    }
    drop(stream);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn hints_change_no_answer_and_certificates_hold() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(62, 6);
    put(&setup, &chain).await;
    let (mut hinted, mut plain) = (open(&setup, &chain).await, open(&setup, &chain).await);
    let attend = |certificate, missed_mass_max| Form::Attend {
        target_mass: 0.5,
        k_max: 4,
        options: AttendOptions {
            tail: true,
            certificate,
            missed_mass_max,
            unbiased: true,
            effort: 0.1,
        },
    };
    for layer in 0..LAYERS {
        let q = query(layer.into(), layer, attend(Certificate::None, 0.0));
        let hint = Hint {
            layer,
            q: q.q.iter().map(|value| value * 0.9).collect(),
            local_lse: vec![],
        };
        // Twice: the last one counts.
        hinted.hint(hint.clone()).await.expect("sent");
        hinted.hint(hint).await.expect("sent");
        let mut answers = Vec::new();
        for stream in [&mut hinted, &mut plain] {
            stream.send(q.clone()).await.expect("sent");
            let reply = stream.receive().await.expect("a reply");
            assert!(!reply.report.hinted && reply.report.index == "flat");
            assert!(reply.report.missed_mass_bound.is_empty());
            match reply.found {
                Found::Attend { o, lse } => answers.push((o, lse)),
                Found::Rows(_) => panic!("asked for attend"),
            }
        }
        assert_eq!(answers[0], answers[1]);
    }
    for (certificate, demand, escalated) in [
        (Certificate::Statistical, 0.0, false),
        (Certificate::Deterministic, 0.01, true),
    ] {
        plain
            .send(query(7, 0, attend(certificate, demand)))
            .await
            .expect("sent");
        let report = plain.receive().await.expect("a reply").report;
        assert_eq!((report.escalated, report.missed_mass_bound.len()), (escalated, Q_HEADS));
        for (bound, mass) in report.missed_mass_bound.iter().zip(&report.mass_covered) {
            assert!((bound + mass - 1.0).abs() < 1e-4);
            assert!(demand == 0.0 || *bound <= demand, "{bound}");
        }
    }
    drop((hinted, plain));
    setup.store.stop().await.expect("everything written");
}

fn basis(mean: f32) -> Basis {
    basis_of(mean, 8, 0.25)
}

fn basis_of(mean: f32, rank: usize, direction: f32) -> Basis {
    let schema = schema();
    let head_dim = usize::from(schema.head_dim);
    let head = HeadBasis {
        mean: vec![mean; head_dim],
        keys: vec![direction; rank * head_dim],
        queries: vec![0.5; rank * head_dim],
        streaming: false,
    };
    Basis {
        model: schema.model_fingerprint(),
        layers: schema.layers.into(),
        kv_heads: schema.kv_heads.into(),
        head_dim,
        rank,
        heads: vec![head; usize::from(schema.layers * schema.kv_heads)],
    }
}

/// The axes as directions.
fn axes() -> Basis {
    let mut basis = basis_of(0.0, 32, 0.0);
    for head in &mut basis.heads {
        head.queries.fill(0.0);
        for at in 0..32 {
            (head.keys[at * 33], head.queries[at * 33]) = (1.0, 1.0);
        }
    }
    basis
}

/// Over sketches a hint begins the search: a query that is as predicted takes what it found, any other one is answered as without
/// a hint, in both forms.
#[tokio::test]
async fn a_hint_begins_the_search_of_its_query() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let (tenant, schema) = (tenant(), schema());
    let taken = setup
        .client
        .open_namespace_with(&tenant, &schema, axes().encode().into());
    taken.await.expect("a basis for these weights");
    let chain = chain(64, 40);
    put(&setup, &chain).await;
    let open = || async {
        let context = OpenContext {
            chain: chain.clone(),
            q_heads: Q_HEADS,
            softmax_scale: SCALE,
            index: IndexChoice::Best,
            row_cache_rows: 0,
        };
        setup.client.decode(&setup.namespace, context).await.expect("a context")
    };
    let (mut hinted, mut plain) = (open().await, open().await);
    assert_eq!(hinted.opened().index, "sketch");
    let attend = Form::Attend {
        target_mass: 0.9,
        k_max: 0,
        options: AttendOptions {
            tail: true,
            effort: 0.1,
            ..AttendOptions::default()
        },
    };
    let (mut used, mut sequence) = (0, 0);
    for form in [attend, Form::Rows { k: 8 }] {
        // The first query says what the others will be like.
        for layer in [0, 1, 2, 0, 1] {
            sequence += 1;
            let q = query(sequence, layer, form);
            let next = Hint {
                layer: (layer + 1) % LAYERS,
                q: query(sequence + 1, (layer + 1) % LAYERS, form).q,
                local_lse: vec![],
            };
            hinted.send(q.clone()).await.expect("sent");
            hinted.hint(next).await.expect("sent");
            plain.send(q).await.expect("sent");
            let (found, expected) = (
                hinted.receive().await.expect("a reply"),
                plain.receive().await.expect("a reply"),
            );
            assert!(!expected.report.hinted && expected.report.hidden.is_zero());
            used += usize::from(found.report.hinted);
            if !found.report.hinted {
                assert!(found.report.hidden.is_zero());
            }
            assert!(found.report.hidden <= found.report.search);
            assert_eq!(found.report.keys_total, expected.report.keys_total);
            match (found.found, expected.found) {
                (Found::Rows(found), Found::Rows(expected)) => {
                    for (found, expected) in found.iter().zip(&expected) {
                        let same = found
                            .positions
                            .iter()
                            .filter(|at| expected.positions.contains(at))
                            .count();
                        assert!(
                            same * 10 >= expected.positions.len() * 8,
                            "{same} of {}",
                            expected.positions.len()
                        );
                    }
                }
                (Found::Attend { lse, .. }, Found::Attend { lse: expected, .. }) => {
                    for (lse, expected) in lse.iter().zip(&expected) {
                        assert!((lse - expected).abs() < 0.3, "{lse} is not about {expected}");
                    }
                }
                _ => panic!("another form than was asked"),
            }
        }
    }
    assert!(used >= 6, "{used} of 10 had a search that was begun ahead");
    // A hint that no query can be ends the stream, as a query does.
    let bad = Hint {
        layer: 1,
        q: vec![f32::NAN; Q_HEADS * usize::from(schema.head_dim)],
        local_lse: vec![],
    };
    hinted.hint(bad).await.expect("sent");
    hinted.send(query(99, 1, attend)).await.expect("sent");
    let error = hinted.receive().await.expect_err("not a number");
    assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
    assert!(error.message.contains("q[0]"), "{error}");
    drop((hinted, plain));
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn a_namespace_keeps_its_basis() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = config(dir.path());
    let setup = Setup::with(&config).await;
    let chain = chain(63, 2);
    put(&setup, &chain).await;
    assert_eq!(setup.namespace.basis, None);
    let stream = open(&setup, &chain).await;
    let opened = stream.opened();
    assert_eq!(opened.index, "flat");
    assert!(opened.index_reason.contains("no sketch basis"), "{opened:?}");
    drop(stream);

    let file = Bytes::from(basis(1.0).encode());
    let (tenant, schema) = (tenant(), schema());
    let with = |file: Bytes| setup.client.open_namespace_with(&tenant, &schema, file);
    let id = Some(basis(1.0).id());
    assert_eq!(with(file.clone()).await.expect("taken").basis, id);
    assert_eq!(with(Bytes::new()).await.expect("what is there").basis, id);
    let mut other_weights = basis(1.0);
    other_weights.model = [9; 32];
    for (name, wrong, words) in [
        ("another one", basis(2.0).encode(), "and keeps it"),
        ("of another model", other_weights.encode(), "other weights"),
        ("damaged", file[..file.len() - 1].to_vec(), "basis: "),
    ] {
        let error = with(wrong.into()).await.expect_err(name);
        assert_eq!(error.kind, ErrorKind::Invalid, "{name}: {error}");
        assert!(error.message.contains(words), "{name}: {error}");
    }
    let stat = setup
        .stock()
        .await
        .stat(kvasir_proto::v1::StatRequest {})
        .await
        .expect("numbers");
    assert_eq!(stat.into_inner().namespaces_with_basis, 1);
    setup.store.stop().await.expect("everything written");

    let again = kvasir_store::Store::start(&config, &kvasir_runtime::Runtime::new())
        .await
        .expect("a store");
    let namespace = client(&again)
        .open_namespace(&tenant, &schema)
        .await
        .expect("a namespace");
    assert_eq!(namespace.basis, id, "a restart keeps it");
    again.stop().await.expect("everything written");
}
