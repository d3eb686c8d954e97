//! The suites against every planted bug. Built and run by `make faults` only: it takes a build of the storage crates of its own.

#![cfg(feature = "planted-bugs")]

use kvasir_block::planted::Bug;
use kvasir_faults::{
    Plan, ROWS,
    planted::{CATCHES, hunt},
};

const SEED: u64 = 0x5EED;

#[test]
fn the_table_names_every_bug_once() {
    let mut named: Vec<_> = CATCHES.iter().map(|(bug, ..)| bug.name()).collect();
    named.sort_unstable();
    let mut all: Vec<_> = Bug::ALL.iter().map(|bug| bug.name()).collect();
    all.sort_unstable();
    assert_eq!(named, all);
}

/// One test, since a bug is planted in the whole process.
#[test]
fn every_bug_is_found_and_without_one_nothing_is() {
    for row in ROWS {
        let outcome = row.run(Plan {
            seed: SEED,
            // Nowhere else are there points to abort at, so all of it is done here.
            count: if row.name == "points" { row.full } else { row.sample },
        });
        assert_eq!(outcome.failure, None, "{} without a bug", row.name);
    }
    let missed: Vec<_> = CATCHES
        .iter()
        .filter(|(bug, rows, count)| hunt(*bug, rows, *count, SEED).is_none())
        .map(|(bug, ..)| bug.name())
        .collect();
    assert!(missed.is_empty(), "bugs that no suite finds: {missed:?}");
}
