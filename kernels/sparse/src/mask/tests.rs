use proptest::{collection::vec, prelude::*};

use super::*;

fn heads() -> impl Strategy<Value = (usize, usize, HeadMask)> {
    let numbers = || vec(0_u32..700, 0..12);
    (prop_oneof![Just(64_usize), Just(128)], 0_usize..300).prop_flat_map(move |(rows, offset)| {
        let head = prop_oneof![
            Just(HeadMask::Dense),
            (1_usize..200, 1_usize..300).prop_map(move |(initial, local)| HeadMask::a_shape(rows, initial, local)),
            (numbers(), numbers()).prop_map(move |(v, s)| HeadMask::vertical_slash(rows, &v, &s)),
            vec(vec(0_u32..12, 0..5), 6).prop_map(move |lists| HeadMask::block_sparse(rows, offset, &lists)),
        ];
        head.prop_map(move |head| (rows, offset, head))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// What a forward gathers is what the definition says, each key once.
    #[test]
    fn held_keys_are_those_of_the_definition((rows, offset, head) in heads(), block in 0_usize..5) {
        let mask = Mask::new(rows, vec![head.clone()]).expect("constructors make sound masks");
        let end = offset + (block + 1) * rows;
        let held = head.held(end, block);
        let mut keys: Vec<usize> = held.ranges.iter().cloned().flatten().collect();
        let runs = keys.len();
        keys.extend(held.columns.iter().map(|&column| column as usize));
        keys.sort_unstable();
        let defined: Vec<usize> = (0..end).filter(|&key| head.holds(end, block, key)).collect();
        prop_assert_eq!(&keys, &defined);
        prop_assert!(held.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        prop_assert_eq!(runs + held.columns.len(), keys.len());
        for row in block * rows..(block + 1) * rows {
            let seen = (0..end + 10).filter(|&key| mask.sees(0, offset, row, key)).count();
            prop_assert_eq!(held.up_to(offset + row), seen);
            prop_assert!(mask.sees(0, offset, row, offset + row), "a query sees itself");
        }
    }

    /// Every pair that a column or a diagonal names is seen, in every row, whatever the offset.
    #[test]
    fn columns_and_diagonals_are_covered(
        rows in prop_oneof![Just(64_usize), Just(128)],
        offset in 0_usize..400,
        queries in 1_usize..300,
        verticals in vec(0_u32..700, 0..10),
        slashes in vec(0_u32..700, 0..10),
    ) {
        let mask = Mask::new(rows, vec![HeadMask::vertical_slash(rows, &verticals, &slashes)]).expect("sound");
        for row in 0..queries {
            let position = offset + row;
            for &slash in &slashes {
                if let Some(key) = position.checked_sub(slash as usize) {
                    prop_assert!(mask.sees(0, offset, row, key), "row {} at distance {}", row, slash);
                }
            }
            for &column in &verticals {
                prop_assert_eq!(mask.sees(0, offset, row, column as usize) , column as usize <= position);
            }
        }
    }
}

#[test]
fn an_a_shape_by_hand() {
    // Blocks of 64 rows, 2 first keys, 10 near ones: two tiles behind each block's end, of which the second reaches further.
    let mask = Mask::new(64, vec![HeadMask::a_shape(64, 2, 10)]).expect("sound");
    let seen = |row: usize| (0..400).filter(|&key| mask.sees(0, 0, row, key)).collect::<Vec<_>>();
    assert_eq!(seen(5), (0..=5).collect::<Vec<_>>());
    // Row 200 is in the block that ends at 256: keys from 128 on, and the two first.
    assert_eq!(seen(200), [0, 1].into_iter().chain(128..=200).collect::<Vec<_>>());
    // Work of 256 queries: 1 tile, 2, then 2 and one for the columns.
    assert_eq!(mask.work(0, 0, 256), 1 + 2 + 3 + 3);
    assert_eq!(
        Mask::new(64, vec![HeadMask::Dense]).expect("sound").work(0, 0, 256),
        1 + 2 + 3 + 4
    );
}

#[test]
fn a_block_sparse_by_hand() {
    // Blocks of 128 rows from position 64 on; the third is asked for key block 1 alone.
    let mask = HeadMask::block_sparse(128, 64, &[vec![], vec![], vec![1]]);
    let mask = Mask::new(128, vec![mask]).expect("sound");
    // Row 300 is at position 364, in the block of positions 320 to 447: its own key blocks are 5 and 6.
    let table = [
        (0, true),
        (63, true),
        (64, true),
        (128, false),
        (319, false),
        (320, true),
        (364, true),
        (365, false),
    ];
    for (key, seen) in table {
        assert_eq!(mask.sees(0, 64, 300, key), seen, "{key}");
    }
    // The first block, those asked for, and the two on the diagonal.
    assert_eq!(mask.work(0, 64, 384), (1 + 2) + (1 + 2) + (1 + 1 + 2));
}

#[test]
fn what_is_out_of_order_is_refused() {
    let relative = |tiles: &[u32], columns: &[u32]| HeadMask::Relative {
        tiles: tiles.to_vec(),
        columns: columns.to_vec(),
    };
    let table = [
        (relative(&[0, 63], &[]), "relative tiles"),
        (relative(&[64, 0], &[]), "relative tiles"),
        (relative(&[0], &[3, 3]), "columns"),
        (relative(&[u32::MAX], &[]), "relative tiles"),
        (
            HeadMask::Absolute {
                rows: vec![vec![], vec![64, 100]],
            },
            "absolute tiles",
        ),
    ];
    for (head, what) in table {
        let error = Mask::new(64, vec![HeadMask::Dense, head]).expect_err(what);
        assert_eq!((error.head, error.what), (1, what));
    }
    assert!(Mask::new(0, vec![]).is_err());
}
