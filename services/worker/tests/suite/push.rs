//! The put path by itself: what steps push, a store holds, and what finds no room is dropped and nothing else.

use kvasir_block::{BlockHash, ExtraKeys, block_hashes};
use kvasir_model::{Attention, Device, Logits, Model, PageId, PagePool, StepSequence};
use kvasir_runtime::units::ByteSize;
use kvasir_worker::{Pusher, WorkerConfig};

use crate::{harness, peer::Peer};

const BLOCK_TOKENS: usize = 64;
/// Whole blocks of the prompt, which has some tokens more.
const BLOCKS: usize = 5;
const STEP_TOKENS: usize = 2 * BLOCK_TOKENS;

/// Computes the prompt step by step and pushes its whole blocks. Returns how many found the queue full.
fn pushed(pusher: &Pusher, model: &mut Model, pool: &mut PagePool, tokens: &[u32], chain: &[BlockHash]) -> usize {
    let pages: Vec<Option<PageId>> = (0..=BLOCKS as u32).map(|page| Some(PageId(page))).collect();
    let mut dropped = 0;
    for (nth, some) in tokens.chunks(STEP_TOKENS).enumerate() {
        let position = nth * STEP_TOKENS;
        let whole = position / BLOCK_TOKENS..(position + some.len()) / BLOCK_TOKENS;
        let completed = whole.map(|block| (chain[block], PageId(block as u32)));
        let mut hooks = pusher.step(completed);
        let sequence = StepSequence {
            tokens: some,
            position,
            pages: &pages,
            attention: Attention::Full,
            logits: Logits::None,
        };
        model.step(&[sequence], pool, &mut hooks).expect("a step");
        dropped += hooks.dropped();
    }
    dropped
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_is_held_once_and_what_has_no_room_is_dropped() {
    let file = harness::model_file();
    let mut model = Model::load_on(&file, &Device::Cpu { threads: 2 }, BLOCK_TOKENS as u16).expect("the model");
    let schema = model.schema().clone();
    let mut pool = model.pool(BLOCKS + 1).expect("a small pool");
    let tokens = harness::prompt(BLOCKS * BLOCK_TOKENS + 10, 1);
    let (peer, running) = Peer::start().await;
    let config = |queue_blocks: usize, offload_streams| WorkerConfig {
        store_url: format!("http://{}", running.addr()),
        offload_queue_bytes_max: ByteSize::bytes((queue_blocks * schema.block_bytes()) as u64),
        offload_streams,
        ..WorkerConfig::default()
    };
    let (layers, mut held) = (usize::from(schema.layers), 0);
    for streams in [1, 3] {
        let chain = block_hashes(
            &tokens,
            BLOCK_TOKENS,
            &ExtraKeys::with_cache_salt(&format!("{streams} streams")),
        );
        let pusher = Pusher::start(&config(BLOCKS, streams), &schema)
            .await
            .expect("the store is there");
        let dropped = tokio::task::block_in_place(|| pushed(&pusher, &mut model, &mut pool, &tokens, &chain));
        let outcome = pusher.settle(&chain).await.expect("an end");
        assert_eq!((dropped, outcome.held, outcome.dropped), (0, BLOCKS, 0));
        held += BLOCKS;
        assert_eq!(peer.held(), held * layers, "all layers of all blocks");
        pusher.stop().await;
    }
    // A queue of one block, and steps of two: the second of each is dropped, and those that end a step before are let in again.
    let chain = block_hashes(&tokens, BLOCK_TOKENS, &ExtraKeys::with_cache_salt("a small queue"));
    let pusher = Pusher::start(&config(1, 1), &schema).await.expect("the store is there");
    let dropped = tokio::task::block_in_place(|| pushed(&pusher, &mut model, &mut pool, &tokens, &chain));
    let outcome = pusher.settle(&chain).await.expect("an end");
    assert!(dropped >= 2, "{dropped} of {BLOCKS} blocks");
    assert_eq!((outcome.held, outcome.dropped), (BLOCKS - dropped, dropped));
    assert_eq!(peer.held(), (held + BLOCKS - dropped) * layers);
    pusher.stop().await;
    running.stop().await;
}
