//! Start, stop, start again; and what a store says about itself.

use std::time::{Duration, Instant};

use kvasir_client::{ClientError, DataPath, ErrorKind, GetOutcome, PutOutcome};
use kvasir_runtime::Runtime;
use kvasir_store::{Store, StoreConfig};

use crate::support::{LAYERS, Setup, chain, config, in_order, layer_block, payload, schema};

#[tokio::test]
async fn blocks_outlive_the_process() {
    let dir = tempfile::tempdir().expect("a folder");
    let chain = chain(10, 50);
    let first = Setup::with(&config(dir.path())).await;
    let epoch = first.namespace.epoch;
    first.put(&chain).await;
    first.store.stop().await.expect("everything written");

    let second = Setup::with(&config(dir.path())).await;
    assert!(second.namespace.epoch > epoch);
    assert_eq!(second.hit_blocks(&chain).await, 50);
    for block in second.get(&chain).await {
        let bytes = payload(block.hash, block.layer, schema().layer_block_bytes());
        assert_eq!((block.outcome, block.payload), (GetOutcome::Hit, Some(bytes)));
    }
    second.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn stopping_ends_streams_and_loses_nothing_accepted() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(11, 400);
    let mut stream = setup.client.put_blocks(&setup.namespace).await.expect("a stream");
    let mut stored = Vec::new();
    let blocks: Vec<_> = in_order(&chain).collect();
    let (before, after) = blocks.split_at(900);
    for (hash, layer) in before {
        stream.put(layer_block(*hash, *layer)).await.expect("queued");
    }
    stream.flush().await.expect("sent");
    stored.extend(stream.outcomes());
    let stop = tokio::spawn(setup.store.stop());
    // A stream of the local path has put all of the rest before a task that was only spawned runs.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut failed = None;
    for (hash, layer) in after {
        if let Err(error) = stream.put(layer_block(*hash, *layer)).await {
            failed = Some(error);
            break;
        }
    }
    stored.extend(stream.outcomes());
    let error = match failed {
        Some(error) => error,
        None => stream.finish().await.expect_err("the store is gone"),
    };
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    stop.await.expect("no panic").expect("everything written");

    let again = Setup::with(&config(dir.path())).await;
    let got = again.get(&chain).await;
    for (hash, layer, outcome) in stored {
        assert_eq!(outcome, PutOutcome::Stored);
        let found = got
            .iter()
            .find(|block| (block.hash, block.layer) == (hash, layer))
            .expect("asked for");
        assert_eq!(found.outcome, GetOutcome::Hit, "answered STORED and then lost");
    }
    again.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_takes_nothing_costs_the_end_a_second() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    // 36 MiB, more than windows and buffers hold.
    let chain = chain(12, 3000);
    setup.put(&chain).await;
    let (reader, _) = setup.by(DataPath::Grpc).await;
    let gets = reader.get_blocks(&setup.namespace, &chain, 0..LAYERS, None, None).await;
    let mut gets = gets.expect("a stream");
    // From here on it reads nothing, as a worker does whose GPU hangs.
    gets.next().await.expect("a block").expect("a block");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    setup.store.stop().await.expect("everything written");
    let took = begun.elapsed();
    // A second, and what a busy machine takes to flush.
    assert!(took < Duration::from_secs(6), "{took:?}");
    let rest = async {
        while gets.next().await?.is_some() {}
        Ok(())
    };
    let cut_off: Result<(), ClientError> = rest.await;
    assert_eq!(cut_off.expect_err("cut off").kind, ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_store_that_is_away_is_unavailable_and_comes_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let client = setup.client.clone();
    let same_port = StoreConfig {
        listen: setup.store.grpc_addr(),
        ..config(dir.path())
    };
    setup.store.stop().await.expect("everything written");
    let error = client.stat().await.expect_err("nobody there");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    assert!(error.message.contains("check that it runs there"), "{error}");
    let error = client.put_blocks(&setup.namespace).await.expect_err("nobody there");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");

    let again = Setup::with(&same_port).await;
    client.stat().await.expect("the old client reconnects");
    again.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn two_stores_cannot_share_a_folder_or_a_port() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let error = Store::start(&config(dir.path()), &Runtime::new())
        .await
        .expect_err("the folder is taken");
    assert!(format!("{error:#}").contains("cannot open the store in"), "{error:#}");

    let other = tempfile::tempdir().expect("a folder");
    let taken = StoreConfig {
        listen: setup.store.grpc_addr(),
        ..config(other.path())
    };
    let error = Store::start(&taken, &Runtime::new())
        .await
        .expect_err("the port is taken");
    assert!(
        format!("{error:#}").contains("another process (perhaps another kvasir)"),
        "{error:#}"
    );
    let free = Setup::with(&config(other.path())).await;
    free.store.stop().await.expect("the failed start left the folder free");
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn readiness_and_metrics_are_served() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    setup.put(&chain(13, 2)).await;
    let admin = format!("http://{}", setup.store.admin_addr());
    let ready = reqwest::get(format!("{admin}/readyz")).await.expect("an answer");
    assert_eq!(ready.status(), 200);
    let wanted = [
        "kvasir_store_put_blocks_total{outcome=\"stored\"}",
        "kvasir_store_get_misses_total{reason=\"absent\"}",
        "kvasir_store_tier_bytes{tier=\"host\"}",
        "kvasir_store_flush_queue_bytes_max",
        "kvasir_store_door_waiting{door=\"io\"}",
        "kvasir_store_call_seconds_bucket{call=\"bulk_put\"",
    ];
    // Numbers are copied once a second.
    for _ in 0..50 {
        let text = reqwest::get(format!("{admin}/metrics"))
            .await
            .expect("an answer")
            .text()
            .await
            .expect("text");
        if wanted.iter().all(|name| text.contains(name)) {
            setup.store.stop().await.expect("everything written");
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("metrics are missing, of {wanted:?}");
}
