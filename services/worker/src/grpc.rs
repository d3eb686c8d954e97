//! `kvasir.v1.Worker` over gRPC: messages in and out, and nothing else.

mod convert;

use std::{
    hash::{BuildHasher, RandomState},
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{Stream, stream};
use kvasir_block::KvSchema;
use kvasir_proto::{
    convert::{namespace_bytes, optional_namespace},
    v1,
};
use kvasir_runtime::request_id::RequestId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use self::convert::{asked, reply, status};
use crate::{
    compute::{Command, ComputeHandle, Submission},
    events::{EventHub, Watch},
    load::{Door, Load},
    outbox::{self, Delivery, Inbox},
    request::{self, Limits},
};

/// Shortest time between two reports of the load on one stream.
const LOAD_INTERVAL: Duration = Duration::from_millis(50);

/// The service. One per worker.
#[derive(Debug)]
pub(crate) struct WorkerService {
    pub(crate) model: String,
    pub(crate) schema: KvSchema,
    pub(crate) limits: Limits,
    pub(crate) door: Door,
    pub(crate) compute: ComputeHandle,
    pub(crate) hub: Arc<EventHub>,
    pub(crate) load: watch::Receiver<Load>,
    /// Cancelled when watches are to end.
    pub(crate) closing: CancellationToken,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl v1::worker_server::Worker for WorkerService {
    type GenerateStream = Replies<v1::GenerateReply>;
    type WatchEventsStream = Replies<v1::BlockEvent>;
    type WatchLoadStream = Replies<v1::WorkerLoad>;

    async fn info(&self, _request: Request<v1::WorkerInfoRequest>) -> Result<Response<v1::WorkerInfoReply>, Status> {
        Ok(Response::new(v1::WorkerInfoReply {
            model: self.model.clone(),
            schema: Some(v1::KvSchema::from(&self.schema)),
            namespace: namespace_bytes(self.hub.namespace()),
            context_tokens_max: self.limits.context_tokens_max as u32,
            epoch: self.hub.epoch(),
        }))
    }

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let submitted = Instant::now();
        // The field is what the caller wrote down for this request; the metadata names the call.
        let id = match request.get_ref().request_id.parse() {
            Ok(id) => id,
            Err(_) => RequestId::of(&request),
        };
        let asked = asked(request.into_inner()).map_err(|invalid| Status::invalid_argument(invalid.to_string()))?;
        let request = request::Request::check(id, asked, &self.limits, random_seed())
            .map_err(|refusal| Status::invalid_argument(refusal.to_string()))?;
        let Some(ticket) = self.door.enter() else {
            let problem = format!(
                "{} requests wait already (worker.waiting_max): try again, or another worker",
                self.door.waiting_max()
            );
            return Err(Status::resource_exhausted(problem));
        };
        let (outbox, inbox) = outbox::pair();
        let departure = Departure {
            inbox,
            compute: self.compute.clone(),
        };
        let span = request.id.span("generate");
        let submission = Submission {
            request,
            outbox,
            ticket,
            span,
            submitted,
        };
        if !self.compute.send(Command::Submit(Box::new(submission))).await {
            return Err(status(&outbox::Failure::Stopping));
        }
        let replies = stream::unfold(departure, async |mut departure| {
            let delivery = departure.inbox.next().await?;
            let reply = match delivery {
                Delivery::Failed(failure) => Err(status(&failure)),
                delivery => Ok(reply(delivery)),
            };
            Some((reply, departure))
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let wanted = optional_namespace(&request.get_ref().namespace)
            .map_err(|invalid| Status::invalid_argument(invalid.to_string()))?;
        if wanted.is_some_and(|wanted| wanted != self.hub.namespace()) {
            return Err(Status::not_found(
                "namespace: this worker serves another one: take it from Info, or leave it empty",
            ));
        }
        let Some(watch) = self.hub.watch() else {
            return Err(Status::resource_exhausted(
                "too many watch this worker's events: end another watch",
            ));
        };
        let closing = self.closing.clone();
        let events = stream::unfold(
            Some((watch, closing)),
            async |state: Option<(Watch, CancellationToken)>| {
                let (mut watch, closing) = state?;
                let next = tokio::select! {
                    () = closing.cancelled() => return None,
                    next = watch.next() => next,
                };
                match next {
                    Some(event) => Some((Ok(event.into()), Some((watch, closing)))),
                    None => Some((
                        Err(Status::resource_exhausted("too slow to follow the events: watch again")),
                        None,
                    )),
                }
            },
        );
        Ok(Response::new(Box::pin(events)))
    }

    async fn watch_load(
        &self,
        _request: Request<v1::WatchLoadRequest>,
    ) -> Result<Response<Self::WatchLoadStream>, Status> {
        let mut load = self.load.clone();
        load.mark_changed();
        let state = (load, self.closing.clone(), true);
        let loads = stream::unfold(state, async |(mut load, closing, first)| {
            let next = async {
                if !first {
                    tokio::time::sleep(LOAD_INTERVAL).await;
                }
                load.changed().await.ok()?;
                Some(*load.borrow_and_update())
            };
            let now = tokio::select! {
                () = closing.cancelled() => return None,
                now = next => now?,
            };
            Some((Ok(now.into()), (load, closing, false)))
        });
        Ok(Response::new(Box::pin(loads)))
    }
}

/// A caller; when it leaves, the compute thread is told to look.
struct Departure {
    inbox: Inbox,
    compute: ComputeHandle,
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.inbox.leave();
        self.compute.nudge();
    }
}

/// A seed for a request that gave none, from the keys that the operating system seeded the standard hasher with.
fn random_seed() -> u64 {
    RandomState::new().hash_one(0)
}
