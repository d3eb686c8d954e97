//! What is put comes back, and the rest is told as it is.

use std::time::Duration;

use kvasir_block::Checksum;
use kvasir_client::{EventKind, GetOutcome, LayerBlock, PutOutcome};

use crate::support::{LAYERS, Setup, chain, config, in_order, layer_block, payload, schema};

#[tokio::test]
async fn put_match_get_lease_stat() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(1, 300);
    let held = &chain[..200];
    let all: Vec<_> = in_order(held)
        .map(|(hash, layer)| (hash, layer, PutOutcome::Stored))
        .collect();
    assert_eq!(
        setup.put(held).await,
        all,
        "an outcome per block, in the order of the puts"
    );
    let again: Vec<_> = in_order(held)
        .map(|(hash, layer)| (hash, layer, PutOutcome::Present))
        .collect();
    assert_eq!(setup.put(held).await, again);

    let lease = Some(Duration::from_secs(3600));
    let found = setup
        .client
        .match_prefix(setup.namespace.id, &chain, lease)
        .await
        .expect("a match");
    assert_eq!(
        (found.hit_blocks, found.host_blocks, found.lease_for),
        (200, 200, Duration::from_secs(60))
    );
    assert_eq!(
        setup.hit_blocks(&chain[1..]).await,
        199,
        "any start is a prefix to the store"
    );
    assert_eq!(setup.hit_blocks(&chain[200..]).await, 0);

    let got = setup.get(&chain).await;
    let expected: Vec<_> = in_order(&chain).collect();
    assert_eq!(
        got.iter().map(|block| (block.hash, block.layer)).collect::<Vec<_>>(),
        expected
    );
    for block in &got {
        let hit = held.contains(&block.hash);
        let bytes = hit.then(|| payload(block.hash, block.layer, schema().layer_block_bytes()));
        let outcome = if hit { GetOutcome::Hit } else { GetOutcome::Miss };
        assert_eq!((block.outcome, &block.payload), (outcome, &bytes));
    }

    let stat = setup.client.stat().await.expect("numbers");
    let blocks = 200 * u64::from(LAYERS);
    assert_eq!((stat.blocks, stat.put_blocks, stat.get_hits), (200, blocks, blocks));
    assert_eq!((stat.put_bytes, stat.get_bytes), (blocks * 4096, blocks * 4096));
    assert_eq!(
        (stat.get_hits_host, stat.get_hits_disk, stat.get_hits_object),
        (blocks, 0, 0)
    );
    assert_eq!(
        (stat.misses_absent, stat.leases, stat.namespaces),
        (100 * u64::from(LAYERS), 1, 1)
    );
    assert_eq!(stat.epoch, setup.namespace.epoch);
    setup
        .client
        .release(found.lease.expect("a lease"))
        .await
        .expect("released");
    setup.client.release(12345).await.expect("an unknown lease is no error");
    assert_eq!(setup.client.stat().await.expect("numbers").leases, 0);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn some_layers_are_not_a_block() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(2, 2);
    let mut stream = setup.client.put_blocks(&setup.namespace).await.expect("a stream");
    stream.put(layer_block(chain[0], 1)).await.expect("queued");
    stream.flush().await.expect("sent");
    stream.finish().await.expect("outcomes");
    assert_eq!(setup.hit_blocks(&chain).await, 0);
    let outcomes: Vec<_> = setup.get(&chain[..1]).await.iter().map(|block| block.outcome).collect();
    assert_eq!(outcomes, [GetOutcome::Miss, GetOutcome::Hit, GetOutcome::Miss]);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn wrong_bytes_are_an_outcome() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(3, 1);
    let good = layer_block(chain[0], 0);
    let wrong = LayerBlock {
        checksum: Checksum::from_u32(good.checksum.to_u32() ^ 1),
        ..layer_block(chain[0], 1)
    };
    let mut stream = setup.client.put_blocks(&setup.namespace).await.expect("a stream");
    stream.put(good).await.expect("queued");
    stream.put(wrong).await.expect("queued");
    let outcomes: Vec<_> = stream
        .finish()
        .await
        .expect("outcomes")
        .into_iter()
        .map(|(_, _, outcome)| outcome)
        .collect();
    assert_eq!(outcomes, [PutOutcome::Stored, PutOutcome::ChecksumMismatch]);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn outcomes_come_without_waiting_and_in_flight_is_bounded() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let client = kvasir_client::StoreClient::new(kvasir_client::ClientConfig {
        in_flight_bytes_max: 32 << 10,
        batch_bytes: 8 << 10,
        ..kvasir_client::ClientConfig::to(setup.url())
    })
    .expect("a client");
    let chain = chain(4, 100);
    let mut stream = client.put_blocks(&setup.namespace).await.expect("a stream");
    assert_eq!(stream.outcomes(), []);
    let mut outcomes = Vec::new();
    for (hash, layer) in in_order(&chain) {
        stream.put(layer_block(hash, layer)).await.expect("queued");
        assert!(
            stream.unanswered_bytes() <= 32 << 10,
            "{} bytes",
            stream.unanswered_bytes()
        );
        outcomes.extend(stream.outcomes());
    }
    assert!(!outcomes.is_empty(), "the bound makes outcomes come while putting");
    outcomes.extend(stream.finish().await.expect("outcomes"));
    let expected: Vec<_> = in_order(&chain)
        .map(|(hash, layer)| (hash, layer, PutOutcome::Stored))
        .collect();
    assert_eq!(outcomes, expected);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test]
async fn events_tell_what_is_held() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(5, 3);
    let mut watch = setup.client.watch_events(None).await.expect("a watch");
    let end = watch.next().await.expect("an event").expect("an event");
    assert_eq!((end.kind, end.epoch), (EventKind::SnapshotEnd, setup.namespace.epoch));
    setup.put(&chain).await;
    for (i, hash) in chain.iter().enumerate() {
        let event = watch.next().await.expect("an event").expect("an event");
        assert_eq!(
            (event.kind, event.namespace),
            (EventKind::Stored, Some(setup.namespace.id))
        );
        assert_eq!(
            (event.hashes, event.sequence),
            (vec![*hash], end.sequence + 1 + i as u64)
        );
    }
    let mut late = setup
        .client
        .watch_events(Some(setup.namespace.id))
        .await
        .expect("a watch");
    let snapshot = late.next().await.expect("an event").expect("an event");
    let (mut held, mut put) = (snapshot.hashes, chain.clone());
    held.sort_unstable();
    put.sort_unstable();
    assert_eq!((snapshot.kind, held), (EventKind::Snapshot, put));
    assert_eq!(
        late.next().await.expect("an event").expect("an event").kind,
        EventKind::SnapshotEnd
    );

    setup.store.stop().await.expect("everything written");
    assert_eq!(late.next().await.expect("an orderly end"), None);
}

#[tokio::test]
async fn a_deadline_in_the_past_is_too_late_for_all() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(6, 40);
    setup.put(&chain).await;
    let deadline = Some(Duration::from_nanos(1));
    // The head of the reply may itself come too late: then the call has timed out, which says the same.
    match setup
        .client
        .get_blocks(&setup.namespace, &chain, 0..LAYERS, None, deadline)
        .await
    {
        Ok(mut stream) => {
            let mut count = 0;
            while let Some(block) = stream.next().await.expect("a block") {
                assert_eq!((block.outcome, block.payload), (GetOutcome::TooLate, None));
                count += 1;
            }
            assert_eq!(count, 40 * usize::from(LAYERS));
        }
        Err(error) => assert_eq!(error.kind, kvasir_client::ErrorKind::TimedOut, "{error}"),
    }
    setup.store.stop().await.expect("everything written");
}
