//! Query samples and built indexes over the wire: sent, built, used, there again after a restart; and what is refused.

use std::time::Duration;

use bytes::Bytes;
use half::f16;
use kvasir_client::{
    BlockQueries, BuildState, BuiltIndex, DecodeStream, ErrorKind, Form, Found, IndexChoice, OpenContext, Reply,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    retrieval::{Q_HEADS, SCALE, put, query},
    support::{LAYERS, Setup, chain, config},
};

/// Samples of four tokens of each block in each layer.
fn samples(chain: &[kvasir_block::BlockHash]) -> Vec<BlockQueries> {
    let mut random = SmallRng::seed_from_u64(7);
    let mut q = || -> Bytes {
        let halves = (0..4 * Q_HEADS * 32).map(|_| f16::from_f32(random.random_range(-1.0..1.0)));
        halves.flat_map(f16::to_le_bytes).collect()
    };
    let blocks = chain
        .iter()
        .flat_map(|hash| (0..LAYERS).map(move |layer| (*hash, layer)));
    blocks
        .map(|(hash, layer)| BlockQueries {
            hash,
            layer,
            tokens: vec![0, 5, 10, 15],
            q: q(),
        })
        .collect()
}

async fn open(setup: &Setup, chain: &[kvasir_block::BlockHash], index: IndexChoice) -> DecodeStream {
    let context = OpenContext {
        chain: chain.to_vec(),
        q_heads: Q_HEADS,
        softmax_scale: SCALE,
        index,
        row_cache_rows: 0,
    };
    setup.client.decode(&setup.namespace, context).await.expect("a context")
}

async fn ask(stream: &mut DecodeStream, sequence: u64) -> Reply {
    let form = Form::Attend {
        target_mass: 1.0,
        k_max: 0,
        options: kvasir_client::AttendOptions::default(),
    };
    stream.send(query(sequence, 1, form)).await.expect("sent");
    stream.receive().await.expect("a reply")
}

#[tokio::test]
async fn asked_for_built_used_and_there_after_a_restart() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut setup = Setup::with(&config(dir.path())).await;
    let chain = chain(70, 12);
    let covered = &chain[..8];
    put(&setup, &chain).await;
    let id = setup.namespace.id;
    let state = setup
        .client
        .build_index(id, covered, BuiltIndex::Roar)
        .await
        .expect("an answer");
    assert!(
        matches!(&state, BuildState::Absent(why) if why.contains("no query samples")),
        "{state:?}"
    );
    let samples = samples(covered);
    let taken = setup.client.put_queries(id, Q_HEADS, samples.clone()).await;
    assert_eq!(taken.expect("taken"), 8 * 4 * u32::from(LAYERS));
    let again = setup.client.put_queries(id, Q_HEADS, samples).await;
    assert_eq!(again.expect("taken"), 0, "the same again");

    let mut flat = open(&setup, &chain, IndexChoice::Roar).await;
    assert_eq!(flat.opened().index, "flat");
    assert!(flat.opened().index_reason.contains("BuildIndex"), "{:?}", flat.opened());
    setup
        .client
        .build_index(id, covered, BuiltIndex::Roar)
        .await
        .expect("asked for");
    let mut tries = 0;
    loop {
        match setup
            .client
            .index_state(id, covered, BuiltIndex::Roar)
            .await
            .expect("a state")
        {
            BuildState::Ready { tokens } => {
                assert_eq!(tokens, 128);
                break;
            }
            BuildState::Absent(why) => panic!("{why}"),
            BuildState::Queued | BuildState::Building { .. } => {}
        }
        tries += 1;
        assert!(tries < 12_000, "not within two minutes");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for round in 0..2 {
        let mut exact = open(&setup, &chain, IndexChoice::Flat).await;
        let mut through = open(&setup, &chain, IndexChoice::Roar).await;
        let opened = through.opened();
        assert_eq!(opened.index, "roar", "round {round}");
        assert!(opened.index_reason.contains("keys behind"), "{opened:?}");
        for sequence in 0..3 {
            let (exact, found) = (ask(&mut exact, sequence).await, ask(&mut through, sequence).await);
            assert_eq!(
                (found.report.index.as_str(), found.report.index_reason.as_str()),
                ("roar", "")
            );
            assert_eq!(found.report.keys_total, exact.report.keys_total);
            let (Found::Attend { o: a, lse: x }, Found::Attend { o: b, lse: y }) = (exact.found, found.found) else {
                panic!("asked for attend");
            };
            let near = |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-3);
            assert!(near(&a, &b) && near(&x, &y), "everything is attended to");
        }
        if round == 0 {
            let reply = ask(&mut flat, 1).await;
            assert_eq!(reply.report.index, "roar", "it was opened before");
            assert!(reply.report.index_reason.contains("after this context was opened"));
            drop((exact, through));
            let (store, client) = (setup.store, setup.client);
            drop((client, flat));
            store.stop().await.expect("a clean stop");
            setup = Setup::with(&config(dir.path())).await;
            let namespace = setup.namespace.id;
            let state = setup.client.build_index(namespace, covered, BuiltIndex::Roar).await;
            assert_eq!(state.expect("a state"), BuildState::Ready { tokens: 128 });
            flat = open(&setup, &chain, IndexChoice::Flat).await;
        }
    }
    drop(flat);
    setup.store.stop().await.expect("a clean stop");
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_its_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(71, 2);
    put(&setup, &chain).await;
    let id = setup.namespace.id;
    let good = samples(&chain)[0].clone();
    let halves = |value: f16| -> Bytes {
        std::iter::repeat_n(value.to_le_bytes(), 4 * Q_HEADS * 32)
            .flatten()
            .collect()
    };
    for (q_heads, block, expected) in [
        (3, good.clone(), "q_heads: 3 is not a multiple of the 2 KV heads"),
        (
            Q_HEADS,
            BlockQueries {
                layer: LAYERS,
                ..good.clone()
            },
            "layer: 3 does not exist",
        ),
        (
            Q_HEADS,
            BlockQueries {
                tokens: vec![0, 1, 2, 16],
                ..good.clone()
            },
            "tokens: 16: a block has 16 tokens",
        ),
        (
            Q_HEADS,
            BlockQueries {
                tokens: vec![0],
                ..good.clone()
            },
            "q: 512 elements, 128 are wanted",
        ),
        (
            Q_HEADS,
            BlockQueries {
                q: halves(f16::NAN),
                ..good.clone()
            },
            "q: element 0 is not finite",
        ),
        (
            Q_HEADS,
            BlockQueries {
                q: good.q.slice(1..),
                ..good.clone()
            },
            "blocks[0].q: 1023 bytes are not halves",
        ),
    ] {
        let error = setup
            .client
            .put_queries(id, q_heads, vec![block])
            .await
            .expect_err(expected);
        assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let nowhere = kvasir_block::NamespaceId::from_bytes([3; 32]);
    let error = setup
        .client
        .put_queries(nowhere, Q_HEADS, vec![good])
        .await
        .expect_err("unknown");
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
    let missing = crate::support::chain(72, 2);
    let error = setup
        .client
        .build_index(id, &missing, BuiltIndex::Wave)
        .await
        .expect_err("not held");
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
    assert!(error.to_string().contains("block 0 of 2"), "{error}");
    let error = setup
        .client
        .build_index(id, &[], BuiltIndex::Wave)
        .await
        .expect_err("empty");
    assert_eq!(error.kind, ErrorKind::Invalid, "{error}");

    // What a program in another language may send.
    let mut raw = kvasir_proto::v1::retrieval_client::RetrievalClient::connect(setup.url())
        .await
        .expect("connected");
    let request = kvasir_proto::v1::BuildIndexRequest {
        namespace: Bytes::copy_from_slice(id.as_bytes()),
        index: "hnsw".to_owned(),
        ..Default::default()
    };
    let status = raw.build_index(request).await.expect_err("no such index");
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().contains("say \"roar\" or \"wave\""), "{status}");
    setup.store.stop().await.expect("a clean stop");
}
