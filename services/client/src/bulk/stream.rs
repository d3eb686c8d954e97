//! The socket of a lane: to a store by TCP, or to one on this machine, whose memory is mapped.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use bytes::{Buf, BufMut, Bytes};
use kvasir_device::{
    ArenaView,
    stream::{set_up_tcp, widen},
};
use kvasir_proto::bulk::{GetRow, Greeting, Welcome};
use rustix::net::{RecvFlags, recv};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{TcpStream, UnixStream},
};

use super::BulkOffer;
use crate::local::Way;

/// Ways to a store, the fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Local,
    Tcp,
}

/// A connection that one stream has for itself. Whole requests go out between [`Self::begin`] and [`Self::end`].
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Local(Local),
}

/// A connection to a store on this machine.
#[derive(Debug)]
pub(crate) struct Local {
    stream: UnixStream,
    /// The same socket, for those who drop bytes that came by it.
    way: Arc<Way>,
    view: ArenaView,
}

impl Stream {
    /// Connects by TCP; the store's answer to the greeting.
    pub(crate) async fn tcp(offer: &BulkOffer) -> io::Result<(Self, [u8; Welcome::BYTES])> {
        let address = offer.address.ok_or(io::ErrorKind::AddrNotAvailable)?;
        let mut stream = TcpStream::connect(address).await?;
        set_up_tcp(&stream, stream.local_addr()?.ip(), address.ip())?;
        let greeting = Greeting::new(offer.epoch, offer.token).encode();
        stream.write_all(&greeting).await?;
        let mut answer = [0; Welcome::BYTES];
        stream.read_exact(&mut answer).await?;
        Ok((Self::Tcp(stream), answer))
    }

    /// Connects to a store on this machine. `view` makes the mapping of its memory, from the answer and the descriptor that came
    /// with it; `None` where we are not let in.
    pub(crate) async fn local(
        offer: &BulkOffer,
        view: impl FnOnce(&[u8; Welcome::BYTES], std::os::fd::OwnedFd) -> io::Result<ArenaView>,
    ) -> io::Result<(Option<Self>, [u8; Welcome::BYTES])> {
        let path = offer.local_socket.as_deref().ok_or(io::ErrorKind::AddrNotAvailable)?;
        let mut stream = UnixStream::connect(path).await?;
        widen(stream.as_fd());
        let greeting = Greeting::new(offer.epoch, offer.token).encode();
        stream.write_all(&greeting).await?;
        let mut answer = [0; Welcome::BYTES];
        let (received, descriptor) = stream
            .async_io(Interest::READABLE, || {
                kvasir_device::socket::receive_descriptor(&stream, &mut answer)
            })
            .await?;
        if received == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        stream.read_exact(&mut answer[received..]).await?;
        let Some(descriptor) = descriptor else {
            return Ok((None, answer));
        };
        let view = view(&answer, descriptor)?;
        let way = Way::new(std::os::unix::net::UnixStream::from(
            stream.as_fd().try_clone_to_owned()?,
        ));
        let local = Local {
            stream,
            way: Arc::new(way),
            view,
        };
        Ok((Some(Self::Local(local)), answer))
    }

    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Tcp(_) => Kind::Tcp,
            Self::Local(_) => Kind::Local,
        }
    }

    /// Whether the store has closed it, or said something that nobody asked for. For a connection on which nothing is on its way.
    pub(crate) fn is_gone(&self) -> bool {
        let peeked = recv(self, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        peeked.err() != Some(rustix::io::Errno::AGAIN)
    }

    /// Reads some bytes; 0 is the end. Dropping the wait loses nothing.
    pub(crate) async fn read_buf(&mut self, into: &mut impl BufMut) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read_buf(into).await,
            Self::Local(local) => local.stream.read_buf(into).await,
        }
    }

    /// What is to go out before a request that now begins.
    pub(crate) fn begin(&self) -> io::Result<Bytes> {
        match self {
            Self::Tcp(_) => Ok(Bytes::new()),
            Self::Local(local) => local.way.begin().map(Bytes::from),
        }
    }

    /// The request has left.
    pub(crate) fn end(&self) {
        if let Self::Local(local) = self {
            local.way.end();
        }
    }

    /// Writes some of what a request consists of. Dropping the wait loses nothing.
    pub(crate) async fn write_from(&mut self, from: &mut impl Buf) -> io::Result<()> {
        let written = match self {
            Self::Tcp(stream) => stream.write_buf(from).await?,
            Self::Local(local) => local.stream.write_buf(from).await?,
        };
        if written == 0 && from.has_remaining() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    /// Writes a whole request.
    pub(crate) async fn write_all(&mut self, request: &[u8]) -> io::Result<()> {
        let mut all = self.begin()?.chain(request);
        while all.has_remaining() {
            self.write_from(&mut all).await?;
        }
        self.end();
        Ok(())
    }

    /// Writes a whole small request, if that goes at once; else it may have left in part, and the connection is of no more use.
    pub(crate) fn try_write(&self, request: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.try_write(request),
            Self::Local(local) => {
                let before = local.way.begin()?;
                let whole = [&before, request].concat();
                let written = local.stream.try_write(&whole)?;
                if written < whole.len() {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                local.way.end();
                Ok(request.len())
            }
        }
    }

    /// The bytes of a place in the store's memory, which the store keeps until they are dropped; `None` for no such place.
    pub(crate) fn placed(&self, row: &GetRow) -> Option<Bytes> {
        let Self::Local(local) = self else { return None };
        let place = local.way.hold(row.place.number, row.length);
        let range = row.place.range(row.length, local.view.capacity())?;
        local.view.bytes(range, Arc::new(place))
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Local(local) => local.stream.as_fd(),
        }
    }
}
