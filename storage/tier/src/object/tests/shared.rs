//! What one store writes and others find: the same over S3 and over a folder.

use super::{server::packs, *};

#[test]
fn what_was_offered_is_read_before_and_after_it_is_written() {
    in_each_home(|home| {
        let tier = home.open(1);
        for i in 0..100 {
            assert_eq!(offer(&tier, i), Offer::Queued);
            assert_eq!(offer(&tier, i), Offer::Present);
        }
        assert_hits(&tier, 0..100, "queued");
        tier.flush(soon()).unwrap();
        let stats = tier.stats();
        assert_eq!(
            (stats.queued_layer_blocks, stats.queue_bytes, stats.layer_blocks),
            (0, 0, 100)
        );
        assert_eq!(stats.objects, packs(&home.folder()).len() as u64);
        assert!(stats.objects > 1, "{stats:?}");
        assert_hits(&tier, (0..100).rev(), "written");
        assert_hits(&tier, [7, 7, 3, 7], "more than once");
        assert_eq!(offer(&tier, 5), Offer::Present);
        assert_eq!(get(&tier, [100, 5]), [ObjectRead::Miss, hit(5)]);
        assert!(tier.contains(key(99)) && !tier.contains(key(100)));
        let stats = tier.stats();
        assert_eq!(
            (stats.hits, stats.misses, stats.failures.total(), stats.degraded),
            (205, 1, 0, None)
        );
    });
}

#[test]
fn neighbours_come_in_few_requests() {
    in_each_home(|home| {
        let mut config = home.config(1);
        (config.object_bytes, config.range_bytes_max) = (512 << 10, 1 << 20);
        let tier = open(config);
        put(&tier, 0..100);
        let before = tier.stats();
        assert_hits(&tier, 0..100, "all");
        assert_eq!(tier.stats().gets - before.gets, 1, "one pack, one range");
        assert_hits(&tier, (0..100).step_by(50), "far apart");
        assert_eq!(tier.stats().gets - before.gets, 3);
    });
}

#[test]
fn stores_of_a_namespace_find_each_others_blocks() {
    in_each_home(|home| {
        let (one, two) = (home.open(1), home.open(2));
        put(&one, 0..30);
        // The second may have learnt of the first one's by now.
        for i in 20..30 {
            assert!(matches!(offer(&two, i), Offer::Queued | Offer::Present), "key {i}");
        }
        put(&two, 30..50);
        assert!(one.refresh(NAMESPACE, soon()) && two.refresh(NAMESPACE, soon()));
        for (tier, name) in [(&one, "one"), (&two, "two")] {
            assert_hits(tier, 0..50, name);
            let mut seen = 0;
            tier.visit_blocks(NAMESPACE, |block, layers| {
                assert_eq!((block.namespace, layers), (NAMESPACE, 2));
                seen += 1;
            });
            assert_eq!(seen, 25, "{name}");
            let mut layers = Vec::new();
            tier.visit_layers(&key(40).block(), |layer| layers.push(layer));
            assert_eq!(layers, [0, 1]);
        }
        let read = two.stats().manifests;
        assert!(two.refresh(NAMESPACE, soon()));
        assert_eq!(two.stats().manifests, read, "a manifest is read once");
    });
}

#[test]
fn a_restart_finds_everything_and_counts_what_is_its_own() {
    in_each_home(|home| {
        let tier = home.open(1);
        put(&tier, 0..60);
        let before = tier.stats();
        tier.stop(soon()).unwrap();
        assert_eq!(offer(&tier, 99), Offer::Degraded);
        assert_eq!(get(&tier, [1]), [ObjectRead::Unavailable]);
        let tier = home.open(1);
        assert!(tier.refresh(NAMESPACE, soon()));
        assert_hits(&tier, 0..60, "after the restart");
        let after = tier.stats();
        assert_eq!(
            (after.own_objects, after.own_bytes),
            (before.own_objects, before.own_bytes)
        );
    });
}

#[test]
fn objects_that_somebody_removed_are_misses_and_then_forgotten() {
    in_each_home(|home| {
        let (one, two) = (home.open(1), home.open(2));
        put(&one, 0..60);
        assert!(two.refresh(NAMESPACE, soon()));
        let files = packs(&home.folder());
        std::fs::remove_file(&files[0]).unwrap();
        let reads = get(&two, 0..60);
        let misses = reads.iter().filter(|read| **read == ObjectRead::Miss).count();
        assert!((1..60).contains(&misses), "{misses}");
        // Which pack goes first is the names' business.
        let gone = (0..60)
            .zip(&reads)
            .find_map(|(i, read)| (*read == ObjectRead::Miss).then_some(i))
            .unwrap();
        assert!(
            (0..60)
                .zip(reads)
                .all(|(i, read)| read == ObjectRead::Miss || read == hit(i))
        );
        assert_eq!(two.stats().vanished_objects, 1);
        assert!(!two.contains(key(gone)));
        // The one who wrote it learns it from the next listing, and takes the blocks again.
        assert!(one.contains(key(gone)));
        assert!(one.refresh(NAMESPACE, soon()));
        assert_eq!(one.stats().vanished_objects, 1);
        put(&one, [gone]);
        assert_hits(&one, [gone], "written again");
    });
}

#[test]
fn the_limit_removes_own_objects_oldest_first() {
    in_each_home(|home| {
        let other = home.open(2);
        put(&other, 1000..1010);
        let mut config = home.config(1);
        config.written_bytes_max = 60 << 10;
        let tier = open(config);
        assert!(tier.refresh(NAMESPACE, soon()));
        for first in (0..200).step_by(20) {
            put(&tier, first..first + 20);
            assert!(tier.stats().own_bytes <= 60 << 10, "{:?}", tier.stats());
        }
        assert!(tier.stats().removed_objects > 0);
        assert_eq!(get(&tier, [0]), [ObjectRead::Miss]);
        assert_hits(&tier, 190..200, "newest");
        assert_hits(&tier, 1000..1010, "of another store");
        let bytes: u64 = packs(&home.folder())
            .iter()
            .map(|path| path.metadata().unwrap().len())
            .sum();
        assert_eq!(bytes, tier.stats().bytes);
    });
}

#[test]
fn age_removes_own_objects() {
    in_each_home(|home| {
        let (one, two) = (home.open(1), home.open(2));
        put(&one, 0..20);
        put(&two, 20..40);
        one.stop(soon()).unwrap();
        let mut config = home.config(1);
        config.written_age_max = Some(Duration::ZERO);
        let tier = open(config);
        // Removal follows the scan that finds them; the second one is behind it.
        while tier.stats().own_objects > 0 || tier.stats().scans == 0 {
            assert!(tier.refresh(NAMESPACE, soon()));
        }
        assert_eq!(get(&tier, [0]), [ObjectRead::Miss]);
        assert_hits(&tier, 20..40, "of another store");
    });
}

#[test]
fn read_only_reads() {
    in_each_home(|home| {
        put(&home.open(1), 0..20);
        let mut config = home.config(1);
        config.read_only = true;
        config.written_age_max = Some(Duration::ZERO);
        let tier = open(config);
        assert_eq!(offer(&tier, 50), Offer::Degraded);
        assert!(tier.refresh(NAMESPACE, soon()));
        assert_hits(&tier, 0..20, "read-only");
        let stats = tier.stats();
        assert_eq!((stats.puts, stats.deletes), (0, 0));
    });
}

#[test]
fn a_pack_that_is_not_what_its_name_says_is_refused() {
    type Spoil = fn(&Path, Vec<u8>);
    let table: [(&str, Spoil); 6] = [
        ("cut", |path, bytes| {
            std::fs::write(path, &bytes[..bytes.len() - 1]).unwrap()
        }),
        ("empty", |path, _| std::fs::write(path, b"").unwrap()),
        ("longer", |path, bytes| {
            std::fs::write(path, [bytes, vec![0]].concat()).unwrap()
        }),
        ("flipped manifest", |path, mut bytes| {
            let at = bytes.len() - 100;
            bytes[at] ^= 1;
            std::fs::write(path, bytes).unwrap();
        }),
        ("newer format", |path, mut bytes| {
            let footer = bytes.len() - 64;
            bytes[footer + 8] += 1;
            let crc = Checksum::of(&bytes[footer..footer + 60]).to_u32();
            bytes[footer + 60..].copy_from_slice(&crc.to_le_bytes());
            std::fs::write(path, bytes).unwrap();
        }),
        ("another name", |path, bytes| {
            let _ = std::fs::remove_file(path);
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let digest = name.len() - ".kvpack".len() - 1;
            let digit = if name.as_bytes()[digest] == b'0' { "1" } else { "0" };
            let name = format!("{}{digit}.kvpack", &name[..digest]);
            std::fs::write(path.with_file_name(name), bytes).unwrap();
        }),
    ];
    in_each_home(|home| {
        put(&home.open(1), 0..5);
        let file = packs(&home.folder()).remove(0);
        let good = std::fs::read(&file).unwrap();
        for (what, spoil) in table {
            spoil(&file, good.clone());
            let reader = home.open(2);
            assert!(reader.refresh(NAMESPACE, soon()), "{what}");
            assert!(reader.refresh(NAMESPACE, soon()), "{what}");
            let stats = reader.stats();
            assert_eq!((stats.manifests, stats.refused_manifests), (0, 1), "{what}");
            assert_eq!(get(&reader, [0]), [ObjectRead::Miss], "{what}");
            for path in packs(&home.folder()) {
                std::fs::remove_file(path).unwrap();
            }
        }
    });
}

#[test]
fn a_pack_in_another_namespaces_folder_is_refused() {
    in_each_home(|home| {
        put(&home.open(1), 0..5);
        let file = packs(&home.folder()).remove(0);
        let other = file.parent().unwrap().with_file_name("08".repeat(32));
        std::fs::create_dir(&other).unwrap();
        std::fs::copy(&file, other.join(file.file_name().unwrap())).unwrap();
        std::fs::write(other.join("notes.txt"), b"not ours").unwrap();
        let reader = home.open(2);
        assert!(reader.refresh(OTHER, soon()));
        let stats = reader.stats();
        assert_eq!((stats.refused_manifests, stats.foreign_objects), (1, 1));
        let keys = [key_in(OTHER, 0), key_in(OTHER, 1)];
        assert_eq!(reader.get_many(&keys, soon()), [ObjectRead::Miss, ObjectRead::Miss]);
    });
}

#[test]
fn flips_at_rest_are_never_served() {
    in_each_home(|home| {
        put(&home.open(1), 0..8);
        let file = packs(&home.folder()).remove(0);
        let good = std::fs::read(&file).unwrap();
        let payload_end = good.len() - 8 * 56 - 64;
        let mut rng = StdRng::seed_from_u64(18);
        let tier = home.open(2);
        let mut corrupt = 0;
        for flip in 0..60 {
            let (at, bit) = (rng.random_range(64..payload_end), rng.random_range(0..8));
            let mut bytes = good.clone();
            bytes[at] ^= 1 << bit;
            std::fs::write(&file, bytes).unwrap();
            // Forgets what was forgotten as corrupt: a new reader each time would be slow.
            let reader = if flip % 10 == 0 {
                home.open(3)
            } else {
                home.open(4 + flip)
            };
            assert!(reader.refresh(NAMESPACE, soon()));
            for (i, read) in (0..8).zip(get(&reader, 0..8)) {
                assert!(
                    read == hit(i) || read == ObjectRead::Corrupt,
                    "byte {at}, bit {bit}, key {i}: {read:?}"
                );
                corrupt += u32::from(read == ObjectRead::Corrupt);
            }
            assert_eq!(reader.stats().corrupt, 1, "byte {at}, bit {bit}");
        }
        assert_eq!(corrupt, 60);
        drop(tier);
    });
}

#[test]
fn an_object_cut_at_rest_is_corrupt_where_it_is_cut() {
    in_each_home(|home| {
        let tier = home.open(1);
        put(&tier, 0..8);
        let file = packs(&home.folder()).remove(0);
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        let reads = get(&tier, 0..8);
        assert!(
            (0..8)
                .zip(&reads)
                .all(|(i, read)| *read == hit(i) || *read == ObjectRead::Corrupt),
            "{reads:?}"
        );
        assert!(reads.contains(&ObjectRead::Corrupt));
        assert!(!tier.contains(key(7)), "forgotten");
        // So it is taken again, and the cache heals.
        put(&tier, [7]);
        assert_hits(&tier, [7], "written again");
    });
}

#[test]
fn bounds_hold() {
    let home = Home::Folder(TempDir::new().unwrap());
    let mut config = home.config(1);
    (config.queue_bytes_max, config.namespaces_max, config.entries_max) = (40 << 10, 2, 50);
    let tier = open(config);
    assert!(tier.open_namespace(OTHER));
    let third = NamespaceId::from_bytes([1; 32]);
    assert!(!tier.open_namespace(third) && !tier.refresh(third, soon()));
    assert_eq!(
        tier.offer(key_in(third, 0), payload(0), Checksum::of(&payload(0))),
        Offer::Degraded
    );
    let huge = Bytes::from(vec![0; (64 << 20) + 1]);
    assert_eq!(tier.offer(key(0), huge, Checksum::from_u32(0)), Offer::Degraded);
    let mut full = 0;
    for i in 0..400 {
        full += u32::from(offer(&tier, i) == Offer::Full);
        assert!(tier.stats().queue_bytes <= 40 << 10);
    }
    assert!(full > 0, "faster than a folder that syncs");
    tier.flush(soon()).unwrap();
    let stats = tier.stats();
    assert!(stats.layer_blocks <= 50, "{stats:?}");
    assert_eq!(stats.refused, u64::from(full) + 2);
}

#[test]
fn a_payload_that_lost_its_checksum_is_never_written() {
    let home = Home::Folder(TempDir::new().unwrap());
    let tier = home.open(1);
    assert_eq!(
        tier.offer(key(0), payload(0), Checksum::of(b"something else")),
        Offer::Queued
    );
    assert_eq!(offer(&tier, 1), Offer::Queued);
    assert_eq!(get(&tier, [0, 1]), [ObjectRead::Corrupt, hit(1)]);
    tier.flush(soon()).unwrap();
    assert_eq!(get(&tier, [0, 1]), [ObjectRead::Miss, hit(1)]);
    assert_eq!(tier.stats().lost, 1);
}

#[test]
fn a_pack_that_is_not_full_is_written_when_it_is_old() {
    let home = Home::Folder(TempDir::new().unwrap());
    let mut config = home.config(1);
    config.open_age_max = Duration::from_millis(10);
    let tier = open(config);
    assert_eq!(offer(&tier, 0), Offer::Queued);
    let patience = soon();
    while tier.stats().written_objects == 0 {
        assert!(Instant::now() < patience, "{:?}", tier.stats());
        std::thread::yield_now();
    }
    assert_hits(&tier, [0], "written by its age");
}
