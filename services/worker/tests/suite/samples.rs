//! What a request that asks for `roar` leaves the store to build it by.

use half::f16;
use kvasir_proto::v1::{self, AttentionMode};
use kvasir_runtime::units::ByteSize;
use kvasir_worker::{AttentionConfig, WorkerConfig};

use crate::{
    harness::{Running, greedy},
    peer::Peer,
};

const PROMPT: usize = 330;
const LAYERS: usize = 30;
/// Nine query heads of 64, in halves.
const ROW_BYTES: usize = 9 * 64 * 2;

/// The question and the samples of one request, computed in steps of so many tokens.
async fn asked(
    step_tokens_max: usize,
    index: &str,
    sample_tokens: u64,
) -> (v1::BuildIndexRequest, Vec<v1::BlockQueries>) {
    let (peer, running) = Peer::start().await;
    let config = WorkerConfig {
        step_tokens_max,
        attention: AttentionConfig {
            query_sample_bytes: ByteSize::bytes(sample_tokens * (LAYERS * ROW_BYTES) as u64),
            ..AttentionConfig::default()
        },
        ..WorkerConfig::default()
    };
    let worker = Running::with_store(config, format!("http://{}", running.addr())).await;
    let prompt = worker.page(PROMPT);
    let request = v1::GenerateRequest {
        attention: Some(v1::AttentionOptions {
            mode: AttentionMode::Attend.into(),
            target_mass: 1.0,
            sink: 16,
            window: 64,
            index: index.to_owned(),
            ..v1::AttentionOptions::default()
        }),
        ..greedy(&prompt, 4)
    };
    let answer = worker.generate(request).await.expect("an answer");
    assert!(!answer.report().fell_back, "{:?}", answer.report());
    let asked = peer.until_asked_to_build().await;
    worker.stop().await;
    running.stop().await;
    asked
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_of_evenly_spread_tokens_are_sent_whatever_the_steps() {
    let (request, mut samples) = asked(256, "roar", 50).await;
    assert_eq!((request.index.as_str(), request.hashes.len()), ("roar", PROMPT / 64));
    let (again, mut in_small_steps) = asked(48, "roar", 50).await;
    assert_eq!(again.hashes, request.hashes);
    let order = |blocks: &mut Vec<v1::BlockQueries>| {
        let place = |block: &v1::BlockQueries| request.hashes.iter().position(|hash| *hash == block.hash);
        blocks.sort_by_key(|block| (block.layer, place(block)));
    };
    order(&mut samples);
    order(&mut in_small_steps);
    assert_eq!(samples, in_small_steps, "a token's query does not depend on its step");
    // Every seventh token of the whole blocks, in each layer.
    let expected: Vec<usize> = (0..PROMPT / 64 * 64).step_by(PROMPT.div_ceil(50)).collect();
    for layer in 0..LAYERS {
        let of_layer = samples.iter().filter(|block| block.layer == layer as u32);
        let mut positions = Vec::new();
        for block in of_layer {
            let at = request
                .hashes
                .iter()
                .position(|hash| *hash == block.hash)
                .expect("a block of the context");
            assert_eq!(block.q.len(), block.tokens.len() * ROW_BYTES);
            positions.extend(block.tokens.iter().map(|token| at * 64 + *token as usize));
            let values: Vec<f32> = block
                .q
                .chunks_exact(2)
                .map(|two| f16::from_le_bytes([two[0], two[1]]).to_f32())
                .collect();
            assert!(values.iter().all(|x| x.is_finite()) && values.iter().any(|x| x.abs() > 0.1));
        }
        assert_eq!(positions, expected, "layer {layer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clusters_need_none() {
    let (request, samples) = asked(256, "wave", 50).await;
    assert_eq!((request.index.as_str(), samples.len()), ("wave", 0));
}
