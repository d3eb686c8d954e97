//! [`LocalConnection`]: gets that are places in the memory of a store on the same machine.

mod way;

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use kvasir_block::BlockHash;
use kvasir_device::{ArenaView, stream::widen};
use kvasir_proto::{
    GetOutcome, PutOutcome,
    bulk::{GetRow, Greeting, Welcome},
};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};

pub(crate) use self::way::Way;
use crate::{
    BulkConnection, BulkOffer, ClientConfig, ClientError, DataPath, ErrorKind, Namespace, PrefixMatch, PutBlock,
    bulk::{check, connection::unreachable, socket::Socket},
    error::CallName,
};

/// A connection to a store on this machine that blocks: for a thread of its own, outside of any runtime.
///
/// A hit is a [`Bytes`] that lies in the store's memory, mapped for reading; nothing is copied. It stays as it is while it, or any clone or
/// slice of it, lives, also when this connection is dropped or broken meanwhile. The last drop gives the place back to the store, a few at
/// a time and with the next request; all that are left go back when this connection and all bytes of it are gone, or the process ends. What
/// the store keeps for a connection is bounded (`store.local_bytes_max`): who holds more gets bytes of its own, received over the socket. So
/// what is kept for long is better copied.
///
/// After an error that is not `Invalid` or a refusal of the store it is of no more use; every call repeats the error, and a new one is to
/// be made.
#[derive(Debug)]
pub struct LocalConnection {
    bulk: BulkConnection,
    way: Arc<Way>,
    view: ArenaView,
}

impl LocalConnection {
    /// Connects to the store that offered its Unix socket when `namespace` was opened; any namespace of that store may be used.
    /// `config` says whether to verify and how long to wait.
    ///
    /// # Errors
    /// `Invalid` when the store offers no such path, or not to this process's user; `Unavailable` when it cannot be reached from here or
    /// has started anew (open the namespace again); `Exhausted` when it has too many connections.
    pub fn connect(namespace: &Namespace, config: &ClientConfig) -> Result<Self, ClientError> {
        let name = CallName {
            call: "local_connect",
            url: config.url.as_str().into(),
        };
        Self::open(&name, namespace, config).map_err(|error| crate::observe::failed(name.call, error))
    }

    fn open(name: &CallName, namespace: &Namespace, config: &ClientConfig) -> Result<Self, ClientError> {
        let none = "the store offers no such path: set store.local_socket, or go by TCP";
        let offer = namespace.bulk.as_ref().ok_or_else(|| name.invalid(none))?;
        let path = offer.local_socket.as_deref();
        let path = path.filter(|_| matches!(config.path, DataPath::Auto | DataPath::Local));
        let path = path.ok_or_else(|| name.invalid(none))?;
        let greeted = reach(path, config).and_then(|stream| greet(&stream, offer).map(|answer| (stream, answer)));
        let (stream, (answer, descriptor)) =
            greeted.map_err(|error| name.error(ErrorKind::Unavailable, unreachable(&error)))?;
        let welcome = check::welcome(name, &answer, offer.epoch)?;
        let descriptor = descriptor.ok_or_else(|| name.broken("a welcome without the memory's descriptor"))?;
        let view = ArenaView::map(descriptor, welcome.arena_bytes).map_err(|error| name.broken(error))?;
        let way = Arc::new(Way::new(stream));
        Ok(Self {
            bulk: BulkConnection::over(Socket::Local(Arc::clone(&way)), welcome, name, config),
            way,
            view,
        })
    }

    /// Reads layer blocks; one outcome each, and for a hit its bytes, verified where `ClientConfig::verify` says so.
    ///
    /// # Errors
    /// `Invalid` for more keys than the store takes or a layer that does not exist; `NotFound` when the namespace must be opened
    /// (again); else the connection broke.
    pub fn get(
        &mut self,
        namespace: &Namespace,
        keys: &[(BlockHash, u16)],
    ) -> Result<Vec<(GetOutcome, Option<Bytes>)>, ClientError> {
        self.get_with(namespace, keys, None, None)
    }

    /// The same; blocks whose turn comes after `deadline` are `TooLate`, `lease` is the one that covers them.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn get_with(
        &mut self,
        namespace: &Namespace,
        keys: &[(BlockHash, u16)],
        lease: Option<u64>,
        deadline: Option<Duration>,
    ) -> Result<Vec<(GetOutcome, Option<Bytes>)>, ClientError> {
        let name = self.bulk.ready("local_get")?;
        self.bulk.ask_get(namespace, keys, lease, deadline)?;
        let Some((asked, _)) = self.bulk.take_asked() else {
            return Err(name.invalid("nothing was asked for"));
        };
        let mut got = Vec::with_capacity(keys.len());
        let mut wrong = Vec::new();
        loop {
            let (head, rows) = self
                .bulk
                .get_rows(&name, &asked, got.len(), namespace.layer_block_bytes)?;
            for row in &rows {
                let payload = match row.outcome {
                    GetOutcome::Hit if head.placed => self.placed(&name, row)?,
                    GetOutcome::Hit => self.sent(&name, row)?,
                    _ => None,
                };
                let outcome = if row.outcome == GetOutcome::Hit && payload.is_none() {
                    wrong.push(keys[got.len()]);
                    GetOutcome::Corrupt
                } else {
                    row.outcome
                };
                got.push((outcome, payload));
            }
            if head.last {
                break;
            }
        }
        if !wrong.is_empty() {
            self.bulk.suspect(&name, namespace, &wrong)?;
        }
        Ok(got)
    }

    /// Puts layer blocks; one outcome each. As [`BulkConnection::put_from`]: the bytes go over the socket, once.
    ///
    /// # Errors
    /// As there.
    pub fn put_from(&mut self, namespace: &Namespace, blocks: &[PutBlock<'_>]) -> Result<Vec<PutOutcome>, ClientError> {
        self.bulk.put_from(namespace, blocks)
    }

    /// Which blocks have all their layers.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn exists(&mut self, namespace: &Namespace, hashes: &[BlockHash]) -> Result<Vec<bool>, ClientError> {
        self.bulk.exists(namespace, hashes)
    }

    /// How many blocks of `chain` are held without a gap, and a lease that keeps them if `lease` is given.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn match_prefix(
        &mut self,
        namespace: &Namespace,
        chain: &[BlockHash],
        lease: Option<Duration>,
    ) -> Result<PrefixMatch, ClientError> {
        self.bulk.match_prefix(namespace, chain, lease)
    }

    /// Layer blocks in the store's memory that are held here: their bytes have not all been dropped.
    pub fn held(&self) -> usize {
        self.way.held()
    }

    /// The bytes of a place; `None` where they are wrong.
    fn placed(&mut self, name: &CallName, row: &GetRow) -> Result<Option<Bytes>, ClientError> {
        let place = self.way.hold(row.place.number, row.length);
        let range = row.place.range(row.length, self.view.capacity());
        let Some(payload) = range.and_then(|range| self.view.bytes(range, Arc::new(place))) else {
            return Err(self.bulk.fail(name.broken("a place outside of the store's memory")));
        };
        Ok((!self.bulk.verifies() || row.checksum.verifies(&payload)).then_some(payload))
    }

    /// Bytes that came over the socket; `None` where they are wrong.
    fn sent(&mut self, name: &CallName, row: &GetRow) -> Result<Option<Bytes>, ClientError> {
        // A layer block of the namespace, which was checked.
        let mut payload = vec![0; row.length as usize];
        let right = self.bulk.receive_block(name, row, &mut payload)?;
        Ok(right.then(|| payload.into()))
    }
}

/// A socket whose waits all have an end, the one for being accepted included.
fn reach(path: &Path, config: &ClientConfig) -> std::io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(config.connect_timeout))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    widen(std::os::fd::AsFd::as_fd(&socket));
    let stream = UnixStream::from(socket);
    stream.set_read_timeout(Some(config.call_timeout))?;
    stream.set_write_timeout(Some(config.call_timeout))?;
    Ok(stream)
}

/// Shows the token; the answer, and the memory's descriptor where we are let in.
fn greet(mut stream: &UnixStream, offer: &BulkOffer) -> std::io::Result<([u8; Welcome::BYTES], Option<OwnedFd>)> {
    use std::io::{Read, Write};
    stream.write_all(&Greeting::new(offer.epoch, offer.token).encode())?;
    let mut answer = [0; Welcome::BYTES];
    let (received, descriptor) = kvasir_device::socket::receive_descriptor(stream, &mut answer)?;
    if received == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    stream.read_exact(&mut answer[received..])?;
    Ok((answer, descriptor))
}
