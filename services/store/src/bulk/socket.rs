//! A peer's socket: whole reads and gathered writes, each with an end.

use std::{
    io::{self, IoSlice, Write},
    net::{Shutdown, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use kvasir_device::stream::{BusyPoll, set_up_tcp, widen};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{RecvFlags, recv},
};

#[derive(Debug)]
pub(super) struct Socket {
    stream: Stream,
    poll: BusyPoll,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    /// Of a process on this machine.
    Unix(UnixStream),
}

impl Socket {
    pub(super) fn tcp(stream: TcpStream, poll: Duration) -> Self {
        Self {
            stream: Stream::Tcp(stream),
            poll: BusyPoll::new(poll),
        }
    }

    pub(super) fn unix(stream: UnixStream, poll: Duration) -> Self {
        Self {
            stream: Stream::Unix(stream),
            poll: BusyPoll::new(poll),
        }
    }

    pub(super) fn is_local(&self) -> bool {
        matches!(self.stream, Stream::Unix(_))
    }

    /// No waiting to fill packets, large buffers, and no call that waits longer than `patience`.
    pub(super) fn set_up(&self, patience: Duration) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => {
                set_up_tcp(stream, stream.local_addr()?.ip(), stream.peer_addr()?.ip())?;
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))
            }
            Stream::Unix(stream) => {
                widen(stream.as_fd());
                stream.set_read_timeout(Some(patience))?;
                stream.set_write_timeout(Some(patience))
            }
        }
    }

    /// Waits for the first of `into`, until `idle` at most, and then for the rest, `patience` at most. False where the peer
    /// ended in order, or did nothing for too long.
    pub(super) fn receive_head(&self, into: &mut [u8], idle: Instant, patience: Duration) -> io::Result<bool> {
        let first = loop {
            match self.read(into) {
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
            match self.read(into) {
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
            match self.write(slices) {
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
        self.shutdown(Shutdown::Read);
    }

    /// Ends both directions.
    pub(super) fn cut(&self) {
        self.shutdown(Shutdown::Both);
    }

    /// Waits until the peer's end is closed, by its process or with it; false where it still is not after `wait`.
    pub(super) fn is_left(&self, wait: Duration) -> bool {
        let wait = Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: wait.subsec_nanos().into(),
        };
        // Asked for or not, a hang-up is told.
        let mut polled = [PollFd::new(self, PollFlags::empty())];
        poll(&mut polled, Some(&wait)).is_ok() && polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Whether bytes are there that were not received, or the peer has left.
    pub(super) fn is_asked(&self) -> bool {
        recv(self, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT).is_ok()
    }

    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        self.poll.receive(self, into)
    }

    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match &self.stream {
            Stream::Tcp(stream) => (&mut &*stream).write_vectored(slices),
            Stream::Unix(stream) => (&mut &*stream).write_vectored(slices),
        }
    }

    /// One that is closed already needs none.
    fn shutdown(&self, how: Shutdown) {
        let _ = match &self.stream {
            Stream::Tcp(stream) => stream.shutdown(how),
            Stream::Unix(stream) => stream.shutdown(how),
        };
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Tcp(stream) => stream.as_fd(),
            Stream::Unix(stream) => stream.as_fd(),
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}
