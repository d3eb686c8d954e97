//! Each row at the size that every change is tested with. `make faults` runs all of it.

use kvasir_faults::{Plan, row};

/// Another seed finds other places; the failure of any names its own.
const SEED: u64 = 0x5EED;

fn sample(name: &str) {
    let row = row(name).expect("a row of that name");
    let outcome = row.run(Plan {
        seed: SEED,
        count: row.sample,
    });
    assert_eq!(outcome.failure, None, "{:?}", outcome.tally);
    assert!(
        outcome.skipped.is_some() || outcome.tally.faults >= row.sample,
        "{:?}",
        outcome.tally
    );
}

macro_rules! samples {
    ($($row:ident),+ $(,)?) => {
        $(#[test]
        fn $row() {
            sample(stringify!($row));
        })+

        #[test]
        fn every_row_has_a_sample() {
            let named = [$(stringify!($row)),+];
            let rows: Vec<_> = kvasir_faults::ROWS.iter().map(|row| row.name).collect();
            assert_eq!(rows, named);
        }
    };
}

samples!(
    identity, promises, kill, power, points, torn, flips, misplaced, memory, wire, space, quota, eio, slow, truncate,
    index, object, clock, pressure
);
