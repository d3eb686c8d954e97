use super::*;

fn hash(n: u8) -> BlockHash {
    BlockHash::from_bytes([n; 32])
}

/// A sequence that computes and registers the blocks of `chain` it does not find, and `private` pages more.
fn run(tier: &mut DeviceTier, chain: &[u8], private: usize) -> Option<(Vec<PageId>, Promise)> {
    let hashes: Vec<BlockHash> = chain.iter().map(|n| hash(*n)).collect();
    let hit = tier.hit(&hashes);
    let (mut pages, mut promise) = tier.admit(&hashes[..hit], hashes.len() + private)?;
    for (depth, name) in hashes.iter().enumerate().skip(hit) {
        let page = tier.take(&mut promise);
        pages.push(tier.register(page, *name, depth));
    }
    for _ in 0..private {
        pages.push(tier.take(&mut promise));
    }
    Some((pages, promise))
}

fn leave(tier: &mut DeviceTier, (pages, promise): (Vec<PageId>, Promise)) {
    tier.release(pages);
    tier.settle(promise);
}

#[test]
fn blocks_stay_after_use_and_are_shared() {
    let mut tier = DeviceTier::new(8);
    let first = run(&mut tier, &[1, 2, 3], 1).expect("fits");
    let second = run(&mut tier, &[1, 2, 9], 0).expect("fits");
    assert_eq!(first.0[..2], second.0[..2], "the common prefix is one set of pages");
    assert_ne!(first.0[2], second.0[2]);
    leave(&mut tier, first);
    leave(&mut tier, second);
    assert_eq!(tier.available(), 8);
    assert_eq!(tier.hit(&[hash(1), hash(2), hash(3)]), 3);
    assert_eq!(
        tier.hit(&[hash(2), hash(3)]),
        2,
        "a hit is by name, the chain is in the name"
    );
    assert_eq!(tier.hit(&[hash(7), hash(2)]), 0, "no hit behind a gap");
}

#[test]
fn the_longest_unused_goes_first_and_of_one_chain_its_end() {
    let mut tier = DeviceTier::new(6);
    for chain in [[1, 2, 3], [4, 5, 6]] {
        let sequence = run(&mut tier, &chain, 0).expect("fits");
        leave(&mut tier, sequence);
    }
    tier.take_changes();
    let newcomer = run(&mut tier, &[7, 8, 9, 10], 0).expect("fits");
    let removed: Vec<Change> = tier
        .take_changes()
        .into_iter()
        .filter(|change| matches!(change, Change::Removed(_)))
        .collect();
    assert_eq!(removed, [3, 2, 1, 6].map(|n| Change::Removed(hash(n))));
    assert_eq!(tier.hit(&[hash(4), hash(5), hash(6)]), 2, "a prefix is left");
    leave(&mut tier, newcomer);
}

#[test]
fn a_promise_holds_and_what_cannot_be_promised_waits() {
    let mut tier = DeviceTier::new(4);
    let (pages, mut promise) = tier.admit(&[], 3).expect("fits");
    assert!(pages.is_empty());
    assert!(tier.admit(&[], 2).is_none(), "one page is left");
    let other = tier.admit(&[], 1).expect("fits");
    let taken: Vec<PageId> = (0..3).map(|_| tier.take(&mut promise)).collect();
    assert_eq!(tier.available(), 0);
    leave(&mut tier, (taken, promise));
    leave(&mut tier, other);
    assert_eq!(tier.available(), 4);
}

#[test]
fn held_prefix_pages_do_not_count_as_room() {
    let mut tier = DeviceTier::new(4);
    let first = run(&mut tier, &[1, 2, 3], 0).expect("fits");
    leave(&mut tier, first);
    // Three evictable and one free; holding the three leaves one.
    assert!(tier.admit(&[hash(1), hash(2), hash(3)], 5).is_none());
    let second = tier.admit(&[hash(1), hash(2), hash(3)], 4).expect("fits exactly");
    assert_eq!(tier.available(), 0);
    leave(&mut tier, second);
}

#[test]
fn two_that_compute_the_same_block_end_with_one_page() {
    let mut tier = DeviceTier::new(4);
    let (_, mut promise_a) = tier.admit(&[], 1).expect("fits");
    let (_, mut promise_b) = tier.admit(&[], 1).expect("fits");
    let (a, b) = (tier.take(&mut promise_a), tier.take(&mut promise_b));
    let a = tier.register(a, hash(1), 0);
    let b = tier.register(b, hash(1), 0);
    assert_eq!(a, b);
    assert_eq!(tier.available(), 3);
    leave(&mut tier, (vec![a], promise_a));
    assert_eq!(tier.available(), 3, "still held once");
    leave(&mut tier, (vec![b], promise_b));
    assert_eq!(tier.available(), 4);
    assert_eq!(tier.take_changes(), [Change::Stored(hash(1))]);
}

#[test]
fn a_private_page_has_no_name_and_is_free_at_once() {
    let mut tier = DeviceTier::new(2);
    let sequence = run(&mut tier, &[], 2).expect("fits");
    leave(&mut tier, sequence);
    assert_eq!((tier.available(), tier.take_changes().len()), (2, 0));
}

#[test]
fn the_middle_of_a_chain_given_up_early_is_as_young_as_its_end_once_touched() {
    let mut tier = DeviceTier::new(6);
    let (pages, promise) = run(&mut tier, &[1, 2, 3], 0).expect("fits");
    tier.release([pages[1]]);
    let other = run(&mut tier, &[4], 0).expect("fits");
    leave(&mut tier, other);
    leave(&mut tier, (vec![pages[0], pages[2]], promise));
    tier.touch(&[hash(1), hash(2), hash(3)]);
    tier.take_changes();
    let newcomer = run(&mut tier, &[10, 11, 12, 13], 0).expect("fits");
    let removed: Vec<Change> = tier
        .take_changes()
        .into_iter()
        .filter(|change| matches!(change, Change::Removed(_)))
        .collect();
    assert_eq!(removed, [4, 3].map(|n| Change::Removed(hash(n))));
    leave(&mut tier, newcomer);
}

/// Random traffic against the invariants, with the seed in the message.
#[test]
fn pages_are_never_lost_under_random_traffic() {
    for seed in 0..200u64 {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut tier = DeviceTier::new(12);
        let mut running = Vec::new();
        for _ in 0..100 {
            if random(3) > 0 {
                // Chains out of a small tree, so that prefixes are shared.
                let branch = random(3) as u8 * 50;
                let chain: Vec<u8> = (0..random(6) as u8)
                    .map(|i| if i < 2 { i } else { branch + i })
                    .collect();
                running.extend(run(&mut tier, &chain, random(3) as usize));
            } else if !running.is_empty() {
                let at = random(running.len() as u64) as usize;
                leave(&mut tier, running.swap_remove(at));
            }
        }
        for sequence in running {
            leave(&mut tier, sequence);
        }
        assert_eq!(tier.available(), 12, "seed {seed}");
        assert_eq!(tier.by_hash.len() + tier.free.len(), 12, "seed {seed}");
    }
}
