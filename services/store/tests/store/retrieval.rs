//! Decode streams against plain attention over the same blocks.

use bytes::Bytes;
use futures::stream;
use half::f16;
use kvasir_block::{BlockHash, Checksum, LayerBlockLayout};
use kvasir_client::{AttendOptions, DecodeStream, ErrorKind, Form, Found, IndexChoice, LayerBlock, OpenContext, Query};
use kvasir_proto::{
    convert,
    v1::{self, decode_request::Request, retrieval_client::RetrievalClient},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tonic::Code;

use crate::support::{Setup, chain, config, in_order, schema};

pub(crate) const Q_HEADS: usize = 4;
pub(crate) const SCALE: f32 = 0.2;

fn layout() -> LayerBlockLayout {
    let schema = schema();
    LayerBlockLayout {
        kv_heads: schema.kv_heads.into(),
        head_dim: schema.head_dim.into(),
        block_tokens: schema.block_tokens.into(),
        dtype: schema.dtype,
    }
}

/// The keys and values of a layer block.
fn elements(hash: BlockHash, layer: u16) -> Vec<f16> {
    let name = u64::from(Checksum::of(hash.as_bytes()).to_u32());
    let mut random = SmallRng::seed_from_u64(name << 16 | u64::from(layer));
    (0..layout().elements())
        .map(|_| f16::from_f32(random.random_range(-2.0..2.0)))
        .collect()
}

fn bytes(values: &[f16]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) async fn put(setup: &Setup, chain: &[BlockHash]) {
    let mut stream = setup.client.put_blocks(&setup.namespace).await.expect("a stream");
    for (hash, layer) in in_order(chain) {
        let payload = bytes(&elements(hash, layer));
        let checksum = Checksum::of(&payload);
        stream
            .put(LayerBlock {
                hash,
                layer,
                checksum,
                payload,
            })
            .await
            .expect("queued");
    }
    stream.finish().await.expect("outcomes");
}

/// Rows of one KV head over the whole chain.
fn rows(chain: &[BlockHash], layer: u16, range: std::ops::Range<usize>) -> Vec<Vec<f16>> {
    let head_dim = layout().head_dim;
    chain
        .iter()
        .flat_map(|hash| {
            elements(*hash, layer)[range.clone()]
                .chunks(head_dim)
                .map(<[f16]>::to_vec)
                .collect::<Vec<_>>()
        })
        .collect()
}

fn scores(q: &[f32], keys: &[Vec<f16>]) -> Vec<f64> {
    let dot = |key: &Vec<f16>| q.iter().zip(key).map(|(q, k)| f64::from(*q) * k.to_f64()).sum::<f64>();
    keys.iter().map(|key| dot(key) * f64::from(SCALE)).collect()
}

pub(crate) async fn open(setup: &Setup, chain: &[BlockHash]) -> DecodeStream {
    let open = OpenContext {
        chain: chain.to_vec(),
        q_heads: Q_HEADS,
        softmax_scale: SCALE,
        index: IndexChoice::Best,
        row_cache_rows: 0,
    };
    setup.client.decode(&setup.namespace, open).await.expect("a context")
}

pub(crate) fn query(sequence: u64, layer: u16, form: Form) -> Query {
    let mut random = SmallRng::seed_from_u64(sequence);
    Query {
        sequence,
        layer,
        q: (0..Q_HEADS * layout().head_dim)
            .map(|_| random.random_range(-1.0..1.0))
            .collect(),
        form,
        excluded: vec![],
        deadline: None,
        local_lse: vec![],
    }
}

#[tokio::test]
async fn attend_over_everything_is_attention() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(50, 12);
    put(&setup, &chain).await;
    let mut stream = open(&setup, &chain).await;
    assert_eq!(
        (stream.opened().tokens, stream.opened().index.as_str()),
        (12 * 16, "flat")
    );
    let (layout, kv_heads) = (layout(), usize::from(schema().kv_heads));
    // Several at once: answered in the order asked.
    let attend = Form::Attend {
        target_mass: 1.0,
        k_max: 0,
        options: AttendOptions::default(),
    };
    for layer in 0..3 {
        stream.send(query(layer.into(), layer, attend)).await.expect("sent");
    }
    for layer in 0..3 {
        let reply = stream.receive().await.expect("a reply");
        assert_eq!((reply.sequence, reply.layer), (layer.into(), layer));
        assert_eq!(
            (reply.report.keys_total, reply.report.shortfall),
            (12 * 16 * kv_heads as u64, None)
        );
        let Found::Attend { o, lse } = reply.found else {
            panic!("asked for attend")
        };
        let q = query(layer.into(), layer, attend).q;
        for head in 0..Q_HEADS {
            let kv_head = head / (Q_HEADS / kv_heads);
            let keys = rows(&chain, layer, layout.keys(kv_head));
            let values = rows(&chain, layer, layout.values(kv_head));
            let scores = scores(&q[head * layout.head_dim..][..layout.head_dim], &keys);
            let sum: f64 = scores.iter().map(|score| score.exp()).sum();
            assert!((f64::from(lse[head]) - sum.log2()).abs() < 1e-3, "lse of head {head}");
            for d in 0..layout.head_dim {
                let expected: f64 = scores
                    .iter()
                    .zip(&values)
                    .map(|(s, v)| s.exp() / sum * v[d].to_f64())
                    .sum();
                let found = f64::from(o[head * layout.head_dim + d]);
                assert!(
                    (found - expected).abs() < 1e-3,
                    "head {head}, {d}: {found} instead of {expected}"
                );
            }
            assert!((reply.report.mass_covered[head] - 1.0).abs() < 1e-4);
        }
    }
    drop(stream);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn rows_are_the_best_keys_as_they_were_put() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(51, 12);
    put(&setup, &chain).await;
    let mut stream = open(&setup, &chain).await;
    let mut asked = query(9, 1, Form::Rows { k: 5 });
    asked.excluded = vec![0..20, 150..192];
    stream.send(asked.clone()).await.expect("sent");
    let reply = stream.receive().await.expect("a reply");
    let Found::Rows(heads) = reply.found else {
        panic!("asked for rows")
    };
    let (layout, kv_heads) = (layout(), usize::from(schema().kv_heads));
    assert_eq!(heads.len(), kv_heads);
    for (kv_head, found) in heads.iter().enumerate() {
        let keys = rows(&chain, 1, layout.keys(kv_head));
        let values = rows(&chain, 1, layout.values(kv_head));
        let mut expected = std::collections::BTreeSet::new();
        let group = Q_HEADS / kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            let scores = scores(&asked.q[head * layout.head_dim..][..layout.head_dim], &keys);
            let mut order: Vec<usize> = (20..150).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            expected.extend(order[..5].iter().map(|position| *position as u32));
        }
        assert_eq!(found.positions, Vec::from_iter(expected));
        let row = |of: &[Vec<f16>]| {
            found
                .positions
                .iter()
                .flat_map(|at| bytes(&of[*at as usize]))
                .collect::<Bytes>()
        };
        assert_eq!((&found.keys, &found.values), (&row(&keys), &row(&values)));
    }
    assert_eq!(reply.report.keys_total, 130 * kv_heads as u64);
    drop(stream);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn a_missing_block_is_named_and_wrong_queries_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(52, 4);
    put(&setup, &chain[..3]).await;
    let whole = OpenContext {
        chain: chain.clone(),
        q_heads: Q_HEADS,
        softmax_scale: SCALE,
        index: IndexChoice::Best,
        row_cache_rows: 0,
    };
    let error = setup
        .client
        .decode(&setup.namespace, whole)
        .await
        .expect_err("one block is missing");
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
    assert!(
        error.message.contains(&format!("{}", chain[3])),
        "{error} does not name {}",
        chain[3]
    );

    let opening = |q_heads| v1::OpenContext {
        namespace: convert::namespace_bytes(setup.namespace.id),
        hashes: convert::hash_bytes(&chain[..3]),
        q_heads,
        softmax_scale: SCALE,
        ..v1::OpenContext::default()
    };
    let open = |q_heads| Request::Open(opening(q_heads));
    let q = |count: usize| convert::float_bytes(&vec![0.5; count]);
    let hint = |layer, count| {
        Request::Hint(v1::Hint {
            layer,
            q: q(count),
            ..v1::Hint::default()
        })
    };
    fn attend_of(query: &mut v1::Query) -> &mut v1::Attend {
        match &mut query.form {
            Some(v1::query::Form::Attend(attend)) => attend,
            _ => panic!("not attend"),
        }
    }
    let attend = Some(v1::query::Form::Attend(v1::Attend {
        target_mass: 1.0,
        ..v1::Attend::default()
    }));
    let good = v1::Query {
        q: q(Q_HEADS * 32),
        form: attend,
        ..v1::Query::default()
    };
    let query = |damage: fn(&mut v1::Query)| {
        let mut query = good.clone();
        damage(&mut query);
        Request::Query(query)
    };
    let table = [
        (vec![query(|_| {})], "query: no context is open, send open first"),
        (vec![open(4), open(4)], "open: this stream has a context"),
        (vec![open(0)], "open.q_heads: 0: must be 1 to 4096"),
        (vec![open(3)], "q_heads"),
        (
            vec![open(4), query(|q| q.layer = 3)],
            "query.layer: 3: the namespace has layers 0 to 2",
        ),
        (
            vec![open(4), query(|q| q.q.truncate(8))],
            "query.q: 128 little-endian f32 have 512 bytes, this has 8",
        ),
        (
            vec![open(4), query(|q| q.form = None)],
            "query.form: is missing: ask for rows or attend",
        ),
        (
            vec![
                open(4),
                query(|q| q.excluded = vec![v1::TokenRange { start: 5, end: 2 }]),
            ],
            "query.excluded[0].start: 5 lies behind end 2",
        ),
        (
            vec![
                open(4),
                query(|q| {
                    q.form = Some(v1::query::Form::Attend(v1::Attend {
                        target_mass: 1.5,
                        ..v1::Attend::default()
                    }))
                }),
            ],
            "target_mass",
        ),
        (
            vec![open(4), query(|q| attend_of(q).certificate = 9)],
            "query.attend.certificate: 9 is no kind",
        ),
        (
            vec![open(4), query(|q| attend_of(q).effort = f32::NAN)],
            "effort: NaN is not a share",
        ),
        (
            vec![open(4), query(|q| attend_of(q).missed_mass_max = -0.1)],
            "missed_mass_max: -0.1 is not a share",
        ),
        (
            vec![Request::Open(v1::OpenContext {
                index: "hnsw".to_owned(),
                ..opening(4)
            })],
            "open.index: \"hnsw\" is no index",
        ),
        (vec![hint(0, Q_HEADS * 32)], "hint: no context is open"),
        (vec![open(4), hint(3, Q_HEADS * 32)], "hint.layer: 3: the namespace has"),
        (vec![open(4), hint(0, 2)], "hint.q: 128 little-endian f32"),
        (
            vec![
                open(4),
                Request::Hint(v1::Hint {
                    layer: 0,
                    q: convert::float_bytes(&[f32::INFINITY; Q_HEADS * 32]),
                    ..v1::Hint::default()
                }),
            ],
            "hint.q[0]: must be finite",
        ),
        (
            vec![open(4), query(|q| q.local_lse = convert::float_bytes(&[0.0; 3]))],
            "query.local_lse: 12 bytes instead of 16 or none",
        ),
        (
            vec![open(4), query(|q| q.local_lse = convert::float_bytes(&[f32::NAN; 4]))],
            "local_lse: element 0 is no log-sum-exp",
        ),
    ];
    let mut client = RetrievalClient::connect(setup.url()).await.expect("a connection");
    for (requests, message) in table {
        let requests = requests
            .into_iter()
            .map(|request| v1::DecodeRequest { request: Some(request) });
        let mut replies = client
            .decode(stream::iter(requests.collect::<Vec<_>>()))
            .await
            .expect("a stream")
            .into_inner();
        let status = loop {
            match replies.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("{message} went unnoticed"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(
            status.message().contains(message),
            "{:?} does not say {message:?}",
            status.message()
        );
    }
    setup.store.stop().await.expect("everything written");
}
