//! A TCP proxy that damages what passes: the network between a client and a store.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::{JoinHandle, JoinSet},
};

/// Bytes that are moved at a time, and may be damaged once.
const PIECE: usize = 16 << 10;

/// What happens to a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Damage {
    /// A bit is another.
    Flip,
    /// A part of it comes twice.
    Duplicate,
    /// A part of it is left out.
    Omit,
    /// Its first part comes, and then the connection ends.
    Cut,
    /// In the table of a get on the bulk path two rows change places.
    Table,
    /// It comes never, and nothing after it: the connection stays open.
    Stall,
    /// A new connection is answered 503 and closed, whatever it asks.
    Unavailable,
    /// A new connection is answered 403, as by S3 to a key that has expired.
    Expired,
}

/// How much goes wrong.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    /// Which damage; a piece gets one of them.
    pub(crate) kinds: &'static [Damage],
    /// Chance of a piece to be damaged.
    pub(crate) share: f64,
}

impl Weather {
    pub(crate) const CLEAR: Self = Self::of(&[], 0.0);

    pub(crate) const fn of(kinds: &'static [Damage], share: f64) -> Self {
        Self { kinds, share }
    }

    /// Whether bytes can arrive that are not those that were sent, on a connection that looks sound: also those of an upload.
    pub(crate) fn alters(&self) -> bool {
        let altering = [Damage::Flip, Damage::Omit, Damage::Duplicate];
        self.kinds.iter().any(|kind| altering.contains(kind))
    }

    /// What happens, if anything, of what this is about.
    fn draw(&self, rng: &mut StdRng, to_connections: bool) -> Option<Damage> {
        let about = |kind: &&Damage| matches!(kind, Damage::Unavailable | Damage::Expired) == to_connections;
        let kinds: Vec<&Damage> = self.kinds.iter().filter(about).collect();
        if kinds.is_empty() || !rng.random_bool(self.share) {
            return None;
        }
        Some(*kinds[rng.random_range(0..kinds.len())])
    }
}

/// A listening proxy; it ends, with its connections, when dropped.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    weather: Mutex<Weather>,
    seed: u64,
    /// What is written in place of what on the way to the client; both of the same length.
    rewrite: Mutex<Option<(String, String)>>,
    connections: AtomicU64,
    damaged: AtomicU64,
}

impl Proxy {
    /// Starts to listen on a free port, for `target`.
    pub(crate) async fn start(target: SocketAddr, seed: u64) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("a port for the proxy")?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            target,
            weather: Mutex::new(Weather::CLEAR),
            seed,
            rewrite: Mutex::new(None),
            connections: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self {
            addr,
            shared,
            accepting,
        })
    }

    /// From now on, for all connections.
    pub(crate) fn set(&self, weather: Weather) {
        *self.shared.weather.lock() = weather;
    }

    /// An address that the store names is to be this one, so that its clients come through another proxy there too.
    pub(crate) fn rewrite(&self, named: SocketAddr, instead: SocketAddr) -> Result<()> {
        let (named, instead) = (named.to_string(), instead.to_string());
        ensure!(named.len() == instead.len(), "{named} and {instead} differ in length");
        *self.shared.rewrite.lock() = Some((named, instead));
        Ok(())
    }

    /// Pieces damaged so far.
    pub(crate) fn damaged(&self) -> u64 {
        self.shared.damaged.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Aborts what is left when this task is.
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let number = shared.connections.fetch_add(1, Ordering::Relaxed);
        let rng = |way: u64| StdRng::seed_from_u64(shared.seed ^ number << 8 ^ way);
        let weather = *shared.weather.lock();
        if let Some(kind) = weather.draw(&mut rng(2), true) {
            shared.damaged.fetch_add(1, Ordering::Relaxed);
            connections.spawn(refuse(client, kind));
            continue;
        }
        let Ok(store) = TcpStream::connect(shared.target).await else {
            continue;
        };
        let _ = (client.set_nodelay(true), store.set_nodelay(true));
        let (from_client, to_client) = client.into_split();
        let (from_store, to_store) = store.into_split();
        connections.spawn(pump(from_client, to_store, rng(0), Arc::clone(&shared), false));
        connections.spawn(pump(from_store, to_client, rng(1), Arc::clone(&shared), true));
        while connections.try_join_next().is_some() {}
    }
}

/// Answers for the store, over HTTP/1.1.
async fn refuse(mut client: TcpStream, kind: Damage) {
    let (status, body) = match kind {
        Damage::Expired => (
            "403 Forbidden",
            "<?xml version=\"1.0\"?><Error><Code>ExpiredToken</Code><Message>expired</Message></Error>",
        ),
        _ => ("503 Service Unavailable", ""),
    };
    let mut request = [0; 4096];
    let _ = client.read(&mut request).await;
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let _ = client.write_all(answer.as_bytes()).await;
    let _ = client.shutdown().await;
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut rng: StdRng, shared: Arc<Shared>, down: bool) {
    let mut piece = vec![0; PIECE];
    while let Ok(count @ 1..) = from.read(&mut piece).await {
        let weather = *shared.weather.lock();
        let mut bytes = piece[..count].to_vec();
        if down && let Some((named, instead)) = &*shared.rewrite.lock() {
            replace(&mut bytes, named.as_bytes(), instead.as_bytes());
        }
        let kind = weather.draw(&mut rng, false);
        if let Some(kind) = kind
            && damage(&mut rng, kind, &mut bytes)
        {
            shared.damaged.fetch_add(1, Ordering::Relaxed);
        }
        if to.write_all(&bytes).await.is_err() || kind == Some(Damage::Cut) {
            break;
        }
        if kind == Some(Damage::Stall) {
            std::future::pending::<()>().await;
        }
    }
    let _ = to.shutdown().await;
}

/// Puts `instead` wherever `named` stands in the piece; they have the same length.
fn replace(bytes: &mut [u8], named: &[u8], instead: &[u8]) {
    let mut at = 0;
    while let Some(found) = bytes[at..].windows(named.len()).position(|window| window == named) {
        bytes[at + found..at + found + named.len()].copy_from_slice(instead);
        at += found + named.len();
    }
}

/// Damages a piece; false where it has nothing in it that could be damaged so.
fn damage(rng: &mut StdRng, kind: Damage, bytes: &mut Vec<u8>) -> bool {
    let start = rng.random_range(0..bytes.len());
    let end = rng.random_range(start..bytes.len()) + 1;
    match kind {
        Damage::Flip => {
            // Every other one near the start of the piece, where frames and headers are.
            let at = if rng.random() {
                start
            } else {
                start % bytes.len().min(200)
            };
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        Damage::Duplicate => {
            let part = bytes[start..end].to_vec();
            bytes.splice(end..end, part);
        }
        Damage::Omit => {
            bytes.drain(start..end);
        }
        Damage::Cut => bytes.truncate(start),
        Damage::Table => return swap_rows(rng, bytes),
        Damage::Stall => bytes.clear(),
        Damage::Unavailable | Damage::Expired => return false,
    }
    true
}

/// Lets two rows in the table of a get of a chain change places, if the piece has such a table: two names that are as good as the
/// right ones. The bytes are those of `proto/src/bulk/FORMAT.md`.
fn swap_rows(rng: &mut StdRng, bytes: &mut [u8]) -> bool {
    const MAGIC: &[u8] = b"KVRQ";
    const GET_CHAIN: u8 = 2;
    const HEAD: usize = 96;
    const ROW: usize = 32;
    let Some(head) = bytes.windows(MAGIC.len()).position(|window| window == MAGIC) else {
        return false;
    };
    let table = head + HEAD;
    if table > bytes.len() || bytes[head + 4] != GET_CHAIN {
        return false;
    }
    let rows = u32::from_le_bytes([12, 13, 14, 15].map(|at| bytes[head + at])) as usize;
    let here = rows.min((bytes.len() - table) / ROW);
    if here < 2 {
        return false;
    }
    let first = rng.random_range(1..here);
    let (before, after) = bytes[table..].split_at_mut(first * ROW);
    before[..ROW].swap_with_slice(&mut after[..ROW]);
    true
}
