use proptest::prelude::*;

use super::*;

const NAMESPACE: NamespaceId = NamespaceId::from_bytes([0xA1; 32]);
const STORE: StoreId = StoreId::from_u64(0x5701);

fn record(hash: u8, layer: u16, payload: &[u8]) -> (LayerBlockKey, Bytes, Checksum) {
    let key = NAMESPACE.block(BlockHash::from_bytes([hash; 32])).layer(layer);
    (key, Bytes::copy_from_slice(payload), Checksum::of(payload))
}

fn whole(pack: &EncodedPack) -> Vec<u8> {
    pack.pieces.concat()
}

fn decode(pack: &EncodedPack, bytes: &[u8]) -> Result<Vec<Entry>, ManifestError> {
    let from = bytes.len().saturating_sub(pack.name.tail_bytes() as usize);
    decode_tail(NAMESPACE, &pack.name, bytes.len() as u64, &bytes[from..])
}

/// The bytes of FORMAT-OBJECT.md. If this fails, the format changed: raise [`PACK_FORMAT`], and keep this sample readable.
#[test]
fn golden_bytes() {
    let pack = encode_pack(
        NAMESPACE,
        STORE,
        0x1234,
        &[record(2, 3, b"keys"), record(4, 0x105, b"values")],
    );
    let bytes = whole(&pack);
    assert_eq!(bytes.len() as u64, pack.bytes);
    assert_eq!(bytes.len(), 64 + (96 + 4) + (96 + 6) + 2 * 56 + 64);
    assert_eq!(
        pack.name.to_string(),
        "0000000000005701-0000000000001234-00000002-6907362e9a5804876c8bea1840539060.kvpack"
    );
    let table: [(usize, &[u8]); 22] = [
        (0, b"KVPACK\r\n"),
        (8, &[1, 0, 0, 0, 0, 0, 0, 0]),
        (16, &[0xA1; 32]),
        (48, &[0; 12]),
        (64, b"KVOB"),
        (68, &[1, 0, 0, 0]),
        (72, &[0xA1; 32]),
        (104, &[2; 32]),
        (136, &[0, 3, 0, 0]),
        (140, &[4, 0, 0, 0]),
        (144, &[64, 0, 0, 0, 0, 0, 0, 0]),
        (152, &Checksum::of(b"keys").to_u32().to_le_bytes()),
        (160, b"keys"),
        (164, b"KVOB"),
        (260, b"values"),
        (266, &[2; 32]),
        (298, &[3, 0, 0, 0]),
        (302, &[4, 0, 0, 0]),
        (306, &[64, 0, 0, 0, 0, 0, 0, 0]),
        (354, &[5, 1, 0, 0, 6, 0, 0, 0, 164, 0, 0, 0, 0, 0, 0, 0]),
        (378, b"KVPKFOOT\x01\0\0\0\x02\0\0\0\x0a\x01\0\0\0\0\0\0"),
        (402, &[0xA1; 32]),
    ];
    for (at, expected) in table {
        assert_eq!(&bytes[at..at + expected.len()], expected, "offset {at}");
    }
    // Every CRC on the page, from the bytes in front of it.
    for (from, at) in [(0, 60), (64, 156), (164, 256), (378, 438)] {
        assert_eq!(
            u32_at(&bytes, at),
            Checksum::of(&bytes[from..at]).to_u32(),
            "CRC at {at}"
        );
    }
    assert_eq!(u32_at(&bytes, 434), Checksum::of(&bytes[266..378]).to_u32());
    assert_eq!(decode(&pack, &bytes), Ok(pack.entries.clone()));
}

#[test]
fn names() {
    let good = "0000000000005701-0000000000001234-00000002-6d21b00be8d5bab4bc4d7e38cfc22f53.kvpack";
    assert_eq!(
        PackName::parse(good).map(|name| name.to_string()).as_deref(),
        Some(good)
    );
    let bad = [
        "",
        ".kvpack",
        "0000000000005701-0000000000001234-00000002-6d21b00be8d5bab4bc4d7e38cfc22f53",
        "0000000000005701-0000000000001234-00000002-6D21B00BE8D5BAB4BC4D7E38CFC22F53.kvpack",
        "0000000000005701-0000000000001234-00000000-6d21b00be8d5bab4bc4d7e38cfc22f53.kvpack",
        "0000000000005701-0000000000001234-ffffffff-6d21b00be8d5bab4bc4d7e38cfc22f53.kvpack",
        "0000000000005701-0000000000001234-00000002-6d21b00be8d5bab4bc4d7e38cfc22f53-1.kvpack",
        "+000000000005701-0000000000001234-00000002-6d21b00be8d5bab4bc4d7e38cfc22f53.kvpack",
        "0000000000005701-0000000000001234-00000002-6d21b00be8d5bab4bc4d7e38cfc22f5é.kvpack",
    ];
    for name in bad {
        assert_eq!(PackName::parse(name), None, "{name}");
    }
}

#[test]
fn another_namespace_is_refused() {
    let pack = encode_pack(NAMESPACE, STORE, 1, &[record(2, 3, b"keys")]);
    let bytes = whole(&pack);
    let tail = &bytes[bytes.len() - pack.name.tail_bytes() as usize..];
    let other = NamespaceId::from_bytes([0xA2; 32]);
    let decoded = decode_tail(other, &pack.name, pack.bytes, tail);
    assert_eq!(
        decoded,
        Err(ManifestError::Wrong("the namespace: it is another one's pack"))
    );
}

#[test]
fn a_newer_format_says_so() {
    let pack = encode_pack(NAMESPACE, STORE, 1, &[record(2, 3, b"keys")]);
    let mut bytes = whole(&pack);
    let footer = bytes.len() - FOOTER_BYTES;
    bytes[footer + 8] = PACK_FORMAT as u8 + 1;
    let crc = Checksum::of(&bytes[footer..footer + 60]).to_u32();
    bytes[footer + 60..].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(decode(&pack, &bytes), Err(ManifestError::Newer(PACK_FORMAT + 1)));
}

#[test]
fn every_flip_in_a_tail_and_every_other_length_is_refused() {
    let pack = encode_pack(NAMESPACE, STORE, 1, &[record(2, 3, b"keys"), record(4, 5, b"values")]);
    let bytes = whole(&pack);
    let tail_from = bytes.len() - pack.name.tail_bytes() as usize;
    for bit in tail_from * 8..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&pack, &flipped).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(decode(&pack, &bytes[..len]).is_err(), "cut to {len}");
    }
    assert!(
        decode(&pack, &[bytes.as_slice(), &[0]].concat()).is_err(),
        "one byte more"
    );
}

/// A manifest whose digest and CRCs agree, but whose places do not: made by someone who can write to the bucket.
#[test]
fn places_outside_the_payloads_are_refused() {
    let entry = |offset, payload_bytes| Entry {
        hash: BlockHash::from_bytes([1; 32]),
        layer: 0,
        offset,
        payload_bytes,
        checksum: Checksum::from_u32(7),
    };
    let table: [(&[Entry], bool); 6] = [
        (&[entry(64, 100), entry(260, 100)], true),
        (&[entry(63, 100), entry(260, 100)], false),
        (&[entry(64, 101), entry(260, 100)], false),
        (&[entry(260, 100), entry(64, 100)], false),
        (&[entry(64, 100), entry(260, 101)], false),
        (&[entry(64, 100), entry(260, u32::MAX)], false),
    ];
    for (entries, accepted) in table {
        let mut manifest = BytesMut::new();
        for entry in entries {
            encode_entry(&mut manifest, entry);
        }
        let name = PackName {
            store: STORE,
            sequence: 1,
            records: 2,
            digest: digest(NAMESPACE, &manifest),
        };
        let mut tail = manifest.clone();
        encode_footer(&mut tail, NAMESPACE, &manifest, 2, 456);
        let decoded = decode_tail(NAMESPACE, &name, 456 + tail.len() as u64, &tail);
        assert_eq!(decoded.is_ok(), accepted, "{entries:?}: {decoded:?}");
    }
}

proptest! {
    #[test]
    fn packs_round_trip(
        records in prop::collection::vec((any::<u8>(), any::<u16>(), prop::collection::vec(any::<u8>(), 0..300)), 1..40),
        store: u64, sequence: u64,
    ) {
        let records: Vec<_> = records.iter().map(|(hash, layer, payload)| record(*hash, *layer, payload)).collect();
        let pack = encode_pack(NAMESPACE, StoreId::from_u64(store), sequence, &records);
        let bytes = whole(&pack);
        prop_assert_eq!(PackName::parse(&pack.name.to_string()), Some(pack.name));
        let entries = decode(&pack, &bytes).unwrap();
        prop_assert_eq!(entries.len(), records.len());
        for (entry, (key, payload, checksum)) in entries.iter().zip(&records) {
            let record = &bytes[entry.offset as usize..entry.end() as usize];
            let (header, found) = record.split_at(RECORD_HEADER_BYTES);
            prop_assert!(is_record_header(header, NAMESPACE, entry));
            prop_assert!(!is_record_header(header, NamespaceId::from_bytes([0; 32]), entry));
            prop_assert_eq!(NAMESPACE.block(entry.hash).layer(entry.layer), *key);
            prop_assert_eq!((found, entry.checksum), (&payload[..], *checksum));
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(
        tail in prop::collection::vec(any::<u8>(), 0..400), object_bytes: u64, records: u32, digest: [u8; 16],
    ) {
        let name = PackName { store: STORE, sequence: 1, records, digest };
        prop_assert!(decode_tail(NAMESPACE, &name, object_bytes, &tail).is_err());
    }
}
