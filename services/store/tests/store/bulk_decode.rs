//! Decode over a bulk connection: what it says is what gRPC says, and what is wrong is refused.

use std::time::Duration;

use kvasir_client::{
    AttendOptions, BulkDecode, ClientError, DataPath, ErrorKind, Form, Hint, IndexChoice, Namespace, OpenContext,
    StoreClient,
};
use kvasir_runtime::units::HumanDuration;

use crate::{
    retrieval::{Q_HEADS, SCALE, open, put, query},
    support::{LAYERS, Setup, chain, config, config_by},
};

const LONG: Duration = Duration::from_secs(20);

/// Does `work` on a thread that may block, with a client that goes by bulk TCP.
async fn blocking<T: Send + 'static>(
    setup: &Setup,
    work: impl FnOnce(StoreClient, Namespace) -> T + Send + 'static,
) -> T {
    let namespace = setup.namespace.clone();
    let client = StoreClient::new(config_by(DataPath::Bulk, &setup.url())).expect("a client");
    let work = move || work(client, namespace);
    tokio::task::spawn_blocking(work).await.expect("no panic")
}

fn context(chain: &[kvasir_block::BlockHash]) -> OpenContext {
    OpenContext {
        chain: chain.to_vec(),
        q_heads: Q_HEADS,
        softmax_scale: SCALE,
        index: IndexChoice::Best,
        row_cache_rows: 0,
    }
}

fn attend(target_mass: f32) -> Form {
    Form::Attend {
        target_mass,
        k_max: 0,
        options: AttendOptions::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_what_grpc_says() {
    let dir = tempfile::tempdir().expect("a folder");
    let setup = Setup::with(&config(dir.path())).await;
    let chain = chain(70, 12);
    put(&setup, &chain).await;
    let forms = [attend(1.0), attend(0.7), Form::Rows { k: 5 }];
    let mut stream = open(&setup, &chain).await;
    let mut expected = Vec::new();
    for (sequence, form) in (1..).zip(forms) {
        for layer in 0..LAYERS {
            stream.send(query(sequence, layer, form)).await.expect("sent");
            expected.push(stream.receive().await.expect("a reply"));
        }
    }
    let context = context(&chain);
    let replies = blocking(&setup, move |client, namespace| {
        let mut stream = client.decode_by_bulk(&namespace, &context).expect("a context");
        assert_eq!(
            (stream.opened().tokens, stream.opened().index.as_str()),
            (12 * 16, "flat")
        );
        let none = stream.receive(LONG).expect_err("nothing was asked");
        assert_eq!(none.kind, ErrorKind::Invalid);
        let mut replies = Vec::new();
        for (sequence, form) in (1..).zip(forms) {
            // All layers at once: answered in the order asked.
            for layer in 0..LAYERS {
                stream.send(query(sequence, layer, form)).expect("sent");
                let hint = Hint {
                    layer,
                    q: query(sequence, layer, form).q,
                    local_lse: vec![],
                };
                stream.hint(&hint).expect("sent");
            }
            for _ in 0..LAYERS {
                replies.push(stream.receive(LONG).expect("lives").expect("a reply"));
            }
        }
        replies
    })
    .await;
    assert_eq!(replies.len(), expected.len());
    for (reply, expected) in replies.iter().zip(&expected) {
        assert_eq!((reply.sequence, reply.layer), (expected.sequence, expected.layer));
        assert_eq!(format!("{:?}", reply.found), format!("{:?}", expected.found));
        assert_eq!(reply.report.mass_covered, expected.report.mass_covered);
        assert_eq!(reply.report.keys_scanned, expected.report.keys_scanned);
    }
    drop(stream);
    setup.store.stop().await.expect("everything written");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut few = config(dir.path());
    few.streams_max = 2;
    let setup = Setup::with(&few).await;
    let held = chain(71, 4);
    put(&setup, &held).await;
    let (there, absent) = (context(&held), context(&chain(72, 4)));
    blocking(&setup, move |client, namespace| {
        let open = |context: &OpenContext| client.decode_by_bulk(&namespace, context);
        let kind = |refused: Result<BulkDecode, ClientError>| refused.expect_err("refused").kind;
        assert_eq!(kind(open(&absent)), ErrorKind::NotFound);
        let odd = OpenContext {
            q_heads: 3,
            ..there.clone()
        };
        assert_eq!(kind(open(&odd)), ErrorKind::Invalid);
        let mut stream = open(&there).expect("a context");
        // Of the wrong shape: the stream lives on.
        let mut short = query(1, 0, attend(1.0));
        short.q.pop();
        assert_eq!(stream.send(short).expect_err("refused").kind, ErrorKind::Invalid);
        stream.send(query(2, 0, attend(1.0))).expect("sent");
        assert_eq!(stream.receive(LONG).expect("lives").expect("a reply").sequence, 2);
        // What only the store can see ends it, and its error is repeated.
        let mut no_number = query(3, 0, attend(1.0));
        no_number.q[1] = f32::NAN;
        stream.send(no_number).expect("sent");
        let refused = stream.receive(LONG).expect_err("refused");
        assert_eq!(refused.kind, ErrorKind::Invalid);
        assert!(refused.message.contains("query.q[1]: must be finite"), "{refused}");
        assert_eq!(stream.send(query(4, 0, attend(1.0))), Err(refused));
        drop(stream);
        // All places among the streams are taken, until one is given back.
        let mut others = Vec::new();
        let full = loop {
            match open(&there) {
                Ok(stream) => others.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind, ErrorKind::Exhausted);
        assert!(full.message.contains("streams_max"), "{full}");
        others.clear();
        let until = std::time::Instant::now() + LONG;
        while open(&there).is_err() {
            assert!(std::time::Instant::now() < until, "no place was given back");
            std::thread::sleep(Duration::from_millis(5));
        }
    })
    .await;
    setup.store.stop().await.expect("everything written");
}

/// A stream on which nothing is asked for too long is closed, and its caller told.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_nothing_for_too_long_is_closed() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut quick = config(dir.path());
    // Looked at whenever a read gave up.
    (quick.bulk_idle_timeout, quick.message_timeout) = (HumanDuration::millis(300), HumanDuration::millis(100));
    let setup = Setup::with(&quick).await;
    let held = chain(73, 4);
    put(&setup, &held).await;
    let context = context(&held);
    let ended = blocking(&setup, move |client, namespace| {
        let mut stream = client.decode_by_bulk(&namespace, &context).expect("a context");
        assert!(stream.send(query(1, 0, attend(1.0))).is_ok());
        assert!(stream.receive(LONG).expect("lives").is_some());
        // Who says nothing for too long is closed.
        std::thread::sleep(Duration::from_millis(700));
        let sent = stream.send(query(2, 0, attend(1.0)));
        sent.and_then(|()| stream.receive(LONG).map(drop))
            .expect_err("it was closed")
    })
    .await;
    assert_eq!(ended.kind, ErrorKind::Unavailable);
    setup.store.stop().await.expect("everything written");
}
