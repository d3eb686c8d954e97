//! Follows block events: each worker's device tier, and the store. A watch that breaks is opened again after a while;
//! its snapshot makes the view whole. A router without events still routes, by load alone.

use std::convert::Infallible;

use kvasir_block::NamespaceId;
use kvasir_client::{ClientError, EventStream, StoreClient};
use kvasir_proto::BlockEvents;
use tokio::sync::watch as latest;

use super::Worker;
use crate::{
    backoff::Backoff,
    grpc::{BlockStream, CallError},
    holders::{Feed, Holder, Holders},
    metrics,
};

/// Follows the device tier of `worker`; never returns, the caller drops it when the worker is lost.
pub(super) async fn follow_worker(worker: &Worker, holders: &Holders, namespace: NamespaceId) -> Infallible {
    let mut backoff = Backoff::new(u64::from(worker.id.0));
    loop {
        let why = match worker.calls.watch_blocks(namespace).await {
            Ok(mut stream) => {
                let holder = Holder::Worker(worker.id);
                follow(holder, holders, &mut backoff, &mut stream).await
            }
            Err(error) => error.to_string(),
        };
        tracing::debug!(worker = %worker.url, %why, "block events of a worker ended, watching again");
        metrics::watch_restarted(&worker.url, "blocks");
        tokio::time::sleep(backoff.next()).await;
    }
}

/// Follows the store, once it is known which namespace matters; never returns unless the workers are gone.
pub(crate) async fn follow_store(
    client: StoreClient,
    url: String,
    holders: &Holders,
    mut namespace: latest::Receiver<Option<NamespaceId>>,
    mut backoff: Backoff,
) {
    let Ok(namespace) = namespace.wait_for(Option::is_some).await.map(|known| *known) else {
        return;
    };
    let mut reachable = true;
    loop {
        let why = match client.watch_events(namespace).await {
            Ok(mut stream) => {
                tracing::info!(store = %url, "watching the store's blocks");
                reachable = true;
                follow(Holder::Store, holders, &mut backoff, &mut stream).await
            }
            Err(error) => error.to_string(),
        };
        // Once per loss, not once per attempt.
        if std::mem::take(&mut reachable) {
            tracing::warn!(store = %url, %why, "the store cannot be watched, routing without it and trying again");
        }
        metrics::watch_restarted(&url, "store");
        tokio::time::sleep(backoff.next()).await;
    }
}

/// Where events come from: the two streams have different types and the same shape.
trait Events: Send {
    type Error: std::fmt::Display;
    fn next(&mut self) -> impl Future<Output = Result<Option<BlockEvents>, Self::Error>> + Send;
}

impl Events for BlockStream {
    type Error = CallError;
    fn next(&mut self) -> impl Future<Output = Result<Option<BlockEvents>, CallError>> + Send {
        self.next()
    }
}

impl Events for EventStream {
    type Error = ClientError;
    fn next(&mut self) -> impl Future<Output = Result<Option<BlockEvents>, ClientError>> + Send {
        self.next()
    }
}

/// Applies events until the stream ends or contradicts itself; answers with why it did.
async fn follow(holder: Holder, holders: &Holders, backoff: &mut Backoff, stream: &mut impl Events) -> String {
    let mut feed = Feed::open(holder, holders);
    loop {
        match stream.next().await {
            Ok(Some(event)) => {
                backoff.reset();
                if let Err(error) = feed.apply(&event) {
                    return error.to_string();
                }
            }
            Ok(None) => return "the stream was closed".to_owned(),
            Err(error) => return error.to_string(),
        }
    }
}
