//! Byte streams between two processes: what is asked of a TCP socket, and waiting for bytes without falling asleep at once.

use std::{
    hint, io,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::net::{RecvFlags, recv, sockopt};

/// Asked of the system for each direction: several frames of about 1 MiB fit, so that one end goes on while the other works. The
/// system may grant less.
const BUFFER_BYTES: usize = 4 << 20;

/// Sets up a connected TCP socket for blocks: small messages leave at once, buffers are large, and between two processes of one
/// machine bytes are not paced. BBR, which some systems have as the default, sends at the rate that it believes the way to have;
/// on loopback there is no way, and it halves the throughput there. Elsewhere the system's choice stands.
///
/// # Errors
/// What the system says, for a socket that is none of TCP.
pub fn set_up_tcp(socket: impl AsFd, local: IpAddr, peer: IpAddr) -> io::Result<()> {
    let socket = socket.as_fd();
    sockopt::set_tcp_nodelay(socket, true)?;
    widen(socket);
    if peer.is_loopback() || peer == local {
        // Every kernel has it and lets everybody choose it; where not, bytes come a little slower.
        let _ = sockopt::set_tcp_congestion(socket, "reno");
    }
    Ok(())
}

/// Asks for large buffers; what the system grants is what there is.
pub fn widen(socket: BorrowedFd<'_>) {
    let _ = sockopt::set_socket_send_buffer_size(socket, BUFFER_BYTES);
    let _ = sockopt::set_socket_recv_buffer_size(socket, BUFFER_BYTES);
}

/// How long a thread that waits for bytes looks again before it sleeps. A small answer takes less time than falling asleep and
/// being woken, most of all on a virtual machine. At most half as many threads of the process look as there are processors; one
/// more sleeps at once, and all do where there is one processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusyPoll {
    most: Duration,
}

impl BusyPoll {
    /// What two small messages and the work between them take.
    pub const DEFAULT: Duration = Duration::from_micros(50);

    /// Looks for `most`; zero is to sleep at once.
    pub const fn new(most: Duration) -> Self {
        Self { most }
    }

    /// Receives some bytes of a blocking socket; none: the other end is closed. Waits as long as the socket's own timeout says
    /// after it looked.
    ///
    /// # Errors
    /// What the system says; `WouldBlock` when nothing came in time.
    pub fn receive(self, socket: impl AsFd, into: &mut [u8]) -> io::Result<usize> {
        let socket = socket.as_fd();
        if let Some(received) = self.look(|| recv(socket, &mut *into, RecvFlags::DONTWAIT).map_err(io::Error::from)) {
            return received.map(|(_, bytes)| bytes);
        }
        let (_, bytes) = recv(socket, into, RecvFlags::empty())?;
        Ok(bytes)
    }

    /// Tries until it is something else than `WouldBlock`; `None` when it was that all the time.
    fn look<T>(self, mut attempt: impl FnMut() -> io::Result<T>) -> Option<io::Result<T>> {
        let mut attempt = || match attempt() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            other => Some(other),
        };
        if self.most.is_zero() {
            return None;
        }
        if let Some(done) = attempt() {
            return Some(done);
        }
        let _looking = Looking::begin()?;
        let until = Instant::now() + self.most;
        loop {
            // Giving way instead would put it behind every thread that has work, for milliseconds on a busy machine; who sleeps
            // is put in front of them when he is woken.
            hint::spin_loop();
            if let Some(done) = attempt() {
                return Some(done);
            }
            if Instant::now() >= until {
                return None;
            }
        }
    }
}

impl Default for BusyPoll {
    fn default() -> Self {
        Self::new(Self::DEFAULT)
    }
}

/// A thread that looks; one of a bounded number.
struct Looking;

static LOOKING: AtomicUsize = AtomicUsize::new(0);
static LOOKING_MAX: LazyLock<usize> =
    LazyLock::new(|| thread::available_parallelism().map_or(0, |processors| processors.get() / 2));

impl Looking {
    fn begin() -> Option<Self> {
        let most = *LOOKING_MAX;
        let more = |looking| (looking < most).then_some(looking + 1);
        // One that did not begin must not end either.
        match LOOKING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Some(Self),
            Err(_) => None,
        }
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        LOOKING.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (here, listener.accept().unwrap().0)
    }

    #[test]
    fn a_stream_within_the_machine_is_not_paced() {
        let (here, _there) = pair();
        let (local, peer) = (here.local_addr().unwrap().ip(), here.peer_addr().unwrap().ip());
        set_up_tcp(&here, local, peer).unwrap();
        assert!(here.nodelay().unwrap());
        assert_eq!(sockopt::tcp_congestion(&here).unwrap(), "reno");
        assert!(sockopt::socket_recv_buffer_size(&here).unwrap() > 64 << 10);
        let (here, _there) = pair();
        let before = sockopt::tcp_congestion(&here).unwrap();
        set_up_tcp(&here, local, "192.0.2.1".parse().unwrap()).unwrap();
        assert_eq!(sockopt::tcp_congestion(&here).unwrap(), before, "the system's choice");
        assert!(set_up_tcp(tempfile::tempfile().unwrap(), local, peer).is_err());
    }

    #[test]
    fn what_comes_is_received_however_it_is_waited_for() {
        for most in [Duration::ZERO, Duration::from_micros(50), Duration::from_secs(30)] {
            let (here, mut there) = pair();
            let poll = BusyPoll::new(most);
            let sender = thread::spawn(move || {
                thread::sleep(Duration::from_millis(5));
                there.write_all(b"late").unwrap();
            });
            let mut bytes = [0; 16];
            assert_eq!(poll.receive(&here, &mut bytes).unwrap(), 4);
            assert_eq!(&bytes[..4], b"late");
            sender.join().unwrap();
            assert_eq!(poll.receive(&here, &mut bytes).unwrap(), 0, "closed");
        }
    }

    #[test]
    fn the_sockets_own_timeout_ends_the_wait() {
        let (here, _there) = pair();
        here.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        let error = BusyPoll::default().receive(&here, &mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn only_so_many_look_at_once() {
        let looking: Vec<_> = std::iter::from_fn(Looking::begin).take(1000).collect();
        assert!(looking.len() <= *LOOKING_MAX, "{}", looking.len());
        // Who may not look is told so at once, whatever it would wait for.
        let poll = BusyPoll::new(Duration::from_secs(3600));
        let mut tries = 0;
        let none = poll.look(|| -> io::Result<()> {
            tries += 1;
            Err(io::ErrorKind::WouldBlock.into())
        });
        assert!(none.is_none() && tries == 1);
    }
}
