//! Bugs planted on purpose, and points at which a process may be stopped on purpose: what the fault suites are judged by.
//!
//! A suite that finds nothing proves little until it has found something. Each [`Bug`] has a site in the storage code, where
//! `if planted(Bug::..)` leaves out a check or an order that the invariants ask for; with it chosen, at least one suite must fail.
//! A [`point`] names a moment between two steps of a write, so that a suite can stop the process there or look at the disk.
//!
//! All of it exists in builds with the feature `planted-bugs` only. Without it [`planted`] is the constant `false` and [`point`] is
//! empty: nothing is left in the code that ships. Which bug is active is chosen for the whole process, by `plant`; this crate
//! reads no environment.

macro_rules! bugs {
    ($($(#[doc = $doc:literal])+ $bug:ident => $name:literal,)+) => {
        /// A check or an order that is left out when the bug is chosen.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Bug {
            $($(#[doc = $doc])+ $bug,)+
        }

        impl Bug {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$bug),+];

            /// Its name on command lines and in reports.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$bug => $name,)+
                }
            }
        }
    };
}

bugs! {
    /// Bytes from the host tier are served without a look at their checksum.
    HostChecksumSkipped => "host-checksum-skipped",
    /// A record from disk is served without a look at its payload's checksum.
    DiskChecksumSkipped => "disk-checksum-skipped",
    /// What a bucket answers is served without a look at its checksum.
    ObjectChecksumSkipped => "object-checksum-skipped",
    /// The client hands on what it received without a look at its checksum.
    ClientChecksumSkipped => "client-checksum-skipped",
    /// The store takes a put without a look at its checksum.
    PutChecksumSkipped => "put-checksum-skipped",
    /// The tenant is no part of a namespace's id.
    TenantDropped => "tenant-dropped",
    /// The disk's key has no layer.
    LayerIgnored => "layer-ignored",
    /// Eviction does not ask whether a block is leased.
    LeasedBlockEvicted => "leased-block-evicted",
    /// A tenant's budget in the host tier does not count.
    TenantBudgetIgnored => "tenant-budget-ignored",
    /// The disk tier writes on when its limit is reached.
    DiskBudgetIgnored => "disk-budget-ignored",
    /// Reads go on behind the deadline.
    DeadlineIgnored => "deadline-ignored",
    /// A restart takes the epoch of the life before.
    EpochReused => "epoch-reused",
    /// The index is told of a record whose bytes were not synced.
    PublishBeforeSync => "publish-before-sync",
    /// Recovery believes a record's header and does not read its payload.
    TornPayloadAccepted => "torn-payload-accepted",
    /// A record counts wherever it lies, also where its header names another segment or offset.
    MisplacedRecordAccepted => "misplaced-record-accepted",
    /// A record counts also where it was written by another life of the folder.
    StaleGenerationAccepted => "stale-generation-accepted",
    /// A read does not compare the key in the record with the one that was asked for.
    ForeignRecordAccepted => "foreign-record-accepted",
    /// A record that was found corrupt stays listed.
    CorruptRecordKept => "corrupt-record-kept",
    /// A table of the bulk path counts without a look at its checksum.
    TableChecksumSkipped => "table-checksum-skipped",
    /// After a failed sync the same file is synced again, and its success is believed.
    SyncRetried => "sync-retried",
}

impl Bug {
    /// The bug of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|bug| bug.name() == name)
    }
}

/// Whether this process has `bug`. Constant `false` in a build without the feature `planted-bugs`.
#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn planted(_bug: Bug) -> bool {
    false
}

/// Says that the moment `name` is reached. Nothing in a build without the feature `planted-bugs`.
#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn point(_name: &'static str) {}

#[cfg(feature = "planted-bugs")]
mod chosen;

#[cfg(feature = "planted-bugs")]
pub use chosen::{Planted, Watching, abort_at, plant, planted, point, watch_points};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names_of_one_bug() {
        for &bug in Bug::ALL {
            assert_eq!(Bug::named(bug.name()), Some(bug));
        }
        assert_eq!(Bug::named("no-such-bug"), None);
    }

    #[cfg(not(feature = "planted-bugs"))]
    #[test]
    fn nothing_is_planted_in_a_build_without_the_feature() {
        const {
            assert!(!planted(Bug::HostChecksumSkipped));
        }
        point("anywhere");
    }
}
