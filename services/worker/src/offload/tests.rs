use super::*;

const LAYERS: usize = 3;
const BYTES: usize = 10;

fn hash(n: u8) -> BlockHash {
    BlockHash::from_bytes([n; 32])
}

fn layer_block(n: u8, layer: u16) -> Pushed {
    Pushed {
        hash: hash(n),
        layer,
        payload: Bytes::from(vec![n; BYTES]),
    }
}

/// Room for two blocks.
fn offload() -> Offload {
    Offload::new(LAYERS, BYTES, 2 * LAYERS * BYTES + 5, OffloadMetrics::new())
}

fn push_all(offload: &Offload, n: u8) {
    assert_eq!(offload.offer(hash(n)), Offer::Accepted);
    for layer in 0..LAYERS as u16 {
        offload.push(layer_block(n, layer));
    }
}

#[tokio::test]
async fn a_block_is_known_when_all_its_layers_are_held() {
    let offload = offload();
    push_all(&offload, 1);
    for answered in 0..LAYERS {
        assert_eq!(offload.offer(hash(1)), Offer::Needless, "on its way");
        assert_eq!(offload.standing(&[hash(1)]).under_way, 1, "after {answered} answers");
        let block = offload.take().await.expect("is queued");
        offload.answered(
            block.hash,
            if answered == 0 {
                PutOutcome::Present
            } else {
                PutOutcome::Stored
            },
        );
    }
    assert_eq!(offload.offer(hash(1)), Offer::Needless, "known");
    assert_eq!(offload.standing(&[hash(1), hash(2)]).missing, [1]);
    offload.note_missing(&[hash(1)]);
    assert_eq!(offload.standing(&[hash(1)]).missing, [0]);
    assert_eq!(offload.offer(hash(1)), Offer::Accepted, "may be pushed again");
}

#[tokio::test]
async fn room_is_for_whole_blocks_and_comes_back() {
    let offload = offload();
    push_all(&offload, 1);
    push_all(&offload, 2);
    assert_eq!(offload.offer(hash(3)), Offer::Dropped);
    assert_eq!(
        offload.standing(&[hash(3)]).missing,
        [0],
        "a dropped block may be offered again"
    );
    for _ in 0..LAYERS {
        offload.take().await.expect("is queued");
    }
    push_all(&offload, 3);
    offload.abandon(hash(2));
    assert_eq!(
        offload.offer(hash(4)),
        Offer::Accepted,
        "an abandoned block leaves room"
    );
    offload.abandon(hash(4));
    push_all(&offload, 5);
    let mut order = Vec::new();
    offload.close();
    while let Some(block) = offload.take().await {
        order.push(block.hash);
    }
    assert_eq!(
        order,
        [[hash(3); LAYERS], [hash(5); LAYERS]].concat(),
        "nothing of an abandoned block is sent"
    );
    assert_eq!(offload.inner.lock().bytes, 0);
    assert_eq!(offload.offer(hash(6)), Offer::Dropped, "closed");
}

#[tokio::test]
async fn a_shed_or_lost_layer_forgets_the_block() {
    for outcome in [PutOutcome::Busy, PutOutcome::ChecksumMismatch] {
        let offload = offload();
        push_all(&offload, 1);
        let first = offload.take().await.expect("is queued");
        offload.answered(first.hash, outcome);
        assert_eq!(offload.queued(), 0, "the other layers are of no use");
        assert_eq!(offload.offer(hash(1)), Offer::Accepted);
    }
}

#[tokio::test]
async fn a_change_of_standing_wakes_who_waits() {
    let offload = offload();
    assert_eq!(offload.offer(hash(1)), Offer::Accepted);
    let mut changed = Box::pin(offload.changed());
    assert!(futures::poll!(&mut changed).is_pending());
    offload.abandon(hash(1));
    assert!(futures::poll!(&mut changed).is_ready());
}
