//! Round trips, and one line per way a message can be wrong.

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum, Dtype, KvSchema, NamespaceId, RopeStyle};

use super::*;
use crate::v1;

fn schema() -> KvSchema {
    KvSchema {
        model: "tiny".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: Some([3; 32]),
        layers: 2,
        kv_heads: 3,
        head_dim: 4,
        block_tokens: 16,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 10_000.0,
        rope_dims: 4,
        rope_style: RopeStyle::Interleaved,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "test/1".to_owned(),
    }
}

#[test]
fn schema_round_trips() {
    for adapter_sha256 in [None, Some([9; 32])] {
        let schema = KvSchema {
            adapter_sha256,
            ..schema()
        };
        assert_eq!(KvSchema::try_from(v1::KvSchema::from(&schema)), Ok(schema));
    }
}

#[test]
fn a_wrong_schema_names_the_field() {
    type Break = fn(&mut v1::KvSchema);
    let cases: [(Break, &str); 12] = [
        (
            |s| s.weights_sha256 = Bytes::from_static(b"short"),
            "weights_sha256: a SHA-256 digest has 32 bytes, this has 5",
        ),
        (
            |s| s.tokenizer_sha256 = Bytes::new(),
            "tokenizer_sha256: a SHA-256 digest has 32 bytes, this has 0",
        ),
        (
            |s| s.adapter_sha256 = Bytes::from_static(b"x"),
            "adapter_sha256: a SHA-256 digest has 32 bytes, this has 1",
        ),
        (|s| s.layers = 0, "layers: 0: must be at least 1"),
        (|s| s.head_dim = 70_000, "head_dim: 70000: must be at most 65535"),
        (
            |s| s.dtype = "f8".to_owned(),
            "dtype: unknown dtype \"f8\": use f16, bf16 or f32",
        ),
        (
            |s| s.rope_style = "twisted".to_owned(),
            "rope_style: \"twisted\": use interleaved or halves",
        ),
        (
            |s| s.layout = "v-then-k".to_owned(),
            "layout: \"v-then-k\": \"k-then-v/head-major/v1\" is the only one this version knows",
        ),
        (
            |s| s.hash_scheme = "md5".to_owned(),
            "hash_scheme: \"md5\": \"sha256_cbor\" is the only one this version knows",
        ),
        (
            |s| s.attention = "linear".to_owned(),
            "attention: \"linear\": this version knows \"full\" and \"sliding(..)\"",
        ),
        (|s| s.tp_rank = 1, "tp_rank: 1: must be below tp_world"),
        (|s| s.numerics = "n".repeat(2000), "numerics: 2000 bytes, at most 1024"),
    ];
    for (damage, expected) in cases {
        let mut wire = v1::KvSchema::from(&schema());
        damage(&mut wire);
        let error = KvSchema::try_from(wire).expect_err(expected);
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn hashes_name_the_index() {
    let good = Bytes::from_static(&[5; 32]);
    let bad = Bytes::from_static(&[5; 31]);
    let list = [good.clone(), good.clone(), good.clone(), bad];
    let error = hashes("hashes", &list, 10).expect_err("31 bytes");
    assert_eq!(error.to_string(), "hashes[3]: a block hash has 32 bytes, this has 31");
    let error = hashes("hashes", &list, 3).expect_err("too many");
    assert_eq!(
        error.to_string(),
        "hashes: 4 hashes, at most 3 are accepted: ask in several calls"
    );
    let names = [BlockHash::from_bytes([1; 32]), BlockHash::from_bytes([2; 32])];
    assert_eq!(hashes("hashes", &hash_bytes(&names), 2), Ok(names.to_vec()));
}

#[test]
fn namespaces_have_32_bytes_or_none() {
    assert_eq!(
        namespace(&[0; 3]).expect_err("3 bytes").to_string(),
        "namespace: a namespace id has 32 bytes, this has 3: take it from OpenNamespace"
    );
    assert_eq!(optional_namespace(&[]), Ok(None));
    assert_eq!(optional_namespace(&[4; 32]), Ok(Some(NamespaceId::from_bytes([4; 32]))));
    assert!(optional_namespace(&[4; 31]).is_err());
}

#[test]
fn entries_name_what_does_not_fit() {
    let head = EntryHead {
        hash: BlockHash::from_bytes([6; 32]),
        layer: 1,
        length: schema().layer_block_bytes(),
        checksum: Checksum::from_u32(0xABCD),
    };
    let wire = head.to_wire(v1::BlockOutcome::Unspecified);
    assert_eq!(EntryHead::try_from(&wire), Ok(head));
    assert_eq!(head.fits(&schema()), Ok(()));

    let check = |head: EntryHead, expected: &str| {
        assert_eq!(head.fits(&schema()).expect_err(expected).to_string(), expected);
    };
    check(
        EntryHead { layer: 2, ..head },
        "layer: 2 does not exist: the namespace has 2 layers",
    );
    check(
        EntryHead { length: 7, ..head },
        "length: a layer block of this namespace has 768 bytes, this has 7",
    );

    let batch = v1::BlockBatch {
        namespace: Bytes::new(),
        entries: vec![wire.clone(), wire.clone()],
    };
    assert_eq!(entry::heads(&batch, 1536), Ok(vec![head, head]));
    assert_eq!(
        entry::heads(&batch, 1000).expect_err("sum").to_string(),
        "payload: the entries' lengths add up to 1536 bytes, the payload has 1000"
    );
    let broken = v1::BlockEntry {
        hash: Bytes::from_static(b"abc"),
        ..wire.clone()
    };
    let batch = v1::BlockBatch {
        namespace: Bytes::new(),
        entries: vec![wire, broken],
    };
    assert_eq!(
        entry::heads(&batch, 1536).expect_err("hash").to_string(),
        "header.entries[1].hash: a block hash has 32 bytes, this has 3"
    );
}

#[test]
fn outcomes_round_trip_and_refuse_the_other_side() {
    for outcome in [
        PutOutcome::Stored,
        PutOutcome::Present,
        PutOutcome::Busy,
        PutOutcome::ChecksumMismatch,
    ] {
        assert_eq!(
            PutOutcome::try_from(i32::from(v1::BlockOutcome::from(outcome))),
            Ok(outcome)
        );
    }
    let gets = [
        GetOutcome::Hit,
        GetOutcome::Miss,
        GetOutcome::Corrupt,
        GetOutcome::Busy,
        GetOutcome::TooLate,
    ];
    for outcome in gets {
        assert_eq!(
            GetOutcome::try_from(i32::from(v1::BlockOutcome::from(outcome))),
            Ok(outcome)
        );
    }
    assert!(PutOutcome::try_from(i32::from(v1::BlockOutcome::Hit)).is_err());
    assert!(GetOutcome::try_from(i32::from(v1::BlockOutcome::Stored)).is_err());
    assert!(GetOutcome::try_from(99).is_err());
}

#[test]
fn events_round_trip() {
    let event = BlockEvents {
        epoch: 7,
        sequence: 9,
        kind: EventKind::Stored,
        namespace: Some(NamespaceId::from_bytes([1; 32])),
        hashes: vec![BlockHash::from_bytes([2; 32])],
        tier: Some(Tier::Host),
    };
    let end = BlockEvents {
        kind: EventKind::SnapshotEnd,
        namespace: None,
        hashes: vec![],
        tier: None,
        ..event.clone()
    };
    for event in [event.clone(), end] {
        assert_eq!(BlockEvents::try_from(v1::BlockEvent::from(event.clone())), Ok(event));
    }
    let check = |wire: v1::BlockEvent, expected: &str| {
        assert_eq!(BlockEvents::try_from(wire).expect_err(expected).to_string(), expected);
    };
    let wire = v1::BlockEvent::from(event);
    check(
        v1::BlockEvent {
            kind: 0,
            ..wire.clone()
        },
        "kind: 0 is no kind of event",
    );
    check(
        v1::BlockEvent {
            namespace: Bytes::new(),
            ..wire.clone()
        },
        "namespace: empty, but the event names blocks",
    );
    check(
        v1::BlockEvent {
            hashes: vec![Bytes::from_static(b"z")],
            ..wire
        },
        "hashes[0]: a block hash has 32 bytes, this has 1",
    );
}

#[test]
fn ranges_and_floats() {
    assert_eq!(std::ops::Range::try_from(v1::TokenRange { start: 2, end: 5 }), Ok(2..5));
    assert_eq!(
        std::ops::Range::try_from(v1::TokenRange { start: 5, end: 2 })
            .expect_err("backwards")
            .to_string(),
        "start: 5 lies behind end 2: ranges are [start, end)"
    );
    let values = [1.5f32, -2.0];
    assert_eq!(floats("q", &float_bytes(&values), 2), Ok(values.to_vec()));
    assert_eq!(
        floats("q", &[0; 7], 2).expect_err("7 bytes").to_string(),
        "q: 2 little-endian f32 have 8 bytes, this has 7"
    );
    assert_eq!(
        floats("q", &float_bytes(&[0.0, f32::NAN]), 2)
            .expect_err("NaN")
            .to_string(),
        "q[1]: must be finite"
    );
}
