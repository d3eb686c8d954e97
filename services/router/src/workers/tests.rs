use super::*;
use crate::grpc::scripted::{namespace, schema};

fn info(change: impl FnOnce(&mut KvSchema)) -> WorkerInfo {
    let mut schema = schema();
    change(&mut schema);
    WorkerInfo {
        schema,
        namespace: namespace(),
        context_tokens_max: 100,
    }
}

#[test]
fn a_worker_that_would_answer_something_else_is_refused_by_field() {
    let expected = Expected {
        schema: schema(),
        context_tokens_max: 100,
    };
    let table = [
        ("the same", info(|_| {}), None),
        (
            "block size",
            info(|s| s.block_tokens = 64),
            Some("block_tokens is 64, this router's is 4; set router.block_tokens"),
        ),
        (
            "model",
            info(|s| s.model = "other".into()),
            Some("model is \"other\", this router's is \"scripted\""),
        ),
        ("weights", info(|s| s.weights_sha256 = [9; 32]), Some("weights_sha256")),
        // A GPU beside a CPU: other roundings, so blocks of their own, but the same model.
        ("numerics", info(|s| s.numerics = "other".into()), None),
        (
            "window",
            WorkerInfo {
                context_tokens_max: 99,
                ..info(|_| {})
            },
            Some("context_tokens_max is 99, this router's is 100"),
        ),
    ];
    for (name, info, expected_text) in table {
        let found = disagreement("http://w:1", &info, &expected).map(|found| found.to_string());
        match (&found, expected_text) {
            (None, None) => {}
            (Some(found), Some(text)) => assert!(found.contains(text), "{name}: {found}"),
            _ => panic!("{name}: {found:?}, expected {expected_text:?}"),
        }
    }
}

#[test]
fn load_is_the_report_or_what_was_sent_since() {
    let report = |running, waiting, prefill_tokens_waiting| {
        Some(LoadReport {
            load: Load {
                running,
                waiting,
                prefill_tokens_waiting,
                kv_usage: 0.5,
            },
            draining: false,
        })
    };
    // report, in flight from here, tokens unanswered from here -> running, waiting, prefill tokens
    let table = [
        (None, 0, 0, (0, 0, 0)),
        (None, 3, 500, (3, 0, 500)),
        (report(2, 1, 300), 3, 500, (2, 1, 500)),
        (report(2, 1, 300), 5, 200, (4, 1, 300)),
        (report(9, 4, 9000), 1, 10, (9, 4, 9000)),
    ];
    for (reported, in_flight, unanswered_tokens, expected) in table {
        let state = State {
            health: Health::Reachable,
            reported,
            in_flight,
            unanswered_tokens,
        };
        let load = state.load();
        let found = (load.running, load.waiting, load.prefill_tokens_waiting);
        assert_eq!(
            found, expected,
            "{reported:?}, {in_flight} in flight, {unanswered_tokens} tokens"
        );
    }
}
