//! WatchEvents: a subscription as a stream.

use std::{future::poll_fn, sync::Arc};

use futures::{Stream, stream};
use kvasir_cache::{BlockEvent, EventKind, EventStep, Subscription, Tier};
use kvasir_proto::{BlockEvents, convert, v1};
use tonic::Status;

use crate::served::Served;

/// The subscription's events until the store stops; behind too far is an error that says what to do.
pub(super) fn events(
    served: Arc<Served>,
    subscription: Subscription,
) -> impl Stream<Item = Result<v1::BlockEvent, Status>> {
    stream::try_unfold((served, subscription), |(served, subscription)| async move {
        let step = tokio::select! {
            biased;
            () = served.stopping.cancelled() => EventStep::Closed,
            step = poll_fn(|context| subscription.poll_next(context)) => step,
        };
        match step {
            EventStep::Event(event) => Ok(Some((wire(event), (served, subscription)))),
            EventStep::Lagged { missed } => Err(Status::resource_exhausted(format!(
                "this watcher fell {missed} events behind: watch again, the snapshot makes it whole"
            ))),
            EventStep::Closed => Ok(None),
        }
    })
}

fn wire(event: BlockEvent) -> v1::BlockEvent {
    let BlockEvent {
        epoch,
        sequence,
        kind,
        namespace,
        hashes,
        tier,
    } = event;
    let kind = match kind {
        EventKind::Snapshot => kvasir_proto::EventKind::Snapshot,
        EventKind::SnapshotEnd => kvasir_proto::EventKind::SnapshotEnd,
        EventKind::Stored => kvasir_proto::EventKind::Stored,
        EventKind::Removed => kvasir_proto::EventKind::Removed,
    };
    let tier = match tier {
        Tier::Host => convert::Tier::Host,
        Tier::Disk => convert::Tier::Disk,
        Tier::Object => convert::Tier::Object,
    };
    BlockEvents {
        epoch,
        sequence,
        kind,
        namespace,
        hashes,
        tier: Some(tier),
    }
    .into()
}
