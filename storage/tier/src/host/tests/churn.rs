//! Sizes that change, and memory that stays inside its bound.

use super::*;

/// Fills with one size after another; each in turn gets the tier, but for holes shorter than a payload, though blocks go in an order that has nothing to do
/// with where they lie.
#[test]
fn each_size_gets_the_memory_of_the_last() {
    const TIER: u64 = 16 << 20;
    for policy in HostPolicy::ALL {
        let mut host = tier(TIER, policy);
        let mut random = SmallRng::seed_from_u64(11);
        let mut next = 0;
        for bytes in [48 << 10, 256 << 10, 5000, 1 << 20, 48 << 10, 70_000] {
            let first = next;
            let mut refused = 0;
            // Twice the tier of this size.
            for _ in 0..2 * TIER / bytes as u64 {
                refused += u64::from(put_sized(&mut host, next, 0, bytes, &[]).is_err());
                host.touch(&block(random.random_range(first..=next)));
                next += 1;
            }
            assert_eq!(refused, 0, "{policy:?} {bytes}");
            let all = host.stats();
            assert!(
                all.bytes + Arena::footprint(bytes) >= TIER * 7 / 8,
                "{policy:?}: {all:?} when filled with payloads of {bytes}"
            );
            // The others keep what was matched of other sizes, and are right to.
            let held = (first..next).filter(|&i| host.contains(block(i).layer(0))).count() as u64;
            let of_this_size = held * Arena::footprint(bytes);
            assert!(policy != HostPolicy::Lru || of_this_size + Arena::footprint(bytes) >= TIER * 7 / 8);
            check(&host);
        }
        let moved = host.stats().moved_layer_blocks;
        assert!(
            moved > 0 && moved < u64::from(next),
            "{policy:?}: {moved} moved for {next} put"
        );
    }
}

/// Four times the tier in mixed sizes, while readers hold some of it for long: all bytes stay right, the arena's file never holds
/// more than the tier may, and when the readers go all of it can be had again.
#[test]
fn mixed_churn_stays_within_its_memory() {
    const TIER: u64 = 8 << 20;
    let sizes = [3000, 20_000, 48 << 10, 100_000, 200_000];
    for policy in HostPolicy::ALL {
        let mut host = tier(TIER, policy);
        let mut random = SmallRng::seed_from_u64(5);
        let mut reading: Vec<(u32, usize, Bytes)> = Vec::new();
        let (mut written, mut next, mut refused) = (0, 0, 0);
        while written < 4 * TIER {
            let bytes = sizes[random.random_range(0..sizes.len())];
            match put_sized(&mut host, next, 0, bytes, &[]) {
                Ok(_) => {
                    written += bytes as u64;
                    if random.random_range(0..10) == 0 {
                        reading.push((next, bytes, host.get(block(next).layer(0)).unwrap().0));
                    }
                }
                Err(_) => refused += 1,
            }
            next += 1;
            if reading.len() > 20 {
                let (i, bytes, read) = reading.swap_remove(random.random_range(0..20));
                assert_eq!(read, payload(i, 0, bytes));
            }
            assert!(host.bytes() <= TIER);
        }
        check(&host);
        assert!(refused * 20 < next, "{policy:?}: {refused} of {next} refused");
        let resident = resident_bytes(&host);
        assert!(resident <= TIER && resident > TIER / 2, "{policy:?}: {resident}");
        let read: u64 = reading.iter().map(|(_, bytes, _)| Arena::footprint(*bytes)).sum();
        host.index
            .keys()
            .copied()
            .collect::<Vec<_>>()
            .iter()
            .for_each(|key| assert!(host.remove(key.layer(0))));
        assert_eq!(
            (host.stats().bytes, host.stats().bytes_elsewhere),
            (read, read),
            "what is read, and no more"
        );
        for (i, bytes, read) in reading {
            assert_eq!(read, payload(i, 0, bytes));
        }
        assert_eq!(host.bytes(), 0);
        assert!(host.arena.try_reserve(host.arena.capacity() as usize).is_some());
    }
}

/// Bytes of the arena's file that the kernel has given memory for.
fn resident_bytes(host: &HostTier) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::File::from(host.arena.file().try_clone_to_owned().unwrap());
    file.metadata().unwrap().blocks() * 512
}

/// A buffer that nobody froze, and a reader, in the way everywhere: the tier is not emptied for a payload that cannot fit.
#[test]
fn the_tier_is_not_emptied_for_one_payload() {
    let mut host = tier(16 << 20, HostPolicy::default());
    let mut kept = Vec::new();
    for i in 0..300 {
        put_sized(&mut host, i, 0, 40_000, &[]).unwrap();
        if i % 30 == 0 {
            kept.push(host.get(block(i).layer(0)).unwrap().0);
        }
    }
    let before = host.index.len();
    let refused = put_sized(&mut host, 1000, 0, 12 << 20, &[]).unwrap_err();
    assert!(!refused.evicted.is_empty(), "it was tried");
    check(&host);
    drop(kept);
    assert!(put_sized(&mut host, 1000, 0, 12 << 20, &[]).is_ok());
    assert!(before > 0 && host.contains(block(1000).layer(0)));
    check(&host);
}
