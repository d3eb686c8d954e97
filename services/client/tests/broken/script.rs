//! A store that says what it was told to.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream, stream::BoxStream};
use kvasir_client::{ClientConfig, StoreClient};
use kvasir_proto::v1::{self, block_store_server as store, retrieval_server as retrieval};
use tonic::{Request, Response, Status, Streaming};

/// What the store says, whatever it is asked; `None` is a stream that stays silent.
#[derive(Clone, Default)]
pub(crate) struct Script {
    pub(crate) opened: v1::OpenNamespaceReply,
    pub(crate) matched: v1::MatchPrefixReply,
    pub(crate) puts: Vec<Option<Result<v1::PutBlocksReply, Status>>>,
    pub(crate) gets: Vec<Option<Result<v1::GetBlocksReply, Status>>>,
    pub(crate) decodes: Vec<Option<Result<v1::DecodeReply, Status>>>,
}

#[derive(Clone)]
struct Scripted(Arc<Script>);

fn play<T: Send + 'static>(
    lines: Vec<Option<Result<T, Status>>>,
) -> Result<Response<BoxStream<'static, Result<T, Status>>>, Status> {
    let lines = stream::iter(lines).then(|line| async move {
        match line {
            Some(line) => line,
            None => std::future::pending().await,
        }
    });
    Ok(Response::new(lines.boxed()))
}

#[tonic::async_trait]
impl store::BlockStore for Scripted {
    type PutBlocksStream = BoxStream<'static, Result<v1::PutBlocksReply, Status>>;
    type GetBlocksStream = BoxStream<'static, Result<v1::GetBlocksReply, Status>>;
    type WatchEventsStream = BoxStream<'static, Result<v1::BlockEvent, Status>>;

    async fn open_namespace(
        &self,
        _: Request<v1::OpenNamespaceRequest>,
    ) -> Result<Response<v1::OpenNamespaceReply>, Status> {
        Ok(Response::new(self.0.opened.clone()))
    }

    async fn match_prefix(&self, _: Request<v1::MatchPrefixRequest>) -> Result<Response<v1::MatchPrefixReply>, Status> {
        Ok(Response::new(self.0.matched))
    }

    async fn release_lease(
        &self,
        _: Request<v1::ReleaseLeaseRequest>,
    ) -> Result<Response<v1::ReleaseLeaseReply>, Status> {
        std::future::pending().await
    }

    async fn put_blocks(
        &self,
        request: Request<Streaming<v1::PutBlocksRequest>>,
    ) -> Result<Response<Self::PutBlocksStream>, Status> {
        // Silent until something was put.
        let mut requests = request.into_inner();
        let first = stream::once(async move { requests.message().await.map(drop) });
        let replies = play(self.0.puts.clone())?.into_inner();
        Ok(Response::new(
            first.filter_map(|_| async { None }).chain(replies).boxed(),
        ))
    }

    async fn get_blocks(&self, _: Request<v1::GetBlocksRequest>) -> Result<Response<Self::GetBlocksStream>, Status> {
        play(self.0.gets.clone())
    }

    async fn watch_events(
        &self,
        _: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let event = v1::BlockEvent {
            kind: 77,
            ..v1::BlockEvent::default()
        };
        play(vec![Some(Ok(event))])
    }

    async fn stat(&self, _: Request<v1::StatRequest>) -> Result<Response<v1::StatReply>, Status> {
        Err(Status::unavailable("on purpose"))
    }
}

#[tonic::async_trait]
impl retrieval::Retrieval for Scripted {
    type DecodeStream = BoxStream<'static, Result<v1::DecodeReply, Status>>;

    async fn decode(&self, _: Request<Streaming<v1::DecodeRequest>>) -> Result<Response<Self::DecodeStream>, Status> {
        play(self.0.decodes.clone())
    }

    async fn put_queries(&self, _: Request<v1::PutQueriesRequest>) -> Result<Response<v1::PutQueriesReply>, Status> {
        Err(Status::unavailable("on purpose"))
    }

    async fn build_index(&self, _: Request<v1::BuildIndexRequest>) -> Result<Response<v1::BuildIndexReply>, Status> {
        // A state that this program does not know.
        let (state, heads) = (77, 1);
        Ok(Response::new(v1::BuildIndexReply {
            state,
            heads,
            ..v1::BuildIndexReply::default()
        }))
    }
}

pub(crate) async fn client_of(script: Script) -> StoreClient {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let scripted = Scripted(Arc::new(script));
    let server = tonic::transport::Server::builder()
        .add_service(store::BlockStoreServer::new(scripted.clone()))
        .add_service(retrieval::RetrievalServer::new(scripted));
    tokio::spawn(server.serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener)));
    StoreClient::new(ClientConfig {
        call_timeout: Duration::from_millis(400),
        ..ClientConfig::to(url)
    })
    .expect("a client")
}
