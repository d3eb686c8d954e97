//! The hand-framed bodies against tonic's own codec, both ways, over a real connection.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{FutureExt, Stream, StreamExt, future::BoxFuture, stream};
use http::{Request, Response};
use kvasir_proto::{
    frame::{self, BulkLimits, BulkMessage, FramedBody, Incoming},
    v1::{self, block_store_client::BlockStoreClient, block_store_server as server},
};
use prost::Message;
use tonic::{Status, body::Body, server::NamedService, transport::Channel};
use tower::{Service, ServiceExt};

const MAX: usize = 8 << 20;
/// Sizes of the messages' payloads: none, small, larger than a frame and a window of the defaults.
const SIZES: [usize; 4] = [0, 1, 50_000, 3 << 20];

fn payload(bytes: usize) -> Bytes {
    (0..bytes).map(|i| (i * 131 % 241) as u8).collect()
}

fn header(bytes: usize) -> v1::BlockBatch {
    let entry = v1::BlockEntry {
        hash: Bytes::from_static(&[3; 32]),
        layer: 4,
        length: bytes as u32,
        crc32c: 5,
        outcome: v1::BlockOutcome::Hit.into(),
    };
    v1::BlockBatch {
        namespace: Bytes::from_static(&[1; 32]),
        entries: vec![entry],
    }
}

fn outcome(header: &v1::BlockBatch, got: &[u8]) -> v1::PutBlocksReply {
    let entry = &header.entries[0];
    let right = *header == self::header(entry.length as usize) && got == payload(entry.length as usize);
    let outcome = if right {
        v1::BlockOutcome::Stored
    } else {
        v1::BlockOutcome::ChecksumMismatch
    };
    v1::PutBlocksReply {
        outcomes: vec![outcome.into()],
    }
}

/// tonic's own server.
struct Stock;

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Answer<T> = Result<tonic::Response<T>, Status>;

#[tonic::async_trait]
impl server::BlockStore for Stock {
    type PutBlocksStream = Replies<v1::PutBlocksReply>;
    type GetBlocksStream = Replies<v1::GetBlocksReply>;
    type WatchEventsStream = Replies<v1::BlockEvent>;

    async fn put_blocks(
        &self,
        request: tonic::Request<tonic::Streaming<v1::PutBlocksRequest>>,
    ) -> Answer<Self::PutBlocksStream> {
        let replies = request.into_inner().map(|message| {
            let message = message?;
            Ok(outcome(&message.header.unwrap_or_default(), &message.payload))
        });
        Ok(tonic::Response::new(replies.boxed()))
    }

    async fn get_blocks(&self, _: tonic::Request<v1::GetBlocksRequest>) -> Answer<Self::GetBlocksStream> {
        let messages = SIZES.map(|bytes| {
            Ok(v1::GetBlocksReply {
                header: Some(header(bytes)),
                payload: payload(bytes),
            })
        });
        let end = [Err(Status::data_loss("the end, 100 % of it"))];
        Ok(tonic::Response::new(
            stream::iter(messages).chain(stream::iter(end)).boxed(),
        ))
    }

    async fn open_namespace(&self, _: tonic::Request<v1::OpenNamespaceRequest>) -> Answer<v1::OpenNamespaceReply> {
        Err(Status::unimplemented("not part of this test"))
    }

    async fn match_prefix(&self, _: tonic::Request<v1::MatchPrefixRequest>) -> Answer<v1::MatchPrefixReply> {
        Err(Status::unimplemented("not part of this test"))
    }

    async fn release_lease(&self, _: tonic::Request<v1::ReleaseLeaseRequest>) -> Answer<v1::ReleaseLeaseReply> {
        Err(Status::unimplemented("not part of this test"))
    }

    async fn watch_events(&self, _: tonic::Request<v1::WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        Err(Status::unimplemented("not part of this test"))
    }

    async fn stat(&self, _: tonic::Request<v1::StatRequest>) -> Answer<v1::StatReply> {
        Err(Status::unimplemented("not part of this test"))
    }
}

/// The same two calls, framed by hand.
#[derive(Clone)]
struct Framed;

impl NamedService for Framed {
    const NAME: &'static str = server::SERVICE_NAME;
}

impl Service<Request<Body>> for Framed {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let put = request.uri().path().ends_with("/PutBlocks");
        let incoming = Incoming::request(request.into_body(), MAX);
        let puts = stream::try_unfold(incoming, |mut incoming| async move {
            let Some(message) = incoming.message().await? else {
                return Ok(None);
            };
            let message = BulkMessage::parse(message, &BulkLimits::default())?;
            let reply = outcome(&message.header, &message.payload.into_bytes());
            Ok(Some((frame::encode_message(&reply)?, incoming)))
        });
        let gets = SIZES.map(|bytes| {
            let payload = payload(bytes).chunks(70_000).map(Bytes::copy_from_slice).collect();
            let header = header(bytes);
            BulkMessage { header, payload }.encode().map_err(Status::from)
        });
        let gets = stream::iter(gets).chain(stream::iter([Err(Status::data_loss("the end, 100 % of it"))]));
        let response = if put {
            frame::response(puts.boxed())
        } else {
            frame::response(gets.boxed())
        };
        async move { Ok(response) }.boxed()
    }
}

async fn serve<S>(service: S) -> Channel
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming),
    );
    Channel::from_shared(url)
        .expect("a url")
        .connect()
        .await
        .expect("a server")
}

fn stock() -> server::BlockStoreServer<Stock> {
    server::BlockStoreServer::new(Stock).max_decoding_message_size(MAX)
}

/// Puts and gets with tonic's generated client.
async fn check_stock_client(channel: Channel) {
    let mut client = BlockStoreClient::new(channel).max_decoding_message_size(MAX);
    let puts = SIZES.map(|bytes| v1::PutBlocksRequest {
        header: Some(header(bytes)),
        payload: payload(bytes),
    });
    let replies = client
        .put_blocks(stream::iter(puts))
        .await
        .expect("a reply")
        .into_inner();
    let replies: Vec<_> = replies.map(|reply| reply.expect("an outcome").outcomes).collect().await;
    assert_eq!(replies, vec![vec![i32::from(v1::BlockOutcome::Stored)]; SIZES.len()]);

    let request = v1::GetBlocksRequest::default();
    let mut got = client.get_blocks(request).await.expect("a reply").into_inner();
    for bytes in SIZES {
        let message = got.next().await.expect("a message").expect("a message");
        assert_eq!(message.header, Some(header(bytes)));
        assert_eq!(message.payload, payload(bytes));
    }
    let end = got.next().await.expect("an end").expect_err("a status");
    assert_eq!(
        (end.code(), end.message()),
        (tonic::Code::DataLoss, "the end, 100 % of it")
    );
}

async fn call<S>(channel: Channel, path: &'static str, messages: S) -> Incoming<Body>
where
    S: Stream<Item = Result<frame::Rope, Status>> + Send + Unpin + 'static,
{
    let request = Request::post(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(FramedBody::request(messages)))
        .expect("a request");
    let response = channel.oneshot(request).await.expect("a reply");
    Incoming::reply(response.into_body(), MAX)
}

/// Puts and gets with bodies framed by hand.
async fn check_framed_client(channel: Channel) {
    let puts = SIZES.map(|bytes| {
        let payload = payload(bytes).chunks(70_000).map(Bytes::copy_from_slice).collect();
        let header = header(bytes);
        BulkMessage { header, payload }.encode().map_err(Status::from)
    });
    let mut replies = call(channel.clone(), "/kvasir.v1.BlockStore/PutBlocks", stream::iter(puts)).await;
    for _ in SIZES {
        let reply = replies.message().await.expect("an outcome").expect("an outcome");
        let reply = v1::PutBlocksReply::decode(reply).expect("well-formed");
        assert_eq!(reply.outcomes, [i32::from(v1::BlockOutcome::Stored)]);
    }
    assert!(replies.message().await.expect("OK").is_none());

    let request = frame::encode_message(&v1::GetBlocksRequest::default()).map_err(Status::from);
    let mut got = call(channel, "/kvasir.v1.BlockStore/GetBlocks", stream::iter([request])).await;
    for bytes in SIZES {
        let message = got.message().await.expect("a message").expect("a message");
        let message = BulkMessage::parse(message, &BulkLimits::default()).expect("well-formed");
        assert_eq!(message.header, header(bytes));
        assert_eq!(message.payload.into_bytes(), payload(bytes));
    }
    match got.message().await {
        Err(frame::StreamError::Status(status)) => {
            assert_eq!(
                (status.code(), status.message()),
                (tonic::Code::DataLoss, "the end, 100 % of it")
            );
        }
        other => panic!("{other:?} instead of the status"),
    }
}

#[tokio::test]
async fn stock_client_and_framed_server() {
    check_stock_client(serve(Framed).await).await;
}

#[tokio::test]
async fn framed_client_and_stock_server() {
    check_framed_client(serve(stock()).await).await;
}

#[tokio::test]
async fn framed_on_both_sides() {
    check_framed_client(serve(Framed).await).await;
}

#[tokio::test]
async fn stock_on_both_sides_agrees_with_the_test() {
    check_stock_client(serve(stock()).await).await;
}
