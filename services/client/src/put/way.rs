//! How the messages of a put stream get to the store: over gRPC, or a connection of the bulk path.

use std::time::Duration;

use futures::{FutureExt, StreamExt};
use kvasir_proto::{
    EntryHead, PutOutcome, convert,
    frame::{BulkLimits, BulkMessage, Incoming, Rope, StreamError},
    v1,
};
use prost::Message;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;

use super::LayerBlock;
use crate::{
    ClientError, DataPath, Namespace, StoreClient,
    bulk::puts::{BulkPuts, IN_FLIGHT_MAX, within},
    error::CallName,
    observe,
};

const PATH: &str = "/kvasir.v1.BlockStore/PutBlocks";

/// Messages between the stream and the connection. What is unanswered is bounded in bytes; this only decouples.
const QUEUE: usize = 4;

/// A way; each wait for it to move lasts `wait` at most.
#[derive(Debug)]
pub(super) struct Way {
    wait: Duration,
    over: Over,
}

#[derive(Debug)]
enum Over {
    Grpc(GrpcPuts),
    Bulk(Box<BulkPuts>),
}

#[derive(Debug)]
pub(super) struct GrpcPuts {
    /// `None` once closed.
    messages: Option<mpsc::Sender<Rope>>,
    replies: Incoming<Body>,
}

impl Way {
    /// The bulk path, where the configuration wants it and it works; else gRPC.
    pub(super) async fn open(
        client: &StoreClient,
        name: &CallName,
        namespace: &Namespace,
    ) -> Result<Self, ClientError> {
        let config = client.config();
        if config.path != DataPath::Grpc {
            let must = config.path == DataPath::Bulk;
            let problem = match client.bulk_pool().lane(name, config, false).await {
                Ok(Some(lane)) => {
                    observe::call(name.call);
                    let puts = BulkPuts::new(client.bulk_pool(), lane, namespace, config.call_timeout);
                    return Ok(Self {
                        wait: config.call_timeout,
                        over: Over::Bulk(Box::new(puts)),
                    });
                }
                Ok(None) => name.no_bulk(),
                Err(error) => error,
            };
            if must {
                return Err(observe::failed(name.call, problem));
            }
        }
        let (messages, queued) = mpsc::channel(QUEUE);
        let messages_in = ReceiverStream::new(queued).map(Ok);
        let grpc = GrpcPuts {
            replies: client.bulk(name, PATH, messages_in, None).await?,
            messages: Some(messages),
        };
        Ok(Self {
            wait: config.call_timeout,
            over: Over::Grpc(grpc),
        })
    }

    /// Most blocks of a message.
    pub(super) fn entries_max(&self) -> usize {
        let limits = BulkLimits::default();
        match &self.over {
            Over::Grpc(_) => limits.entries_max,
            Over::Bulk(puts) => puts.rows_max().min(limits.entries_max),
        }
    }

    /// Most messages without an answer.
    pub(super) const fn messages_max(&self) -> usize {
        match self.over {
            Over::Grpc(_) => usize::MAX,
            Over::Bulk(_) => IN_FLIGHT_MAX,
        }
    }

    /// Whether the store ended it because nothing was put for long, so that another is to be opened.
    pub(super) fn is_gone(&self) -> bool {
        match &self.over {
            Over::Grpc(_) => false,
            Over::Bulk(puts) => puts.is_gone(),
        }
    }

    /// Waits until a message may be sent: then `None`. Until then replies may come. Dropping the wait loses nothing.
    pub(super) async fn room(&mut self, name: &CallName) -> Result<Option<Vec<PutOutcome>>, ClientError> {
        match &mut self.over {
            Over::Grpc(grpc) => grpc.room(name, self.wait).await,
            Over::Bulk(puts) => puts.sent(name, Some(self.wait)).await.map(|()| None),
        }
    }

    /// Sends a message for which there is room; false when the stream has ended, which the replies explain.
    pub(super) fn send(
        &mut self,
        name: &CallName,
        namespace: &Namespace,
        blocks: Vec<LayerBlock>,
    ) -> Result<bool, ClientError> {
        match &mut self.over {
            Over::Grpc(grpc) => grpc.send(name, namespace, blocks),
            Over::Bulk(puts) => puts.queue(name, blocks).map(|()| true),
        }
    }

    /// Waits until what was sent is the system's to carry. Dropping the wait loses nothing.
    pub(super) async fn sent(&mut self, name: &CallName) -> Result<(), ClientError> {
        match &mut self.over {
            // The connection's own task writes.
            Over::Grpc(_) => Ok(()),
            Over::Bulk(puts) => puts.sent(name, Some(self.wait)).await,
        }
    }

    /// The outcomes of the oldest message without an answer; `None` at an end. Dropping the wait loses nothing.
    pub(super) async fn reply(&mut self, name: &CallName) -> Result<Option<Vec<PutOutcome>>, ClientError> {
        self.reply_within(name, Some(self.wait)).await
    }

    /// The same where it is there already; `None` where it is not.
    pub(super) fn reply_now(&mut self, name: &CallName) -> Option<Result<Option<Vec<PutOutcome>>, ClientError>> {
        self.reply_within(name, None).now_or_never()
    }

    async fn reply_within(
        &mut self,
        name: &CallName,
        wait: Option<Duration>,
    ) -> Result<Option<Vec<PutOutcome>>, ClientError> {
        match &mut self.over {
            Over::Grpc(grpc) => match within(wait, grpc.replies.message()).await {
                Some(reply) => outcomes(name, reply),
                None => Err(name.timed_out(self.wait)),
            },
            Over::Bulk(puts) => puts.reply(name, wait).await.map(Some),
        }
    }

    /// Nothing more is sent.
    pub(super) fn no_more(&mut self) {
        if let Over::Grpc(grpc) = &mut self.over {
            grpc.messages = None;
        }
    }

    /// Ends in order, when everything was answered.
    pub(super) async fn end(&mut self, name: &CallName) -> Result<(), ClientError> {
        if let Over::Bulk(puts) = &mut self.over {
            puts.close();
            return Ok(());
        }
        match self.reply(name).await? {
            None => Ok(()),
            Some(_) => Err(name.broken("more outcomes than messages")),
        }
    }
}

impl GrpcPuts {
    async fn room(&mut self, name: &CallName, wait: Duration) -> Result<Option<Vec<PutOutcome>>, ClientError> {
        let Some(messages) = &self.messages else {
            return Ok(None);
        };
        if messages.capacity() > 0 {
            return Ok(None);
        }
        let waited = timeout(wait, async {
            tokio::select! {
                // Where the other end is gone there is no place either: sending then finds out.
                _ = messages.reserve() => None,
                reply = self.replies.message() => Some(reply),
            }
        })
        .await;
        match waited {
            Ok(None) => Ok(None),
            // An end is found out by sending.
            Ok(Some(reply)) => outcomes(name, reply),
            Err(_) => Err(name.timed_out(wait)),
        }
    }

    fn send(&mut self, name: &CallName, namespace: &Namespace, blocks: Vec<LayerBlock>) -> Result<bool, ClientError> {
        let mut message = BulkMessage::default();
        message.header.namespace = convert::namespace_bytes(namespace.id);
        for block in blocks {
            let head = EntryHead {
                hash: block.hash,
                layer: block.layer,
                length: block.payload.len(),
                checksum: block.checksum,
            };
            message.header.entries.push(head.to_wire(v1::BlockOutcome::Unspecified));
            message.payload.push(block.payload);
        }
        let frames = message.encode().map_err(|error| name.invalid(error))?;
        Ok(self
            .messages
            .as_ref()
            .is_some_and(|messages| messages.try_send(frames).is_ok()))
    }
}

fn outcomes(name: &CallName, reply: Result<Option<Rope>, StreamError>) -> Result<Option<Vec<PutOutcome>>, ClientError> {
    let Some(message) = reply.map_err(|error| name.stream(&error))? else {
        return Ok(None);
    };
    let reply = v1::PutBlocksReply::decode(message).map_err(|error| name.broken(error))?;
    let outcomes = reply.outcomes.into_iter().map(PutOutcome::try_from);
    let outcomes = outcomes
        .collect::<Result<_, _>>()
        .map_err(|error| name.broken_field(&error))?;
    Ok(Some(outcomes))
}
