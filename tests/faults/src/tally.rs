//! What a run did, in numbers.

use std::collections::BTreeMap;

use serde::Serialize;

/// Where a store keeps blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Memory.
    Host,
    /// Segment files.
    Disk,
    /// A bucket.
    Object,
    /// One of the store's, whichever: a client is not told.
    Store,
}

/// What a note's name begins with that is no sum.
const LONGEST: &str = "longest";

/// Counts of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Faults that were inflicted.
    pub faults: u64,
    /// Reads that gave the right bytes, by tier.
    pub hits: BTreeMap<Tier, u64>,
    /// Reads of what was not there, or not any more.
    pub misses: u64,
    /// Reads that met damage and said so: a miss that is counted by the store.
    pub corrupt: u64,
    /// Reads and puts that were shed, came too late or met a broken connection.
    pub shed: u64,
    /// Reads that gave other bytes than were put. Must be 0.
    pub wrong: u64,
    /// Ends of the store that nobody asked for: panics, aborts, starts that failed. Must be 0.
    pub deaths: u64,
    /// What else a row counts.
    pub notes: BTreeMap<&'static str, u64>,
    /// The first read that gave wrong bytes, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_wrong: Option<String>,
}

impl Tally {
    /// Reads that gave the right bytes.
    pub fn hits(&self) -> u64 {
        self.hits.values().sum()
    }

    /// Adds to a count of the row's own.
    pub fn note(&mut self, name: &'static str, count: u64) {
        *self.notes.entry(name).or_default() += count;
    }

    /// Keeps the larger: for times, whose names begin with `longest`.
    pub fn note_max(&mut self, name: &'static str, value: u64) {
        let held = self.notes.entry(name).or_default();
        *held = value.max(*held);
    }

    /// Adds what was counted elsewhere.
    pub(crate) fn absorb(&mut self, other: Self) {
        self.faults += other.faults;
        for (tier, hits) in other.hits {
            *self.hits.entry(tier).or_default() += hits;
        }
        self.misses += other.misses;
        self.corrupt += other.corrupt;
        self.shed += other.shed;
        self.wrong += other.wrong;
        self.deaths += other.deaths;
        for (name, count) in other.notes {
            if name.starts_with(LONGEST) {
                self.note_max(name, count);
            } else {
                self.note(name, count);
            }
        }
        if let Some(first) = other.first_wrong {
            self.first_wrong.get_or_insert(first);
        }
    }

    pub(crate) fn hit(&mut self, tier: Tier) {
        *self.hits.entry(tier).or_default() += 1;
    }

    pub(crate) fn wrong(&mut self, what: impl FnOnce() -> String) {
        self.wrong += 1;
        self.first_wrong.get_or_insert_with(what);
    }
}
