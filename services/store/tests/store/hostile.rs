//! Peers that are cut off, stand still, or do not speak gRPC.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::{Stream, StreamExt, stream};
use kvasir_client::{DataPath, ErrorKind, GetOutcome};
use kvasir_proto::{
    EntryHead, convert,
    frame::{BulkMessage, FramedBody, Incoming, Rope, StreamError},
    v1,
};
use kvasir_runtime::units::ByteSize;
use kvasir_store::StoreConfig;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Status, body::Body, client::GrpcService, transport::Endpoint};

use crate::support::{LAYERS, Setup, chain, config, layer_block};

/// The right message with all layers of one block, as body frames.
fn put_message(setup: &Setup, seed: u32) -> Rope {
    let hash = chain(seed, 1)[0];
    let mut message = BulkMessage::default();
    message.header.namespace = convert::namespace_bytes(setup.namespace.id);
    for layer in 0..LAYERS {
        let block = layer_block(hash, layer);
        let (length, checksum) = (block.payload.len(), block.checksum);
        let head = EntryHead {
            hash,
            layer,
            length,
            checksum,
        };
        message.header.entries.push(head.to_wire(v1::BlockOutcome::Unspecified));
        message.payload.push(block.payload);
    }
    message.encode().expect("small")
}

/// A put stream whose body is these frames, however wrong.
async fn put_raw(setup: &Setup, frames: Vec<Result<Rope, Status>>) -> Incoming<Body> {
    put_stream(setup, stream::iter(frames)).await
}

async fn put_stream<S>(setup: &Setup, frames: S) -> Incoming<Body>
where
    S: Stream<Item = Result<Rope, Status>> + Send + Unpin + 'static,
{
    let endpoint = Endpoint::from_shared(setup.url()).expect("a url");
    let mut channel = endpoint.connect().await.expect("a connection");
    let request = http::Request::post("/kvasir.v1.BlockStore/PutBlocks")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(FramedBody::request(frames)))
        .expect("a request");
    std::future::poll_fn(|context| channel.poll_ready(context))
        .await
        .expect("ready");
    let response = channel.call(request).await.expect("a reply");
    Incoming::reply(response.into_body(), 1 << 20)
}

async fn outcomes(replies: &mut Incoming<Body>) -> Result<Option<v1::PutBlocksReply>, StreamError> {
    let reply = replies.message().await?;
    Ok(reply.map(|reply| v1::PutBlocksReply::decode(reply).expect("well-formed")))
}

#[tokio::test]
async fn a_message_that_is_cut_off_is_named_and_those_before_it_are_kept() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let whole = put_message(&setup, 30);
    let cut = Rope::from(put_message(&setup, 31).into_bytes().slice(..5000));
    let mut replies = put_raw(&setup, vec![Ok(whole), Ok(cut)]).await;
    let first = outcomes(&mut replies).await.expect("outcomes").expect("outcomes");
    assert_eq!(first.outcomes, [i32::from(v1::BlockOutcome::Stored); LAYERS as usize]);
    match outcomes(&mut replies).await {
        Err(StreamError::Status(status)) => {
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(
                status.message().contains("the stream ended inside a message"),
                "{status:?}"
            );
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(setup.hit_blocks(&chain(30, 1)).await, 1);
    assert_eq!(setup.hit_blocks(&chain(31, 1)).await, 0);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn a_sender_that_leaves_loses_nothing_that_was_answered() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let open = stream::iter([Ok(put_message(&setup, 32))]).chain(stream::pending());
    let mut replies = put_stream(&setup, open).await;
    assert!(outcomes(&mut replies).await.expect("outcomes").is_some());
    drop(replies);
    assert_eq!(setup.hit_blocks(&chain(32, 1)).await, 1);
    // Half-closed in order: the store answers everything, and says OK.
    let mut replies = put_raw(&setup, vec![Ok(put_message(&setup, 33))]).await;
    assert!(outcomes(&mut replies).await.expect("outcomes").is_some());
    assert!(outcomes(&mut replies).await.expect("OK").is_none());
    assert_eq!(setup.hit_blocks(&chain(33, 1)).await, 1);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn unknown_fields_are_tolerated_and_compression_is_not() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let mut body = put_message(&setup, 34).into_bytes().to_vec().split_off(5);
    body.extend([7 << 3 | 2, 3, 1, 2, 3, 8 << 3, 0x96, 1]);
    let frame = |flag: u8| {
        let mut frame = BytesMut::new();
        frame.put_u8(flag);
        frame.put_u32(body.len() as u32);
        frame.put_slice(&body);
        Rope::from(frame.freeze())
    };
    let mut replies = put_raw(&setup, vec![Ok(frame(0)), Ok(frame(1))]).await;
    assert!(outcomes(&mut replies).await.expect("outcomes").is_some());
    match outcomes(&mut replies).await {
        Err(StreamError::Status(status)) => assert_eq!(status.code(), Code::Unimplemented, "{status:?}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(setup.hit_blocks(&chain(34, 1)).await, 1);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn a_message_that_never_arrives_is_given_up() {
    let dir = tempfile::tempdir().expect("a folder");
    let impatient = StoreConfig {
        message_timeout: kvasir_runtime::units::HumanDuration::millis(50),
        put_bytes_max: ByteSize::mib(8),
        ..config(dir.path())
    };
    let setup = Setup::with(&impatient).await;
    // The prefix announces as much as is accepted, and then nothing comes.
    let begun = stream::iter([Ok(Rope::from(Bytes::from_static(&[0, 0, 0x80, 0, 0])))]).chain(stream::pending());
    let mut replies = put_stream(&setup, begun).await;
    match outcomes(&mut replies).await {
        Err(StreamError::Status(status)) => {
            assert_eq!(status.code(), Code::DeadlineExceeded);
            assert!(
                status.message().contains("a message of 8388608 bytes did not arrive"),
                "{status:?}"
            );
        }
        other => panic!("{other:?}"),
    }
    // Its room is free again.
    setup.put(&chain(35, 2)).await;
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn garbage_on_the_port_hurts_nobody() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let mut preface_then_noise = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    preface_then_noise.extend([0xa5; 4000]);
    let table: [&[u8]; 4] = [b"GET / HTTP/1.1\r\n\r\n", &[0; 3000], &[0xff; 100], &preface_then_noise];
    for garbage in table {
        let mut socket = tokio::net::TcpStream::connect(setup.store.grpc_addr())
            .await
            .expect("a connection");
        socket.write_all(garbage).await.expect("written");
        socket.shutdown().await.expect("half-closed");
        let mut answer = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(5), socket.read_to_end(&mut answer)).await;
        assert!(closed.is_ok(), "the store closes the connection");
    }
    setup.client.stat().await.expect("the store is well");
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn a_reader_that_stands_still_is_in_nobodys_way() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(36, 2000);
    setup.put(&chain).await;
    // 24 MiB are wanted, far more than windows hold, and nothing is read.
    let mut lazy = setup
        .client
        .get_blocks(&setup.namespace, &chain, 0..LAYERS, None, None)
        .await
        .expect("a stream");
    lazy.next().await.expect("a block").expect("a block");
    let other = crate::support::client(&setup.store);
    let mut stream = other
        .get_blocks(&setup.namespace, &chain[..100], 0..1, None, None)
        .await
        .expect("a stream");
    let mut hits = 0;
    while let Some(block) = stream.next().await.expect("a block") {
        hits += usize::from(block.outcome == GetOutcome::Hit);
    }
    assert_eq!(hits, 100);
    // It goes on where it stood.
    let mut rest = 1;
    while lazy.next().await.expect("a block").is_some() {
        rest += 1;
    }
    assert_eq!(rest, 2000 * usize::from(LAYERS));
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn streams_and_watchers_are_bounded() {
    let dir = tempfile::tempdir().expect("a folder");
    let narrow = StoreConfig {
        streams_max: 1,
        subscribers_max: 1,
        ..config(dir.path())
    };
    let setup = Setup::with(&narrow).await;
    let (by_grpc, namespace) = setup.by(DataPath::Grpc).await;
    let first = by_grpc.put_blocks(&namespace).await.expect("a stream");
    let error = by_grpc.put_blocks(&namespace).await.expect_err("no place");
    assert_eq!(error.kind, ErrorKind::Exhausted, "{error}");
    assert!(error.message.contains("store.streams_max allows no more"), "{error}");
    first.finish().await.expect("closed");
    setup.put(&chain(37, 1)).await;

    let watch = setup.client.watch_events(None).await.expect("a watch");
    let error = setup.client.watch_events(None).await.expect_err("no place");
    assert_eq!(error.kind, ErrorKind::Exhausted, "{error}");
    drop(watch);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn a_watcher_that_falls_behind_is_told() {
    let dir = tempfile::tempdir().expect("a folder");
    let narrow = StoreConfig {
        event_queue_max: 1,
        ..config(dir.path())
    };
    let setup = Setup::with(&narrow).await;
    let mut watch = setup.client.watch_events(None).await.expect("a watch");
    // Small events fit into the windows of the connection, so the queue overflows only where many come at once: one
    // message makes two hundred blocks whole.
    let chain = chain(38, 200);
    setup.put(&chain).await;
    let mut error = None;
    for _ in 0..=chain.len() {
        match watch.next().await {
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(lagged) => {
                error = Some(lagged);
                break;
            }
        }
    }
    let error = error.expect("it fell behind");
    assert_eq!(error.kind, ErrorKind::Exhausted, "{error}");
    assert!(
        error.message.contains("watch again, the snapshot makes it whole"),
        "{error}"
    );
    setup.store.stop().await.expect("everything written");
}
