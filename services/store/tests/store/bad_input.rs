//! One line per way a call can be wrong: the code, and words that name the field. Sent by tonic's own client.

use bytes::Bytes;
use futures::stream;
use kvasir_block::Checksum;
use kvasir_proto::{convert, v1};
use tonic::Code;

use crate::support::{Setup, chain, config, layer_block, schema};

fn check<T: std::fmt::Debug>(result: Result<T, tonic::Status>, code: Code, message: &str) {
    let status = result.expect_err(message);
    assert_eq!(status.code(), code, "{status:?}");
    assert!(
        status.message().contains(message),
        "{:?} does not say {message:?}",
        status.message()
    );
}

#[tokio::test]
async fn namespaces() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let mut store = setup.stock().await;
    let good = v1::OpenNamespaceRequest {
        tenant: "default".to_owned(),
        schema: Some((&schema()).into()),
        expected_namespace: convert::namespace_bytes(setup.namespace.id),
        ..v1::OpenNamespaceRequest::default()
    };
    store.open_namespace(good.clone()).await.expect("the id is right");
    let other_rope = kvasir_block::KvSchema {
        rope_theta: 5e5,
        ..schema()
    };
    type Break = Box<dyn Fn(&mut v1::OpenNamespaceRequest)>;
    let table: Vec<(Break, Code, &str)> = vec![
        (
            Box::new(|r| r.tenant.clear()),
            Code::InvalidArgument,
            "tenant: is empty",
        ),
        (
            Box::new(|r| r.tenant = "t".repeat(1000)),
            Code::InvalidArgument,
            "tenant: 1000 bytes, at most 256",
        ),
        (
            Box::new(|r| r.schema = None),
            Code::InvalidArgument,
            "schema: is missing",
        ),
        (
            Box::new(|r| r.schema.as_mut().expect("set").layers = 0),
            Code::InvalidArgument,
            "schema.layers: 0: must be at least 1",
        ),
        (
            Box::new(|r| r.expected_namespace = Bytes::from_static(b"short")),
            Code::InvalidArgument,
            "expected_namespace: a namespace id has 32 bytes, this has 5",
        ),
        (
            Box::new(move |r| r.schema = Some((&other_rope).into())),
            Code::FailedPrecondition,
            "it differs from this schema in rope_theta",
        ),
        (
            Box::new(|r| r.tenant = "other".to_owned()),
            Code::FailedPrecondition,
            "this schema and another tenant",
        ),
        (
            Box::new(|r| r.expected_namespace = Bytes::from_static(&[7; 32])),
            Code::FailedPrecondition,
            "no namespace with that id is open here",
        ),
        (
            Box::new(|r| r.basis = Bytes::from_static(b"KVBASIS, but not one")),
            Code::InvalidArgument,
            "basis: ",
        ),
    ];
    for (damage, code, message) in table {
        let mut request = good.clone();
        damage(&mut request);
        check(store.open_namespace(request).await, code, message);
    }
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn hashes_and_ranges() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut small = config(dir.path());
    small.hashes_max = 10;
    let setup = Setup::with(&small).await;
    let mut store = setup.stock().await;
    let good = v1::GetBlocksRequest {
        namespace: convert::namespace_bytes(setup.namespace.id),
        hashes: convert::hash_bytes(&chain(20, 3)),
        layer_start: 0,
        layer_end: 1,
        ..v1::GetBlocksRequest::default()
    };
    store.get_blocks(good.clone()).await.expect("all is well");
    type Break = fn(&mut v1::GetBlocksRequest);
    let table: [(Break, Code, &str); 9] = [
        (
            |r| r.namespace = Bytes::new(),
            Code::InvalidArgument,
            "namespace: a namespace id has 32 bytes, this has 0: take it from OpenNamespace",
        ),
        (
            |r| r.namespace = Bytes::from_static(&[9; 32]),
            Code::NotFound,
            "is not open here, open it with its schema",
        ),
        (
            |r| r.hashes[1] = Bytes::from_static(&[1; 31]),
            Code::InvalidArgument,
            "hashes[1]: a block hash has 32 bytes, this has 31",
        ),
        (
            |r| r.hashes = convert::hash_bytes(&chain(1, 11)),
            Code::InvalidArgument,
            "hashes: 11 hashes, at most 10 are accepted: ask in several calls",
        ),
        (
            |r| r.layer_end = 0,
            Code::InvalidArgument,
            "layer_end: 0: must be above layer_start 0",
        ),
        (
            |r| r.layer_start = 2,
            Code::InvalidArgument,
            "layer_end: 1: must be above layer_start 2",
        ),
        (
            |r| r.layer_end = 4,
            Code::InvalidArgument,
            "layer_end: 4: the namespace has layers 0 to 3",
        ),
        (
            |r| r.layer_end = 70_000,
            Code::InvalidArgument,
            "layer_end: 70000: layers end at 65535",
        ),
        (
            |r| r.hashes = vec![Bytes::from_static(&[1; 32]); 40_000],
            Code::ResourceExhausted,
            "at most 1048576 are accepted",
        ),
    ];
    for (damage, code, message) in table {
        let mut request = good.clone();
        damage(&mut request);
        check(store.get_blocks(request).await, code, message);
    }
    let matching = |hashes: Vec<Bytes>| v1::MatchPrefixRequest {
        namespace: convert::namespace_bytes(setup.namespace.id),
        hashes,
        lease_ms: 0,
    };
    let short = matching(vec![Bytes::from_static(b"x")]);
    check(
        store.match_prefix(short).await,
        Code::InvalidArgument,
        "hashes[0]: a block hash has 32 bytes, this has 1",
    );
    let many = matching(vec![Bytes::from_static(&[1; 32]); 11]);
    check(
        store.match_prefix(many).await,
        Code::InvalidArgument,
        "hashes: 11 hashes, at most 10 are accepted",
    );
    let watch = v1::WatchEventsRequest {
        namespace: Bytes::from_static(b"abc"),
    };
    check(
        store.watch_events(watch).await,
        Code::InvalidArgument,
        "namespace: a namespace id has 32 bytes, this has 3",
    );
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn puts() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut small = config(dir.path());
    small.message_bytes_max = kvasir_runtime::units::ByteSize::kib(64);
    let setup = Setup::with(&small).await;
    let mut store = setup.stock().await;
    let block = layer_block(chain(21, 1)[0], 0);
    let entry = v1::BlockEntry {
        hash: Bytes::copy_from_slice(block.hash.as_bytes()),
        layer: 0,
        length: 4096,
        crc32c: Checksum::of(&block.payload).to_u32(),
        outcome: 0,
    };
    let good = v1::PutBlocksRequest {
        header: Some(v1::BlockBatch {
            namespace: convert::namespace_bytes(setup.namespace.id),
            entries: vec![entry],
        }),
        payload: block.payload,
    };
    fn header(request: &mut v1::PutBlocksRequest) -> &mut v1::BlockBatch {
        request.header.as_mut().expect("set")
    }
    type Break = fn(&mut v1::PutBlocksRequest);
    let table: [(Break, Code, &str); 9] = [
        (
            |r| r.header = None,
            Code::InvalidArgument,
            "header.namespace: a namespace id has 32 bytes, this has 0",
        ),
        (
            |r| header(r).namespace = Bytes::from_static(&[5; 32]),
            Code::NotFound,
            "is not open here, open it with its schema first",
        ),
        (
            |r| header(r).entries[0].hash = Bytes::new(),
            Code::InvalidArgument,
            "header.entries[0].hash: a block hash has 32 bytes, this has 0",
        ),
        (
            |r| header(r).entries[0].layer = 3,
            Code::InvalidArgument,
            "header.entries[0].layer: 3 does not exist: the namespace has 3 layers",
        ),
        (
            |r| header(r).entries[0].layer = 1 << 20,
            Code::InvalidArgument,
            "header.entries[0].layer: 1048576 does not exist",
        ),
        (
            |r| header(r).entries[0].length = 4095,
            Code::InvalidArgument,
            "payload: the entries' lengths add up to 4095 bytes, the payload has 4096",
        ),
        (
            |r| {
                header(r).entries[0].length = 100;
                r.payload = r.payload.slice(..100);
            },
            Code::InvalidArgument,
            "header.entries[0].length: a layer block of this namespace has 4096 bytes, this has 100",
        ),
        (
            |r| r.payload = Bytes::from(vec![0; 100_000]),
            Code::ResourceExhausted,
            "at most 65536 are accepted: send smaller batches",
        ),
        (
            |r| header(r).entries = vec![v1::BlockEntry::default(); 9000],
            Code::InvalidArgument,
            "header.entries: more than 8192 in one message",
        ),
    ];
    for (damage, code, message) in table {
        let mut request = good.clone();
        damage(&mut request);
        // The good message before it is stored all the same.
        let replies = store
            .put_blocks(stream::iter([good.clone(), request]))
            .await
            .expect("a stream");
        let mut replies = replies.into_inner();
        let first = replies.message().await.expect("an outcome").expect("an outcome");
        assert_eq!(first.outcomes.len(), 1);
        check(replies.message().await, code, message);
    }
    assert_eq!(setup.client.stat().await.expect("numbers").put_blocks, 1);
    setup.store.stop().await.expect("everything written");
}
