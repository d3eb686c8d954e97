use kvasir_block::{BlockHash, Checksum};
use proptest::prelude::*;

use super::*;
use crate::object::{config::StoreId, format::encode_pack};

const NAMESPACE: NamespaceId = NamespaceId::from_bytes([3; 32]);

fn pack(sequence: u64) -> PackName {
    PackName {
        store: StoreId::from_u64(1),
        sequence,
        records: 9,
        digest: [0; 16],
    }
}

fn place(sequence: u64, offset: u32, payload_bytes: u32) -> Place {
    let (hash, checksum) = (BlockHash::from_bytes([0; 32]), Checksum::from_u32(0));
    Place {
        pack: pack(sequence),
        entry: Entry {
            hash,
            layer: 0,
            offset,
            payload_bytes,
            checksum,
        },
    }
}

/// Pack, start, end, slots in order of place.
type Shape = (u64, u64, u64, Vec<usize>);

/// The ranges of a plan.
fn shape(places: &[Place], gap: u64, range: u64) -> Vec<Shape> {
    let places = places
        .iter()
        .enumerate()
        .map(|(slot, place)| (slot, NAMESPACE, *place))
        .collect();
    let readings = plan(places, gap, range);
    let show = |reading: Reading| {
        let Range { start, end } = span(&reading.wants);
        (
            reading.pack.sequence,
            start,
            end,
            reading.wants.into_iter().flat_map(|want| want.slots).collect(),
        )
    };
    readings.into_iter().map(show).collect()
}

#[test]
fn neighbours_share_a_range() {
    // A record takes 96 bytes more than its payload.
    let (a, b, c) = (place(1, 100, 4), place(1, 200, 4), place(1, 400, 4));
    let table: [(&[Place], u64, u64, Vec<Shape>); 7] = [
        (&[], 0, 1000, vec![]),
        (&[a, b], 0, 1000, vec![(1, 100, 300, vec![0, 1])]),
        (&[b, a], 0, 1000, vec![(1, 100, 300, vec![1, 0])]),
        (
            &[a, b, c],
            99,
            1000,
            vec![(1, 100, 300, vec![0, 1]), (1, 400, 500, vec![2])],
        ),
        (&[a, b, c], 100, 1000, vec![(1, 100, 500, vec![0, 1, 2])]),
        (
            &[a, b, c],
            100,
            399,
            vec![(1, 100, 300, vec![0, 1]), (1, 400, 500, vec![2])],
        ),
        (
            &[a, place(2, 200, 4), a],
            1000,
            1000,
            vec![(1, 100, 200, vec![0, 2]), (2, 200, 300, vec![1])],
        ),
    ];
    for (places, gap, range, expected) in table {
        assert_eq!(shape(places, gap, range), expected, "gap {gap}, range {range}");
    }
}

#[test]
fn one_block_larger_than_a_range_is_read_whole() {
    assert_eq!(shape(&[place(1, 64, 5000)], 0, 100), [(1, 64, 5160, vec![0])]);
}

proptest! {
    /// However an answer is cut into pieces, the same records come out, and nothing of what lies between them.
    #[test]
    fn records_do_not_depend_on_the_pieces(
        sizes in prop::collection::vec(0_usize..200, 1..12), wanted: u16, cuts in prop::collection::vec(1_usize..300, 1..20),
    ) {
        let records: Vec<_> = sizes.iter().enumerate().map(|(i, bytes)| {
            let payload = Bytes::from(vec![i as u8 + 1; *bytes]);
            (NAMESPACE.block(BlockHash::from_bytes([i as u8; 32])).layer(7), payload.clone(), Checksum::of(&payload))
        }).collect();
        let pack = encode_pack(NAMESPACE, StoreId::from_u64(1), 1, &records);
        let object = pack.pieces.concat();
        let wants: Vec<_> = pack.entries.iter().enumerate()
            .filter(|(i, _)| wanted & 1 << i != 0)
            .map(|(i, entry)| Want { entry: *entry, slots: vec![i] }).collect();
        let range = span(&wants);
        let mut body = &object[range.start as usize..range.end as usize];
        let mut taken = Records::new(&wants, range.start);
        let mut found = Vec::new();
        for cut in cuts.iter().cycle() {
            if body.is_empty() { break }
            let (piece, rest) = body.split_at(body.len().min(*cut));
            taken.take(piece, |want, record| found.push((want.slots[0], verify(NAMESPACE, &want.entry, record))));
            body = rest;
        }
        let expected: Vec<_> = wants.iter().map(|want| {
            let (_, payload, checksum) = records[want.slots[0]].clone();
            (want.slots[0], ObjectRead::Hit { payload, checksum })
        }).collect();
        prop_assert_eq!(found, expected);
        prop_assert_eq!(taken.at, range.end);
    }
}
