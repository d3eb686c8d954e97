//! The rows, each in a file of its own.

mod clock;
mod device;
mod flips;
mod identity;
mod index;
mod kill;
mod memory;
mod misplaced;
mod object;
mod points;
mod power;
mod pressure;
mod promises;
mod quota;
mod space;
mod torn;
mod truncate;
mod wire;

use crate::{Row, Tier};

/// Every row, in the order of the matrix.
pub const ROWS: &[Row] = &[
    Row {
        name: "identity",
        number: None,
        fault: "reads under another tenant, schema, layer; a second put with other bytes",
        sample: 200,
        full: 20_000,
        tiers: &[Tier::Host, Tier::Disk],
        inflict: identity::inflict,
    },
    Row {
        name: "promises",
        number: None,
        fault: "leases, budgets and deadlines while memory and disk are full",
        sample: 9,
        full: 900,
        tiers: &[Tier::Host, Tier::Disk],
        inflict: promises::inflict,
    },
    Row {
        name: "kill",
        number: Some(1),
        fault: "kill -9 of a store under load, at a random time",
        sample: 12,
        full: 1000,
        tiers: &[Tier::Store],
        inflict: kill::inflict,
    },
    Row {
        name: "power",
        number: Some(2),
        fault: "the power goes at an operation of a write; unsynced sectors are there or not",
        sample: 60,
        full: 1200,
        tiers: &[Tier::Disk],
        inflict: power::inflict,
    },
    Row {
        name: "points",
        number: Some(2),
        fault: "the process ends at a named point of publishing, reclaim, a pack",
        sample: 11,
        full: 220,
        tiers: &[Tier::Store],
        inflict: points::inflict,
    },
    Row {
        name: "torn",
        number: Some(3),
        fault: "a segment of 4 MiB cut at every 512 bytes; unsynced sectors lost in any order",
        sample: 48,
        full: 18_192,
        tiers: &[Tier::Disk],
        inflict: torn::inflict,
    },
    Row {
        name: "flips",
        number: Some(4),
        fault: "a bit, a burst or a page of a record goes wrong at rest",
        sample: 900,
        full: 30_000,
        tiers: &[Tier::Disk],
        inflict: flips::inflict,
    },
    Row {
        name: "misplaced",
        number: Some(5),
        fault: "whole records in the wrong place: swapped, copied, left over",
        sample: 256,
        full: 2_000,
        tiers: &[Tier::Disk],
        inflict: misplaced::inflict,
    },
    Row {
        name: "memory",
        number: Some(6),
        fault: "a bit of the host tier's memory flips",
        sample: 200,
        full: 10_000,
        tiers: &[Tier::Host],
        inflict: memory::inflict,
    },
    Row {
        name: "wire",
        number: Some(7),
        fault: "on the wire: flips, pieces twice, left out, cut short",
        sample: 150,
        full: 10000,
        tiers: &[Tier::Store],
        inflict: wire::inflict,
    },
    Row {
        name: "space",
        number: Some(8),
        fault: "the file system is full, and has space again",
        sample: 3,
        full: 200,
        tiers: &[Tier::Host, Tier::Disk],
        inflict: space::inflict,
    },
    Row {
        name: "quota",
        number: Some(8),
        fault: "a quota is used up: the system's, ours of the disk, a tenant's of memory",
        sample: 8,
        full: 200,
        tiers: &[Tier::Host, Tier::Disk],
        inflict: quota::inflict,
    },
    Row {
        name: "eio",
        number: Some(9),
        fault: "reads, writes, syncs and allocations fail; reads come short or flipped",
        sample: 100,
        full: 3000,
        tiers: &[Tier::Disk],
        inflict: device::fail,
    },
    Row {
        name: "slow",
        number: Some(10),
        fault: "reads take 2 to 20 ms each, and have a deadline",
        sample: 10,
        full: 100,
        tiers: &[Tier::Disk],
        inflict: device::delay,
    },
    Row {
        name: "truncate",
        number: Some(11),
        fault: "segment files are cut short under the running store",
        sample: 20,
        full: 500,
        tiers: &[Tier::Disk],
        inflict: truncate::inflict,
    },
    Row {
        name: "index",
        number: Some(12),
        fault: "flips and cuts in the index, the namespaces, the epoch",
        sample: 40,
        full: 5_000,
        tiers: &[Tier::Disk],
        inflict: index::inflict,
    },
    Row {
        name: "object",
        number: Some(18),
        fault: "a bucket that resets, stalls, sends too little or something else, answers 503 or 403",
        sample: 60,
        full: 2_000,
        tiers: &[Tier::Object],
        inflict: object::inflict,
    },
    Row {
        name: "clock",
        number: Some(19),
        fault: "the wall clock goes anywhere between lives, the monotonic one begins anywhere",
        sample: 20,
        full: 200,
        tiers: &[Tier::Disk, Tier::Store],
        inflict: clock::inflict,
    },
    Row {
        name: "pressure",
        number: Some(20),
        fault: "a limit of memory: enough, far too little, enough again",
        sample: 3,
        full: 51,
        tiers: &[Tier::Store],
        inflict: pressure::inflict,
    },
];

/// The row of that name, or of that number in the matrix.
pub fn row(name: &str) -> Option<&'static Row> {
    ROWS.iter()
        .find(|row| row.name == name || row.number.is_some_and(|number| number.to_string() == name))
}
