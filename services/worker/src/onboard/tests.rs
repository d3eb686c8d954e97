use kvasir_block::{Dtype, LayerBlockLayout};

use super::*;

const LAYERS: usize = 3;
const LAYOUT: LayerBlockLayout = LayerBlockLayout {
    kv_heads: 1,
    head_dim: 4,
    block_tokens: 2,
    dtype: Dtype::F16,
};

/// Arrivals of a load of `blocks` blocks: `.` is a good layer block, `-` a missing one, `!` a failure, `|` only structure. However many
/// come at a time, `whole` of them are whole in the end.
fn check(blocks: usize, arrivals: &str, whole: usize, over: bool) {
    for batch in [1, 2, 4, 64] {
        check_batches(blocks, arrivals, batch, whole, over);
    }
}

fn check_batches(blocks: usize, arrivals: &str, batch: usize, whole: usize, over: bool) {
    let mut pool = PagePool::new(LAYOUT, LAYERS, blocks).expect("a small pool");
    let (sender, receiver) = mpsc::channel(64);
    let pages = (0..blocks as u32).map(PageId).collect();
    let mut onboard = Onboard::new(5, pages, LAYERS, receiver);
    let marks: Vec<(usize, char)> = arrivals.chars().filter(|mark| *mark != '|').enumerate().collect();
    let (came, failed): (Vec<_>, Vec<_>) = marks.into_iter().partition(|(_, mark)| *mark != '!');
    for some in came.chunks(batch) {
        let payload =
            |(place, mark): &(usize, char)| (*mark == '.').then(|| vec![*place as u8 + 1; LAYOUT.bytes()].into());
        let arrival = Arrival::Blocks(some.iter().map(payload).collect());
        sender.try_send(arrival).expect("there is room");
    }
    for _ in failed {
        let arrival = Arrival::Failed("gone".to_owned());
        sender.try_send(arrival).expect("there is room");
    }
    onboard.pump(&mut pool);
    assert_eq!(
        (onboard.loaded().1.len(), onboard.is_over(), onboard.is_cut()),
        (whole, over, whole < blocks),
        "{arrivals}"
    );
    if over {
        for layer in 0..LAYERS {
            for page in 0..whole {
                let expected = (layer * blocks + page) as u8 + 1;
                assert_eq!(
                    pool.page_bytes(layer, PageId(page as u32)).expect("host pages")[0],
                    expected,
                    "{arrivals}: layer {layer} page {page}"
                );
            }
        }
    }
}

#[test]
fn a_load_is_what_is_whole_in_all_layers() {
    check(3, "...|...|...", 3, true);
    check(3, "...|...|..", 3, false);
    check(3, "", 3, false);
    check(3, "..-|...|...", 2, true);
    // Two blocks are whole as soon as their last layer is there.
    check(3, "..-|...|..", 2, true);
    check(3, "...|.-.|...", 1, true);
    check(3, "...|...|.--", 1, true);
    check(3, "-", 0, true);
    check(3, "...|...|..!", 2, true);
    check(3, "...|..!", 0, true);
    check(3, "...|.-!", 0, true);
    check(1, ".|.|.", 1, true);
}

#[test]
fn a_wrong_length_cuts_like_a_missing_block() {
    let mut pool = PagePool::new(LAYOUT, LAYERS, 2).expect("a small pool");
    let (sender, receiver) = mpsc::channel(64);
    let mut onboard = Onboard::new(0, vec![PageId(0), PageId(1)], LAYERS, receiver);
    for bytes in [LAYOUT.bytes(), LAYOUT.bytes() - 1] {
        sender
            .try_send(Arrival::Blocks(vec![Some(vec![1; bytes].into())]))
            .expect("there is room");
    }
    onboard.pump(&mut pool);
    assert_eq!((onboard.is_cut(), onboard.loaded().1.len()), (true, 1));
    assert_eq!(onboard.take_bytes(), LAYOUT.bytes() as u64);
}

#[test]
fn waiting_ends_with_the_layer_with_a_cut_or_with_the_time() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .expect("a runtime");
    let timeout = Duration::from_millis(20);
    let mut pool = PagePool::new(LAYOUT, LAYERS, 2).expect("a small pool");
    let (sender, receiver) = mpsc::channel(64);
    let mut onboard = Onboard::new(0, vec![PageId(0), PageId(1)], LAYERS, receiver);
    let good = || Arrival::Blocks(vec![Some(vec![1; LAYOUT.bytes()].into())]);
    for _ in 0..3 {
        sender.try_send(good()).expect("there is room");
    }
    assert_eq!(onboard.wait(0, &mut pool, timeout, runtime.handle()), Ok(()));
    let late = sender.clone();
    runtime.spawn(async move {
        tokio::time::sleep(Duration::from_millis(5)).await;
        late.send(good()).await
    });
    assert_eq!(onboard.wait(1, &mut pool, timeout, runtime.handle()), Ok(()));
    let cut = onboard
        .wait(2, &mut pool, timeout, runtime.handle())
        .expect_err("nothing comes");
    assert!(cut.0.contains("20ms"), "{}", cut.0);
    assert!(onboard.is_over() && onboard.loaded().1.is_empty());
}
