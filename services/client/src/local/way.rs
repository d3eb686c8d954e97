//! The socket to a local store, shared by a connection and the bytes that came by it.

use std::{
    io::{self, IoSlice, Write},
    os::unix::net::UnixStream,
    sync::Arc,
};

use kvasir_block::NamespaceId;
use kvasir_device::stream::BusyPoll;
use kvasir_proto::bulk::{Op, ROWS_MAX, RequestHead, number_table};
use parking_lot::Mutex;

use crate::bulk::socket::write_all;

/// Places, and bytes in them, that are given back at once; fewer wait for the next request or the last drop.
const BATCH: usize = 32;
const BATCH_BYTES: u64 = 8 << 20;

/// A socket, blocking or not, on which one thread asks, and whoever drops bytes gives places back. While any of them is left the socket is open, and while
/// it is open the store keeps what was not given back.
#[derive(Debug)]
pub(crate) struct Way {
    stream: UnixStream,
    /// Held for a whole request, so that requests do not mix; false once one of them left in part.
    sending: Mutex<bool>,
    places: Mutex<Places>,
}

#[derive(Debug, Default)]
struct Places {
    held: usize,
    /// To be given back.
    returned: Vec<u64>,
    returned_bytes: u64,
}

/// A place that is held; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct HeldPlace {
    way: Arc<Way>,
    number: u64,
    bytes: u32,
}

impl Way {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            sending: Mutex::new(true),
            places: Mutex::default(),
        }
    }

    pub(crate) fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        BusyPoll::default().receive(&self.stream, into)
    }

    /// Sends a request, and before it what is to be given back.
    pub(crate) fn request(&self, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut whole = self.sending.lock();
        self.send_returns(&mut whole)?;
        self.send(&mut whole, slices)
    }

    /// A place that the store keeps for us from now on.
    pub(crate) fn hold(self: &Arc<Self>, number: u64, bytes: u32) -> HeldPlace {
        self.places.lock().held += 1;
        HeldPlace {
            way: Arc::clone(self),
            number,
            bytes,
        }
    }

    pub(crate) fn held(&self) -> usize {
        self.places.lock().held
    }

    fn give_back(&self, number: u64, bytes: u32) {
        let now = {
            let mut places = self.places.lock();
            places.held -= 1;
            places.returned.push(number);
            places.returned_bytes += u64::from(bytes);
            places.held == 0 || places.returned.len() >= BATCH || places.returned_bytes >= BATCH_BYTES
        };
        if !now {
            return;
        }
        // Where a request is being sent, the next one takes them along.
        if let Some(mut whole) = self.sending.try_lock()
            && let Err(error) = self.send_returns(&mut whole)
        {
            tracing::debug!(%error, "cannot give places back, they go with the connection");
        }
    }

    /// Begins a request that is written by other means, through the same socket; what is to go out before it.
    pub(crate) fn begin(&self) -> io::Result<Vec<u8>> {
        let mut whole = self.sending.lock();
        if !std::mem::replace(&mut *whole, false) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut messages = Vec::new();
        for numbers in self.take_returned().chunks(ROWS_MAX) {
            messages.extend(returns(numbers));
        }
        Ok(messages)
    }

    /// The request that was begun has left.
    pub(crate) fn end(&self) {
        *self.sending.lock() = true;
    }

    fn take_returned(&self) -> Vec<u64> {
        let mut places = self.places.lock();
        places.returned_bytes = 0;
        std::mem::take(&mut places.returned)
    }

    /// Sends what is to be given back, as far as it goes at once where the socket does not block; the rest waits.
    fn send_returns(&self, whole: &mut bool) -> io::Result<()> {
        let numbers = self.take_returned();
        let mut sent = 0;
        for numbers in numbers.chunks(BATCH) {
            if !*whole {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let message = returns(numbers);
            match (&self.stream).write(&message) {
                Ok(written) if written == message.len() => {}
                Ok(written) => self.send(whole, &mut [IoSlice::new(&message[written..])])?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    *whole = false;
                    return Err(error);
                }
            }
            sent += numbers.len();
        }
        if sent < numbers.len() {
            self.places.lock().returned.extend(&numbers[sent..]);
        }
        Ok(())
    }

    fn send(&self, whole: &mut bool, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        if !*whole {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        // Until all of it has left.
        *whole = false;
        write_all(&self.stream, slices)?;
        *whole = true;
        Ok(())
    }
}

/// A request that gives places back.
fn returns(numbers: &[u64]) -> Vec<u8> {
    let table = number_table(numbers);
    let head = RequestHead::new(Op::Return, 0, NamespaceId::from_bytes([0; 32])).with_table(&table);
    [&head.encode()[..], &table].concat()
}

impl Drop for HeldPlace {
    fn drop(&mut self) {
        self.way.give_back(self.number, self.bytes);
    }
}
