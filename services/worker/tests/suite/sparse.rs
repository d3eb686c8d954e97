//! Sparse prefill in a whole worker: what it answers, what it names, and what it must not mix up.

use kvasir_proto::v1;
use kvasir_runtime::units::ByteSize;
use kvasir_sparse::{HeadPatterns, Pattern};
use kvasir_worker::WorkerConfig;

use crate::harness::{Running, greedy, prompt};

const BLOCK: u16 = 128;

/// Patterns of SmolLM2's shape in a file of their own.
fn patterns_file(folder: &tempfile::TempDir, pattern: Pattern, dense_up_to: usize) -> std::path::PathBuf {
    let mut patterns = HeadPatterns::uniform(pattern, 30, 9).expect("a sound pattern");
    patterns.dense_up_to = dense_up_to;
    let path = folder.path().join("heads.json");
    std::fs::write(&path, patterns.write().expect("JSON")).expect("a folder that can be written to");
    path
}

fn config(sparse_prefill: std::path::PathBuf) -> WorkerConfig {
    WorkerConfig {
        sparse_prefill,
        block_tokens: BLOCK,
        step_tokens_max: 256,
        kv_bytes_max: ByteSize::mib(256),
        ..WorkerConfig::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_found_again_and_give_the_same_tokens() {
    let folder = tempfile::tempdir().expect("a folder");
    let narrow = Pattern::AShape { initial: 16, local: 64 };
    let worker = Running::start(config(patterns_file(&folder, narrow, 256))).await;
    // Five whole blocks and a part; from the third on they are sparse.
    let prompt = prompt(5 * 128 + 40, 3);
    let cold = worker.generate(greedy(&prompt, 12)).await.expect("an answer");
    assert_eq!(cold.started.cached_tokens_device, 0);
    let warm = worker.generate(greedy(&prompt, 12)).await.expect("an answer");
    assert_eq!(warm.started.cached_tokens_device, 5 * 128, "whole blocks are named");
    assert_eq!(warm.ids, cold.ids);
    // A prompt that goes on where the answer ended: the block with the prompt's tail and the answer was never computed whole,
    // so it has no name.
    let mut longer = prompt.clone();
    longer.extend(&cold.ids);
    longer.extend(crate::harness::prompt(200, 4));
    let going_on = worker.generate(greedy(&longer, 1)).await.expect("an answer");
    assert_eq!(going_on.started.cached_tokens_device, 5 * 128);

    // Who asks for full attention by name gets it, from nothing but the blocks that are dense anyway, and leaves nothing.
    let full = v1::GenerateRequest {
        attention: Some(v1::AttentionOptions {
            mode: v1::AttentionMode::Full.into(),
            ..v1::AttentionOptions::default()
        }),
        ..greedy(&prompt, 12)
    };
    let dense = worker.generate(full.clone()).await.expect("an answer");
    assert_eq!(dense.started.cached_tokens_device, 256);
    let again = worker.generate(full).await.expect("an answer");
    assert_eq!((again.started.cached_tokens_device, &again.ids), (256, &dense.ids));
    let warm = worker.generate(greedy(&prompt, 12)).await.expect("an answer");
    assert_eq!((warm.started.cached_tokens_device, &warm.ids), (5 * 128, &cold.ids));
    worker.stop().await;

    let plain = Running::start(config("off".into())).await;
    let truth = plain.generate(greedy(&prompt, 12)).await.expect("an answer");
    assert_eq!(truth.ids, dense.ids, "full attention is full attention");
    assert_ne!(
        truth.ids, cold.ids,
        "16 first and 64 near keys are not enough for a random text"
    );
    plain.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_at_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = patterns_file(&folder, Pattern::BlockSparse { blocks: 4 }, 0);
    let refusal = Running::refused(WorkerConfig {
        block_tokens: 96,
        ..config(path.clone())
    })
    .await;
    assert!(
        refusal.contains("worker.sparse_prefill") && refusal.contains("blocks of 96 tokens"),
        "{refusal}"
    );
    let refusal = Running::refused(config(folder.path().join("none.json"))).await;
    assert!(
        refusal.contains("worker.sparse_prefill") && refusal.contains("cannot be opened"),
        "{refusal}"
    );
    std::fs::write(&path, "[{}]").expect("a file");
    let refusal = Running::refused(config(path)).await;
    assert!(refusal.contains("patterns of 1 layers of 9 heads"), "{refusal}");
}
