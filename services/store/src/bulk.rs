//! The bulk path: blocks over plain connections, a thread each, by the frames of `kvasir_proto::bulk`.
//!
//! A hit goes from the host tier's own memory to the socket with no thread in between and no copy but the kernel's; a put is
//! received into the room where it will rest and verified as it comes; without room it is not received, for `put_wait_max`. A connection does one request at a time, in order, and holds
//! at most a frame of about 1 MiB (or one block) of memory beside it.
//!
//! What is bounded: connections (`bulk_connections_max`; one more is told so and closed), the time a request takes to arrive
//! (`message_timeout`) and a frame to leave (`bulk_stall_timeout`), the time a connection does nothing (`bulk_idle_timeout`).
//! Places are taken before the token is shown, so who connects and says nothing has one for `message_timeout`.
//!
//! Decode streams come by it too, a message at a time: the connection's thread searches by itself, in the place of one of the threads for
//! retrieval, so there is no hand-over between a query and its reply.
//!
//! A process on this machine comes by a Unix socket ([`crate::local`]) and is served by the same code.

mod answer;
mod connection;
mod decode;
mod put;
mod socket;

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd, BorrowedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context;
use kvasir_proto::bulk::{Refusal, TOKEN_BYTES, Welcome};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use self::{connection::Connection, socket::Socket};
use crate::{
    local::{Budget, LocalListener, Places},
    metrics,
    served::Served,
};

/// How long connections may finish what they are sending when the store stops.
const DRAIN: Duration = Duration::from_secs(1);

/// How often a thread that waits for its peer to leave looks whether the store stops.
const LOOK: Duration = Duration::from_millis(100);

/// The listener and its connections; [`Self::stop`] ends them.
#[derive(Debug)]
pub(crate) struct BulkServer {
    addr: SocketAddr,
    shared: Arc<Shared>,
    local: Option<LocalListener>,
    accepting: Vec<JoinHandle<()>>,
}

/// What readers on this machine may still look at after their connections were closed. To be dropped when nothing is written into
/// the arena any more.
#[derive(Debug)]
pub(crate) struct Kept {
    _places: Vec<Places>,
}

#[derive(Debug)]
struct Shared {
    served: Arc<Served>,
    /// Of the store's asynchronous side.
    runtime: Handle,
    /// Of all local readers.
    budget: Arc<Budget>,
    kept: Mutex<Vec<Places>>,
    epoch: u64,
    token: [u8; TOKEN_BYTES],
    stopping: AtomicBool,
    connections: Mutex<Connections>,
    tcp: TcpListener,
}

#[derive(Debug, Default)]
struct Connections {
    next: u64,
    open: HashMap<u64, Arc<Socket>>,
    threads: Vec<JoinHandle<()>>,
}

impl BulkServer {
    /// Binds `store.bulk_listen` and serves. Called within the runtime.
    pub(crate) fn start(served: &Arc<Served>) -> anyhow::Result<Self> {
        let wanted = served.config.bulk_listen;
        let listener = TcpListener::bind(wanted)
            .with_context(|| format!("cannot listen on store.bulk_listen = {wanted}: choose a free address"))?;
        let addr = listener.local_addr()?;
        let local = LocalListener::bind(&served.config)?;
        let shared = Arc::new(Shared {
            epoch: served.cache()?.epoch(),
            token: served.bulk_token,
            served: Arc::clone(served),
            runtime: Handle::current(),
            budget: Arc::new(Budget::of(&served.config)),
            kept: Mutex::default(),
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
            tcp: listener,
        });
        let mut server = Self {
            addr,
            shared,
            local,
            accepting: Vec::new(),
        };
        match server.listen() {
            Ok(()) => Ok(server),
            Err(error) => {
                server.stop();
                Err(error.into())
            }
        }
    }

    /// Starts a thread for each listener.
    fn listen(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let poll = shared.served.config.bulk_poll.get();
        let accepting = thread::Builder::new().name("bulk-accept".to_owned());
        self.accepting.push(accepting.spawn(move || {
            shared.accept(|| shared.tcp.accept().map(|(stream, _)| Socket::tcp(stream, poll)));
        })?);
        if let Some(local) = &self.local {
            let (shared, listener) = (Arc::clone(&self.shared), local.listener()?);
            let accepting = thread::Builder::new().name("local-accept".to_owned());
            self.accepting.push(accepting.spawn(move || {
                shared.accept(|| listener.accept().map(|(stream, _)| Socket::unix(stream, poll)));
            })?);
        }
        Ok(())
    }

    /// Where the Unix socket is, if there is one.
    pub(crate) fn local_socket(&self) -> Option<&str> {
        self.local.as_ref().map(LocalListener::path)
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Takes no more, lets requests that are being answered end within a second, and closes. Blocks; for a thread that may.
    pub(crate) fn stop(mut self) -> Kept {
        let shared = &self.shared;
        shared.stopping.store(true, Ordering::Release);
        // Wakes the threads in `accept`, which then see the flag.
        wake(shared.tcp.as_fd());
        if let Some(local) = &self.local {
            wake(local.as_fd());
        }
        for accepting in self.accepting.drain(..) {
            if accepting.join().is_err() {
                tracing::error!("a bulk listener panicked");
            }
        }
        shared.each(Socket::end_reading);
        let until = Instant::now() + DRAIN;
        while Instant::now() < until && !shared.connections.lock().open.is_empty() {
            thread::sleep(Duration::from_millis(5));
        }
        shared.each(Socket::cut);
        let threads = std::mem::take(&mut shared.connections.lock().threads);
        for thread in threads {
            // A panic inside was caught and counted.
            let _ = thread.join();
        }
        Kept {
            _places: std::mem::take(&mut shared.kept.lock()),
        }
    }
}

fn wake(listener: BorrowedFd<'_>) {
    if let Err(error) = rustix::net::shutdown(listener, rustix::net::Shutdown::Both) {
        tracing::debug!(%error, "cannot wake a bulk listener");
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, next: impl Fn() -> io::Result<Socket>) {
        loop {
            let accepted = next();
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            match accepted {
                Ok(socket) => self.admit(socket),
                Err(error) => {
                    // Out of descriptors, or a peer that left at once: neither ends the listener.
                    tracing::warn!(%error, "cannot take a bulk connection");
                    thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// A thread for the connection, or a refusal.
    fn admit(self: &Arc<Self>, socket: Socket) {
        let config = &self.served.config;
        if let Err(error) = socket.set_up(config.message_timeout.get()) {
            tracing::debug!(%error, "a bulk connection left before it began");
            return;
        }
        if socket.is_local() && !self.is_ours(&socket) {
            metrics::refused("bulk_connect", "PERMISSION_DENIED");
            let _ = socket.send(&[&Welcome::encode(Err(Refusal::Foreign))], Instant::now());
            return;
        }
        let mut connections = self.connections.lock();
        let (done, running): (Vec<_>, Vec<_>) = std::mem::take(&mut connections.threads)
            .into_iter()
            .partition(JoinHandle::is_finished);
        connections.threads = running;
        for thread in done {
            // A panic inside was caught and counted.
            let _ = thread.join();
        }
        if connections.open.len() >= config.bulk_connections_max {
            metrics::refused("bulk_connect", "RESOURCE_EXHAUSTED");
            // Fits into the socket's buffer, so it does not wait.
            let _ = socket.send(&[&Welcome::encode(Err(Refusal::Full))], Instant::now());
            return;
        }
        let number = connections.next;
        connections.next += 1;
        let socket = Arc::new(socket);
        let spawned = thread::Builder::new().name(format!("bulk-{number}")).spawn({
            let (shared, socket) = (Arc::clone(self), Arc::clone(&socket));
            move || shared.serve(number, &socket)
        });
        match spawned {
            Ok(thread) => {
                connections.open.insert(number, socket);
                connections.threads.push(thread);
                metrics::bulk_connections(connections.open.len(), config.bulk_connections_max);
            }
            Err(error) => tracing::error!(%error, "cannot start a thread for a bulk connection"),
        }
    }

    /// Whether a local peer's user may read the store's memory.
    fn is_ours(&self, socket: &Socket) -> bool {
        match kvasir_device::socket::peer(socket) {
            Ok(peer) => crate::local::may_enter(peer.uid, &self.served.config.local_uids),
            Err(error) => {
                tracing::warn!(%error, "cannot tell who is at the other end of the local socket");
                false
            }
        }
    }

    /// Serves a connection to its end, however it ends.
    fn serve(&self, number: u64, socket: &Arc<Socket>) {
        let _open = Open { shared: self, number };
        let connection = Connection::new(self, socket);
        match catch_unwind(AssertUnwindSafe(|| connection.serve())) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(connection = number, %error, "a bulk connection ended early"),
            Err(_) => {
                metrics::bulk_panic();
                tracing::error!(connection = number, "a bulk connection panicked");
            }
        }
        if let Some(places) = connection.into_places() {
            self.outlast(socket, places);
        }
        socket.cut();
    }

    /// Keeps what the peer holds for as long as it may look at it, also where this side ended the connection.
    fn outlast(&self, socket: &Socket, places: Places) {
        if places.is_empty() {
            return;
        }
        // Its next request fails.
        socket.end_reading();
        while !socket.is_left(LOOK) {
            if self.is_stopping() {
                self.kept.lock().push(places);
                return;
            }
        }
    }

    fn each(&self, act: impl Fn(&Socket)) {
        self.connections.lock().open.values().for_each(|socket| act(socket));
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// A place among the connections, given back on drop.
struct Open<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let mut connections = self.shared.connections.lock();
        connections.open.remove(&self.number);
        metrics::bulk_connections(connections.open.len(), self.shared.served.config.bulk_connections_max);
    }
}

/// A token that nobody can guess.
pub(crate) fn new_token() -> io::Result<[u8; TOKEN_BYTES]> {
    use std::io::Read;
    let mut token = [0; TOKEN_BYTES];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut token)?;
    Ok(token)
}
