use std::collections::HashSet;

use kvasir_block::{BlockHash, NamespaceId};
use proptest::prelude::*;

use super::*;

const PAYLOAD: usize = 1000;
const LAYER: u64 = PAYLOAD as u64 + LAYER_OVERHEAD_BYTES;

fn block(i: u8) -> BlockKey {
    NamespaceId::from_bytes([9; 32]).block(BlockHash::from_bytes([i; 32]))
}

fn payload(i: u8) -> Bytes {
    Bytes::from(vec![i; PAYLOAD])
}

fn put(host: &mut HostTier, i: u8, layer: u16, pinned: &[u8]) -> Result<Vec<BlockKey>, NoRoom> {
    let stay: HashSet<_> = pinned.iter().map(|&i| block(i)).collect();
    host.insert(block(i).layer(layer), payload(i), Checksum::of(&payload(i)), |key| {
        stay.contains(key)
    })
}

#[test]
fn evicts_whole_blocks_least_recently_used_first() {
    let mut host = HostTier::new(2 * (2 * LAYER + BLOCK_OVERHEAD_BYTES));
    for i in [1, 2] {
        for layer in 0..2 {
            assert_eq!(put(&mut host, i, layer, &[]), Ok(vec![]));
        }
    }
    assert_eq!(host.bytes(), host.bytes_max());
    host.touch(&block(1));
    assert_eq!(put(&mut host, 3, 0, &[]), Ok(vec![block(2)]));
    assert!(!host.contains(block(2).layer(0)) && !host.contains(block(2).layer(1)));
    assert_eq!(
        host.get(block(1).layer(1)),
        Some((payload(1), Checksum::of(&payload(1))))
    );
    assert_eq!((host.evicted_blocks(), host.layer_blocks()), (1, 3));
}

#[test]
fn what_must_stay_stays() {
    let mut host = HostTier::new(2 * (LAYER + BLOCK_OVERHEAD_BYTES));
    put(&mut host, 1, 0, &[]).unwrap();
    put(&mut host, 2, 0, &[]).unwrap();
    assert_eq!(
        put(&mut host, 3, 0, &[1, 2]),
        Err(NoRoom {
            payload_bytes: PAYLOAD,
            bytes_max: host.bytes_max()
        })
    );
    assert!(
        host.contains(block(1).layer(0)) && host.contains(block(2).layer(0)),
        "nothing was evicted in vain"
    );
    assert_eq!(put(&mut host, 3, 0, &[1]), Ok(vec![block(2)]));
    // A block does not push out its own other layers.
    assert_eq!(
        put(&mut host, 3, 1, &[1]),
        Err(NoRoom {
            payload_bytes: PAYLOAD,
            bytes_max: host.bytes_max()
        })
    );
    assert!(host.contains(block(3).layer(0)));
}

#[test]
fn first_bytes_stay_and_a_giant_is_refused() {
    let mut host = HostTier::new(10_000);
    put(&mut host, 1, 0, &[]).unwrap();
    let other = Bytes::from(vec![77; PAYLOAD]);
    assert_eq!(
        host.insert(block(1).layer(0), other.clone(), Checksum::of(&other), |_| false),
        Ok(vec![])
    );
    assert_eq!(host.get(block(1).layer(0)).unwrap().0, payload(1));
    let giant = Bytes::from(vec![0; 10_001]);
    assert!(
        host.insert(block(2).layer(0), giant.clone(), Checksum::of(&giant), |_| false)
            .is_err()
    );
    assert!(host.contains(block(1).layer(0)));
    assert!(host.remove(block(1).layer(0)) && !host.remove(block(1).layer(0)));
    assert_eq!((host.bytes(), host.layer_blocks(), host.index.len()), (0, 0, 0));
    assert!(HostTier::new(0).get(block(0).layer(0)).is_none());
}

proptest! {
    /// The budget, the counts and the list hold whatever is done.
    #[test]
    fn never_above_budget(steps in prop::collection::vec((0..4u8, 0..12u8, 0..3u16), 0..200), blocks in 0..6u64) {
        let mut host = HostTier::new(blocks * (2 * LAYER + BLOCK_OVERHEAD_BYTES));
        let mut held: HashSet<LayerBlockKey> = HashSet::new();
        for (what, i, layer) in steps {
            let key = block(i).layer(layer);
            match what {
                0 | 1 => {
                    if let Ok(evicted) = put(&mut host, i, layer, &[0, 1]) {
                        prop_assert!(!evicted.contains(&block(0)) && !evicted.contains(&block(1)));
                        held.retain(|key| !evicted.contains(&key.block()));
                        held.insert(key);
                    }
                }
                2 => host.touch(&block(i)),
                _ => prop_assert_eq!(host.remove(key), held.remove(&key)),
            }
            prop_assert!(host.bytes() <= host.bytes_max());
            prop_assert_eq!(host.layer_blocks(), held.len() as u64);
            for key in &held {
                prop_assert_eq!(host.get(*key).map(|(bytes, _)| bytes[0]), Some(key.hash.as_bytes()[0]));
            }
            let listed: Vec<_> = std::iter::successors(Some(host.oldest), |&at| (at != NONE).then(|| host.nodes[at].younger))
                .take_while(|&at| at != NONE)
                .collect();
            prop_assert_eq!(listed.len(), host.index.len());
            let bytes: u64 = listed.iter().map(|&at| host.block_bytes(at)).sum();
            prop_assert_eq!(bytes, host.bytes());
        }
    }
}
