//! Streams of puts: the same by every path, patient where the store is busy, and whole again after a long silence.

use std::time::{Duration, Instant};

use kvasir_block::{Checksum, NamespaceId};
use kvasir_client::{BulkConnection, DataPath, ErrorKind, GetOutcome, LayerBlock, PutOutcome};
use kvasir_runtime::units::{ByteSize, HumanDuration};
use kvasir_store::StoreConfig;

use crate::support::{LAYERS, Setup, chain, config, config_by, in_order, layer_block, payload, put_blocks, schema};

const PATHS: [DataPath; 4] = [DataPath::Grpc, DataPath::Bulk, DataPath::Local, DataPath::Auto];

#[tokio::test(flavor = "multi_thread")]
async fn every_path_says_the_same() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    for (seed, path) in (90..).zip(PATHS) {
        let (client, namespace) = setup.by(path).await;
        // Several messages of about 1 MiB.
        let wanted = chain(seed, 300);
        for expected in [PutOutcome::Stored, PutOutcome::Present] {
            let mut puts = client.put_blocks(&namespace).await.expect("a stream");
            let mut outcomes = Vec::new();
            for (hash, layer) in in_order(&wanted) {
                puts.put(layer_block(hash, layer)).await.expect("queued");
                outcomes.extend(puts.outcomes());
            }
            let short = LayerBlock {
                payload: payload(wanted[0], 0, 3),
                ..layer_block(wanted[0], 0)
            };
            let error = puts.put(short).await.expect_err("too short");
            assert_eq!(error.kind, ErrorKind::Invalid, "{path:?}: {error}");
            outcomes.extend(puts.finish().await.expect("outcomes"));
            let all: Vec<_> = in_order(&wanted).map(|(hash, layer)| (hash, layer, expected)).collect();
            assert_eq!(outcomes, all, "{path:?}");
        }
        let new = chain(seed + 100, 1)[0];
        let wrong = LayerBlock {
            checksum: Checksum::from_u32(1),
            ..layer_block(new, 1)
        };
        let mut puts = client.put_blocks(&namespace).await.expect("a stream");
        puts.put(layer_block(new, 0)).await.expect("queued");
        puts.put(wrong).await.expect("queued");
        let outcomes = puts.finish().await.expect("outcomes");
        let expected = [(new, 0, PutOutcome::Stored), (new, 1, PutOutcome::ChecksumMismatch)];
        assert_eq!(outcomes, expected, "{path:?}");

        let mut unknown = namespace.clone();
        unknown.id = NamespaceId::from_bytes([3; 32]);
        let mut puts = client.put_blocks(&unknown).await.expect("a stream");
        puts.put(layer_block(new, 0)).await.expect("queued");
        let error = puts.finish().await.expect_err("unknown");
        assert_eq!(error.kind, ErrorKind::NotFound, "{path:?}: {error}");

        for block in setup.get(&wanted).await {
            let bytes = payload(block.hash, block.layer, schema().layer_block_bytes());
            assert_eq!(
                (block.outcome, block.payload),
                (GetOutcome::Hit, Some(bytes)),
                "{path:?}"
            );
        }
    }
    setup.store.stop().await.expect("everything written");
}

/// A store whose flush queue takes one block at a time, and waits for room as long as is said.
fn slow(dir: &std::path::Path, put_wait_max: HumanDuration) -> StoreConfig {
    StoreConfig {
        flush_queue_bytes_max: ByteSize::bytes(1),
        put_wait_max,
        ..config(dir)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_flush_queue_is_waited_for() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&slow(dir.path(), HumanDuration::secs(60))).await;
    for (seed, path) in (200..).zip(PATHS) {
        let (client, namespace) = setup.by(path).await;
        let mut puts = client.put_blocks(&namespace).await.expect("a stream");
        for (hash, layer) in in_order(&chain(seed, 10)) {
            puts.put(layer_block(hash, layer)).await.expect("queued");
        }
        let outcomes = puts.finish().await.expect("outcomes");
        let stored = outcomes.iter().all(|(_, _, outcome)| *outcome == PutOutcome::Stored);
        assert!(
            stored && outcomes.len() == 10 * usize::from(LAYERS),
            "{path:?}: {outcomes:?}"
        );
    }
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_stays_full_sheds_puts() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&slow(dir.path(), HumanDuration::millis(1))).await;
    let mut all = 0;
    for (seed, path) in (210..).zip(PATHS) {
        let (client, namespace) = setup.by(path).await;
        let mut puts = client.put_blocks(&namespace).await.expect("a stream");
        for (hash, layer) in in_order(&chain(seed, 20)) {
            puts.put(layer_block(hash, layer)).await.expect("queued");
        }
        let outcomes = puts.finish().await.expect("outcomes");
        let count = |wanted| outcomes.iter().filter(|(_, _, outcome)| *outcome == wanted).count();
        // An empty queue takes one block of any size, so not all are shed.
        let (busy, stored) = (count(PutOutcome::Busy), count(PutOutcome::Stored));
        assert!(
            busy > 0 && busy + stored == 20 * usize::from(LAYERS),
            "{path:?}: {outcomes:?}"
        );
        all += stored as u64;
    }
    assert_eq!(setup.client.stat().await.expect("numbers").put_blocks, all);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_that_waits_ends_when_the_store_stops() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&slow(dir.path(), HumanDuration::secs(600))).await;
    let (namespace, url) = (setup.namespace.clone(), setup.url());
    let putting = tokio::task::spawn_blocking(move || {
        let mut bulk = BulkConnection::connect(&namespace, &config_by(DataPath::Bulk, &url)).expect("a connection");
        let mut put = 0;
        // Until it is cut off, or told that the rest is too much now.
        for seed in 220..1000 {
            let blocks: Vec<_> = in_order(&chain(seed, 100))
                .map(|(hash, layer)| layer_block(hash, layer))
                .collect();
            match bulk.put_from(&namespace, &put_blocks(&blocks)) {
                Ok(outcomes) if outcomes.contains(&PutOutcome::Busy) => break,
                Ok(outcomes) => put += outcomes.len(),
                Err(error) => {
                    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
                    break;
                }
            }
        }
        put
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    setup.store.stop().await.expect("everything written");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    putting.await.expect("no panic");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_after_a_long_silence() {
    let dir = tempfile::tempdir().expect("a folder");
    let impatient = StoreConfig {
        bulk_idle_timeout: HumanDuration::millis(50),
        message_timeout: HumanDuration::millis(100),
        ..config(dir.path())
    };
    let setup = Setup::with(&impatient).await;
    let wanted = chain(230, 3);
    for path in [DataPath::Bulk, DataPath::Local] {
        let (client, namespace) = setup.by(path).await;
        let mut puts = client.put_blocks(&namespace).await.expect("a stream");
        for hash in &wanted {
            puts.put(layer_block(*hash, 0)).await.expect("queued");
            puts.flush().await.expect("sent");
            let until = Instant::now() + Duration::from_secs(20);
            while puts.outcomes().is_empty() {
                assert!(Instant::now() < until, "{path:?}: no outcome");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            // The store closes the connection meanwhile.
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        assert_eq!(puts.finish().await.expect("all was answered"), []);
    }
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn gets_of_a_store_on_this_machine_lie_in_its_memory() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let wanted = chain(240, 50);
    setup.put(&wanted).await;
    // Where memory of an arena is mapped here, by the store and by its clients.
    let maps = || -> Vec<std::ops::Range<usize>> {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let arenas = maps.lines().filter(|line| line.contains("kvasir-arena"));
        let range = |line: &str| {
            let (range, _) = line.split_once(' ').expect("a range");
            let (start, end) = range.split_once('-').expect("a range");
            let number = |hex| usize::from_str_radix(hex, 16).expect("a number");
            number(start)..number(end)
        };
        arenas.map(range).collect()
    };
    for (path, in_arena) in [
        (DataPath::Local, true),
        (DataPath::Auto, true),
        (DataPath::Bulk, false),
        (DataPath::Grpc, false),
    ] {
        let (client, namespace) = setup.by(path).await;
        let mut kept = Vec::new();
        // Twice, so that the connection is used again while bytes of it are held.
        for _ in 0..2 {
            let gets = client.get_blocks(&namespace, &wanted, 0..LAYERS, None, None).await;
            let mut gets = gets.expect("a stream");
            while let Some(block) = gets.next().await.expect("a block") {
                kept.push((block.hash, block.layer, block.payload.expect("a hit")));
            }
        }
        drop(client);
        let maps = maps();
        for (hash, layer, bytes) in kept {
            let at = bytes.as_ptr() as usize;
            assert_eq!(maps.iter().any(|map| map.contains(&at)), in_arena, "{path:?}");
            assert_eq!(bytes, payload(hash, layer, schema().layer_block_bytes()), "{path:?}");
        }
    }
    setup.store.stop().await.expect("everything written");
}
