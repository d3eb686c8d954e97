//! [`BulkConnection`]: gets into the caller's memory and puts out of it, one thread, several requests on their way.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    net::TcpStream,
    sync::Arc,
    time::Duration,
};

use kvasir_block::{
    BlockHash, Checksum,
    planted::{Bug, planted},
};
use kvasir_proto::{
    GetOutcome, PutOutcome,
    bulk::{self, GetRow, Greeting, Op, PutRow, ReplyHead, RequestHead, Welcome},
};

use super::{
    BulkOffer,
    check::{self, Asked},
    socket::Socket,
};
use crate::{ClientConfig, ClientError, DataPath, ErrorKind, Namespace, PrefixMatch, error::CallName, observe};

/// Bytes received and then verified at a time: they are still in the processor's cache.
const STEP_BYTES: usize = 256 << 10;

/// Most requests without an answer. Their heads fit into the socket's buffers, so that neither side waits for the other.
const IN_FLIGHT_MAX: usize = 16;

/// One layer block to put, in the caller's memory.
#[derive(Clone, Copy, Debug)]
pub struct PutBlock<'a> {
    /// Name of the block.
    pub hash: BlockHash,
    /// Layer index from 0.
    pub layer: u16,
    /// CRC-32C of the payload, made where the bytes were made.
    pub checksum: Checksum,
    /// Keys and values, exactly a layer block of the namespace.
    pub payload: &'a [u8],
}

/// A connection of the bulk path that blocks: for a thread of its own, outside of any runtime. After an error that is not
/// `Invalid` or a refusal of the store it is of no more use; every call repeats the error, and a new one is to be made.
#[derive(Debug)]
pub struct BulkConnection {
    url: Arc<str>,
    socket: Socket,
    welcome: Welcome,
    verify: bool,
    call_timeout: Duration,
    next_id: u64,
    asked: VecDeque<(Asked, Namespace)>,
    table: Vec<u8>,
    failed: Option<ClientError>,
}

impl BulkConnection {
    /// Connects to the store that offered the bulk path when `namespace` was opened; any namespace of that store may be used.
    /// `config` says whether to verify and how long to wait.
    ///
    /// # Errors
    /// `Invalid` when the store offers no such path, `Unavailable` when it cannot be reached or has started anew (open the
    /// namespace again), `Exhausted` when it has too many connections.
    pub fn connect(namespace: &Namespace, config: &ClientConfig) -> Result<Self, ClientError> {
        let name = CallName {
            call: "bulk_connect",
            url: config.url.as_str().into(),
        };
        let connected = Self::open(&name, namespace, config);
        connected.map_err(|error| observe::failed(name.call, error))
    }

    fn open(name: &CallName, namespace: &Namespace, config: &ClientConfig) -> Result<Self, ClientError> {
        let none = "the store offers no such path: set store.bulk_listen, or use gRPC";
        let offer = namespace.bulk.as_ref().ok_or_else(|| name.invalid(none))?;
        let address = offer
            .address
            .filter(|_| matches!(config.path, DataPath::Auto | DataPath::Bulk));
        let address = address.ok_or_else(|| name.invalid(none))?;
        let socket = Socket::tcp(address, config.connect_timeout, config.call_timeout);
        let mut socket = socket.map_err(|error| name.error(ErrorKind::Unavailable, unreachable(&error)))?;
        let welcome =
            greet(&mut socket, offer).map_err(|error| name.error(ErrorKind::Unavailable, unreachable(&error)))?;
        let welcome = check::welcome(name, &welcome, offer.epoch)?;
        Ok(Self::over(socket, welcome, name, config))
    }

    /// Over a socket whose other end has let us in.
    pub(crate) fn over(socket: Socket, welcome: Welcome, name: &CallName, config: &ClientConfig) -> Self {
        Self {
            url: Arc::clone(&name.url),
            socket,
            welcome,
            verify: config.verify,
            call_timeout: config.call_timeout,
            next_id: 0,
            asked: VecDeque::new(),
            table: Vec::new(),
            failed: None,
        }
    }

    /// Its socket, on which nothing is on its way; `None` where that is not one of TCP.
    pub(crate) fn into_tcp(self) -> Option<TcpStream> {
        match self.socket {
            Socket::Tcp(stream) => Some(stream),
            Socket::Local(_) => None,
        }
    }

    /// Reads layer blocks into `into`: block `i` of `keys` goes to `into[i * layer_block_bytes..]`, and is verified as it comes.
    /// Bytes of blocks that are no hit are not said.
    ///
    /// # Errors
    /// `Invalid` for more keys than the store takes, a layer that does not exist, or memory of another size; `NotFound` when the
    /// namespace must be opened (again); else the connection broke.
    pub fn get_into(
        &mut self,
        namespace: &Namespace,
        keys: &[(BlockHash, u16)],
        into: &mut [u8],
    ) -> Result<Vec<GetOutcome>, ClientError> {
        self.nothing_on_its_way("bulk_get")?;
        self.ask_get(namespace, keys, None, None)?;
        self.receive_get(into)
    }

    /// Sends a get without waiting for it: [`Self::receive_get`] takes the answers in the order of the questions. Blocks whose
    /// turn comes after `deadline` are `TooLate`; `lease` is the one that covers them.
    ///
    /// # Errors
    /// As [`Self::get_into`]; `Exhausted` when 16 requests are unanswered.
    pub fn ask_get(
        &mut self,
        namespace: &Namespace,
        keys: &[(BlockHash, u16)],
        lease: Option<u64>,
        deadline: Option<Duration>,
    ) -> Result<(), ClientError> {
        let name = self.ready("bulk_get")?;
        check::rows(&name, keys.len(), self.welcome.rows_max)?;
        if let Some((_, layer)) = keys.iter().find(|(_, layer)| *layer >= namespace.schema.layers) {
            let held = namespace.schema.layers;
            return Err(name.invalid(format!("layer {layer}: the namespace has layers 0..{held}")));
        }
        let table = bulk::key_table(keys);
        let head = RequestHead {
            receiver_verifies: true,
            deadline,
            lease: lease.unwrap_or(0),
            ..self.head(Op::Get, namespace)
        };
        self.ask(&name, head, &table, &[], keys, namespace)
    }

    /// Receives the answer of the oldest get that was asked for, as [`Self::get_into`].
    ///
    /// # Errors
    /// As [`Self::get_into`]; `Invalid` when the oldest unanswered request is no get.
    pub fn receive_get(&mut self, into: &mut [u8]) -> Result<Vec<GetOutcome>, ClientError> {
        let name = self.ready("bulk_get")?;
        let Some((asked, namespace)) = self.asked.front() else {
            return Err(name.invalid("nothing was asked for"));
        };
        let block_bytes = namespace.layer_block_bytes;
        let expected = asked.rows * block_bytes;
        if asked.op != Op::Get || into.len() != expected {
            let found = into.len();
            return Err(name.invalid(format!(
                "{found} bytes of memory: the oldest get wants exactly {expected}"
            )));
        }
        let Some((asked, namespace)) = self.asked.pop_front() else {
            return Err(name.invalid("nothing was asked for"));
        };
        let mut outcomes = Vec::with_capacity(asked.rows);
        let mut wrong = Vec::new();
        loop {
            let (head, rows) = self.get_rows(&name, &asked, outcomes.len(), block_bytes)?;
            if head.placed {
                return Err(self.fail(name.broken("places over TCP")));
            }
            for row in &rows {
                let at = outcomes.len() * block_bytes;
                let mut outcome = row.outcome;
                if outcome == GetOutcome::Hit && !self.receive_block(&name, row, &mut into[at..at + block_bytes])? {
                    wrong.push(asked.keys[outcomes.len()]);
                    outcome = GetOutcome::Corrupt;
                }
                outcomes.push(outcome);
            }
            observe::bytes(name.call, head.payload_bytes as usize);
            if head.last {
                break;
            }
        }
        if !wrong.is_empty() {
            self.suspect(&name, &namespace, &wrong)?;
        }
        Ok(outcomes)
    }

    /// Puts layer blocks out of the caller's memory; one outcome each.
    ///
    /// # Errors
    /// `Invalid` for a block that is none of the namespace; `NotFound` when the namespace must be opened (again); else the
    /// connection broke, and blocks may or may not be held.
    pub fn put_from(&mut self, namespace: &Namespace, blocks: &[PutBlock<'_>]) -> Result<Vec<PutOutcome>, ClientError> {
        self.nothing_on_its_way("bulk_put")?;
        let name = self.ready("bulk_put")?;
        check::rows(&name, blocks.len(), self.welcome.rows_max)?;
        let mut table = Vec::with_capacity(blocks.len() * PutRow::BYTES);
        let mut payload_bytes = 0u64;
        for block in blocks {
            let head = kvasir_proto::EntryHead {
                hash: block.hash,
                layer: block.layer,
                length: block.payload.len(),
                checksum: block.checksum,
            };
            head.fits(&namespace.schema).map_err(|error| name.invalid(error))?;
            payload_bytes += block.payload.len() as u64;
            let row = PutRow {
                hash: block.hash,
                layer: block.layer,
                // A layer block of the schema, which is bounded.
                length: block.payload.len() as u32,
                checksum: block.checksum,
            };
            row.encode(&mut table);
        }
        check::payload(&name, payload_bytes, self.welcome.payload_bytes_max)?;
        let head = RequestHead {
            payload_bytes,
            ..self.head(Op::Put, namespace)
        };
        let payloads: Vec<&[u8]> = blocks.iter().map(|block| block.payload).collect();
        self.ask(&name, head, &table, &payloads, &[], namespace)?;
        observe::bytes(name.call, payload_bytes as usize);
        self.answer(&name)?;
        bulk::put_rows(&self.table).map_err(|error| self.broke(&name, &error))
    }

    /// Which blocks have all their layers.
    ///
    /// # Errors
    /// As [`Self::get_into`].
    pub fn exists(&mut self, namespace: &Namespace, hashes: &[BlockHash]) -> Result<Vec<bool>, ClientError> {
        self.nothing_on_its_way("bulk_exists")?;
        let name = self.ready("bulk_exists")?;
        check::rows(&name, hashes.len(), self.welcome.rows_max)?;
        let head = self.head(Op::Exists, namespace);
        self.ask(&name, head, &bulk::hash_table(hashes), &[], &[], namespace)?;
        self.answer(&name)?;
        Ok(bulk::presence_rows(&self.table).collect())
    }

    /// How many blocks of `chain` are held without a gap, and a lease that keeps them if `lease` is given.
    ///
    /// # Errors
    /// As [`Self::get_into`].
    pub fn match_prefix(
        &mut self,
        namespace: &Namespace,
        chain: &[BlockHash],
        lease: Option<Duration>,
    ) -> Result<PrefixMatch, ClientError> {
        self.nothing_on_its_way("bulk_match")?;
        let name = self.ready("bulk_match")?;
        check::rows(&name, chain.len(), self.welcome.rows_max)?;
        let head = RequestHead {
            lease: lease.map_or(0, |wish| crate::client::millis(wish).into()),
            ..self.head(Op::Match, namespace)
        };
        self.ask(&name, head, &bulk::hash_table(chain), &[], &[], namespace)?;
        let head = self.answer(&name)?;
        check::matched(&head, chain.len()).map_err(|what| self.fail(name.broken(what)))
    }

    fn head(&mut self, op: Op, namespace: &Namespace) -> RequestHead {
        self.next_id += 1;
        RequestHead::new(op, self.next_id, namespace.id)
    }

    /// The name of a call on a connection that works.
    pub(crate) fn ready(&self, call: &'static str) -> Result<CallName, ClientError> {
        match &self.failed {
            Some(error) => Err(error.clone()),
            None => Ok(CallName {
                call,
                url: Arc::clone(&self.url),
            }),
        }
    }

    /// Calls that wait for their own answer want no other before it.
    pub(crate) fn nothing_on_its_way(&self, call: &'static str) -> Result<(), ClientError> {
        let name = self.ready(call)?;
        match self.asked.len() {
            0 => Ok(()),
            count => Err(name.invalid(format!(
                "{count} gets were asked for and not received: receive them first"
            ))),
        }
    }

    /// Sends a request and notes what it asked for.
    fn ask(
        &mut self,
        name: &CallName,
        head: RequestHead,
        table: &[u8],
        payloads: &[&[u8]],
        keys: &[(BlockHash, u16)],
        namespace: &Namespace,
    ) -> Result<(), ClientError> {
        if self.asked.len() >= IN_FLIGHT_MAX {
            let what = format!("{IN_FLIGHT_MAX} requests are unanswered: receive some first");
            return Err(name.error(ErrorKind::Exhausted, what));
        }
        observe::call(name.call);
        let head = head.with_table(table);
        let bytes = head.encode();
        let mut slices = Vec::with_capacity(2 + payloads.len());
        slices.extend([IoSlice::new(&bytes), IoSlice::new(table)]);
        slices.extend(payloads.iter().map(|payload| IoSlice::new(payload)));
        if let Err(error) = self.socket.write_all(&mut slices) {
            return Err(self.lost(name, &error));
        }
        if matches!(head.op, Op::Suspect | Op::Return) {
            return Ok(());
        }
        let asked = Asked {
            op: head.op,
            id: head.id,
            rows: head.rows as usize,
            keys: keys.to_vec(),
        };
        self.asked.push_back((asked, namespace.clone()));
        Ok(())
    }

    /// The one frame of an answer without payload; its table is in `self.table`.
    fn answer(&mut self, name: &CallName) -> Result<ReplyHead, ClientError> {
        let Some((asked, _)) = self.asked.pop_front() else {
            return Err(name.invalid("nothing was asked for"));
        };
        let head = self.frame(name, &asked, 0)?;
        if !head.last || (asked.op != Op::Match && head.rows as usize != asked.rows) {
            let what = format!("{} outcomes for {} blocks", head.rows, asked.rows);
            return Err(self.fail(name.broken(what)));
        }
        Ok(head)
    }

    /// The head and table of the next frame of an answer, of which `first` rows have come.
    fn frame(&mut self, name: &CallName, asked: &Asked, first: usize) -> Result<ReplyHead, ClientError> {
        let mut bytes = [0; ReplyHead::BYTES];
        if let Err(error) = self.socket.read_exact(&mut bytes) {
            return Err(self.lost(name, &error));
        }
        let head = ReplyHead::decode(&bytes).map_err(|error| self.broke(name, &error))?;
        self.table.resize(head.table_bytes as usize, 0);
        if let Err(error) = self.socket.read_exact(&mut self.table) {
            return Err(self.lost(name, &error));
        }
        bulk::check_table(&self.table, head.table).map_err(|error| self.broke(name, &error))?;
        asked.fits(&head, first).map_err(|what| self.fail(name.broken(what)))?;
        match check::refusal(name, &head, &self.table) {
            // The request ended in order: the connection lives on.
            Some(error) => Err(observe::failed(name.call, error)),
            None => Ok(head),
        }
    }

    /// The head and rows of the next frame of a get, of which `first` rows have come.
    pub(crate) fn get_rows(
        &mut self,
        name: &CallName,
        asked: &Asked,
        first: usize,
        block_bytes: usize,
    ) -> Result<(ReplyHead, Vec<GetRow>), ClientError> {
        let head = self.frame(name, asked, first)?;
        let rows = check::get_rows(&head, &self.table, block_bytes).map_err(|error| self.broke(name, &error))?;
        Ok((head, rows))
    }

    /// Takes the question that is answered next.
    pub(crate) fn take_asked(&mut self) -> Option<(Asked, Namespace)> {
        self.asked.pop_front()
    }

    /// Whether bytes are verified.
    pub(crate) const fn verifies(&self) -> bool {
        self.verify
    }

    /// The payload of a hit; whether it is the right one.
    pub(crate) fn receive_block(
        &mut self,
        name: &CallName,
        row: &GetRow,
        into: &mut [u8],
    ) -> Result<bool, ClientError> {
        let mut checksum = Checksum::EMPTY;
        let mut done = 0;
        while done < into.len() {
            let end = (done + STEP_BYTES).min(into.len());
            let read = match self.socket.read_some(&mut into[done..end]) {
                Ok(read) => read,
                Err(error) => return Err(self.lost(name, &error)),
            };
            if self.verify {
                checksum = checksum.append(&into[done..done + read]);
            }
            done += read;
        }
        Ok(!self.verify || checksum == row.checksum || planted(Bug::ClientChecksumSkipped))
    }

    /// Tells the store which blocks came wrong, so that it looks at its own bytes.
    pub(crate) fn suspect(
        &mut self,
        name: &CallName,
        namespace: &Namespace,
        keys: &[(BlockHash, u16)],
    ) -> Result<(), ClientError> {
        for (hash, layer) in keys {
            observe::corrupt();
            tracing::warn!(?hash, layer, "received layer block is corrupt, dropping it");
        }
        let head = self.head(Op::Suspect, namespace);
        self.ask(name, head, &bulk::key_table(keys), &[], &[], namespace)
    }

    /// The connection is gone.
    fn lost(&mut self, name: &CallName, error: &io::Error) -> ClientError {
        let error = check::lost(name, error, self.call_timeout);
        self.fail(error)
    }

    fn broke(&mut self, name: &CallName, error: &bulk::BulkError) -> ClientError {
        self.fail(name.broken(error))
    }

    /// Notes the error that ends the connection.
    pub(crate) fn fail(&mut self, error: ClientError) -> ClientError {
        let error = observe::failed("bulk", error);
        self.failed = Some(error.clone());
        error
    }
}

/// Shows the token; the answer's bytes.
fn greet(socket: &mut Socket, offer: &BulkOffer) -> io::Result<[u8; Welcome::BYTES]> {
    let greeting = Greeting::new(offer.epoch, offer.token).encode();
    socket.write_all(&mut [IoSlice::new(&greeting)])?;
    let mut answer = [0; Welcome::BYTES];
    socket.read_exact(&mut answer)?;
    Ok(answer)
}

pub(crate) fn unreachable(error: &io::Error) -> String {
    format!("the store's bulk path cannot be reached ({error}); open the namespace again, use gRPC, or go on without")
}
