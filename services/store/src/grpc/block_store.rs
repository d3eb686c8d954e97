//! The calls of `BlockStore` that are not bulk.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use kvasir_block::{KvSchema, NamespaceId, Tenant};
use kvasir_cache::{BlockCache, CacheStats, LeaseId, SEGMENT_FORMAT};
use kvasir_proto::{
    InvalidMessage, convert,
    v1::{self, block_store_server::BlockStore},
};
use kvasir_runtime::request_id::RequestId;
use tonic::{Request, Response, Status, Streaming};

use super::{
    status::{observed, of_cache, of_message},
    watch,
};
use crate::served::Served;

/// Longest tenant name, in bytes.
pub(crate) const TENANT_BYTES_MAX: usize = 256;

/// Version of what is kept of indexes: sketches, and built ones.
const INDEX_FORMAT: u32 = 1;

#[derive(Clone, Debug)]
pub(super) struct BlockStoreApi(pub(super) Arc<Served>);

#[tonic::async_trait]
impl BlockStore for BlockStoreApi {
    type PutBlocksStream = BoxStream<'static, Result<v1::PutBlocksReply, Status>>;
    type GetBlocksStream = BoxStream<'static, Result<v1::GetBlocksReply, Status>>;
    type WatchEventsStream = BoxStream<'static, Result<v1::BlockEvent, Status>>;

    async fn open_namespace(
        &self,
        request: Request<v1::OpenNamespaceRequest>,
    ) -> Result<Response<v1::OpenNamespaceReply>, Status> {
        let span = RequestId::of(&request).span("open_namespace");
        observed("open_namespace", span, self.open(request.into_inner()))
            .await
            .map(Response::new)
    }

    async fn match_prefix(
        &self,
        request: Request<v1::MatchPrefixRequest>,
    ) -> Result<Response<v1::MatchPrefixReply>, Status> {
        let span = RequestId::of(&request).span("match_prefix");
        observed("match_prefix", span, self.matched(request.into_inner()))
            .await
            .map(Response::new)
    }

    async fn release_lease(
        &self,
        request: Request<v1::ReleaseLeaseRequest>,
    ) -> Result<Response<v1::ReleaseLeaseReply>, Status> {
        let span = RequestId::of(&request).span("release_lease");
        let lease = LeaseId::from_u64(request.into_inner().lease);
        let release = async {
            self.0.with_cache(move |cache| cache.release(lease)).await?;
            Ok(Response::new(v1::ReleaseLeaseReply {}))
        };
        observed("release_lease", span, release).await
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let span = RequestId::of(&request).span("watch_events");
        let subscribe = async {
            let namespace = convert::optional_namespace(&request.get_ref().namespace).map_err(|e| of_message(&e))?;
            // The snapshot is as long as what is held.
            let subscribed = self.0.with_cache(move |cache| cache.subscribe(namespace)).await?;
            let subscription = subscribed.map_err(|error| of_cache(&error))?;
            Ok(Response::new(watch::events(Arc::clone(&self.0), subscription).boxed()))
        };
        observed("watch_events", span, subscribe).await
    }

    async fn stat(&self, request: Request<v1::StatRequest>) -> Result<Response<v1::StatReply>, Status> {
        let span = RequestId::of(&request).span("stat");
        let stat = async { Ok(Response::new(stat_reply(&self.0.with_cache(BlockCache::stats).await?))) };
        observed("stat", span, stat).await
    }

    async fn put_blocks(
        &self,
        _: Request<Streaming<v1::PutBlocksRequest>>,
    ) -> Result<Response<Self::PutBlocksStream>, Status> {
        Err(framed_by_hand())
    }

    async fn get_blocks(&self, _: Request<v1::GetBlocksRequest>) -> Result<Response<Self::GetBlocksStream>, Status> {
        Err(framed_by_hand())
    }
}

/// The generated code wants the bulk calls here too, but [`super::routes`] answers them before it is asked.
fn framed_by_hand() -> Status {
    Status::internal("a bulk call reached the generated code: BlockStoreRoutes must be in front of it")
}

impl BlockStoreApi {
    async fn open(&self, mut request: v1::OpenNamespaceRequest) -> Result<v1::OpenNamespaceReply, Status> {
        let basis = std::mem::take(&mut request.basis);
        let (tenant, schema, expected) = declared(request).map_err(|error| of_message(&error))?;
        let id = NamespaceId::new(&tenant, &schema);
        let cache = self.0.cache()?;
        if let Some(expected) = expected.filter(|expected| *expected != id) {
            return Err(Status::failed_precondition(unexpected(&cache, expected, id, &schema)));
        }
        let layer_block_bytes = schema.layer_block_bytes() as u64;
        let opened = self
            .0
            .with_cache(move |cache| {
                let namespace = cache.open_namespace(&tenant, &schema)?;
                let basis = if basis.is_empty() {
                    cache.basis_id(namespace)
                } else {
                    Some(cache.set_basis(namespace, &basis)?)
                };
                Ok((namespace, basis))
            })
            .await?;
        let (namespace, basis) = opened.map_err(|error| of_cache(&error))?;
        let config = &self.0.config;
        let limits = v1::Limits {
            message_bytes_max: config.message_bytes_max.as_u64(),
            hashes_max: u32::try_from(config.hashes_max).unwrap_or(u32::MAX),
            lease_ms_max: u32::try_from(config.lease_max.get().as_millis()).unwrap_or(u32::MAX),
        };
        Ok(v1::OpenNamespaceReply {
            namespace: convert::namespace_bytes(namespace),
            layer_block_bytes,
            limits: Some(limits),
            segment_format: SEGMENT_FORMAT,
            index_format: INDEX_FORMAT,
            epoch: cache.epoch(),
            basis_id: basis.map_or_else(Bytes::new, |id| Bytes::copy_from_slice(id.as_bytes())),
            bulk: self.0.bulk_offer.get().map(|places| v1::BulkOffer {
                address: places.addr.to_string(),
                token: self.0.bulk_token.to_vec().into(),
                local_socket: places.local_socket.clone().unwrap_or_default(),
            }),
        })
    }

    async fn matched(&self, request: v1::MatchPrefixRequest) -> Result<v1::MatchPrefixReply, Status> {
        let namespace = convert::namespace(&request.namespace).map_err(|error| of_message(&error))?;
        let hashes = convert::hashes("hashes", &request.hashes, self.0.config.hashes_max);
        let hashes = hashes.map_err(|error| of_message(&error))?;
        let lease = (request.lease_ms > 0).then(|| Duration::from_millis(request.lease_ms.into()));
        let matched = self
            .0
            .with_cache(move |cache| cache.match_prefix(namespace, &hashes, lease))
            .await?;
        let matched = matched.map_err(|error| of_cache(&error))?;
        // Hits are at most hashes_max, and a lease lasts at most lease_ms.
        Ok(v1::MatchPrefixReply {
            hit_blocks: matched.hit_blocks as u32,
            host_blocks: matched.host_blocks as u32,
            lease: matched.lease.map_or(0, LeaseId::to_u64),
            lease_ms: matched.lease_for.as_millis() as u32,
            disk_blocks: matched.disk_blocks as u32,
            object_blocks: matched.object_blocks as u32,
        })
    }
}

fn declared(request: v1::OpenNamespaceRequest) -> Result<(Tenant, KvSchema, Option<NamespaceId>), InvalidMessage> {
    if request.tenant.len() > TENANT_BYTES_MAX {
        let problem = format!("{} bytes, at most {TENANT_BYTES_MAX}", request.tenant.len());
        return Err(InvalidMessage::new("tenant", problem));
    }
    let tenant = Tenant::new(request.tenant)
        .ok_or_else(|| InvalidMessage::new("tenant", "is empty: single-tenant installations say \"default\""))?;
    let schema = request
        .schema
        .ok_or_else(|| InvalidMessage::new("schema", "is missing"))?;
    let schema = KvSchema::try_from(schema).map_err(|error| error.inside("schema"))?;
    let expected = match &request.expected_namespace {
        none if none.is_empty() => None,
        bytes => Some(NamespaceId::from_slice(bytes).ok_or_else(|| {
            let problem = format!("a namespace id has 32 bytes, this has {}", bytes.len());
            InvalidMessage::new("expected_namespace", problem)
        })?),
    };
    Ok((tenant, schema, expected))
}

/// Why the id is another than the caller thinks, as far as this store can tell.
fn unexpected(cache: &BlockCache, expected: NamespaceId, id: NamespaceId, schema: &KvSchema) -> String {
    let difference = match cache.schema(expected) {
        Some(held) => match held.first_difference(schema) {
            Some(field) => format!("it differs from this schema in {field}"),
            None => "it has this schema and another tenant".to_owned(),
        },
        None => "no namespace with that id is open here, so which field differs cannot be said".to_owned(),
    };
    format!("expected_namespace: {expected}, but tenant and schema give {id}; {difference}")
}

fn stat_reply(stats: &CacheStats) -> v1::StatReply {
    let object = stats.object.as_ref();
    v1::StatReply {
        epoch: stats.epoch,
        uptime_ms: u64::try_from(stats.uptime.as_millis()).unwrap_or(u64::MAX),
        namespaces: stats.namespaces,
        blocks: stats.blocks,
        host_bytes: stats.host_bytes,
        host_bytes_max: stats.host_bytes_max,
        disk_bytes: stats.disk.bytes,
        disk_bytes_max: stats.disk.bytes_max,
        put_blocks: stats.put_blocks,
        put_bytes: stats.put_bytes,
        get_hits: stats.get_hits_host + stats.get_hits_disk + stats.get_hits_object,
        get_bytes: stats.get_bytes,
        misses_absent: stats.misses_absent,
        misses_corrupt: stats.misses_corrupt,
        misses_busy: stats.misses_busy,
        flush_queue_blocks: stats.disk.queued_layer_blocks,
        leases: stats.leases,
        flush_dropped: stats.disk.refused,
        namespaces_with_basis: stats.namespaces_with_basis,
        get_hits_host: stats.get_hits_host,
        get_hits_disk: stats.get_hits_disk,
        get_hits_object: stats.get_hits_object,
        misses_late: stats.misses_late,
        promoted: stats.promoted,
        demoted: stats.demoted,
        admission_skipped: stats.admission_skipped,
        prefetch_issued: stats.prefetch_issued,
        prefetch_useful: stats.prefetch_useful,
        prefetch_wasted: stats.prefetch_wasted,
        prefetch_dropped: stats.prefetch_dropped,
        object_bytes: object.map_or(0, |object| object.bytes),
        object_layer_blocks: object.map_or(0, |object| object.layer_blocks),
    }
}
