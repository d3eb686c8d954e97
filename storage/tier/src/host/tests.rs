use std::collections::HashSet;

use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;

mod churn;
mod model;

const PAYLOAD: usize = 1000;
/// What a layer block of [`PAYLOAD`] costs.
const LAYER: u64 = PAGE_BYTES as u64 + LAYER_OVERHEAD_BYTES;
const NAMESPACE: NamespaceId = NamespaceId::from_bytes([9; 32]);

fn tier(bytes_max: u64, policy: HostPolicy) -> HostTier {
    let huge_pages = HugePages::Off;
    HostTier::new(HostConfig {
        bytes_max,
        policy,
        huge_pages,
    })
    .unwrap()
}

/// Room for this many blocks of one layer each.
fn tier_of(blocks: u64, policy: HostPolicy) -> HostTier {
    tier(blocks * (LAYER + BLOCK_OVERHEAD_BYTES), policy)
}

fn hash(i: u32) -> BlockHash {
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&i.to_be_bytes());
    BlockHash::from_bytes(bytes)
}

fn block(i: u32) -> BlockKey {
    NAMESPACE.block(hash(i))
}

fn chain(blocks: impl IntoIterator<Item = u32>) -> Vec<BlockHash> {
    blocks.into_iter().map(hash).collect()
}

/// The only right payload of a layer block.
fn payload(i: u32, layer: u16, bytes: usize) -> Bytes {
    let mut random = SmallRng::seed_from_u64(u64::from(i) << 16 | u64::from(layer));
    let mut payload = vec![0; bytes];
    random.fill(&mut payload[..]);
    Bytes::from(payload)
}

fn put(host: &mut HostTier, i: u32, layer: u16, pinned: &[u32]) -> Result<Vec<BlockKey>, NoRoom> {
    put_sized(host, i, layer, PAYLOAD, pinned)
}

fn put_sized(host: &mut HostTier, i: u32, layer: u16, bytes: usize, pinned: &[u32]) -> Result<Vec<BlockKey>, NoRoom> {
    put_owned(host, i, layer, bytes, Owner::default(), pinned)
}

fn put_owned(
    host: &mut HostTier,
    i: u32,
    layer: u16,
    bytes: usize,
    owner: Owner,
    pinned: &[u32],
) -> Result<Vec<BlockKey>, NoRoom> {
    let stay: HashSet<_> = pinned.iter().map(|&i| block(i)).collect();
    let payload = payload(i, layer, bytes);
    let checksum = Checksum::of(&payload);
    host.insert(block(i).layer(layer), payload, checksum, owner, |key| {
        stay.contains(key)
    })
}

/// Every invariant, and every byte.
fn check(host: &HostTier) {
    assert!(host.bytes() <= host.bytes_max());
    let listed: usize = host.shares.all().map(|share| share.policy.len()).sum();
    assert_eq!(listed, host.index.len(), "each block is in the order of eviction once");
    let shares: u64 = host.shares.all().map(|share| share.bytes).sum();
    let blocks: u64 = host
        .index
        .values()
        .map(|&place| host.blocks[place as usize].bytes())
        .sum();
    assert_eq!(shares, blocks);
    let (mut layers, mut held_bytes) = (0, 0);
    for (key, &place) in &host.index {
        for layer in &host.blocks[place as usize].layers {
            assert_eq!(host.homes[(layer.held.offset() / PAGE_BYTES as u64) as usize], place);
            assert!(layer.checksum.verifies(layer.held.as_slice()), "{key:?}");
            layers += 1;
            held_bytes += layer.held.footprint();
        }
    }
    assert_eq!((layers, held_bytes), (host.layer_blocks, host.held_bytes));
    assert!(held_bytes <= host.arena.used());
}

#[test]
fn evicts_whole_blocks_least_recently_used_first() {
    let mut host = tier(2 * (2 * LAYER + BLOCK_OVERHEAD_BYTES), HostPolicy::Lru);
    for i in [1, 2] {
        for layer in 0..2 {
            assert_eq!(put(&mut host, i, layer, &[]), Ok(vec![]));
        }
    }
    assert_eq!(host.bytes(), host.bytes_max());
    host.touch(&block(1));
    assert_eq!(put(&mut host, 3, 0, &[]), Ok(vec![block(2)]));
    assert!(!host.contains(block(2).layer(0)) && !host.contains(block(2).layer(1)));
    let right = payload(1, 1, PAYLOAD);
    assert_eq!(host.get(block(1).layer(1)), Some((right.clone(), Checksum::of(&right))));
    assert_eq!((host.evicted_blocks(), host.layer_blocks()), (1, 3));
    check(&host);
}

#[test]
fn what_must_stay_stays() {
    for policy in HostPolicy::ALL {
        let mut host = tier_of(2, policy);
        put(&mut host, 1, 0, &[]).unwrap();
        put(&mut host, 2, 0, &[]).unwrap();
        let no_room = NoRoom {
            payload_bytes: PAYLOAD,
            bytes_max: host.bytes_max(),
            evicted: vec![],
        };
        assert_eq!(put(&mut host, 3, 0, &[1, 2]), Err(no_room.clone()));
        assert!(host.contains(block(1).layer(0)) && host.contains(block(2).layer(0)));
        assert_eq!(put(&mut host, 3, 0, &[1]), Ok(vec![block(2)]), "{policy:?}");
        // A block does not push out its own other layers.
        assert_eq!(put(&mut host, 3, 1, &[1]), Err(no_room));
        assert!(host.contains(block(3).layer(0)));
        check(&host);
        // Where several must go and not all may, none does, and the next search finds them in their order.
        assert!(put_sized(&mut host, 4, 0, 2 * PAGE_BYTES, &[1]).is_err());
        check(&host);
        assert!(host.contains(block(1).layer(0)) && host.contains(block(3).layer(0)));
        assert_eq!(put(&mut host, 5, 0, &[1]), Ok(vec![block(3)]), "{policy:?}");
    }
}

#[test]
fn first_bytes_stay_and_a_giant_is_refused() {
    let mut host = tier(20_000, HostPolicy::default());
    put(&mut host, 1, 0, &[]).unwrap();
    let other = Bytes::from(vec![77; PAYLOAD]);
    let sum = Checksum::of(&other);
    let again = host.insert(block(1).layer(0), other, sum, Owner::default(), |_| false);
    assert_eq!(again, Ok(vec![]));
    assert_eq!(host.get(block(1).layer(0)).unwrap().0, payload(1, 0, PAYLOAD));
    assert_eq!(put_sized(&mut host, 2, 0, 20_001, &[]).unwrap_err().evicted, []);
    assert!(host.contains(block(1).layer(0)));
    assert!(host.remove(block(1).layer(0)) && !host.remove(block(1).layer(0)));
    assert_eq!((host.bytes(), host.layer_blocks(), host.index.len()), (0, 0, 0));
    check(&host);
    let mut none = tier(0, HostPolicy::default());
    assert!(none.get(block(0).layer(0)).is_none() && put(&mut none, 0, 0, &[]).is_err());
}

#[test]
fn a_payload_in_the_arena_is_kept_without_copying() {
    let mut host = tier_of(4, HostPolicy::default());
    let right = payload(1, 0, PAYLOAD);
    let (mut buffer, evicted) = host.reserve(PAYLOAD, Owner::default(), |_| false).unwrap();
    assert!(evicted.is_empty() && host.stats().bytes_elsewhere == PAGE_BYTES as u64);
    buffer.as_mut_slice().copy_from_slice(&right);
    let bytes = buffer.freeze(0..PAYLOAD);
    let sum = Checksum::of(&bytes);
    host.insert(block(1).layer(0), bytes.clone(), sum, Owner::default(), |_| false)
        .unwrap();
    let (got, _) = host.get(block(1).layer(0)).unwrap();
    assert_eq!((got.as_ptr(), &got), (bytes.as_ptr(), &right));
    assert_eq!(host.arena().locate(&got), Some(0..PAYLOAD as u64));
    assert_eq!(host.stats().bytes_elsewhere, 0);
    check(&host);
}

/// What someone reads is neither evicted nor counted as room, and its bytes stay right when it is removed.
#[test]
fn readers_keep_what_they_read() {
    for policy in HostPolicy::ALL {
        let mut host = tier_of(3, policy);
        (1..=3).for_each(|i| assert_eq!(put(&mut host, i, 0, &[]), Ok(vec![])));
        let reading: Vec<Bytes> = (1..=3).map(|i| host.get(block(i).layer(0)).unwrap().0).collect();
        let refused = put(&mut host, 4, 0, &[]).unwrap_err();
        assert_eq!(refused.evicted, [], "nothing in vain: {policy:?}");
        assert!(host.remove(block(2).layer(0)));
        assert_eq!(host.stats().bytes_elsewhere, PAGE_BYTES as u64);
        assert!(put(&mut host, 4, 0, &[]).is_err(), "removed, but still read");
        assert!((1..=3).all(|i| reading[i as usize - 1] == payload(i, 0, PAYLOAD)));
        drop(reading);
        assert_eq!(put(&mut host, 4, 0, &[]), Ok(vec![]));
        assert_eq!(put(&mut host, 5, 0, &[]).unwrap().len(), 1);
        check(&host);
    }
}

/// A search passes over what must stay once, not every time; and gives up where all must.
#[test]
fn thousands_that_must_stay_are_passed_over_once() {
    for policy in HostPolicy::ALL {
        let blocks = 3000;
        let mut host = tier_of(blocks, policy);
        (0..blocks as u32).for_each(|i| assert_eq!(put(&mut host, i, 0, &[]), Ok(vec![])));
        let asked = std::cell::Cell::new(0);
        let leased = |key: &BlockKey| {
            asked.set(asked.get() + 1);
            u32::from_be_bytes(key.hash.as_bytes()[..4].try_into().unwrap()) < 2500
        };
        for i in 10_000..10_500 {
            let new = payload(i, 0, PAYLOAD);
            let sum = Checksum::of(&new);
            let evicted = host.insert(block(i).layer(0), new, sum, Owner::default(), leased);
            assert_eq!(evicted.unwrap().len(), 1);
        }
        assert!(
            asked.get() <= 2 * 3000,
            "{policy:?}: {} questions for 500 victims",
            asked.get()
        );
        assert!((0..2500).all(|i| host.contains(block(i).layer(0))));
        asked.set(0);
        let all = |_: &BlockKey| {
            asked.set(asked.get() + 1);
            true
        };
        let none = payload(1, 1, PAYLOAD);
        assert!(
            host.insert(
                block(20_000).layer(0),
                none,
                Checksum::from_u32(0),
                Owner::default(),
                all
            )
            .is_err()
        );
        assert!(asked.get() <= 4096);
        check(&host);
    }
}

#[test]
fn a_prefix_outlives_its_tail() {
    let mut host = tier_of(8, HostPolicy::Prefix);
    // Two chains share 0, 1: 0-1-2-3 and 0-1-4-5. The caller asks before it puts.
    for blocks in [[0, 1, 2, 3], [0, 1, 4, 5]] {
        host.note_chain(NAMESPACE, &chain(blocks));
        blocks.iter().for_each(|&i| drop(put(&mut host, i, 0, &[])));
    }
    // Heads are the oldest, and never go first. Then strangers without a chain come, six and two more than fit.
    let mut gone = Vec::new();
    for i in 100..107 {
        gone.extend(put(&mut host, i, 0, &[100, 101]).unwrap());
    }
    assert_eq!(gone.len(), 5);
    let place = |i| gone.iter().position(|&key| key == block(i)).unwrap_or(usize::MAX);
    for (parent, child) in [(0, 1), (1, 2), (2, 3), (1, 4), (4, 5)] {
        assert!(place(child) <= place(parent), "{child} before {parent}: {gone:?}");
    }
    check(&host);
}

/// Chains that contradict each other cannot make blocks immortal.
#[test]
fn claimed_rings_are_broken() {
    let mut host = tier_of(6, HostPolicy::Prefix);
    (0..6).for_each(|i| drop(put(&mut host, i, 0, &[])));
    let claims: [&[u32]; 6] = [&[0, 1, 2], &[2, 1, 0], &[1, 1, 1], &[3, 3], &[4, 5, 4, 5], &[5, 4]];
    for claim in claims {
        host.note_chain(NAMESPACE, &chain(claim.iter().copied()));
        check(&host);
    }
    let evicted: HashSet<BlockKey> = (10..16).flat_map(|i| put(&mut host, i, 0, &[]).unwrap()).collect();
    let expected: HashSet<BlockKey> = (0..6).map(block).collect();
    assert_eq!(evicted, expected);
    check(&host);
}

#[test]
fn what_is_known_of_absent_blocks_is_bounded() {
    let mut host = tier_of(2, HostPolicy::Prefix);
    for start in 0..100 {
        host.note_chain(NAMESPACE, &chain(start * 1000..start * 1000 + 1000));
    }
    assert_eq!(host.absent.len(), 16_384);
    // Notes that were taken leave their place in the queue, which is bounded all the same.
    let mut host = tier_of(2, HostPolicy::Prefix);
    for i in 0..20_000 {
        host.note_chain(NAMESPACE, &chain([i]));
        put(&mut host, i, 0, &[]).unwrap();
    }
    assert!(host.absent.len() <= 16_384);
    let mut lru = tier_of(2, HostPolicy::Lru);
    lru.note_chain(NAMESPACE, &chain(0..10));
    assert_eq!(lru.absent.len(), 0, "nobody asks for it");
}

#[test]
fn budgets_hold_an_owner_and_spare_the_others() {
    let (a, b, other) = (Owner::new(1), Owner::new(2), Owner::new(3));
    let one = LAYER + BLOCK_OVERHEAD_BYTES;
    for policy in HostPolicy::ALL {
        let mut host = tier_of(10, policy);
        host.set_budget(a, 4 * one);
        host.set_budget(b, 4 * one);
        for i in 0..4 {
            assert_eq!(put_owned(&mut host, i, 0, PAYLOAD, a, &[]), Ok(vec![]));
        }
        // At its budget, with room in the tier: its own go.
        for i in 4..20 {
            assert_eq!(put_owned(&mut host, i, 0, PAYLOAD, a, &[]).unwrap().len(), 1);
            assert_eq!(host.owner_bytes(a), 4 * one);
        }
        let refused = put_owned(&mut host, 20, 0, PAYLOAD, a, &[16, 17, 18, 19]).unwrap_err();
        assert_eq!((refused.bytes_max, refused.evicted), (4 * one, vec![]));
        // Others fill the rest, and then push, but nobody below a proportional part: 10 of 18 for those without a budget.
        for i in 100..200 {
            put_owned(&mut host, i, 0, PAYLOAD, other, &[]).unwrap();
            put_owned(&mut host, 1000 + i, 0, PAYLOAD, b, &[]).unwrap();
        }
        let parts = [a, b, other].map(|owner| host.owner_bytes(owner) / one);
        assert!(parts[0] >= 2 && parts[1] >= 2 && parts[2] >= 5, "{policy:?}: {parts:?}");
        check(&host);
    }
}
