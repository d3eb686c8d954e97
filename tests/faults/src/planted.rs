//! Which row finds which planted bug: the suites judged by what they are for.

use kvasir_block::planted::{Bug, plant};

use crate::{Outcome, Plan, row};

/// A bug, the rows that must find it, and how many faults that takes.
pub const CATCHES: &[(Bug, &[&str], u64)] = &[
    (Bug::HostChecksumSkipped, &["memory"], 40),
    (Bug::DiskChecksumSkipped, &["flips"], 300),
    (Bug::ObjectChecksumSkipped, &["object"], 200),
    (Bug::ClientChecksumSkipped, &["wire"], 200),
    (Bug::PutChecksumSkipped, &["wire"], 200),
    (Bug::TableChecksumSkipped, &["wire"], 200),
    (Bug::TenantDropped, &["identity"], 200),
    (Bug::LayerIgnored, &["identity"], 200),
    (Bug::LeasedBlockEvicted, &["promises"], 9),
    (Bug::TenantBudgetIgnored, &["promises"], 9),
    (Bug::DiskBudgetIgnored, &["promises"], 9),
    (Bug::DeadlineIgnored, &["slow", "promises"], 5),
    (Bug::EpochReused, &["clock"], 20),
    (Bug::PublishBeforeSync, &["power"], 60),
    (Bug::TornPayloadAccepted, &["torn"], 48),
    (Bug::MisplacedRecordAccepted, &["misplaced"], 256),
    (Bug::StaleGenerationAccepted, &["misplaced"], 256),
    (Bug::ForeignRecordAccepted, &["misplaced"], 256),
    (Bug::SyncRetried, &["eio"], 200),
    (Bug::CorruptRecordKept, &["flips"], 300),
];

/// Plants `bug` and runs its rows until one finds it: what that run was. `None` if none does.
pub fn hunt(bug: Bug, rows: &[&str], count: u64, seed: u64) -> Option<Outcome> {
    let _planted = plant(bug);
    rows.iter()
        .filter_map(|name| row(name))
        .map(|row| row.run(Plan { seed, count }))
        .find(|outcome| outcome.failure.is_some())
}
