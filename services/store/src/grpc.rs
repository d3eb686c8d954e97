//! The services: `kvasir.v1.BlockStore`, whose two bulk calls are framed by hand, and `kvasir.v1.Retrieval`.
//!
//! Messages are checked once, here; behind this module the store speaks in domain types.

mod block_store;
mod deadline;
mod get;
mod indexes;
mod put;
mod retrieval;
mod routes;
mod status;
mod watch;

use std::sync::Arc;

use kvasir_proto::v1::{block_store_server::BlockStoreServer, retrieval_server::RetrievalServer};
use kvasir_runtime::grpc::GrpcServer;

use self::{block_store::BlockStoreApi, retrieval::RetrievalApi, routes::BlockStoreRoutes};
pub(crate) use self::{
    block_store::TENANT_BYTES_MAX,
    retrieval::{Exchange, Refused, RefusedAs},
};
use crate::served::Served;

/// Adds the store's services to a server.
pub(crate) fn add_to(server: GrpcServer, served: &Arc<Served>) -> GrpcServer {
    let control_bytes_max = served.config.control_bytes_max();
    let generated = BlockStoreServer::new(BlockStoreApi(Arc::clone(served)))
        .max_decoding_message_size(served.config.open_bytes_max());
    let retrieval = RetrievalServer::new(RetrievalApi(Arc::clone(served))).max_decoding_message_size(control_bytes_max);
    server
        .add_service(BlockStoreRoutes::new(Arc::clone(served), generated))
        .add_service(retrieval)
}
