//! Connections of the asynchronous client: a bounded number, each used by one stream at a time and then kept.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use kvasir_proto::bulk::{Greeting, Welcome};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use kvasir_device::stream::set_up_tcp;

use super::{BulkOffer, check};
use crate::{ClientConfig, ClientError, ErrorKind, error::CallName};

/// How long a path that did not work is not tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// A connection that one stream has for itself.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) stream: TcpStream,
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
    idle: Vec<(TcpStream, Welcome, u64)>,
    /// Not before.
    pause: Option<Instant>,
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
            state.offer = offer.cloned();
            state.idle.clear();
            state.pause = None;
        }
    }

    /// A connection for a stream: one that is at hand, or a new one where `fresh` or none is. `Ok(None)` when the store offers no
    /// bulk path, all places are taken, or it failed a moment ago.
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
            if state.pause.is_some_and(|until| Instant::now() < until) {
                return Ok(None);
            }
            let Some(offer) = state.offer.clone() else {
                return Ok(None);
            };
            if fresh {
                // One was found closed: the others are as old.
                state.idle.clear();
            } else if let Some((stream, welcome, next_id)) = state.idle.pop() {
                return Ok(Some(Lane {
                    stream,
                    welcome,
                    next_id,
                    reused: true,
                    _place: place,
                }));
            }
            offer
        };
        match timeout(config.connect_timeout, connect(&offer)).await {
            Ok(Ok((stream, answer))) => match check::welcome(name, &answer, offer.epoch) {
                Ok(welcome) => Ok(Some(Lane {
                    stream,
                    welcome,
                    next_id: 0,
                    reused: false,
                    _place: place,
                })),
                Err(error) => Err(self.failed(error)),
            },
            Ok(Err(error)) => Err(self.failed(name.error(ErrorKind::Unavailable, unreachable(&error)))),
            Err(_) => Err(self.failed(name.timed_out(config.connect_timeout))),
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

    fn failed(&self, error: ClientError) -> ClientError {
        tracing::debug!(%error, "the bulk path does not work, going by gRPC");
        self.state.lock().pause = Some(Instant::now() + PAUSE);
        error
    }
}

async fn connect(offer: &BulkOffer) -> io::Result<(TcpStream, [u8; Welcome::BYTES])> {
    let address = offer
        .address
        .ok_or_else(|| io::Error::new(io::ErrorKind::AddrNotAvailable, "the store offers no bulk TCP path"))?;
    let mut stream = TcpStream::connect(address).await?;
    set_up_tcp(&stream, stream.local_addr()?.ip(), address.ip())?;
    stream
        .write_all(&Greeting::new(offer.epoch, offer.token).encode())
        .await?;
    let mut answer = [0; Welcome::BYTES];
    stream.read_exact(&mut answer).await?;
    Ok((stream, answer))
}

fn unreachable(error: &io::Error) -> String {
    format!("the store's bulk path cannot be reached ({error}); use gRPC, or go on without")
}
