//! Events: which blocks the store has, and how that changes.

use kvasir_block::NamespaceId;
use kvasir_proto::{BlockEvents, convert, v1};
use tonic::Streaming;

use crate::{ClientError, StoreClient, error::CallName, observe};

/// An open watch. Dropping it ends the watch.
#[derive(Debug)]
pub struct EventStream {
    name: CallName,
    events: Streaming<v1::BlockEvent>,
}

impl EventStream {
    pub(crate) async fn open(client: &StoreClient, namespace: Option<NamespaceId>) -> Result<Self, ClientError> {
        let name = client.name("watch_events");
        let message = v1::WatchEventsRequest {
            namespace: namespace.map(convert::namespace_bytes).unwrap_or_default(),
        };
        let mut stub = client.block_store();
        let reply = client
            .opening(&name, stub.watch_events(client.request(message, None)))
            .await?;
        Ok(Self {
            name,
            events: reply.into_inner(),
        })
    }

    /// The next event, waiting as long as it takes; `None` when the store ended the stream (watch again). A dead
    /// connection is found by the keep-alive.
    ///
    /// # Errors
    /// `Exhausted` when this reader fell behind: watch again, the snapshot makes it whole. Else the stream broke.
    pub async fn next(&mut self) -> Result<Option<BlockEvents>, ClientError> {
        let event = match self.events.message().await {
            Ok(None) => return Ok(None),
            Ok(Some(event)) => BlockEvents::try_from(event).map_err(|error| self.name.broken_field(&error)),
            Err(status) => Err(self.name.status(&status)),
        };
        event.map(Some).map_err(|error| observe::failed(self.name.call, error))
    }
}
