//! Splits anywhere, messages of either encoder, and one line per way the bytes can be wrong.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{FutureExt, StreamExt, stream};
use http_body::{Body, Frame};
use proptest::prelude::*;
use prost::Message;
use tonic::Status;

use super::*;
use crate::v1;

const MAX: usize = 1 << 20;

fn entry(i: u8, bytes: usize) -> v1::BlockEntry {
    v1::BlockEntry {
        hash: Bytes::from(vec![i; 32]),
        layer: u32::from(i),
        length: bytes as u32,
        crc32c: 7,
        outcome: 0,
    }
}

fn batch(lengths: &[usize]) -> v1::BlockBatch {
    v1::BlockBatch {
        namespace: Bytes::from_static(&[9; 32]),
        entries: lengths
            .iter()
            .enumerate()
            .map(|(i, bytes)| entry(i as u8, *bytes))
            .collect(),
    }
}

/// Bytes that tell where they were.
fn pattern(count: usize) -> Bytes {
    (0..count).map(|i| (i * 31 % 251) as u8).collect()
}

fn framed(lengths: &[usize]) -> Bytes {
    let payload = lengths.iter().map(|bytes| pattern(*bytes)).collect();
    let header = batch(lengths);
    BulkMessage { header, payload }.encode().expect("small").into_bytes()
}

/// What the generated code makes of the same message, with the gRPC prefix.
fn generated(lengths: &[usize]) -> Bytes {
    let payload: Vec<u8> = lengths.iter().flat_map(|bytes| pattern(*bytes)).collect();
    let request = v1::PutBlocksRequest {
        header: Some(batch(lengths)),
        payload: payload.into(),
    };
    encode_message(&request).expect("small").into_bytes()
}

fn decode(parts: impl IntoIterator<Item = Bytes>) -> Result<Vec<BulkMessage>, FrameError> {
    let mut decoder = Decoder::new(MAX);
    let mut messages = Vec::new();
    for part in parts {
        decoder.push(part);
        while let Some(message) = decoder.next_message()? {
            messages.push(BulkMessage::parse(message, &BulkLimits::default())?);
        }
    }
    decoder.end().map(|()| messages)
}

#[test]
fn the_bytes_are_those_of_the_generated_encoder() {
    for lengths in [&[][..], &[0], &[1], &[300, 0, 70_000]] {
        assert_eq!(framed(lengths), generated(lengths), "{lengths:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_split_gives_the_same_messages(
        shapes in prop::collection::vec(prop::collection::vec(0usize..9000, 0..5), 1..4),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let wire: Bytes = shapes.iter().flat_map(|lengths| framed(lengths)).collect::<Vec<u8>>().into();
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(wire.len() + 1)).collect();
        at.extend([0, wire.len()]);
        at.sort_unstable();
        let parts = at.windows(2).map(|pair| wire.slice(pair[0]..pair[1]));
        let messages = decode(parts).expect("well-formed");
        prop_assert_eq!(messages.len(), shapes.len());
        for (mut message, lengths) in messages.into_iter().zip(&shapes) {
            prop_assert_eq!(&message.header, &batch(lengths));
            for bytes in lengths {
                prop_assert_eq!(message.payload.cut(*bytes), Some(pattern(*bytes)));
            }
            prop_assert!(message.payload.is_empty());
        }
    }

    #[test]
    fn garbage_is_an_error_or_a_message_never_a_panic(wire in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut prefixed = BytesMut::new();
        prefixed.put_u8(0);
        prefixed.put_u32(wire.len() as u32);
        prefixed.put_slice(&wire);
        let _ = decode([Bytes::from(wire.clone())]);
        // What prost takes, we take, and what it refuses, we refuse.
        let ours = decode([prefixed.freeze()]);
        let theirs = v1::PutBlocksRequest::decode(&wire[..]);
        prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "{:?} but {:?}", ours, theirs);
    }

    #[test]
    fn a_rope_reads_as_one_buffer(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..8),
        cuts in prop::collection::vec(0usize..60, 0..6),
    ) {
        let mut flat = Bytes::from(parts.concat());
        let mut rope: Rope = parts.into_iter().map(Bytes::from).collect();
        for (i, cut) in cuts.into_iter().enumerate() {
            let there = cut <= flat.len();
            let got = if i % 2 == 0 { rope.cut(cut) } else { rope.split(cut).map(Rope::into_bytes) };
            prop_assert_eq!(got, there.then(|| flat.split_to(cut)));
            prop_assert_eq!(rope.remaining(), flat.len());
        }
        prop_assert_eq!(rope.into_bytes(), flat);
    }
}

#[test]
fn what_lies_in_one_frame_is_shared() {
    let blocks = [pattern(6000), pattern(7000)];
    let message = BulkMessage {
        header: batch(&[6000, 7000]),
        payload: blocks.iter().cloned().collect(),
    };
    let frames = message.encode().expect("small");
    let mut decoder = Decoder::new(MAX);
    frames.into_iter().for_each(|frame| decoder.push(frame));
    let message = decoder.next_message().expect("well-formed").expect("complete");
    let mut payload = BulkMessage::parse(message, &BulkLimits::default())
        .expect("well-formed")
        .payload;
    for block in blocks {
        let taken = payload.cut(block.len()).expect("there");
        assert_eq!(taken.as_ptr(), block.as_ptr(), "cut out, not copied");
    }
}

#[test]
fn fields_come_in_any_order_and_unknown_ones_are_skipped() {
    fn field(buf: &mut Vec<u8>, number: u8, bytes: &[u8]) {
        buf.push(number << 3 | 2);
        prost::encode_length_delimiter(bytes.len(), buf).expect("room");
        buf.put_slice(bytes);
    }
    let (first, second) = (
        batch(&[3]),
        v1::BlockBatch {
            entries: vec![entry(5, 2)],
            ..v1::BlockBatch::default()
        },
    );
    let mut wire = Vec::new();
    field(&mut wire, 15, b"stale payload");
    wire.extend([2 << 3, 0xff, 0x01]); // varint
    field(&mut wire, 15, b"abcde");
    wire.extend([4 << 3 | 3, 5 << 3, 1, 4 << 3 | 4]); // group
    field(&mut wire, 1, &first.encode_to_vec());
    wire.extend([6 << 3 | 1, 1, 2, 3, 4, 5, 6, 7, 8, 7 << 3 | 5, 1, 2, 3, 4]); // fixed
    field(&mut wire, 9, b"unknown");
    field(&mut wire, 1, &second.encode_to_vec());
    let ours = BulkMessage::parse(Bytes::from(wire.clone()).into(), &BulkLimits::default()).expect("well-formed");
    let theirs = v1::PutBlocksRequest::decode(&wire[..]).expect("well-formed");
    assert_eq!(Some(ours.header), theirs.header);
    assert_eq!(ours.payload.into_bytes(), theirs.payload);
}

#[test]
fn wrong_bytes_are_refused_in_words() {
    let check = |wire: &[u8], expected: &str| {
        let limits = BulkLimits {
            header_bytes_max: 50,
            entries_max: 3,
        };
        let mut decoder = Decoder::new(1000);
        decoder.push(Bytes::copy_from_slice(wire));
        let error = match decoder.next_message() {
            Ok(Some(message)) => BulkMessage::parse(message, &limits).map(drop),
            Ok(None) => decoder.end(),
            Err(error) => Err(error),
        };
        assert_eq!(error.expect_err(expected).to_string(), expected);
    };
    check(
        &[0, 0, 0, 4, 0],
        "a message of 1024 bytes, at most 1000 are accepted: send smaller batches",
    );
    check(
        &[0, 255, 255, 255, 255],
        "a message of 4294967295 bytes, at most 1000 are accepted: send smaller batches",
    );
    check(
        &[1, 0, 0, 0, 9],
        "the message is compressed: send bulk messages uncompressed, KV does not get smaller",
    );
    check(
        b"GET /",
        "byte 0x47 where a gRPC message must begin with 0x00: this is not gRPC, or a length was wrong",
    );
    check(
        &[0, 0, 0],
        "the stream ended inside a message, 2 bytes before its end: the sender was cut off",
    );
    check(
        &[0, 0, 0, 0, 9, 1],
        "the stream ended inside a message, 8 bytes before its end: the sender was cut off",
    );
    check(
        &[0, 0, 0, 0, 2, 0x7a, 9],
        "payload: is longer than the message that holds it",
    );
    check(
        &[0, 0, 0, 0, 2, 0x0a, 9],
        "header: is longer than the message that holds it",
    );
    check(&[0, 0, 0, 0, 2, 0x08, 1], "header: has wire type 0, must have 2");
    check(&[0, 0, 0, 0, 2, 0x7d, 1], "payload: has wire type 5, must have 2");
    check(
        &[0, 0, 0, 0, 2, 0x00, 1],
        "message: is not protobuf: a field has no number",
    );
    check(
        &[0, 0, 0, 0, 1, 0x80],
        "message: is not protobuf: a number does not end",
    );
    check(
        &[0, 0, 0, 0, 2, 0x0a, 51],
        "header: has 51 bytes, at most 50 are accepted",
    );
    check(
        &[0, 0, 0, 0, 10, 0x0a, 8, 0x12, 0, 0x12, 0, 0x12, 0, 0x12, 0],
        "header.entries: more than 3 in one message: send smaller batches",
    );
}

#[test]
fn many_tiny_frames_do_not_cost_an_entry_each() {
    let wire = framed(&[100_000]);
    let mut decoder = Decoder::new(MAX);
    wire.chunks(1)
        .for_each(|byte| decoder.push(Bytes::copy_from_slice(byte)));
    let mut message = decoder.next_message().expect("well-formed").expect("complete");
    let mut parts = 0;
    while message.pop().is_some() {
        parts += 1;
    }
    assert!(parts <= 2, "{parts} parts for {} frames of one byte", wire.len());
}

type Frames = Vec<Result<Frame<Bytes>, Status>>;

/// Frames of a body that never waits.
fn frames(body: impl Body<Data = Bytes, Error = Status> + Unpin) -> Frames {
    let body = http_body_util::BodyStream::new(body);
    body.collect().now_or_never().expect("never waits")
}

/// What [`Incoming`] makes of frames: how many messages, and the end.
fn receive(frames: Frames, is_reply: bool) -> (usize, Result<(), String>) {
    let body = http_body_util::StreamBody::new(stream::iter(frames));
    let mut incoming = if is_reply {
        Incoming::reply(body, MAX)
    } else {
        Incoming::request(body, MAX)
    };
    let mut count = 0;
    loop {
        match incoming.message().now_or_never().expect("never waits") {
            Ok(Some(_)) => count += 1,
            Ok(None) => return (count, Ok(())),
            Err(error) => return (count, Err(error.to_string())),
        }
    }
}

#[test]
fn bodies_end_as_grpc_has_it() {
    let message = || Ok(Rope::from(framed(&[5])));
    let busy = || Err(Status::unavailable("stopping"));
    let reply = |items| frames(FramedBody::reply(stream::iter(items)));
    let request = |items| frames(FramedBody::request(stream::iter(items)));

    assert_eq!(receive(reply(vec![message(), message()]), true), (2, Ok(())));
    assert_eq!(
        receive(reply(vec![message(), busy()]), true),
        (1, Err("stopping".to_owned()))
    );
    assert_eq!(receive(request(vec![message()]), false), (1, Ok(())));
    assert_eq!(
        receive(request(vec![message(), busy()]), false),
        (1, Err("stopping".to_owned()))
    );

    let (count, end) = receive(request(vec![message()]), true);
    let no_status = "the reply ended without a gRPC status: the peer died or is not a gRPC server";
    assert_eq!((count, end), (1, Err(no_status.to_owned())));

    let mut cut = reply(vec![message()]);
    cut[0] = Ok(Frame::data(framed(&[5]).slice(..20)));
    let (count, end) = receive(cut, true);
    assert_eq!(count, 0);
    assert!(end.expect_err("cut").contains("inside a message"));
}
