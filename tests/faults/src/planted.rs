//! Which row finds which planted bug: the suites judged by what they are for.

use kvasir_block::planted::{Bug, plant};

use crate::{Outcome, Plan, row};

/// A bug, the rows that must find it, and how many faults that takes.
pub const CATCHES: &[(Bug, &[&str], u64)] = &[
    (Bug::PutChecksumSkipped, &["wire"], 400),
    (Bug::ClientChecksumSkipped, &["wire"], 400),
    (Bug::TenantDropped, &["identity"], 200),
    (Bug::LayerIgnored, &["identity"], 200),
    (Bug::LeasedBlockEvicted, &["promises"], 9),
    (Bug::TenantBudgetIgnored, &["promises"], 9),
    (Bug::EpochReused, &["clock"], 20),
];

/// Plants `bug` and runs its rows until one finds it: what that run was. `None` if none does.
pub fn hunt(bug: Bug, rows: &[&str], count: u64, seed: u64) -> Option<Outcome> {
    let _planted = plant(bug);
    rows.iter()
        .filter_map(|name| row(name))
        .map(|row| row.run(Plan { seed, count }))
        .find(|outcome| outcome.failure.is_some())
}
