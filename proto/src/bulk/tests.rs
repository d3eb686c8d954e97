use std::time::Duration;

use kvasir_block::{BlockHash, NamespaceId};
use proptest::prelude::*;

use super::*;
use crate::{GetOutcome, PutOutcome, convert::Tier};

const NAMESPACE: NamespaceId = NamespaceId::from_bytes([9; 32]);

fn hash(byte: u8) -> BlockHash {
    BlockHash::from_bytes([byte; 32])
}

#[test]
fn heads_round_trip() {
    let greeting = Greeting::new(77, [5; TOKEN_BYTES]);
    assert_eq!(Greeting::decode(&greeting.encode()), Ok(greeting));
    assert!(!format!("{greeting:?}").contains('5'), "a token is for nobody's logs");
    let welcome = Welcome {
        epoch: 77,
        rows_max: 4096,
        payload_bytes_max: 1 << 40,
        arena_bytes: 1 << 33,
    };
    for answer in [
        Ok(welcome),
        Err(Refusal::Version),
        Err(Refusal::Stale),
        Err(Refusal::Full),
        Err(Refusal::Stopping),
        Err(Refusal::Foreign),
    ] {
        assert_eq!(Welcome::decode(&Welcome::encode(answer)), Ok(answer));
    }
    for op in [
        Op::Get,
        Op::GetChain,
        Op::Put,
        Op::Exists,
        Op::Match,
        Op::Return,
        Op::Suspect,
    ] {
        for deadline in [None, Some(Duration::ZERO), Some(Duration::from_micros(1_234_567))] {
            let request = RequestHead {
                receiver_verifies: true,
                layers: 3..65_535,
                deadline,
                lease: u64::MAX,
                recompute: deadline.filter(|deadline| !deadline.is_zero()),
                payload_bytes: if op == Op::Put { 1 << 50 } else { 0 },
                ..RequestHead::new(op, 1 << 63, NAMESPACE)
            }
            .with_table(&vec![7; 3 * op.row_bytes()]);
            assert_eq!(request.rows, 3);
            assert_eq!(RequestHead::decode(&request.encode()), Ok(request));
        }
        let reply = ReplyHead {
            last: false,
            first: if op == Op::Match { 0 } else { 12 },
            disk_blocks: if op == Op::Match { 12 } else { 0 },
            payload_bytes: u64::MAX,
            hit_blocks: 1,
            host_blocks: 2,
            lease: 3,
            lease_ms: 4,
            ..ReplyHead::new(op, 8)
        };
        assert_eq!(ReplyHead::decode(&reply.encode()), Ok(reply));
        let (refusal, text) = ReplyHead::refusal(op, 8, Status::Exhausted, &"é".repeat(600));
        assert_eq!(ReplyHead::decode(&refusal.encode()), Ok(refusal.clone()));
        assert_eq!(check_table(&text, refusal.table), Ok(()));
        assert_eq!(reply_text(&text), "é".repeat(512));
    }
}

#[test]
fn messages_of_a_decode_round_trip() {
    let message = b"a query";
    let request = RequestHead::new(Op::Decode, 4, NAMESPACE).with_message(message);
    let read = RequestHead::decode(&request.encode()).expect("a request");
    assert_eq!((&read, read.payload_bytes), (&request, 7));
    assert_eq!(read.check_message(message), Ok(()));
    let damaged = Err(BulkError::Damaged { what: "the message" });
    assert_eq!(read.check_message(b"a quarry"), damaged);
    let reply = ReplyHead::new(Op::Decode, 4).with_message(message);
    let read = ReplyHead::decode(&reply.encode()).expect("a reply");
    assert_eq!((&read, read.check_message(message)), (&reply, Ok(())));
    assert_eq!(read.check_message(b""), damaged);
    // It has no table, and nothing but a put and a decode has a payload.
    let with_rows = RequestHead { rows: 1, ..request };
    let error = RequestHead::decode(&with_rows.encode()).unwrap_err().to_string();
    assert_eq!(error, "rows: 1: a decode has none");
    let of_a_get = RequestHead::new(Op::Get, 4, NAMESPACE).with_message(message);
    let error = RequestHead::decode(&of_a_get.encode()).unwrap_err().to_string();
    assert_eq!(error, "payload_bytes: 7: only a put or a decode carries payloads");
}

#[test]
fn tables_round_trip() {
    let hashes = [hash(1), hash(2)];
    assert_eq!(hash_rows(&hash_table(&hashes)).collect::<Vec<_>>(), hashes);
    let keys = [(hash(1), 0), (hash(2), 65_535)];
    assert_eq!(key_rows(&key_table(&keys)).collect::<Vec<_>>(), keys);
    let held = [true, false, true];
    assert_eq!(presence_rows(&presence_table(&held)).collect::<Vec<_>>(), held);

    let mut table = Vec::new();
    let rows: Vec<PutRow> = (0..3)
        .map(|i| PutRow {
            hash: hash(i),
            layer: u16::from(i) << 8,
            length: 1000 + u32::from(i),
            checksum: Checksum::from_u32(77),
        })
        .collect();
    rows.iter().for_each(|row| row.encode(&mut table));
    let mut head = RequestHead::new(Op::Put, 1, NAMESPACE).with_table(&table);
    head.payload_bytes = 3003;
    assert_eq!(PutRow::decode_all(&head, &table), Ok(rows));
    head.payload_bytes = 3004;
    let error = PutRow::decode_all(&head, &table).unwrap_err().to_string();
    assert_eq!(error, "payload_bytes: 3004, but the rows add up to 3003");
    table[0] ^= 1;
    let error = PutRow::decode_all(&head, &table).unwrap_err();
    assert_eq!(error, BulkError::Damaged { what: "the table" });

    for placed in [false, true] {
        let mut table = Vec::new();
        let hit = GetRow {
            outcome: GetOutcome::Hit,
            tier: Tier::Host,
            length: 5,
            checksum: Checksum::from_u32(6),
            place: if placed {
                Place {
                    offset: 1 << 40,
                    number: 8,
                }
            } else {
                Place::default()
            },
        };
        let rows = [
            hit,
            GetRow {
                tier: Tier::Disk,
                ..hit
            },
            GetRow::without(GetOutcome::Miss),
            GetRow::without(GetOutcome::Corrupt),
            GetRow::without(GetOutcome::Busy),
            GetRow::without(GetOutcome::TooLate),
        ];
        rows.iter().for_each(|row| row.encode(placed, &mut table));
        let read: Vec<_> = table
            .chunks_exact(GetRow::bytes(placed))
            .map(|row| GetRow::decode(row, placed).expect("a row"))
            .collect();
        assert_eq!(read, rows);
    }
    let outcomes = [
        PutOutcome::Stored,
        PutOutcome::Present,
        PutOutcome::Busy,
        PutOutcome::ChecksumMismatch,
    ];
    assert_eq!(put_rows(&put_reply_rows(&outcomes)), Ok(outcomes.to_vec()));
}

#[test]
fn what_cannot_be_is_named() {
    let right = RequestHead::new(Op::Get, 1, NAMESPACE);
    let table: [(RequestHead, &str); 2] = [
        (
            RequestHead {
                rows: 65_537,
                ..right.clone()
            },
            "rows: 65537: at most 65536, ask in several requests",
        ),
        (
            RequestHead {
                payload_bytes: 1,
                ..right.clone()
            },
            "payload_bytes: 1: only a put or a decode carries payloads",
        ),
    ];
    for (head, expected) in table {
        assert_eq!(RequestHead::decode(&head.encode()).unwrap_err().to_string(), expected);
    }
    let error = RequestHead::decode(&[b'G'; RequestHead::BYTES])
        .unwrap_err()
        .to_string();
    assert!(error.contains("the request begins with [47, 47, 47, 47]"), "{error}");
    let reply = ReplyHead {
        rows: 2,
        table_bytes: 3,
        ..ReplyHead::new(Op::Exists, 1)
    };
    let error = ReplyHead::decode(&reply.encode()).unwrap_err().to_string();
    assert_eq!(error, "table_bytes: 3 where 2 were to be expected");
    for (row, expected) in [
        ([0; 12], "outcome: 0 is no outcome of a get"),
        ([2, 1, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0], "length: 9 without a hit"),
    ] {
        assert_eq!(GetRow::decode(&row, false).unwrap_err().to_string(), expected);
    }
    assert!(put_rows(&[1, 9]).is_err());
    let place = Place { offset: 100, number: 1 };
    assert_eq!(place.range(28, 128), Some(100..128));
    assert_eq!(place.range(29, 128), None);
    let place = Place {
        offset: u64::MAX,
        number: 1,
    };
    assert_eq!(place.range(1, u64::MAX), None);
}

#[test]
fn every_flipped_bit_of_a_head_is_noticed() {
    let request = RequestHead::new(Op::GetChain, 3, NAMESPACE).encode();
    for bit in 0..RequestHead::BYTES * 8 {
        let mut flipped = request;
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(RequestHead::decode(&flipped).is_err(), "bit {bit}");
    }
    let reply = ReplyHead::new(Op::GetChain, 3).encode();
    for bit in 0..ReplyHead::BYTES * 8 {
        let mut flipped = reply;
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(ReplyHead::decode(&flipped).is_err(), "bit {bit}");
    }
}

/// The bytes themselves, so that a change of the format is a decision.
#[test]
fn a_request_as_it_was_written_down() {
    let head = RequestHead {
        layers: 1..3,
        deadline: Some(Duration::from_micros(9)),
        lease: 5,
        recompute: Some(Duration::from_micros(0x0403)),
        receiver_verifies: true,
        ..RequestHead::new(Op::GetChain, 7, NAMESPACE)
    }
    .with_table(hash(4).as_bytes());
    let bytes = head.encode();
    assert_eq!(
        bytes[..40],
        [
            b'K', b'V', b'R', b'Q', 2, 1, 1, 0, 3, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0,
            0, 5, 0, 0, 0, 0, 0, 0, 0
        ]
    );
    assert_eq!(bytes[52..84], [9; 32]);
    assert_eq!(bytes[84..92], [3, 4, 0, 0, 0, 0, 0, 0]);
}

proptest! {
    #[test]
    fn noise_is_an_error_and_never_a_panic(noise: [[u8; 32]; 3], sealed: bool) {
        let mut bytes = [0; RequestHead::BYTES];
        bytes.copy_from_slice(&noise.concat()[..RequestHead::BYTES]);
        bytes[..4].copy_from_slice(b"KVRQ");
        if sealed {
            let checksum = Checksum::of(&bytes[..RequestHead::BYTES - 4]);
            bytes[RequestHead::BYTES - 4..].copy_from_slice(&checksum.to_u32().to_le_bytes());
        }
        if let Ok(head) = RequestHead::decode(&bytes) {
            prop_assert!(head.table_bytes() <= ROWS_MAX * 64);
        }
        let mut bytes = [0; ReplyHead::BYTES];
        bytes.copy_from_slice(&noise.concat()[..ReplyHead::BYTES]);
        bytes[..4].copy_from_slice(b"KVRP");
        if sealed {
            let checksum = Checksum::of(&bytes[..ReplyHead::BYTES - 4]);
            bytes[ReplyHead::BYTES - 4..].copy_from_slice(&checksum.to_u32().to_le_bytes());
        }
        if let Ok(head) = ReplyHead::decode(&bytes) {
            prop_assert!(head.table_bytes as usize <= ROWS_MAX * 64);
        }
    }
}
