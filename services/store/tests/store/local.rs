//! The local path: places in the store's memory, which stay as they are while somebody looks at them.

use std::{
    io::{BufRead, BufReader},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use kvasir_block::BlockHash;
use kvasir_client::{
    ClientConfig, DataPath, ErrorKind, GetOutcome, LocalConnection, Namespace, PutOutcome, StoreClient,
};
use kvasir_runtime::units::{ByteSize, HumanDuration};
use kvasir_store::StoreConfig;

use crate::support::{Setup, chain, config, config_by, in_order, layer_block, payload, put_blocks, schema, tenant};

const BLOCK_BYTES: u64 = 4096;

fn local_config(url: &str) -> ClientConfig {
    config_by(DataPath::Local, url)
}

fn connect(setup: &Setup) -> LocalConnection {
    LocalConnection::connect(&setup.namespace, &local_config(&setup.url())).expect("a connection")
}

fn keys(chain: &[BlockHash]) -> Vec<(BlockHash, u16)> {
    in_order(chain).collect()
}

/// Gets blocks that are all held, and checks their bytes.
fn hits(local: &mut LocalConnection, namespace: &Namespace, keys: &[(BlockHash, u16)]) -> Vec<Bytes> {
    let got = local.get(namespace, keys).expect("outcomes");
    let bytes: Vec<Bytes> = got.into_iter().map(|(_, bytes)| bytes.expect("a hit")).collect();
    check(&bytes, keys);
    bytes
}

fn check(bytes: &[Bytes], keys: &[(BlockHash, u16)]) {
    assert_eq!(bytes.len(), keys.len());
    for (i, (bytes, (hash, layer))) in bytes.iter().zip(keys).enumerate() {
        assert_eq!(*bytes, payload(*hash, *layer, schema().layer_block_bytes()), "{i}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn places_have_the_bytes_that_were_put_and_are_returned() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let (by_grpc, by_local) = (chain(70, 300), chain(71, 300));
    setup.put(&by_grpc).await;
    let mut local = connect(&setup);
    let blocks: Vec<_> = in_order(&by_local)
        .map(|(hash, layer)| layer_block(hash, layer))
        .collect();
    let outcomes = local.put_from(&setup.namespace, &put_blocks(&blocks));
    let outcomes = outcomes.expect("outcomes");
    assert_eq!(outcomes, [PutOutcome::Stored].repeat(900));
    for chain in [&by_grpc, &by_local] {
        // Every third key is of a block that nobody has.
        let absent = BlockHash::from_bytes([9; 32]);
        let keys: Vec<_> = in_order(chain)
            .enumerate()
            .map(|(i, key)| if i % 3 == 2 { (absent, key.1) } else { key })
            .collect();
        let got = local.get(&setup.namespace, &keys).expect("outcomes");
        assert_eq!(local.held(), 600, "all hits are places");
        for (i, ((hash, layer), (outcome, bytes))) in keys.iter().zip(got).enumerate() {
            if i % 3 == 2 {
                assert_eq!((outcome, bytes), (GetOutcome::Miss, None), "{i}");
            } else {
                assert_eq!(outcome, GetOutcome::Hit, "{i}");
                let expected = payload(*hash, *layer, schema().layer_block_bytes());
                assert_eq!(bytes, Some(expected), "{i}");
            }
        }
        assert_eq!(local.held(), 0, "all were dropped");
    }
    let absent = chain(72, 1)[0];
    let held = local
        .exists(&setup.namespace, &[by_grpc[0], absent])
        .expect("an answer");
    assert_eq!(held, [true, false]);
    let matched = local
        .match_prefix(&setup.namespace, &by_grpc[..2], None)
        .expect("a match");
    assert_eq!(matched.hit_blocks, 2);
    let mut unknown = setup.namespace.clone();
    unknown.id = kvasir_block::NamespaceId::from_bytes([3; 32]);
    let error = local.get(&unknown, &keys(&by_grpc[..1])).expect_err("unknown");
    assert_eq!(error.kind, ErrorKind::NotFound, "{error}");
    hits(&mut local, &setup.namespace, &keys(&by_grpc[..1]));
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_stays_while_the_store_churns_idles_and_stops() {
    let dir = tempfile::tempdir().expect("a folder");
    let small = StoreConfig {
        host_bytes_max: ByteSize::mib(8),
        bulk_idle_timeout: HumanDuration::millis(50),
        message_timeout: HumanDuration::millis(500),
        ..config(dir.path())
    };
    let setup = Setup::with(&small).await;
    let wanted = chain(73, 100);
    setup.put(&wanted).await;
    let mut local = connect(&setup);
    let wanted = keys(&wanted);
    let held = hits(&mut local, &setup.namespace, &wanted);
    assert_eq!(local.held(), 300);
    // Three times the memory, so that everything in it is replaced but what is held.
    for seed in 74..77 {
        let more = chain(seed, 700);
        setup.put(&more).await;
        check(&held, &wanted);
        // What was evicted comes from disk, and the bytes of this round are as right as those of the first.
        hits(&mut local, &setup.namespace, &keys(&more[..20]));
    }
    // Longer than a connection may be idle that holds nothing.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(hits(&mut local, &setup.namespace, &wanted[..5]).len(), 5);
    // The connection goes, its bytes stay.
    drop(local);
    setup.put(&chain(78, 700)).await;
    check(&held, &wanted);
    setup.store.stop().await.expect("everything written");
    check(&held, &wanted);
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_its_bounds_a_reader_gets_bytes_of_its_own() {
    let dir = tempfile::tempdir().expect("a folder");
    let wanted = chain(79, 10);
    for (places_max, bytes_max, expected) in [(5, 1 << 20, 5), (1000, 7 * BLOCK_BYTES, 7), (1000, 1 << 20, 30)] {
        let narrow = StoreConfig {
            local_places_max: places_max,
            local_bytes_max: ByteSize::bytes(bytes_max),
            ..config(dir.path())
        };
        let setup = Setup::with(&narrow).await;
        setup.put(&wanted).await;
        let mut local = connect(&setup);
        let keys = keys(&wanted);
        let held = hits(&mut local, &setup.namespace, &keys);
        assert_eq!(local.held(), expected);
        hits(&mut local, &setup.namespace, &keys);
        assert_eq!(local.held(), expected, "the rest was copied");
        drop(held);
        assert_eq!(local.held(), 0);
        let _again = hits(&mut local, &setup.namespace, &keys);
        assert_eq!(local.held(), expected, "returned places are had again");
        setup.store.stop().await.expect("everything written");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn turned_off_or_asked_for_otherwise_there_is_no_local_path() {
    let dir = tempfile::tempdir().expect("a folder");
    let off = StoreConfig {
        local_socket: "".into(),
        ..config(dir.path())
    };
    let setup = Setup::with(&off).await;
    assert_eq!(setup.store.local_socket(), None);
    let error = LocalConnection::connect(&setup.namespace, &local_config(&setup.url())).expect_err("none");
    assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
    setup.store.stop().await.expect("everything written");
    let setup = Setup::with(&config(dir.path())).await;
    let path = setup.store.local_socket().expect("a socket").to_owned();
    let config = config_by(DataPath::Bulk, &setup.url());
    let error = LocalConnection::connect(&setup.namespace, &config).expect_err("another path");
    assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
    let mut local = connect(&setup);
    setup.store.stop().await.expect("everything written");
    assert!(!std::path::Path::new(&path).exists());
    let error = local.exists(&setup.namespace, &[]).expect_err("stopped");
    assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
}

/// Where the child of a test finds the store.
const STORE: &str = "KVASIR_TEST_STORE";

/// Another process: holds what it gets until its standard input ends or it is killed.
#[test]
#[ignore = "is run by the tests below"]
#[expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a process that a test starts: told where the store is, and tells what it holds"
)]
fn child() {
    let url = std::env::var(STORE).expect("run by a test");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let config = local_config(&url);
    let namespace = runtime.block_on(async {
        let client = StoreClient::new(config.clone()).expect("a client");
        client.open_namespace(&tenant(), &schema()).await.expect("a namespace")
    });
    match LocalConnection::connect(&namespace, &config) {
        Ok(mut local) => {
            let _held = hits(&mut local, &namespace, &keys(&chain(80, 10)));
            println!("child: holds {}", local.held());
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        Err(error) => println!("child: {:?}: {}", error.kind, error.message),
    }
}

/// Starts the child, as another user perhaps; what it says. `None` where that user may not run it.
fn start(setup: &Setup, uid: Option<u32>) -> Option<(Child, String)> {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command
        .args(["--exact", "local::child", "--ignored", "--nocapture"])
        .env(STORE, setup.url())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    if let Some(uid) = uid {
        command.uid(uid);
    }
    let mut child = command.spawn().ok()?;
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let said = lines
        .map_while(Result::ok)
        .find_map(|line| line.split_once("child: ").map(|(_, said)| said.to_owned()));
    Some((child, said.expect("the child says something")))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_process_held_comes_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let narrow = StoreConfig {
        // All connections together may hold half of it.
        host_bytes_max: ByteSize::bytes(60 * BLOCK_BYTES),
        segment_bytes: ByteSize::mib(1),
        ..config(dir.path())
    };
    let setup = Setup::with(&narrow).await;
    let wanted = chain(80, 10);
    setup.put(&wanted).await;
    let (mut child, said) = start(&setup, None).expect("a child");
    assert_eq!(said, "holds 30");
    let mut local = connect(&setup);
    let one = keys(&wanted[..1])[..1].to_vec();
    let copied = hits(&mut local, &setup.namespace, &one);
    assert_eq!(
        (copied.len(), local.held()),
        (1, 0),
        "the child holds all there is to hold"
    );
    child.kill().expect("killed");
    child.wait().expect("gone");
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let held = hits(&mut local, &setup.namespace, &one);
        if local.held() == 1 {
            check(&held, &one);
            break;
        }
        assert!(Instant::now() < until, "nothing came back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_users_are_let_in_by_name_only() {
    const OTHER: u32 = 65_534;
    let dir = tempfile::tempdir().expect("a folder");
    for (uids, expected) in [
        (vec![], ["Unavailable"].as_slice()),
        // Refused in words, or closed before the words were read.
        (vec![OTHER - 1], &["Invalid", "Unavailable"]),
        (vec![OTHER], &["holds 30"]),
    ] {
        let listed = StoreConfig {
            local_uids: uids,
            ..config(dir.path())
        };
        let setup = Setup::with(&listed).await;
        setup.put(&chain(80, 10)).await;
        for path in [dir.path(), &listed.data_dir] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("set");
        }
        // To start a process as another user takes the rights to; without them there is nothing to see.
        if let Some((mut child, said)) = start(&setup, Some(OTHER)) {
            assert!(expected.iter().any(|start| said.starts_with(start)), "{said}");
            drop(child.stdin.take());
            child.wait().expect("gone");
        }
        setup.store.stop().await.expect("everything written");
    }
}
