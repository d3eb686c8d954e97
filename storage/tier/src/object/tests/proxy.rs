//! What stands between a store and its bucket on a bad day: answers with errors, breaks off, flips bits, stalls.
//!
//! One request to a connection, so that each answer can be spoilt by itself.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

/// What to do to an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// Answer with this status and this error code.
    Status(u16, &'static str),
    /// Close the connection as soon as the request is there.
    Reset,
    /// Let this many bytes of the body through, then close; a body that is not longer passes.
    Cut(usize),
    /// Flip one bit of the byte at this place of the body.
    Flip(usize),
    /// Replace the body with zeros.
    Zeros,
    /// The answer says it holds one byte less than was asked for, and does.
    Less,
    /// Never answer.
    Stall,
    /// Let this many bytes of the body through, then never go on.
    StallIn(usize),
    /// Wait this long before the answer.
    Slow(u64),
}

impl Fault {
    /// One of all kinds.
    pub(super) fn random(rng: &mut StdRng, body_bytes_max: usize) -> Self {
        let at = rng.random_range(0..body_bytes_max);
        match rng.random_range(0..14) {
            0 => Self::Status(503, "SlowDown"),
            1 => Self::Status(500, "InternalError"),
            2 => Self::Status(403, "AccessDenied"),
            3 => Self::Status(400, "ExpiredToken"),
            4 => Self::Reset,
            5 => Self::Cut(at),
            6 | 7 => Self::Flip(at),
            8 => Self::Zeros,
            9 => Self::Less,
            10 if at % 2 == 0 => Self::Stall,
            10 => Self::StallIn(at),
            11 => Self::Slow(rng.random_range(1..40)),
            _ => Self::None,
        }
    }

    /// What it is called in counts.
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Status(_, code) => code,
            Self::Reset => "reset",
            Self::Cut(_) => "cut",
            Self::Flip(_) | Self::Zeros => "wrong body",
            Self::Less => "short body",
            Self::Stall | Self::StallIn(_) => "stall",
            Self::Slow(_) => "slow",
        }
    }

    /// Whether it only changes a body, so that an answer without one passes unharmed.
    fn needs_body(self) -> bool {
        matches!(
            self,
            Self::Cut(_) | Self::Flip(_) | Self::Zeros | Self::Less | Self::StallIn(_)
        )
    }
}

#[derive(Debug)]
enum Plan {
    Always(Fault),
    Seeded(Box<StdRng>, usize),
}

struct State {
    plan: Mutex<Plan>,
    /// Ranged GETs of objects only: lists and writes go through.
    reads_only: AtomicBool,
    stop: AtomicBool,
    /// Answers spoilt, by the name of the fault.
    spoilt: Mutex<BTreeMap<&'static str, u64>>,
}

impl State {
    fn count(&self, fault: Fault) {
        if fault != Fault::None {
            *self.spoilt.lock().entry(fault.name()).or_default() += 1;
        }
    }
}

pub(super) struct Proxy {
    pub(super) address: SocketAddr,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    pub(super) fn start(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            plan: Mutex::new(Plan::Always(Fault::None)),
            reads_only: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            spoilt: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        let thread = std::thread::spawn(move || {
            let mut connections = Vec::new();
            for client in listener.incoming() {
                if shared.stop.load(Ordering::SeqCst) {
                    break;
                }
                let shared = Arc::clone(&shared);
                let client = client.unwrap();
                // Either side may go away at any time; that is the point.
                connections.push(std::thread::spawn(move || drop(serve(client, server, &shared))));
                connections.retain(|connection| !connection.is_finished());
            }
            connections
                .into_iter()
                .for_each(|connection| connection.join().unwrap());
        });
        Self {
            address,
            state,
            thread: Some(thread),
        }
    }

    /// From now on, to every request.
    pub(super) fn set(&self, fault: Fault) {
        self.state.reads_only.store(false, Ordering::SeqCst);
        *self.state.plan.lock() = Plan::Always(fault);
    }

    /// From now on, to ranged reads of objects.
    pub(super) fn set_reads(&self, fault: Fault) {
        self.state.reads_only.store(true, Ordering::SeqCst);
        *self.state.plan.lock() = Plan::Always(fault);
    }

    /// From now on a fault of any kind, or none, drawn for each request.
    pub(super) fn set_random(&self, seed: u64, body_bytes_max: usize) {
        self.state.reads_only.store(false, Ordering::SeqCst);
        *self.state.plan.lock() = Plan::Seeded(Box::new(StdRng::seed_from_u64(seed)), body_bytes_max);
    }

    /// How many answers were spoilt, and how.
    pub(super) fn spoilt(&self) -> BTreeMap<&'static str, u64> {
        self.state.spoilt.lock().clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut client: TcpStream, server: SocketAddr, state: &State) -> io::Result<()> {
    let head = read_head(&mut client)?;
    let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let body_bytes = header(&text, "content-length")
        .and_then(|value| value.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; body_bytes];
    client.read_exact(&mut body)?;
    let is_read = text.starts_with("get ") && header(&text, "range").is_some();
    let fault = match &mut *state.plan.lock() {
        _ if state.reads_only.load(Ordering::SeqCst) && !is_read => Fault::None,
        Plan::Always(fault) => *fault,
        Plan::Seeded(rng, body_bytes_max) => Fault::random(rng, *body_bytes_max),
    };
    if !fault.needs_body() {
        state.count(fault);
    }
    match fault {
        Fault::Status(status, code) => {
            let page = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code></Error>");
            let bytes = page.len();
            return write!(
                client,
                "HTTP/1.1 {status} X\r\ncontent-type: application/xml\r\ncontent-length: {bytes}\r\nconnection: close\r\n\r\n{page}"
            );
        }
        Fault::Reset => return Ok(()),
        Fault::Stall => return hold(state),
        Fault::Slow(ms) => std::thread::sleep(Duration::from_millis(ms)),
        _ => {}
    }
    let (mut head, mut body) = ask(server, &head, &body)?;
    let is_spoilt = match fault {
        Fault::Cut(at) => at < body.len(),
        Fault::Less => is_read && !body.is_empty(),
        _ => fault.needs_body() && !body.is_empty(),
    };
    if is_spoilt {
        state.count(fault);
    }
    match fault {
        Fault::Flip(at) if !body.is_empty() => {
            let at = at % body.len();
            body[at] ^= 1 << (at % 8);
        }
        Fault::Zeros => body.fill(0),
        Fault::Less if is_read => {
            let bytes = body.len();
            body.pop();
            head = head.replace(
                &format!("content-length: {bytes}\r\n"),
                &format!("content-length: {}\r\n", bytes - 1),
            );
        }
        _ => {}
    }
    client.write_all(head.as_bytes())?;
    match fault {
        Fault::Cut(at) => client.write_all(&body[..at.min(body.len())]),
        Fault::StallIn(at) => {
            client.write_all(&body[..at.min(body.len().saturating_sub(1))])?;
            hold(state)
        }
        _ => client.write_all(&body),
    }
}

/// Keeps the connection open until the proxy ends or the fault is over.
fn hold(state: &State) -> io::Result<()> {
    let is_stalling = || match &*state.plan.lock() {
        Plan::Always(fault) => matches!(fault, Fault::Stall | Fault::StallIn(_)),
        Plan::Seeded(..) => true,
    };
    for _ in 0..200 {
        if state.stop.load(Ordering::SeqCst) || !is_stalling() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Passes the request on; answers with head and body.
fn ask(server: SocketAddr, head: &[u8], body: &[u8]) -> io::Result<(String, Vec<u8>)> {
    let mut upstream = TcpStream::connect(server)?;
    upstream.write_all(&head[..head.len() - 2])?;
    upstream.write_all(b"connection: close\r\n\r\n")?;
    upstream.write_all(body)?;
    let head = String::from_utf8_lossy(&read_head(&mut upstream)?).into_owned();
    let mut body = Vec::new();
    upstream.read_to_end(&mut body)?;
    Ok((head, body))
}

fn read_head(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        from.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(head)
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}
