//! A worker and a store that goes wrong: every fault costs time, none costs a token.

use kvasir_proto::v1::{self, AttentionMode, retrieval_report::Shortfall};
use kvasir_runtime::units::{ByteSize, HumanDuration};
use kvasir_worker::WorkerConfig;

use crate::{
    harness::{Running, greedy, prompt},
    peer::{Fault, Peer},
};

const PAGE_BYTES: u64 = 64 * 30 * 2 * 3 * 64 * 2;
const LAYERS: usize = 30;
/// Five whole blocks and a tail of ten tokens.
const PROMPT: usize = 330;
const BLOCKS: usize = 5;

/// Eight pages, so that one other request of 500 tokens empties the device tier.
fn config() -> WorkerConfig {
    WorkerConfig {
        kv_bytes_max: ByteSize::bytes(8 * PAGE_BYTES),
        onboard_timeout: HumanDuration::millis(700),
        retrieval_timeout: HumanDuration::millis(700),
        ..WorkerConfig::default()
    }
}

async fn empty_the_device_tier(worker: &Running) {
    let other = v1::GenerateRequest {
        no_cache: true,
        ..greedy(&prompt(500, 99), 1)
    };
    worker.generate(other).await.expect("an answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_goes_wrong_is_computed_and_the_tokens_are_the_same() {
    let (peer, running) = Peer::start().await;
    let worker = Running::with_store(config(), format!("http://{}", running.addr())).await;
    let prompt = prompt(PROMPT, 1);
    let cold = worker.generate(greedy(&prompt, 8)).await.expect("an answer");
    assert_eq!(cold.started.cached_tokens, 0);
    assert_eq!(cold.report().bytes_pushed, BLOCKS as u64 * PAGE_BYTES);
    peer.until_held(BLOCKS * LAYERS).await;

    let table = [
        // What goes wrong, and tokens that came from the store all the same.
        (Fault::None, 320),
        (Fault::GetMisses(2), 128),
        (Fault::GetMisses(29 * BLOCKS + 4), 256),
        (Fault::GetCorrupts(7 * BLOCKS), 0),
        (Fault::GetCorrupts(7 * BLOCKS + 1), 64),
        (Fault::GetEnds(40), 0),
        (Fault::GetEnds(29 * BLOCKS + 3), 192),
        (Fault::GetStalls(0), 0),
        (Fault::GetStalls(12), 0),
        (Fault::GetRefused, 0),
        (Fault::MatchStalls, 0),
    ];
    for (fault, cached) in table {
        empty_the_device_tier(&worker).await;
        peer.set(fault);
        let answer = worker.generate(greedy(&prompt, 8)).await.expect("an answer");
        let found = (answer.started.cached_tokens_device, answer.started.cached_tokens_store);
        assert_eq!(found, (0, cached), "{fault:?}");
        assert_eq!(answer.ids, cold.ids, "{fault:?}");
        let whole = u64::from(cached) / 64 * PAGE_BYTES;
        assert!(
            answer.report().bytes_loaded >= whole,
            "{fault:?}: {:?}",
            answer.report()
        );
    }
    assert_eq!(peer.held(), BLOCKS * LAYERS, "nothing was pushed under another name");

    // The store is gone for good.
    running.stop().await;
    empty_the_device_tier(&worker).await;
    let answer = worker.generate(greedy(&prompt, 8)).await.expect("an answer");
    assert_eq!((answer.started.cached_tokens, &answer.ids), (0, &cold.ids));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retrieval_that_goes_wrong_ends_in_full_attention_and_says_why() {
    let (peer, running) = Peer::start().await;
    let worker = Running::with_store(config(), format!("http://{}", running.addr())).await;
    // Words rather than random tokens: rounding must not decide between two that are equally likely.
    let prompt = worker.page(PROMPT);
    let full = worker.generate(greedy(&prompt, 8)).await.expect("an answer");
    let with = |mode: AttentionMode, salt: &str| v1::GenerateRequest {
        attention: Some(v1::AttentionOptions {
            mode: mode.into(),
            target_mass: 1.0,
            k: 1000,
            sink: 16,
            window: 64,
            ..v1::AttentionOptions::default()
        }),
        cache_salt: salt.to_owned(),
        ..greedy(&prompt, 8)
    };
    let (attend, rows) = (AttentionMode::Attend, AttentionMode::Rows);
    let table = [
        // What goes wrong, how it was asked, under which salt, and words of the reason; none where nothing fell back.
        (Fault::None, attend, "", ""),
        (Fault::None, rows, "", ""),
        (Fault::QueryShort(33, Shortfall::KMax), attend, "", ""),
        (Fault::QueryStalls(0), attend, "", "answer"),
        (Fault::QueryStalls(95), rows, "", "answer"),
        (Fault::QueryFails(64), attend, "", "broken"),
        (
            Fault::QueryShort(64, Shortfall::Deadline),
            attend,
            "",
            "ran out of time",
        ),
        (Fault::QueryShort(31, Shortfall::MissingBlocks), rows, "", "lost blocks"),
        (Fault::OpensNotFound(1), attend, "", ""),
        (Fault::OpensNotFound(100), attend, "", "did not open"),
        (Fault::PutsBusy(2), attend, "busy", ""),
    ];
    for (fault, mode, salt, reason) in table {
        peer.set(fault);
        let answer = worker.generate(with(mode, salt)).await.expect("an answer");
        let report = answer.report();
        assert_eq!(answer.ids, full.ids, "{fault:?} with {mode:?}");
        assert_eq!(report.mode, i32::from(mode), "{fault:?}");
        assert_eq!(
            report.fell_back,
            !reason.is_empty(),
            "{fault:?}: {}",
            report.fallback_reason
        );
        assert!(
            report.fallback_reason.contains(reason),
            "{fault:?}: {}",
            report.fallback_reason
        );
        if !report.fell_back {
            // Seven tokens decoded with retrieval in thirty layers, over 320 - 16 - 64 keys of three heads.
            let queries = 7 * LAYERS as u64;
            assert_eq!(
                (report.round_trips, report.keys_total),
                (queries, queries * 240 * 3),
                "{fault:?}"
            );
            assert_eq!(report.mass_covered_min, 1.0, "{report:?}");
            // All layers but the first three were hinted at, a token each.
            assert_eq!((report.index.as_str(), report.hinted), ("sketch", 7 * 27), "{report:?}");
            match mode {
                AttentionMode::Rows => {
                    // What was sent for the first token was kept for the others.
                    assert_eq!(
                        (report.rows, report.rows_kept),
                        (queries * 720, 6 * 30 * 720),
                        "{report:?}"
                    );
                    assert!(report.retrieved_bytes < 2 * 30 * 720 * 256, "{report:?}");
                }
                _ => assert!(
                    report.retrieved_bytes > queries * 9 * 64 * 4 && report.rows == 0,
                    "{report:?}"
                ),
            }
        }
    }
    // What was computed with retrieval never got a name: the store holds the prompt's blocks under both salts, no more.
    assert_eq!(peer.held(), 2 * BLOCKS * LAYERS);
    worker.stop().await;
    running.stop().await;
}
