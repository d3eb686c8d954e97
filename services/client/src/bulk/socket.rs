//! Blocking sockets with timeouts: exact reads, gathered writes.

use std::{
    io::{self, IoSlice, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use rustix::net::sockopt;

use crate::local::Way;

/// Asked of the system for each direction: a frame fits, so that the store goes on while we verify. The system may grant less.
pub(crate) const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// A connection to a store.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    /// To a store on this machine.
    Local(Arc<Way>),
}

impl Socket {
    pub(crate) fn tcp(address: SocketAddr, connect_timeout: Duration, timeout: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, connect_timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        widen(stream.as_fd());
        Ok(Self::Tcp(stream))
    }

    /// Reads some bytes, at least one; an end is an error.
    pub(crate) fn read_some(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Tcp(stream) => stream.read(into),
                Self::Local(way) => way.read(into),
            };
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    pub(crate) fn read_exact(&mut self, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let read = self.read_some(into)?;
            into = &mut into[read..];
        }
        Ok(())
    }

    /// Writes all slices, gathered.
    pub(crate) fn write_all(&mut self, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => write_all(stream, slices),
            Self::Local(way) => way.request(slices),
        }
    }
}

/// Writes all slices, gathered.
pub(crate) fn write_all(mut stream: impl Write, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    // Empty ones in front would look like an end.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match stream.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Asks for large buffers; what the system grants is what there is.
pub(crate) fn widen(socket: BorrowedFd<'_>) {
    let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER_BYTES);
    let _ = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER_BYTES);
}
