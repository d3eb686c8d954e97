//! The decode stream as the compute thread uses it.
//!
//! The compute thread waits on the stream itself: a task in between would cost a wake-up of a thread in each direction,
//! thirty times a token. By a bulk connection it writes and reads the socket, too; by gRPC the runtime's threads do.

use std::{fmt::Debug, sync::Arc, time::Duration};

use kvasir_client::{BulkDecode, ClientError, DecodeStream, Hint, Query, Reply};
use tokio::{runtime::Handle, time::timeout};

use crate::store_session::StoreSession;

/// Where queries go and replies come from, in the order asked. After an error it is of no more use.
pub(crate) trait Wire: Debug + Send {
    /// Sends a query; waits for nothing but room to put it.
    ///
    /// # Errors
    /// Why not, in words.
    fn send(&mut self, query: Query) -> Result<(), String>;

    /// Sends about what the queries of a layer will be.
    ///
    /// # Errors
    /// Why not, in words.
    fn hint(&mut self, hint: Hint) -> Result<(), String>;

    /// The reply to the oldest query that has none yet.
    ///
    /// # Errors
    /// Why not, in words; `None` when it did not come in time.
    fn receive(&mut self, wait: Duration) -> Result<Reply, Option<String>>;
}

/// A stream to the store over gRPC.
#[derive(Debug)]
pub(crate) struct StoreWire {
    stream: DecodeStream,
    session: Arc<StoreSession>,
    runtime: Handle,
}

impl StoreWire {
    pub(crate) fn new(stream: DecodeStream, session: Arc<StoreSession>, runtime: Handle) -> Self {
        Self {
            stream,
            session,
            runtime,
        }
    }

    fn failed(&self, error: &ClientError) -> String {
        self.session.lost(error);
        format!("retrieval failed: {error}")
    }
}

impl Wire for StoreWire {
    fn send(&mut self, query: Query) -> Result<(), String> {
        let sent = self.runtime.block_on(self.stream.send(query));
        sent.map_err(|error| self.failed(&error))
    }

    fn hint(&mut self, hint: Hint) -> Result<(), String> {
        let sent = self.runtime.block_on(self.stream.hint(hint));
        sent.map_err(|error| self.failed(&error))
    }

    fn receive(&mut self, wait: Duration) -> Result<Reply, Option<String>> {
        let next = async { timeout(wait, self.stream.receive()).await };
        match self.runtime.block_on(next) {
            Ok(reply) => reply.map_err(|error| Some(self.failed(&error))),
            Err(_) => Err(None),
        }
    }
}

/// One over a bulk connection.
#[derive(Debug)]
pub(crate) struct BulkWire {
    stream: BulkDecode,
    session: Arc<StoreSession>,
}

impl BulkWire {
    pub(crate) fn new(stream: BulkDecode, session: Arc<StoreSession>) -> Self {
        Self { stream, session }
    }

    fn failed(&self, error: &ClientError) -> String {
        self.session.lost(error);
        format!("retrieval failed: {error}")
    }
}

impl Wire for BulkWire {
    fn send(&mut self, query: Query) -> Result<(), String> {
        let sent = self.stream.send(query);
        sent.map_err(|error| self.failed(&error))
    }

    fn hint(&mut self, hint: Hint) -> Result<(), String> {
        let sent = self.stream.hint(&hint);
        sent.map_err(|error| self.failed(&error))
    }

    fn receive(&mut self, wait: Duration) -> Result<Reply, Option<String>> {
        match self.stream.receive(wait) {
            Ok(reply) => reply.ok_or(None),
            Err(error) => Err(Some(self.failed(&error))),
        }
    }
}
