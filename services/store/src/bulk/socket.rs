//! A peer's socket: whole reads and gathered writes, each with an end.

use std::{
    io::{self, IoSlice, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustix::net::sockopt;

/// Asked of the system for each direction; it may grant less.
const BUFFER_BYTES: usize = 4 << 20;

#[derive(Debug)]
pub(super) struct Socket(TcpStream);

impl Socket {
    pub(super) fn tcp(stream: TcpStream) -> Self {
        Self(stream)
    }

    /// No waiting to fill packets, large buffers, and no call that waits longer than `patience`.
    pub(super) fn set_up(&self, patience: Duration) -> io::Result<()> {
        self.0.set_nodelay(true)?;
        self.0.set_read_timeout(Some(patience))?;
        self.0.set_write_timeout(Some(patience))?;
        // What the system grants is what there is.
        let _ = sockopt::set_socket_send_buffer_size(self.0.as_fd(), BUFFER_BYTES);
        let _ = sockopt::set_socket_recv_buffer_size(self.0.as_fd(), BUFFER_BYTES);
        Ok(())
    }

    /// Waits for the first of `into`, until `idle` at most, and then for the rest, `patience` at most. False where the peer
    /// ended in order, or did nothing for too long.
    pub(super) fn receive_head(&self, into: &mut [u8], idle: Instant, patience: Duration) -> io::Result<bool> {
        let first = loop {
            match (&self.0).read(into) {
                Ok(0) => return Ok(false),
                Ok(read) => break read,
                Err(error) if is_timeout(&error) && Instant::now() >= idle => return Ok(false),
                Err(error) if is_timeout(&error) || error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        self.receive(&mut into[first..], Instant::now() + patience)?;
        Ok(true)
    }

    /// Fills `into`. A peer that sends a byte now and then does not get beyond `until` by more than a read's patience.
    pub(super) fn receive(&self, mut into: &mut [u8], until: Instant) -> io::Result<()> {
        while !into.is_empty() {
            match (&self.0).read(into) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => into = &mut into[read..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if !into.is_empty() && Instant::now() >= until {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// Sends all of `parts`, gathered; not beyond `until` by more than a write's patience.
    pub(super) fn send(&self, parts: &[&[u8]], until: Instant) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut slices = &mut slices[..];
        // Empty ones in front would look like an end.
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            match (&self.0).write_vectored(slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut slices, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_timeout(&error) && Instant::now() < until => {}
                Err(error) => return Err(error),
            }
            if !slices.is_empty() && Instant::now() >= until {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// Wakes who waits for the next request; what is being answered goes on.
    pub(super) fn end_reading(&self) {
        // One that is closed already needs no waking.
        let _ = self.0.shutdown(Shutdown::Read);
    }

    /// Ends both directions.
    pub(super) fn cut(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
