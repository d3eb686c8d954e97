//! [`StoreClient`]: the connection, unary calls, and the opening of streams.

mod transport;

pub(crate) use transport::REPLY_BYTES_MAX;

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use kvasir_block::{BlockHash, KvSchema, NamespaceId, Tenant};
use kvasir_proto::{convert, v1};
use kvasir_runtime::request_id::RequestId;
use tonic::transport::Channel;

use crate::{
    BulkDecode, BulkOffer, ClientConfig, ClientError, DecodeStream, ErrorKind, EventStream, GetStream, Namespace,
    OpenContext, PrefixMatch, PutStream, bulk::pool::Pool, error::CallName, retry::Backoff,
};

/// A store, seen from outside. Cheap to clone; connects lazily and reconnects by itself.
#[derive(Clone, Debug)]
pub struct StoreClient {
    shared: Arc<Shared>,
    request_id: Option<RequestId>,
}

#[derive(Debug)]
struct Shared {
    config: ClientConfig,
    url: Arc<str>,
    channel: Channel,
    backoff: Backoff,
    bulk: Arc<Pool>,
}

impl StoreClient {
    /// A client of the store at `config.url`. It connects on the first call. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// `Invalid` for a URL or a limit that cannot work, or outside of a runtime.
    pub fn new(config: ClientConfig) -> Result<Self, ClientError> {
        let url: Arc<str> = config.url.as_str().into();
        let channel = transport::channel(&config)?;
        let shared = Shared {
            backoff: Backoff::new(config.jitter_seed),
            bulk: Arc::new(Pool::new(config.bulk_connections_max)),
            config,
            url,
            channel,
        };
        Ok(Self {
            shared: Arc::new(shared),
            request_id: None,
        })
    }

    /// The same client, whose calls carry `id` so that the store's logs can be joined with the caller's.
    #[must_use]
    pub fn with_request_id(&self, id: RequestId) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            request_id: Some(id),
        }
    }

    /// Where the store is.
    pub fn url(&self) -> &str {
        &self.shared.url
    }

    /// Declares a namespace and learns the store's limits.
    ///
    /// # Errors
    /// `Invalid` for a schema that the store refuses; else as any call.
    pub async fn open_namespace(&self, tenant: &Tenant, schema: &KvSchema) -> Result<Namespace, ClientError> {
        self.open_namespace_with(tenant, schema, Bytes::new()).await
    }

    /// The same with the basis that keys are to be sketched with, a file of `kvasir calibrate`; empty for whatever is there.
    ///
    /// # Errors
    /// As for [`StoreClient::open_namespace`]; `Invalid` when the namespace has another basis, or this is none.
    pub async fn open_namespace_with(
        &self,
        tenant: &Tenant,
        schema: &KvSchema,
        basis: Bytes,
    ) -> Result<Namespace, ClientError> {
        let name = self.name("open_namespace");
        let id = NamespaceId::new(tenant, schema);
        let request = v1::OpenNamespaceRequest {
            tenant: tenant.as_str().to_owned(),
            schema: Some(schema.into()),
            expected_namespace: convert::namespace_bytes(id),
            basis,
        };
        let reply = self
            .unary(&name, request, |mut store, request| async move {
                store.open_namespace(request).await
            })
            .await?;
        let held = convert::namespace(&reply.namespace).map_err(|error| name.broken_field(&error))?;
        if held != id {
            return Err(name.broken(format_args!("namespace {held} instead of {id}")));
        }
        let layer_block_bytes = schema.layer_block_bytes();
        if reply.layer_block_bytes != layer_block_bytes as u64 {
            let what = format!(
                "layer_block_bytes {} instead of {layer_block_bytes}",
                reply.layer_block_bytes
            );
            return Err(name.broken(what));
        }
        let limits = reply.limits.unwrap_or_default();
        let message_bytes_max = usize::try_from(limits.message_bytes_max).unwrap_or(usize::MAX);
        if message_bytes_max < layer_block_bytes {
            let what = format!(
                "the store accepts messages of {message_bytes_max} bytes and a layer block has {layer_block_bytes}: \
                 raise its message_bytes_max"
            );
            return Err(name.error(ErrorKind::Exhausted, what));
        }
        let bulk = BulkOffer::of(reply.bulk.as_ref(), reply.epoch, self.url()).map_err(|what| name.broken(what))?;
        self.shared.bulk.offered(bulk.as_ref());
        Ok(Namespace {
            id,
            schema: schema.clone(),
            layer_block_bytes,
            message_bytes_max,
            hashes_max: limits.hashes_max as usize,
            epoch: reply.epoch,
            basis: match &reply.basis_id[..] {
                [] => None,
                id => Some(id.try_into().map_err(|_| name.broken("basis_id has not 32 bytes"))?),
            },
            bulk,
        })
    }

    /// How many blocks of `chain` are held without a gap, and a lease that keeps them if `lease` is given. A retried call
    /// may leave a second lease behind, which expires.
    ///
    /// # Errors
    /// `NotFound` when the namespace must be opened (again); else as any call.
    pub async fn match_prefix(
        &self,
        namespace: NamespaceId,
        chain: &[BlockHash],
        lease: Option<Duration>,
    ) -> Result<PrefixMatch, ClientError> {
        let name = self.name("match_prefix");
        let request = v1::MatchPrefixRequest {
            namespace: convert::namespace_bytes(namespace),
            hashes: convert::hash_bytes(chain),
            lease_ms: lease.map_or(0, millis),
        };
        let reply = self
            .unary(&name, request, |mut store, request| async move {
                store.match_prefix(request).await
            })
            .await?;
        let matched = PrefixMatch {
            hit_blocks: reply.hit_blocks as usize,
            host_blocks: reply.host_blocks as usize,
            disk_blocks: reply.disk_blocks as usize,
            object_blocks: reply.object_blocks as usize,
            lease: (reply.lease != 0).then_some(reply.lease),
            lease_for: Duration::from_millis(reply.lease_ms.into()),
        };
        matched.checked(chain.len()).map_err(|what| name.broken(what))
    }

    /// Gives a lease back early; an unknown one may have expired and is no error.
    ///
    /// # Errors
    /// As any call.
    pub async fn release(&self, lease: u64) -> Result<(), ClientError> {
        let request = v1::ReleaseLeaseRequest { lease };
        let name = self.name("release_lease");
        let call = |mut store: transport::Stub, request| async move { store.release_lease(request).await };
        self.unary(&name, request, call)
            .await
            .map(|v1::ReleaseLeaseReply {}| ())
    }

    /// Counters and sizes of the store.
    ///
    /// # Errors
    /// As any call.
    pub async fn stat(&self) -> Result<v1::StatReply, ClientError> {
        let name = self.name("stat");
        self.unary(&name, v1::StatRequest {}, |mut store, request| async move {
            store.stat(request).await
        })
        .await
    }

    /// Opens a stream of puts.
    ///
    /// # Errors
    /// As any call; a namespace that the store does not know shows with the first outcome.
    pub async fn put_blocks(&self, namespace: &Namespace) -> Result<PutStream, ClientError> {
        PutStream::open(self, namespace).await
    }

    /// Reads layer blocks in the order asked: layer after layer, inside a layer in the order of `chain`. Blocks whose turn
    /// comes after `deadline` are `TooLate`.
    ///
    /// # Errors
    /// `Invalid` for more hashes than the store accepts or layers that do not exist; `NotFound` when the namespace must be
    /// opened (again); else as any call.
    pub async fn get_blocks(
        &self,
        namespace: &Namespace,
        chain: &[BlockHash],
        layers: Range<u16>,
        lease: Option<u64>,
        deadline: Option<Duration>,
    ) -> Result<GetStream, ClientError> {
        GetStream::open(self, namespace, chain, layers, lease, deadline).await
    }

    /// Opens a context for retrieval: one stream per decoding sequence.
    ///
    /// # Errors
    /// `NotFound` naming a block that the store does not hold, `Exhausted` when too many contexts are open; else as any
    /// call.
    pub async fn decode(&self, namespace: &Namespace, open: OpenContext) -> Result<DecodeStream, ClientError> {
        DecodeStream::open(self, namespace, open).await
    }

    /// As [`StoreClient::decode`], over a bulk connection of its own, on a thread that may block and then uses the stream.
    ///
    /// # Errors
    /// As [`StoreClient::decode`]; `Invalid` when the store offers no such path, `Exhausted` when it has too many connections.
    pub fn decode_by_bulk(&self, namespace: &Namespace, open: &OpenContext) -> Result<BulkDecode, ClientError> {
        BulkDecode::open(namespace, self.config(), open)
    }

    /// Watches which blocks are available, a snapshot first. `None` watches all namespaces.
    ///
    /// # Errors
    /// `Exhausted` when the store has too many watchers; else as any call.
    pub async fn watch_events(&self, namespace: Option<NamespaceId>) -> Result<EventStream, ClientError> {
        EventStream::open(self, namespace).await
    }

    pub(crate) fn name(&self, call: &'static str) -> CallName {
        CallName {
            call,
            url: Arc::clone(&self.shared.url),
        }
    }

    pub(crate) fn bulk_pool(&self) -> &Arc<Pool> {
        &self.shared.bulk
    }

    pub(crate) fn config(&self) -> &ClientConfig {
        &self.shared.config
    }
}

/// Whole milliseconds, at least one, at most what fits.
pub(crate) fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX).max(1)
}
