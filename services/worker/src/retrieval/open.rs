//! Opening a context at the store.

use std::{sync::Arc, time::Duration};

use kvasir_block::BlockHash;
use kvasir_client::{
    BulkDecode, ClientError, DecodeStream, ErrorKind, IndexChoice, Namespace, OpenContext, Opened, StoreClient,
};

use crate::{
    compute::{ComputeHandle, SequenceId},
    config::IndexWanted,
    offload::Offload,
    store_session::StoreSession,
};

/// Times the blocks of a context are offered again: once for a full queue, once for a busy store, once for an eviction.
const OFFERS_MAX: usize = 3;

/// What is needed to open a context.
pub(crate) struct Opening {
    pub(crate) client: StoreClient,
    pub(crate) session: Arc<StoreSession>,
    pub(crate) offload: Arc<Offload>,
    /// The context, from its first block.
    pub(crate) chain: Vec<BlockHash>,
    pub(crate) q_heads: usize,
    pub(crate) softmax_scale: f32,
    pub(crate) index: IndexWanted,
    /// Rows per layer and KV head that are kept of what comes.
    pub(crate) row_cache_rows: usize,
    /// For all of it: offering, pushing, opening.
    pub(crate) timeout: Duration,
    /// Whose pages hold the context, and where to ask for them.
    pub(crate) sequence: SequenceId,
    pub(crate) compute: ComputeHandle,
}

/// An open context, by the way that was to be had.
#[derive(Debug)]
pub(crate) enum OpenStream {
    Bulk(BulkDecode),
    Grpc(DecodeStream),
}

impl OpenStream {
    /// What serves the context.
    pub(crate) fn opened(&self) -> &Opened {
        match self {
            Self::Bulk(stream) => stream.opened(),
            Self::Grpc(stream) => stream.opened(),
        }
    }
}

/// Waits until the store holds the context, offering again what was dropped, and opens it.
///
/// # Errors
/// Why it cannot be retrieved from, in words for a person.
pub(crate) async fn open(opening: &Opening) -> Result<OpenStream, String> {
    match tokio::time::timeout(opening.timeout, try_open(opening)).await {
        Ok(opened) => opened,
        Err(_) => {
            let standing = opening.offload.standing(&opening.chain);
            Err(format!(
                "the store did not have the context within {:?}: of {} blocks {} were on their way and {} missing",
                opening.timeout,
                opening.chain.len(),
                standing.under_way,
                standing.missing.len()
            ))
        }
    }
}

async fn try_open(opening: &Opening) -> Result<OpenStream, String> {
    let mut offers = 0;
    loop {
        let Some(namespace) = opening.session.namespace() else {
            return Err("the store is away".to_owned());
        };
        wait_until_held(opening, &mut offers).await?;
        match open_stream(opening, &namespace).await {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind == ErrorKind::NotFound && offers < OFFERS_MAX => {
                // What was believed held is not; all of it is offered again, and what is there is answered as present.
                opening.offload.note_missing(&opening.chain);
            }
            Err(error) => {
                opening.session.lost(&error);
                return Err(format!("the store did not open the context: {error}"));
            }
        }
    }
}

/// By a bulk connection where the store offers one and has room for it, else by gRPC.
async fn open_stream(opening: &Opening, namespace: &Namespace) -> Result<OpenStream, ClientError> {
    let context = OpenContext {
        chain: opening.chain.clone(),
        q_heads: opening.q_heads,
        softmax_scale: opening.softmax_scale,
        index: match opening.index {
            IndexWanted::Best => IndexChoice::Best,
            IndexWanted::Flat => IndexChoice::Flat,
            IndexWanted::Sketch => IndexChoice::Sketch,
            IndexWanted::Roar => IndexChoice::Roar,
            IndexWanted::Wave => IndexChoice::Wave,
        },
        row_cache_rows: u32::try_from(opening.row_cache_rows).unwrap_or(u32::MAX),
    };
    if namespace.bulk.is_some() {
        let (client, namespace, context) = (opening.client.clone(), namespace.clone(), context.clone());
        let opened = tokio::task::spawn_blocking(move || client.decode_by_bulk(&namespace, &context)).await;
        match opened {
            Ok(Ok(stream)) => return Ok(OpenStream::Bulk(stream)),
            // What gRPC would say as well.
            Ok(Err(error)) if error.kind == ErrorKind::NotFound => return Err(error),
            Ok(Err(error)) => tracing::debug!(%error, "no decode stream over a bulk connection, going by gRPC"),
            Err(error) => tracing::error!(%error, "opening a decode stream over a bulk connection failed"),
        }
    }
    opening.client.decode(namespace, context).await.map(OpenStream::Grpc)
}

async fn wait_until_held(opening: &Opening, offers: &mut usize) -> Result<(), String> {
    loop {
        let changed = opening.offload.changed();
        tokio::pin!(changed);
        // Registered before the look, so that a change in between is not missed.
        changed.as_mut().enable();
        let standing = opening.offload.standing(&opening.chain);
        match (standing.under_way, standing.missing.len()) {
            (0, 0) => return Ok(()),
            (0, missing) if *offers >= OFFERS_MAX => {
                return Err(format!(
                    "{missing} of {} blocks could not be pushed to the store",
                    opening.chain.len()
                ));
            }
            (0, _) => {
                *offers += 1;
                opening.compute.offer(opening.sequence, standing.missing).await;
                // The compute thread answers by a change of standing, or by doing nothing where the queue is full.
                let _waited = tokio::time::timeout(RETRY, changed).await;
            }
            _ => changed.await,
        }
    }
}

/// Wait between two offers of blocks that found no room.
const RETRY: Duration = Duration::from_millis(250);
