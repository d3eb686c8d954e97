//! Connections of the asynchronous client: a bounded number, each used by one stream at a time and then kept.

use std::{
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_device::ArenaView;
use kvasir_proto::bulk::Welcome;
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{
    BulkOffer, check,
    stream::{Kind, Stream},
};
use crate::{ClientConfig, ClientError, DataPath, ErrorKind, error::CallName};

/// How long a path that did not work is not tried again.
const PAUSE: Duration = Duration::from_secs(1);
/// The same for one that lets us not in for who we are, which is not likely to change.
const REFUSED: Duration = Duration::from_secs(600);

/// A connection that one stream has for itself.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) stream: Stream,
    pub(crate) welcome: Welcome,
    pub(crate) next_id: u64,
    /// It served another stream before, so the store may have closed it since.
    pub(crate) reused: bool,
    _place: OwnedSemaphorePermit,
}

/// The connections of a client.
#[derive(Debug)]
pub(crate) struct Pool {
    places: Arc<Semaphore>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What the store offered last.
    offer: Option<BulkOffer>,
    idle: Vec<(Stream, Welcome, u64)>,
    /// The memory of the store, where it is on this machine.
    view: Option<ArenaView>,
    /// Not before, by TCP and locally.
    pause: Option<Instant>,
    local_pause: Option<Instant>,
}

impl Pool {
    pub(crate) fn new(connections_max: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS))),
            state: Mutex::default(),
        }
    }

    /// Notes what the store offers now: connections of an earlier start are of no more use.
    pub(crate) fn offered(&self, offer: Option<&BulkOffer>) {
        let mut state = self.state.lock();
        if state.offer.as_ref() != offer {
            *state = State {
                offer: offer.cloned(),
                ..State::default()
            };
        }
    }

    /// A connection for a stream: one that is at hand, or a new one where `fresh` or none is. `Ok(None)` when the store offers no
    /// path that is wanted, all places are taken, or it failed a moment ago.
    ///
    /// # Errors
    /// It cannot be reached, or let us not in.
    pub(crate) async fn lane(
        &self,
        name: &CallName,
        config: &ClientConfig,
        fresh: bool,
    ) -> Result<Option<Lane>, ClientError> {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return Ok(None);
        };
        let offer = {
            let mut state = self.state.lock();
            if fresh {
                // One was found closed: the others are as old.
                state.idle.clear();
            }
            state.offer.clone()
        };
        let Some(offer) = offer else {
            return Ok(None);
        };
        let lane = |stream, welcome, next_id, reused| Lane {
            stream,
            welcome,
            next_id,
            reused,
            _place: place,
        };
        let mut problem = None;
        for kind in wanted(config.path, &offer) {
            if let Some((stream, welcome, next_id)) = self.idle(kind) {
                return Ok(Some(lane(stream, welcome, next_id, true)));
            }
            if self.is_paused(kind) {
                continue;
            }
            let connected = match timeout(config.connect_timeout, self.connect(name, kind, &offer)).await {
                Ok(connected) => connected,
                Err(_) => Err(name.timed_out(config.connect_timeout)),
            };
            match connected {
                Ok((stream, welcome)) => return Ok(Some(lane(stream, welcome, 0, false))),
                Err(error) => problem = Some(self.failed(kind, error)),
            }
        }
        problem.map_or(Ok(None), Err)
    }

    /// One of those at hand that is still open.
    fn idle(&self, kind: Kind) -> Option<(Stream, Welcome, u64)> {
        let mut state = self.state.lock();
        while let Some(at) = state.idle.iter().rposition(|(stream, ..)| stream.kind() == kind) {
            let found = state.idle.swap_remove(at);
            if !found.0.is_gone() {
                return Some(found);
            }
        }
        None
    }

    fn is_paused(&self, kind: Kind) -> bool {
        let state = self.state.lock();
        let until = match kind {
            Kind::Tcp => state.pause,
            Kind::Local => state.local_pause,
        };
        until.is_some_and(|until| Instant::now() < until)
    }

    async fn connect(&self, name: &CallName, kind: Kind, offer: &BulkOffer) -> Result<(Stream, Welcome), ClientError> {
        let connected = match kind {
            Kind::Tcp => Stream::tcp(offer).await.map(|(stream, answer)| (Some(stream), answer)),
            Kind::Local => Stream::local(offer, |answer, descriptor| self.view(answer, descriptor)).await,
        };
        let (stream, answer) = connected.map_err(|error| name.error(ErrorKind::Unavailable, unreachable(&error)))?;
        let welcome = check::welcome(name, &answer, offer.epoch)?;
        let stream = stream.ok_or_else(|| name.broken("a welcome without the memory's descriptor"))?;
        Ok((stream, welcome))
    }

    /// A mapping of the store's memory: one for all connections.
    fn view(&self, answer: &[u8; Welcome::BYTES], descriptor: OwnedFd) -> io::Result<ArenaView> {
        let welcome = Welcome::decode(answer)
            .map_err(io::Error::other)?
            .map_err(io::Error::other)?;
        let mut state = self.state.lock();
        if state.offer.as_ref().is_none_or(|offer| offer.epoch != welcome.epoch) {
            // Of another start than is offered now: not for others.
            drop(state);
            return ArenaView::map(descriptor, welcome.arena_bytes).map_err(io::Error::other);
        }
        match &state.view {
            Some(view) => Ok(view.clone()),
            None => {
                let view = ArenaView::map(descriptor, welcome.arena_bytes).map_err(io::Error::other)?;
                Ok(state.view.insert(view).clone())
            }
        }
    }

    /// Keeps a connection on which nothing is on its way.
    pub(crate) fn give_back(&self, lane: Lane) {
        let mut state = self.state.lock();
        if state
            .offer
            .as_ref()
            .is_some_and(|offer| offer.epoch == lane.welcome.epoch)
        {
            // At most as many as there are places.
            state.idle.push((lane.stream, lane.welcome, lane.next_id));
        }
    }

    fn failed(&self, kind: Kind, error: ClientError) -> ClientError {
        tracing::debug!(?kind, %error, "a faster path does not work, going by another");
        let mut state = self.state.lock();
        let pause = match kind {
            Kind::Tcp => &mut state.pause,
            Kind::Local => &mut state.local_pause,
        };
        *pause = Some(
            Instant::now()
                + if error.kind == ErrorKind::Invalid {
                    REFUSED
                } else {
                    PAUSE
                },
        );
        error
    }
}

/// The ways that are offered and wanted, in the order in which they are tried.
fn wanted(path: DataPath, offer: &BulkOffer) -> impl Iterator<Item = Kind> {
    let local = offer.local_socket.is_some() && matches!(path, DataPath::Auto | DataPath::Local);
    let tcp = offer.address.is_some() && path != DataPath::Grpc;
    let kinds = [(Kind::Local, local), (Kind::Tcp, tcp)];
    kinds.into_iter().filter_map(|(kind, wanted)| wanted.then_some(kind))
}

fn unreachable(error: &io::Error) -> String {
    format!("the store's bulk path cannot be reached ({error}); use gRPC, or go on without")
}
