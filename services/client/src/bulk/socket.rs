//! Blocking sockets with timeouts: exact reads, gathered writes.

use std::{
    io::{self, IoSlice, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use kvasir_device::stream::{BusyPoll, set_up_tcp};

use crate::local::Way;

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
        set_up_tcp(&stream, stream.local_addr()?.ip(), address.ip())?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(Self::Tcp(stream))
    }

    /// Reads some bytes, at least one; an end is an error.
    pub(crate) fn read_some(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Tcp(stream) => BusyPoll::default().receive(&*stream, into),
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
