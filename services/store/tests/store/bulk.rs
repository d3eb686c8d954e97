//! The bulk path: what it says is what gRPC says, and peers that break it hurt nobody.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use kvasir_block::{BlockHash, Checksum, NamespaceId};
use kvasir_client::{BulkConnection, ClientConfig, DataPath, ErrorKind, GetOutcome, Namespace, PutBlock, PutOutcome};
use kvasir_proto::bulk::{Greeting, VERSION, Welcome};
use kvasir_runtime::{Runtime, units::HumanDuration};
use kvasir_store::{Store, StoreConfig};

use crate::support::{
    LAYERS, Setup, chain, config, config_by, in_order, layer_block, payload, put_blocks, schema, tenant,
};

/// Does `work` with a bulk connection, on a thread of its own.
async fn with_bulk<T: Send + 'static>(
    setup: &Setup,
    work: impl FnOnce(&mut BulkConnection, &Namespace) -> T + Send + 'static,
) -> T {
    let (namespace, url) = (setup.namespace.clone(), setup.url());
    let work = move || {
        let mut bulk = BulkConnection::connect(&namespace, &bulk_config(&url)).expect("a connection");
        work(&mut bulk, &namespace)
    };
    tokio::task::spawn_blocking(work).await.expect("no panic")
}

fn bulk_config(url: &str) -> ClientConfig {
    config_by(DataPath::Bulk, url)
}

fn put_all(bulk: &mut BulkConnection, namespace: &Namespace, chain: &[BlockHash]) -> Vec<PutOutcome> {
    let blocks: Vec<_> = in_order(chain).map(|(hash, layer)| layer_block(hash, layer)).collect();
    bulk.put_from(namespace, &put_blocks(&blocks)).expect("outcomes")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_put_by_one_path_is_got_by_the_other() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    // More than a frame, so that answers come in several.
    let (by_grpc, by_bulk) = (chain(60, 300), chain(61, 300));
    setup.put(&by_grpc).await;
    let (first, second) = (by_grpc.clone(), by_bulk.clone());
    with_bulk(&setup, move |bulk, namespace| {
        assert_eq!(put_all(bulk, namespace, &second), [PutOutcome::Stored].repeat(900));
        assert_eq!(put_all(bulk, namespace, &second[..2]), [PutOutcome::Present].repeat(6));
        let bytes = namespace.layer_block_bytes;
        for chain in [&first, &second] {
            // Every third key is of a block that nobody has.
            let absent = BlockHash::from_bytes([9; 32]);
            let keys: Vec<_> = in_order(chain)
                .enumerate()
                .map(|(i, key)| if i % 3 == 2 { (absent, key.1) } else { key })
                .collect();
            let mut memory = vec![0; keys.len() * bytes];
            let outcomes = bulk.get_into(namespace, &keys, &mut memory).expect("outcomes");
            for (i, ((hash, layer), outcome)) in keys.iter().zip(outcomes).enumerate() {
                let expected = if i % 3 == 2 { GetOutcome::Miss } else { GetOutcome::Hit };
                assert_eq!(outcome, expected, "{i}");
                if outcome == GetOutcome::Hit {
                    assert_eq!(memory[i * bytes..][..bytes], payload(*hash, *layer, bytes), "{i}");
                }
            }
        }
        let absent = crate::support::chain(62, 1)[0];
        let held = bulk
            .exists(namespace, &[first[0], absent, second[299]])
            .expect("an answer");
        assert_eq!(held, [true, false, true]);
        let matched = bulk
            .match_prefix(namespace, &[first[0], first[1], absent], Some(Duration::from_secs(5)))
            .expect("a match");
        assert_eq!((matched.hit_blocks, matched.lease.is_some()), (2, true));
    })
    .await;
    assert!(
        setup
            .get(&by_bulk)
            .await
            .iter()
            .all(|block| block.outcome == GetOutcome::Hit)
    );
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn several_gets_are_on_their_way_and_late_ones_say_so() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(63, 100);
    setup.put(&chain).await;
    with_bulk(&setup, move |bulk, namespace| {
        let keys: Vec<_> = in_order(&chain).collect();
        let bytes = namespace.layer_block_bytes;
        for part in keys.chunks(30) {
            bulk.ask_get(namespace, part, None, None).expect("asked");
        }
        let error = bulk.exists(namespace, &chain).expect_err("answers are on their way");
        assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
        for part in keys.chunks(30) {
            let mut memory = vec![0; part.len() * bytes];
            let outcomes = bulk.receive_get(&mut memory).expect("outcomes");
            assert_eq!(outcomes, [GetOutcome::Hit].repeat(part.len()));
            let (hash, layer) = part[7];
            assert_eq!(memory[7 * bytes..][..bytes], payload(hash, layer, bytes));
        }
        bulk.ask_get(namespace, &keys[..5], None, Some(Duration::ZERO))
            .expect("asked");
        let outcomes = bulk.receive_get(&mut vec![0; 5 * bytes]).expect("outcomes");
        assert_eq!(outcomes, [GetOutcome::TooLate; 5]);
    })
    .await;
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_the_words_of_grpc_and_leave_the_connection_whole() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(64, 2);
    with_bulk(&setup, move |bulk, namespace| {
        let mut unknown = namespace.clone();
        unknown.id = NamespaceId::from_bytes([3; 32]);
        let bytes = namespace.layer_block_bytes;
        let error = bulk
            .get_into(&unknown, &[(chain[0], 0)], &mut vec![0; bytes])
            .expect_err("unknown");
        assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
        assert!(error.message.contains("open it with its schema first"), "{error}");
        let wrong = layer_block(chain[0], 0);
        let block = PutBlock {
            hash: wrong.hash,
            layer: 0,
            checksum: Checksum::from_u32(1),
            payload: &wrong.payload,
        };
        let error = bulk.put_from(&unknown, &[block]).expect_err("unknown");
        assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
        let outcomes = bulk.put_from(namespace, &[block]).expect("outcomes");
        assert_eq!(outcomes, [PutOutcome::ChecksumMismatch]);
        let short = PutBlock {
            payload: &wrong.payload[1..],
            ..block
        };
        let error = bulk.put_from(namespace, &[short]).expect_err("short");
        assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
        assert_eq!(put_all(bulk, namespace, &chain), [PutOutcome::Stored].repeat(6));
    })
    .await;
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_another_start_and_one_connection_too_many_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let narrow = StoreConfig {
        bulk_connections_max: 1,
        ..config(dir.path())
    };
    let setup = Setup::with(&narrow).await;
    let (old, url) = (setup.namespace.clone(), setup.url());
    with_bulk(&setup, move |bulk, namespace| {
        let error = BulkConnection::connect(namespace, &bulk_config(&url)).expect_err("no place");
        assert_eq!(error.kind, ErrorKind::Exhausted, "{error}");
        assert!(
            error.message.contains("store.bulk_connections_max allows no more"),
            "{error}"
        );
        assert!(bulk.exists(namespace, &[]).expect("an answer").is_empty());
    })
    .await;
    let addr = setup.store.bulk_addr();
    setup.store.stop().await.expect("everything written");
    // The same port, another start.
    let again = StoreConfig {
        bulk_listen: addr,
        ..narrow
    };
    let setup = Setup::with(&again).await;
    let error = BulkConnection::connect(&old, &bulk_config(&setup.url())).expect_err("stale");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    assert!(error.message.contains("open the namespace again"), "{error}");
    setup.store.stop().await.expect("everything written");
}

fn raw(setup: &Setup) -> TcpStream {
    let stream = TcpStream::connect(setup.store.bulk_addr()).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
    stream
}

/// What the store says until it closes.
fn rest(mut stream: TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    // A reset is an end, too.
    let _ = stream.read_to_end(&mut answer);
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_guesses_are_shown_the_door() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let epoch = setup.namespace.epoch;
    let guess = Greeting::new(epoch, [0; 16]).encode();
    let other = Greeting {
        version: VERSION + 1,
        ..Greeting::new(epoch, [0; 16])
    }
    .encode();
    let table: [(&[u8], usize); 5] = [
        (
            b"GET / HTTP/1.1\r\nHost: store\r\nAccept: everything there is\r\n\r\n",
            0,
        ),
        (&[0; 3000], 0),
        (&guess[..20], 0),
        (&guess, Welcome::BYTES),
        (&other, Welcome::BYTES),
    ];
    for (garbage, answered) in table {
        let mut stream = raw(&setup);
        // The store may have closed it already.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert_eq!(rest(stream).len(), answered, "{garbage:?}");
    }
    setup.client.stat().await.expect("the store is well");
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_and_silent_peers_lose_their_places() {
    let dir = tempfile::tempdir().expect("a folder");
    let impatient = StoreConfig {
        message_timeout: HumanDuration::millis(100),
        bulk_connections_max: 8,
        ..config(dir.path())
    };
    let setup = Setup::with(&impatient).await;
    // Eight that say nothing take all places, for a while.
    let silent: Vec<_> = (0..8).map(|_| raw(&setup)).collect();
    let started = Instant::now();
    for stream in silent {
        assert!(rest(stream).is_empty());
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    // One that sends a byte now and then is no better.
    let mut slow = raw(&setup);
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(20));
        if slow.write_all(b"K").is_err() {
            break;
        }
    }
    assert!(rest(slow).is_empty());
    with_bulk(&setup, |bulk, namespace| {
        bulk.exists(namespace, &[]).expect("an answer")
    })
    .await;
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stands_still_does_not_hold_the_store_up() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(65, 2000);
    setup.put(&chain).await;
    let (other, url) = (setup.namespace.clone(), setup.url());
    let mut lazy = BulkConnection::connect(&other, &bulk_config(&url)).expect("a connection");
    let keys: Vec<_> = in_order(&chain).collect();
    // 24 MiB are wanted, more than buffers hold, and nothing is read.
    lazy.ask_get(&other, &keys, None, None).expect("asked");
    let few = chain[..10].to_vec();
    let held = with_bulk(&setup, move |bulk, namespace| {
        bulk.exists(namespace, &few).expect("an answer")
    })
    .await;
    assert_eq!(held, [true; 10]);
    let started = Instant::now();
    setup.store.stop().await.expect("everything written");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    let error = lazy.receive_get(&mut vec![0; keys.len() * schema().layer_block_bytes()]);
    assert_eq!(error.expect_err("cut off").kind, ErrorKind::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_the_client_say_the_same_on_every_path() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    // More than a frame, with a hole.
    let mut wanted = chain(66, 300);
    setup.put(&wanted).await;
    wanted[100] = BlockHash::from_bytes([9; 32]);
    let mut answers = Vec::new();
    for path in [DataPath::Auto, DataPath::Grpc, DataPath::Bulk, DataPath::Local] {
        let (client, namespace) = setup.by(path).await;
        // Twice, so that the connection is used again.
        for _ in 0..2 {
            let gets = client.get_blocks(&namespace, &wanted, 0..LAYERS, None, None).await;
            let mut gets = gets.expect("a stream");
            let mut got = Vec::new();
            while let Some(block) = gets.next().await.expect("a block") {
                got.push((block.hash, block.layer, block.outcome, block.payload));
            }
            answers.push(got);
        }
        let late = client
            .get_blocks(&namespace, &wanted, 0..1, None, Some(Duration::ZERO))
            .await;
        if let Ok(mut late) = late
            && let Ok(Some(block)) = late.next().await
        {
            assert_eq!(block.outcome, GetOutcome::TooLate, "{path:?}");
        }
        let mut unknown = namespace.clone();
        unknown.id = NamespaceId::from_bytes([3; 32]);
        let error = client
            .get_blocks(&unknown, &wanted, 0..1, None, None)
            .await
            .expect_err("unknown");
        assert_eq!(error.kind, ErrorKind::NotFound, "{path:?}: {error}");
    }
    assert_eq!(answers[0].len(), 900);
    assert!(answers[0].iter().all(|(hash, layer, outcome, bytes)| match outcome {
        GetOutcome::Hit => bytes.as_ref() == Some(&payload(*hash, *layer, schema().layer_block_bytes())),
        outcome => *outcome == GetOutcome::Miss && *hash == wanted[100] && bytes.is_none(),
    }));
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_goes_on_by_itself_when_the_store_starts_anew() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let wanted = chain(67, 2);
    setup.put(&wanted).await;
    assert_eq!(setup.get(&wanted).await.len(), 6);
    let (grpc, client, namespace) = (setup.store.grpc_addr(), setup.client, setup.namespace);
    setup.store.stop().await.expect("everything written");
    let again = StoreConfig {
        listen: grpc,
        ..config(dir.path())
    };
    let store = Store::start(&again, &Runtime::new()).await.expect("a store");
    // The old bulk path is gone, gRPC carries it; once the namespace is opened anew, bulk does again.
    for _ in 0..2 {
        let mut gets = client
            .get_blocks(&namespace, &wanted, 0..LAYERS, None, None)
            .await
            .expect("a stream");
        while let Some(block) = gets.next().await.expect("a block") {
            assert_eq!(block.outcome, GetOutcome::Hit);
        }
        let anew = client.open_namespace(&tenant(), &schema()).await.expect("a namespace");
        assert_ne!(anew.epoch, namespace.epoch);
        assert_ne!(anew.bulk, namespace.bulk);
    }
    store.stop().await.expect("everything written");
}
