use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

fn list(head: HeadTiles) -> TileList {
    TileList::new(vec![head]).expect("in order")
}

#[test]
fn dense_sees_all_that_came_before() {
    for (offset, rows) in [(0, 1), (0, 300), (77, 200)] {
        let list = list(HeadTiles::dense(offset + rows));
        for row in 0..rows {
            for key in 0..offset + rows {
                assert_eq!(
                    list.sees(0, offset, row, key),
                    key <= offset + row,
                    "{offset} {row} {key}"
                );
            }
        }
    }
}

#[test]
fn every_pair_that_was_asked_for_is_seen_and_tiles_do_not_overlap() {
    let mut rng = StdRng::seed_from_u64(7);
    for _ in 0..40 {
        let (offset, rows) = (rng.random_range(0..300usize), rng.random_range(1..400usize));
        let tokens = offset + rows;
        let mut some = |most: usize| -> Vec<u32> {
            (0..rng.random_range(0..most))
                .map(|_| rng.random_range(0..tokens as u32))
                .collect()
        };
        let (verticals, slashes) = (some(20), some(12));
        let list = list(HeadTiles::vertical_slash(&verticals, &slashes));
        for row in 0..rows {
            let position = offset + row;
            assert!(list.sees(0, offset, row, position), "the query itself");
            for &column in verticals.iter().filter(|&&column| column as usize <= position) {
                assert!(
                    list.sees(0, offset, row, column as usize),
                    "column {column} of row {row}"
                );
            }
            for &slash in slashes.iter().filter(|&&slash| slash as usize <= position) {
                assert!(
                    list.sees(0, offset, row, position - slash as usize),
                    "slash {slash} of row {row}"
                );
            }
        }
    }
}

#[test]
fn shapes_see_no_more_than_their_tiles() {
    let a_shape = list(HeadTiles::a_shape(64, 128));
    // Row 1000 lies in the block that ends at 1024; its local window begins at 1024 - 256.
    let cases = [
        (0, true),
        (63, true),
        (64, false),
        (767, false),
        (768, true),
        (1000, true),
        (1001, false),
    ];
    for (key, seen) in cases {
        assert_eq!(a_shape.sees(0, 0, 1000, key), seen, "{key}");
    }
    let blocks = list(HeadTiles::block_sparse(0, &[vec![], vec![], vec![1]]));
    for (row, key, seen) in [
        (300, 63, false),
        (300, 64, true),
        (300, 128, false),
        (300, 256, true),
        (300, 301, false),
    ] {
        assert_eq!(blocks.sees(0, 0, row, key), seen, "{row} {key}");
    }
}

#[test]
fn work_is_counted_in_the_kernels_tiles() {
    // Two full row blocks of 128: two tiles, then four.
    assert_eq!(list(HeadTiles::dense(256)).work(0, 0, 256), 6);
    // The local window of 64 + 128, and one tile of columns for each block.
    assert_eq!(list(HeadTiles::a_shape(10, 64)).work(0, 0, 256), (2 + 1) + (3 + 1));
    // An isolated diagonal costs a square of 128.
    assert_eq!(list(HeadTiles::vertical_slash(&[], &[500])).work(0, 1024, 128), 2 + 2);
}

#[test]
fn what_is_out_of_order_is_refused() {
    let relative = |tiles: &[u32], columns: &[u32]| HeadTiles::Relative {
        tiles: tiles.into(),
        columns: columns.into(),
    };
    for (head, good) in [
        (relative(&[0, 64], &[1, 2]), true),
        (relative(&[0, 63], &[]), false),
        (relative(&[64, 0], &[]), false),
        (relative(&[], &[2, 2]), false),
        (relative(&[u32::MAX], &[]), false),
        (
            HeadTiles::Absolute {
                rows: vec![vec![0, 10]],
            },
            false,
        ),
    ] {
        assert_eq!(TileList::new(vec![head.clone()]).is_ok(), good, "{head:?}");
    }
}
