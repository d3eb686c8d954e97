//! Stores that break the contract: every kind of wrong reply is an error that names it, never a panic, never wrong bytes.

use std::time::Duration;

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum};
use kvasir_client::{
    AttendOptions, ClientConfig, ErrorKind, Form, Found, GetOutcome, Hint, IndexChoice, LayerBlock, OpenContext,
    PutOutcome, Query, StoreClient,
};
use kvasir_proto::v1;
use tonic::Status;

use crate::{
    script::{Script, client_of},
    support::{BYTES, CHAIN, namespace, schema, tenant},
};

fn entry(hash: BlockHash, layer: u32, outcome: v1::BlockOutcome) -> v1::BlockEntry {
    let hit = outcome == v1::BlockOutcome::Hit;
    v1::BlockEntry {
        hash: Bytes::copy_from_slice(hash.as_bytes()),
        layer,
        length: if hit { BYTES as u32 } else { 0 },
        crc32c: Checksum::of(&[7; BYTES]).to_u32(),
        outcome: outcome.into(),
    }
}

/// Block 0 of layer 0 hit, block 1 missed; then layer 1 in a message of its own.
fn right_gets() -> [v1::GetBlocksReply; 2] {
    let header = |entries| {
        Some(v1::BlockBatch {
            namespace: Bytes::copy_from_slice(namespace().id.as_bytes()),
            entries,
        })
    };
    let layer = |layer| {
        vec![
            entry(CHAIN[0], layer, v1::BlockOutcome::Hit),
            entry(CHAIN[1], layer, v1::BlockOutcome::Miss),
        ]
    };
    [0, 1].map(|index| v1::GetBlocksReply {
        header: header(layer(index)),
        payload: Bytes::from_static(&[7; BYTES]),
    })
}

#[tokio::test]
async fn gets_are_compared_with_what_was_asked() {
    type Break = fn(&mut Vec<Option<Result<v1::GetBlocksReply, Status>>>);
    fn first(script: &mut [Option<Result<v1::GetBlocksReply, Status>>]) -> &mut v1::GetBlocksReply {
        script[0].as_mut().expect("set").as_mut().expect("set")
    }
    fn header(script: &mut [Option<Result<v1::GetBlocksReply, Status>>]) -> &mut v1::BlockBatch {
        first(script).header.as_mut().expect("set")
    }
    let table: [(Break, ErrorKind, &str); 13] = [
        (
            |s| header(s).namespace = Bytes::new(),
            ErrorKind::Internal,
            "header.namespace is another than asked for",
        ),
        (
            |s| header(s).entries[1].hash = Bytes::from_static(&[2; 31]),
            ErrorKind::Internal,
            "header.entries[1].hash: a block hash has 32 bytes, this has 31",
        ),
        (
            |s| header(s).entries[1].hash = Bytes::from_static(&[9; 32]),
            ErrorKind::Internal,
            "header.entries[1].hash: ",
        ),
        (
            |s| header(s).entries[0].layer = 1,
            ErrorKind::Internal,
            "header.entries[0].layer: 1 instead of 0",
        ),
        (
            |s| {
                header(s).entries[0].length = 32;
                first(s).payload.truncate(32);
            },
            ErrorKind::Internal,
            "header.entries[0].length: 32 instead of 64",
        ),
        (
            |s| header(s).entries[1].outcome = v1::BlockOutcome::Stored.into(),
            ErrorKind::Internal,
            "outcome: 1 is no outcome of a get",
        ),
        (
            |s| first(s).payload = Bytes::from_static(&[7; BYTES + 1]),
            ErrorKind::Internal,
            "payload: the entries' lengths add up to 64 bytes, the payload has 65",
        ),
        (
            |s| drop(s.pop()),
            ErrorKind::Internal,
            "the stream ended after 2 of 4 blocks",
        ),
        (
            |s| s.push(Some(Ok(right_gets()[1].clone()))),
            ErrorKind::Internal,
            "header.entries[0].hash: more blocks than asked for",
        ),
        (|s| s[1] = None, ErrorKind::TimedOut, "no answer within 400ms"),
        (
            |s| s[1] = Some(Err(Status::internal("a bug"))),
            ErrorKind::Internal,
            "a bug",
        ),
        (
            |s| s[1] = Some(Err(Status::unavailable("stopping"))),
            ErrorKind::Unavailable,
            "stopping",
        ),
        (
            |s| s[1] = Some(Err(Status::not_found("which namespace?"))),
            ErrorKind::NotFound,
            "which namespace?",
        ),
    ];
    for (damage, kind, message) in table {
        let mut gets = right_gets().map(|reply| Some(Ok(reply))).to_vec();
        damage(&mut gets);
        let client = client_of(Script {
            gets,
            ..Script::default()
        })
        .await;
        let mut stream = client
            .get_blocks(&namespace(), &CHAIN, 0..2, None, None)
            .await
            .expect("a stream");
        let error = loop {
            match stream.next().await {
                Ok(Some(block)) => assert!(block.payload.is_none_or(|bytes| bytes == [7; BYTES][..])),
                Ok(None) => panic!("{message} went unnoticed"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(message), "{error} does not say {message:?}");
        let again = stream.next().await.expect_err("an ended stream stays ended");
        assert_eq!(again, error);
    }
}

#[tokio::test]
async fn a_wrong_checksum_is_corrupt_and_nothing_else_is_lost() {
    let mut gets = right_gets();
    gets[0].payload = Bytes::from_static(&[8; BYTES]);
    let gets = gets.map(|reply| Some(Ok(reply))).to_vec();
    let client = client_of(Script {
        gets,
        ..Script::default()
    })
    .await;
    let mut stream = client
        .get_blocks(&namespace(), &CHAIN, 0..2, None, None)
        .await
        .expect("a stream");
    let mut got = Vec::new();
    while let Some(block) = stream.next().await.expect("a block") {
        got.push((block.outcome, block.payload.map(|bytes| bytes.to_vec())));
    }
    let expected = [
        (GetOutcome::Corrupt, None),
        (GetOutcome::Miss, None),
        (GetOutcome::Hit, Some(vec![7; BYTES])),
        (GetOutcome::Miss, None),
    ];
    assert_eq!(got, expected);
}

#[tokio::test]
async fn calls_that_cannot_be_right_are_refused_here() {
    let client = client_of(Script::default()).await;
    let many = vec![CHAIN[0]; 101];
    let error = client
        .get_blocks(&namespace(), &many, 0..2, None, None)
        .await
        .expect_err("too many");
    assert_eq!(error.kind, ErrorKind::Invalid);
    assert!(
        error
            .message
            .contains("101 blocks, the store takes 100 in one call: ask in several"),
        "{error}"
    );
    for layers in [0..0, 0..3, 5..6] {
        let error = client
            .get_blocks(&namespace(), &CHAIN, layers, None, None)
            .await
            .expect_err("no such layers");
        assert!(error.message.contains("the namespace has layers 0..2"), "{error}");
    }
    for url in ["", "store", "https://store", "http:///x"] {
        let error = StoreClient::new(ClientConfig::to(url)).expect_err(url);
        assert!(
            error.kind == ErrorKind::Invalid && error.message.contains("http://127.0.0.1:7401"),
            "{error}"
        );
    }
}

pub(crate) fn block(index: usize, layer: u16) -> LayerBlock {
    LayerBlock {
        hash: CHAIN[index],
        layer,
        checksum: Checksum::of(&[7; BYTES]),
        payload: Bytes::from_static(&[7; BYTES]),
    }
}

#[tokio::test]
async fn puts_have_one_outcome_each() {
    use v1::BlockOutcome::{Busy, Hit, Stored};
    let reply = |outcomes: &[v1::BlockOutcome]| {
        Some(Ok(v1::PutBlocksReply {
            outcomes: outcomes.iter().map(|outcome| i32::from(*outcome)).collect(),
        }))
    };
    let table = [
        (vec![reply(&[Stored])], ErrorKind::Internal, "1 outcomes for 2 blocks"),
        (
            vec![reply(&[Stored, Hit])],
            ErrorKind::Internal,
            "outcomes: 3 is no outcome of a put",
        ),
        (
            vec![reply(&[Stored, Busy]), reply(&[Stored])],
            ErrorKind::Internal,
            "more outcomes than messages",
        ),
        (vec![], ErrorKind::Internal, "the stream ended with 2 blocks unanswered"),
        (
            vec![Some(Err(Status::resource_exhausted("full")))],
            ErrorKind::Exhausted,
            "full",
        ),
        (vec![None], ErrorKind::TimedOut, "no answer within 400ms"),
    ];
    for (puts, kind, message) in table {
        let client = client_of(Script {
            puts,
            ..Script::default()
        })
        .await;
        let mut stream = client.put_blocks(&namespace()).await.expect("a stream");
        for index in 0..2 {
            stream.put(block(index, 1)).await.expect("queued");
        }
        let error = stream.finish().await.expect_err(message);
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(message), "{error} does not say {message:?}");
    }
    let puts = vec![reply(&[Stored, Busy])];
    let client = client_of(Script {
        puts,
        ..Script::default()
    })
    .await;
    let mut stream = client.put_blocks(&namespace()).await.expect("a stream");
    let error = stream.put(block(0, 2)).await.expect_err("no such layer");
    assert!(error.message.contains("layer: 2 does not exist"), "{error}");
    let short = LayerBlock {
        payload: Bytes::from_static(&[7; 3]),
        ..block(0, 0)
    };
    let error = stream.put(short).await.expect_err("too short");
    assert!(
        error
            .message
            .contains("a layer block of this namespace has 64 bytes, this has 3"),
        "{error}"
    );
    stream.put(block(0, 0)).await.expect("the stream lives on");
    stream.put(block(1, 1)).await.expect("the stream lives on");
    let outcomes = stream.finish().await.expect("outcomes");
    assert_eq!(
        outcomes,
        [(CHAIN[0], 0, PutOutcome::Stored), (CHAIN[1], 1, PutOutcome::Busy)]
    );
}

#[tokio::test]
async fn unary_replies_are_checked_and_waits_end() {
    let id = Bytes::copy_from_slice(namespace().id.as_bytes());
    let opened = v1::OpenNamespaceReply {
        namespace: id,
        layer_block_bytes: BYTES as u64,
        limits: Some(v1::Limits {
            message_bytes_max: 1000,
            hashes_max: 5,
            lease_ms_max: 1,
        }),
        ..v1::OpenNamespaceReply::default()
    };
    let client = client_of(Script {
        opened: opened.clone(),
        ..Script::default()
    })
    .await;
    let namespace = client.open_namespace(&tenant(), &schema()).await.expect("all is well");
    assert_eq!((namespace.hashes_max, namespace.message_bytes_max), (5, 1000));
    type Break = fn(&mut v1::OpenNamespaceReply);
    let table: [(Break, &str); 4] = [
        (
            |r| r.namespace = Bytes::from_static(b"x"),
            "namespace: a namespace id has 32 bytes, this has 1",
        ),
        (|r| r.namespace = Bytes::from_static(&[1; 32]), " instead of "),
        (|r| r.layer_block_bytes = 65, "layer_block_bytes 65 instead of 64"),
        (|r| r.limits = None, "the store accepts messages of 0 bytes"),
    ];
    for (damage, message) in table {
        let mut opened = opened.clone();
        damage(&mut opened);
        let client = client_of(Script {
            opened,
            ..Script::default()
        })
        .await;
        let error = client.open_namespace(&tenant(), &schema()).await.expect_err(message);
        assert!(error.message.contains(message), "{error} does not say {message:?}");
    }

    for (hit_blocks, object_blocks, expected) in [
        (
            3,
            0,
            "0 of 3 hits in memory, 0 on disk and 0 in objects, of 2 blocks asked for",
        ),
        (
            2,
            3,
            "0 of 2 hits in memory, 0 on disk and 3 in objects, of 2 blocks asked for",
        ),
    ] {
        let matched = v1::MatchPrefixReply {
            hit_blocks,
            object_blocks,
            ..v1::MatchPrefixReply::default()
        };
        let client = client_of(Script {
            matched,
            ..Script::default()
        })
        .await;
        let error = client
            .match_prefix(namespace.id, &CHAIN, None)
            .await
            .expect_err("too many");
        assert!(error.message.contains(expected), "{error}");
    }

    let client = client_of(Script::default()).await;
    let started = std::time::Instant::now();
    let error = client.release(1).await.expect_err("silence");
    assert_eq!(error.kind, ErrorKind::TimedOut, "{error}");
    assert!(started.elapsed() < Duration::from_secs(2));
    let error = client.stat().await.expect_err("tried three times");
    assert_eq!(
        (error.kind, error.message.ends_with(": on purpose")),
        (ErrorKind::Unavailable, true),
        "{error}"
    );
    let mut watch = client.watch_events(None).await.expect("a watch");
    let error = watch.next().await.expect_err("no such kind");
    assert!(error.message.contains("kind: 77 is no kind of event"), "{error}");
}

#[tokio::test]
async fn retrieval_replies_are_compared_with_what_was_asked() {
    let opened = v1::DecodeReply {
        result: Some(v1::decode_reply::Result::Opened(v1::Opened {
            tokens: 8,
            index: "flat".to_owned(),
            ..v1::Opened::default()
        })),
        ..v1::DecodeReply::default()
    };
    let attend = v1::AttendResult {
        o: Bytes::from(vec![0; 2 * 4 * 4]),
        lse: [f32::NEG_INFINITY, 1.0]
            .iter()
            .flat_map(|lse| lse.to_le_bytes())
            .collect(),
    };
    let good = v1::DecodeReply {
        sequence: 5,
        layer: 1,
        result: Some(v1::decode_reply::Result::Attend(attend)),
        report: Some(v1::RetrievalReport {
            mass_covered: vec![1.0, 1.0],
            ..v1::RetrievalReport::default()
        }),
    };
    fn attend_of(reply: &mut v1::DecodeReply) -> &mut v1::AttendResult {
        match &mut reply.result {
            Some(v1::decode_reply::Result::Attend(attend)) => attend,
            _ => panic!("not an attend reply"),
        }
    }
    fn report_of(reply: &mut v1::DecodeReply) -> &mut v1::RetrievalReport {
        reply.report.as_mut().expect("set")
    }
    type Break = fn(&mut v1::DecodeReply);
    let table: [(Break, Option<&str>); 10] = [
        (|_| {}, None),
        (
            |r| report_of(r).missed_mass_bound.push(0.5),
            Some("report.missed_mass_bound: 1 values for 2 heads"),
        ),
        (|r| r.sequence = 6, Some("sequence: 6 instead of 5")),
        (|r| r.layer = 0, Some("layer: 0 instead of 1")),
        (|r| r.result = None, Some("result: does not answer Attend")),
        (|r| r.report = None, Some("report: is missing")),
        (
            |r| attend_of(r).o.truncate(7),
            Some("attend.o: 8 little-endian f32 have 32 bytes, this has 7"),
        ),
        (
            |r| attend_of(r).lse = Bytes::from(vec![0xff; 8]),
            Some("attend.lse: must be finite or -inf"),
        ),
        (
            |r| report_of(r).mass_covered.clear(),
            Some("report.mass_covered: 0 values for 2 heads"),
        ),
        (
            |r| report_of(r).shortfall = 9,
            Some("report.shortfall: 9 is not known here"),
        ),
    ];
    for (damage, message) in table {
        let mut reply = good.clone();
        damage(&mut reply);
        let decodes = vec![Some(Ok(opened.clone())), Some(Ok(reply)), None];
        let client = client_of(Script {
            decodes,
            ..Script::default()
        })
        .await;
        let open = OpenContext {
            chain: CHAIN.to_vec(),
            q_heads: 2,
            softmax_scale: 0.5,
            index: IndexChoice::Best,
            row_cache_rows: 0,
        };
        let mut stream = client.decode(&namespace(), open).await.expect("a stream");
        assert_eq!((stream.opened().tokens, stream.opened().index.as_str()), (8, "flat"));
        let query = Query {
            sequence: 5,
            layer: 1,
            q: vec![0.0; 8],
            form: Form::Attend {
                target_mass: 1.0,
                k_max: 0,
                options: AttendOptions::default(),
            },
            excluded: vec![],
            deadline: None,
            local_lse: vec![],
        };
        let short = Query {
            q: vec![0.0; 7],
            ..query.clone()
        };
        let error = stream.send(short).await.expect_err("too short");
        assert!(error.message.contains("q: 7 values, 2 heads of 4 are 8"), "{error}");
        stream.send(query.clone()).await.expect("sent");
        match (stream.receive().await, message) {
            (Ok(reply), None) => {
                assert_eq!((reply.sequence, reply.layer), (5, 1));
                // Silence ends at the query's deadline.
                let deadline = Some(Duration::from_millis(10));
                stream.send(Query { deadline, ..query }).await.expect("sent");
                let error = stream.receive().await.expect_err("silence");
                assert_eq!(error.kind, ErrorKind::TimedOut, "{error}");
            }
            (Err(error), Some(message)) => {
                assert_eq!(error.kind, ErrorKind::Internal, "{error}");
                assert!(error.message.contains(message), "{error} does not say {message:?}");
            }
            (other, _) => panic!("{other:?}, expected {message:?}"),
        }
    }
}

#[tokio::test]
async fn rows_that_do_not_fit_together_are_refused() {
    let row_bytes = 4 * 2;
    let good = v1::HeadRows {
        positions: vec![1, 3, 6],
        keys: Bytes::from(vec![0; 2 * row_bytes]),
        values: Bytes::from(vec![0; 2 * row_bytes]),
        sent: vec![0, 2],
        partial: true,
    };
    type Break = fn(&mut v1::HeadRows);
    let table: [(Break, Option<&str>); 6] = [
        (|_| {}, None),
        (
            |rows| rows.positions[2] = 8,
            Some("rows.heads[0].positions: must rise and stay below 8"),
        ),
        (
            |rows| rows.sent = vec![2, 0],
            Some("rows.heads[0].sent: must rise and stay below 3"),
        ),
        (
            |rows| rows.sent = vec![0, 3],
            Some("rows.heads[0].sent: must rise and stay below 3"),
        ),
        (
            |rows| rows.sent = vec![0],
            Some("rows.heads[0].keys: 16 bytes instead of 8"),
        ),
        // Without the mark, `sent` says nothing and all rows must be there.
        (
            |rows| rows.partial = false,
            Some("rows.heads[0].keys: 16 bytes instead of 24"),
        ),
    ];
    for (damage, message) in table {
        let mut rows = good.clone();
        damage(&mut rows);
        let opened = v1::Opened {
            tokens: 8,
            index: "flat".to_owned(),
            ..v1::Opened::default()
        };
        let opened = v1::DecodeReply {
            result: Some(v1::decode_reply::Result::Opened(opened)),
            ..v1::DecodeReply::default()
        };
        let heads = vec![rows; usize::from(namespace().schema.kv_heads)];
        let reply = v1::DecodeReply {
            sequence: 5,
            result: Some(v1::decode_reply::Result::Rows(v1::RowsResult { heads })),
            report: Some(v1::RetrievalReport {
                mass_covered: vec![1.0, 1.0],
                ..v1::RetrievalReport::default()
            }),
            ..v1::DecodeReply::default()
        };
        let script = Script {
            decodes: vec![Some(Ok(opened)), Some(Ok(reply)), None],
            ..Script::default()
        };
        let client = client_of(script).await;
        let open = OpenContext {
            chain: CHAIN.to_vec(),
            q_heads: 2,
            softmax_scale: 0.5,
            index: IndexChoice::Best,
            row_cache_rows: 8,
        };
        let mut stream = client.decode(&namespace(), open).await.expect("a stream");
        let short = Hint {
            layer: 1,
            q: vec![0.0; 7],
            local_lse: vec![],
        };
        let error = stream.hint(short).await.expect_err("too short");
        assert!(error.message.contains("q: 7 values, 2 heads of 4 are 8"), "{error}");
        let hint = Hint {
            layer: 1,
            q: vec![0.0; 8],
            local_lse: vec![],
        };
        stream.hint(hint).await.expect("a hint has no reply");
        let query = Query {
            sequence: 5,
            layer: 0,
            q: vec![0.0; 8],
            form: Form::Rows { k: 3 },
            excluded: vec![],
            deadline: None,
            local_lse: vec![],
        };
        stream.send(query).await.expect("sent");
        match (stream.receive().await, message) {
            (Ok(reply), None) => {
                let Found::Rows(heads) = reply.found else {
                    panic!("rows were asked for");
                };
                assert_eq!(heads[0].sent, Some(vec![0, 2]));
            }
            (Err(error), Some(message)) => assert!(error.message.contains(message), "{error} does not say {message:?}"),
            (other, _) => panic!("{other:?}, expected {message:?}"),
        }
    }
}
