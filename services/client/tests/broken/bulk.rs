//! Stores that break the bulk path: every wrong answer is an error that names it, never a panic, never wrong bytes.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use kvasir_block::{BlockHash, Checksum};
use kvasir_client::{
    BulkConnection, BulkOffer, ClientConfig, ClientError, ErrorKind, GetOutcome, Namespace, PutOutcome,
};
use kvasir_proto::{
    bulk::{GetRow, Greeting, Op, PutRow, Refusal, ReplyHead, RequestHead, Status, Welcome, put_reply_rows},
    convert, v1,
};

use crate::{
    script::{Script, client_of},
    store::block,
    support::{BYTES, CHAIN, namespace_at, schema, tenant},
};

const TOKEN: [u8; 16] = [7; 16];

const KEYS: [(BlockHash, u16); 2] = [(CHAIN[0], 0), (CHAIN[1], 1)];

fn at(address: SocketAddr) -> Namespace {
    namespace_at(Some(BulkOffer::tcp(address, 1, TOKEN)))
}

/// A store that greets as told, reads one get of [`KEYS`], and then says `answer`. What came after it is given back.
fn store(welcome: Vec<u8>, answer: Vec<u8>) -> (Namespace, thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let namespace = at(listener.local_addr().expect("an address"));
    let serving = thread::spawn(move || {
        let (mut stream, _): (TcpStream, _) = listener.accept().expect("a client");
        stream.read_exact(&mut [0; Greeting::BYTES]).expect("a greeting");
        stream.write_all(&welcome).expect("written");
        let mut rest = Vec::new();
        if stream.read_exact(&mut [0; RequestHead::BYTES + 2 * 36]).is_ok() {
            // A client that is gone already has seen enough.
            let _ = stream.write_all(&answer);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut rest);
        }
        rest
    });
    (namespace, serving)
}

fn right_welcome() -> Welcome {
    Welcome {
        epoch: 1,
        rows_max: 100,
        payload_bytes_max: 1 << 20,
        arena_bytes: 0,
    }
}

fn get(namespace: &Namespace) -> Result<(Vec<GetOutcome>, Vec<u8>), ClientError> {
    let config = ClientConfig {
        call_timeout: Duration::from_secs(5),
        ..ClientConfig::to("http://127.0.0.1:1")
    };
    let mut bulk = BulkConnection::connect(namespace, &config)?;
    let mut memory = vec![0; 2 * BYTES];
    let outcomes = bulk.get_into(namespace, &KEYS, &mut memory)?;
    Ok((outcomes, memory))
}

/// The right answer: block 0 hit, block 1 missed; `edit` makes another of it.
fn answer(edit: impl FnOnce(&mut ReplyHead, &mut Vec<GetRow>, &mut Vec<u8>)) -> Vec<u8> {
    let hit = GetRow {
        length: BYTES as u32,
        checksum: Checksum::of(&[5; BYTES]),
        ..GetRow::without(GetOutcome::Hit)
    };
    let mut rows = vec![hit, GetRow::without(GetOutcome::Miss)];
    let mut payload = vec![5; BYTES];
    let mut head = ReplyHead::new(Op::Get, 1);
    head.payload_bytes = BYTES as u64;
    edit(&mut head, &mut rows, &mut payload);
    let mut table = Vec::new();
    rows.iter().for_each(|row| row.encode(false, &mut table));
    let mut bytes = head.with_table(rows.len(), &table).encode().to_vec();
    bytes.extend(table);
    bytes.extend(payload);
    bytes
}

#[test]
fn the_right_answer_is_taken() {
    let (namespace, _serving) = store(Welcome::encode(Ok(right_welcome())).to_vec(), answer(|_, _, _| {}));
    let (outcomes, memory) = get(&namespace).expect("outcomes");
    assert_eq!(outcomes, [GetOutcome::Hit, GetOutcome::Miss]);
    assert_eq!(memory[..BYTES], [5; BYTES]);
}

#[test]
fn a_wrong_byte_is_a_miss_and_the_store_is_told() {
    let wrong = answer(|_, _, payload| payload[63] ^= 1);
    let (namespace, serving) = store(Welcome::encode(Ok(right_welcome())).to_vec(), wrong);
    let (outcomes, _) = get(&namespace).expect("outcomes");
    assert_eq!(outcomes, [GetOutcome::Corrupt, GetOutcome::Miss]);
    let told = serving.join().expect("no panic");
    let head = RequestHead::decode(told[..RequestHead::BYTES].try_into().expect("a head")).expect("a request");
    assert_eq!((head.op, head.rows), (Op::Suspect, 1));
    assert_eq!(told[RequestHead::BYTES..][..32], *KEYS[0].0.as_bytes());
}

#[test]
fn answers_that_break_the_contract_are_named() {
    let (refusal, text) = ReplyHead::refusal(Op::Get, 1, Status::NotFound, "no such namespace");
    let refusal = [&refusal.encode()[..], &text].concat();
    let mut damaged = answer(|_, _, _| {});
    damaged[ReplyHead::BYTES + 1] ^= 1;
    let mut flipped = answer(|_, _, _| {});
    flipped[9] ^= 1;
    let table: [(Vec<u8>, ErrorKind, &str); 12] = [
        (
            answer(|head, _, _| head.id = 2),
            ErrorKind::Internal,
            "an answer to Get 2 instead of Get 1",
        ),
        (
            answer(|head, _, _| head.op = Op::Put),
            ErrorKind::Internal,
            "table_bytes",
        ),
        (
            answer(|head, _, _| head.first = 1),
            ErrorKind::Internal,
            "rows 1 to 3 of 2",
        ),
        (
            answer(|_, rows, _| rows.push(GetRow::without(GetOutcome::Miss))),
            ErrorKind::Internal,
            "rows 0 to 3 of 2",
        ),
        (
            answer(|_, rows, _| rows.truncate(1)),
            ErrorKind::Internal,
            "the answer ended after 1 of 2 rows",
        ),
        (
            answer(|_, rows, _| rows[0].length = 63),
            ErrorKind::Internal,
            "length: 63 instead of 64",
        ),
        (
            answer(|head, _, _| head.payload_bytes = 1 << 60),
            ErrorKind::Internal,
            "payload_bytes: 1152921504606846976, but the rows add up to 64",
        ),
        (damaged, ErrorKind::Internal, "the table was damaged on its way"),
        (flipped, ErrorKind::Internal, "the reply was damaged on its way"),
        (vec![b'H'; 200], ErrorKind::Internal, "this is not Kvasir's bulk path"),
        (
            answer(|_, _, payload| payload.truncate(10)),
            ErrorKind::Unavailable,
            "the connection broke in mid-stream",
        ),
        (refusal, ErrorKind::NotFound, "no such namespace"),
    ];
    for (answer, kind, expected) in table {
        let (namespace, _serving) = store(Welcome::encode(Ok(right_welcome())).to_vec(), answer);
        let error = get(&namespace).expect_err(expected);
        assert!(error.message.contains(expected), "{expected}: {error}");
        assert_eq!(error.kind, kind, "{error}");
    }
}

#[test]
fn refusals_at_the_door_have_kinds() {
    let other_epoch = Welcome {
        epoch: 2,
        ..right_welcome()
    };
    let table: [(Vec<u8>, ErrorKind); 6] = [
        (Welcome::encode(Err(Refusal::Full)).to_vec(), ErrorKind::Exhausted),
        (Welcome::encode(Err(Refusal::Stale)).to_vec(), ErrorKind::Unavailable),
        (Welcome::encode(Err(Refusal::Version)).to_vec(), ErrorKind::Invalid),
        (Welcome::encode(Ok(other_epoch)).to_vec(), ErrorKind::Unavailable),
        (vec![0; Welcome::BYTES], ErrorKind::Internal),
        (Vec::new(), ErrorKind::Unavailable),
    ];
    for (welcome, kind) in table {
        let nothing_said = welcome.is_empty();
        let (namespace, _serving) = if nothing_said {
            // Nobody listens there any more.
            (at(([127, 0, 0, 1], 1).into()), thread::spawn(Vec::new))
        } else {
            store(welcome, Vec::new())
        };
        let error = get(&namespace).expect_err("refused");
        assert_eq!(error.kind, kind, "{error}");
    }
}

/// Puts two blocks by a client whose store offers a bulk path, where it says `answer` to the put.
async fn put(answer: Vec<u8>) -> Result<Vec<PutOutcome>, ClientError> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        stream.read_exact(&mut [0; Greeting::BYTES]).expect("a greeting");
        stream
            .write_all(&Welcome::encode(Ok(right_welcome())))
            .expect("written");
        let mut request = [0; RequestHead::BYTES + 2 * PutRow::BYTES + 2 * BYTES];
        stream.read_exact(&mut request).expect("a put");
        assert_eq!(request[RequestHead::BYTES + 2 * PutRow::BYTES..], [7; 2 * BYTES]);
        let _ = stream.write_all(&answer);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let client = client_of(Script {
        opened: v1::OpenNamespaceReply {
            namespace: convert::namespace_bytes(namespace_at(None).id),
            layer_block_bytes: BYTES as u64,
            limits: Some(v1::Limits {
                message_bytes_max: 1000,
                hashes_max: 5,
                lease_ms_max: 1,
            }),
            epoch: 1,
            bulk: Some(v1::BulkOffer {
                address: address.to_string(),
                token: TOKEN.to_vec().into(),
                local_socket: String::new(),
            }),
            ..v1::OpenNamespaceReply::default()
        },
        ..Script::default()
    })
    .await;
    let namespace = client.open_namespace(&tenant(), &schema()).await?;
    let mut stream = client.put_blocks(&namespace).await?;
    for index in 0..2 {
        stream.put(block(index, 1)).await?;
    }
    let outcomes = stream.finish().await?;
    Ok(outcomes.into_iter().map(|(_, _, outcome)| outcome).collect())
}

#[tokio::test]
async fn answers_to_puts_that_break_the_contract_are_named() {
    use PutOutcome::{Busy, Stored};
    let answer = |outcomes: &[PutOutcome], edit: fn(&mut ReplyHead, &mut Vec<u8>)| {
        let mut table = put_reply_rows(outcomes);
        let mut head = ReplyHead::new(Op::Put, 1).with_table(outcomes.len(), &table);
        edit(&mut head, &mut table);
        [&head.encode()[..], &table].concat()
    };
    let right = put(answer(&[Stored, Busy], |_, _| {})).await;
    assert_eq!(right.expect("outcomes"), [Stored, Busy]);
    let (refusal, text) = ReplyHead::refusal(Op::Put, 1, Status::NotFound, "no such namespace");
    let table: [(Vec<u8>, ErrorKind, &str); 8] = [
        (
            answer(&[Stored], |_, _| {}),
            ErrorKind::Internal,
            "the answer ended after 1 of 2 rows",
        ),
        (answer(&[Stored; 3], |_, _| {}), ErrorKind::Internal, "rows 0 to 3 of 2"),
        (
            answer(&[Stored; 2], |head, _| head.last = false),
            ErrorKind::Internal,
            "an answer to a put in more than one frame",
        ),
        (
            answer(&[Stored; 2], |head, _| head.id = 9),
            ErrorKind::Internal,
            "an answer to Put 9 instead of Put 1",
        ),
        (
            answer(&[Stored; 2], |_, table| table[1] = 3),
            ErrorKind::Internal,
            "the table was damaged on its way",
        ),
        (
            answer(&[Stored; 2], |_, table| table.truncate(1)),
            ErrorKind::Unavailable,
            "the connection broke in mid-stream",
        ),
        (Vec::new(), ErrorKind::Unavailable, "the connection broke in mid-stream"),
        (
            [&refusal.encode()[..], &text].concat(),
            ErrorKind::NotFound,
            "no such namespace",
        ),
    ];
    for (answer, kind, expected) in table {
        let error = put(answer).await.expect_err(expected);
        assert!(error.message.contains(expected), "{expected}: {error}");
        assert_eq!(error.kind, kind, "{error}");
    }
}
