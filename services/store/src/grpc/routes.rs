//! `kvasir.v1.BlockStore` as a tower service: the bulk calls go to hand-framed handlers, the others to generated code.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{FutureExt, future::BoxFuture};
use http::{Request, Response};
use kvasir_proto::v1::block_store_server::{BlockStoreServer, SERVICE_NAME};
use kvasir_runtime::request_id::RequestId;
use tonic::{body::Body, codegen::Service, server::NamedService};

use super::{block_store::BlockStoreApi, get, put, status};
use crate::served::Served;

#[derive(Clone, Debug)]
pub(super) struct BlockStoreRoutes {
    served: Arc<Served>,
    generated: BlockStoreServer<BlockStoreApi>,
}

impl BlockStoreRoutes {
    pub(super) fn new(served: Arc<Served>, generated: BlockStoreServer<BlockStoreApi>) -> Self {
        Self { served, generated }
    }
}

impl NamedService for BlockStoreRoutes {
    const NAME: &'static str = SERVICE_NAME;
}

impl Service<Request<Body>> for BlockStoreRoutes {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // As the generated service, which is always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (call, served) = match request.uri().path() {
            "/kvasir.v1.BlockStore/PutBlocks" => ("put_blocks", Arc::clone(&self.served)),
            "/kvasir.v1.BlockStore/GetBlocks" => ("get_blocks", Arc::clone(&self.served)),
            _ => return self.generated.call(request),
        };
        let id = request.extensions().get::<RequestId>().cloned();
        let span = id
            .unwrap_or_else(|| RequestId::from_headers(request.headers()))
            .span(call);
        async move {
            let answer = match call {
                "put_blocks" => put::serve(served, request, span.clone()),
                _ => get::serve(served, request, span.clone()).await,
            };
            Ok(answer.unwrap_or_else(|error| {
                status::refused(call, &span, &error);
                error.into_http()
            }))
        }
        .boxed()
    }
}
