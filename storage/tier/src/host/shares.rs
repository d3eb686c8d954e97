//! Who owns what: an owner with a budget has a share with an order of eviction of its own, all others have one together.

use std::{cmp::Ordering, collections::HashMap};

use super::policy::{HostPolicy, Policy};

/// Whose blocks they are: a number that the tier's owner gives each tenant.
///
/// A budget is a maximum. An owner at its budget evicts its own blocks for its new ones. When the tier as a whole is full, blocks of the
/// share that is fullest relative to its budget go (those without one share the tier's): so nobody can push another below
/// `budget * bytes_max / sum of all budgets`, the part that would be its own if all were as full as they may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner(u32);

impl Owner {
    /// The owner of this number.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }
}

#[derive(Debug)]
pub(super) struct Share {
    pub(super) policy: Box<dyn Policy>,
    pub(super) bytes: u64,
    pub(super) bytes_max: u64,
}

/// The common share, and one for each owner that was ever given a budget.
#[derive(Debug)]
pub(super) struct Shares {
    kind: HostPolicy,
    /// The first is the common one.
    all: Vec<Share>,
    by_owner: HashMap<Owner, usize>,
}

impl Shares {
    pub(super) fn new(kind: HostPolicy, bytes_max: u64) -> Self {
        let common = Share {
            policy: kind.build(),
            bytes: 0,
            bytes_max,
        };
        Self {
            kind,
            all: vec![common],
            by_owner: HashMap::new(),
        }
    }

    pub(super) fn set_budget(&mut self, owner: Owner, bytes_max: u64) {
        match self.by_owner.get(&owner) {
            Some(&index) => self.all[index].bytes_max = bytes_max,
            None => {
                self.by_owner.insert(owner, self.all.len());
                self.all.push(Share {
                    policy: self.kind.build(),
                    bytes: 0,
                    bytes_max,
                });
            }
        }
    }

    pub(super) fn index_of(&self, owner: Owner) -> usize {
        self.by_owner.get(&owner).copied().unwrap_or_default()
    }

    pub(super) fn of(&self, owner: Owner) -> &Share {
        &self.all[self.index_of(owner)]
    }

    pub(super) fn at(&mut self, index: usize) -> &mut Share {
        &mut self.all[index]
    }

    pub(super) fn want_links(&self) -> bool {
        self.all[0].policy.wants_links()
    }

    #[cfg(test)]
    pub(super) fn all(&self) -> impl Iterator<Item = &Share> {
        self.all.iter()
    }

    /// The share that gives next: the fullest relative to its budget that holds anything and is not in `exhausted`.
    pub(super) fn fullest(&self, exhausted: &[usize]) -> Option<usize> {
        let candidates = (0..self.all.len()).filter(|index| self.all[*index].bytes > 0 && !exhausted.contains(index));
        candidates.max_by(|&a, &b| self.all[a].fuller(&self.all[b]))
    }
}

impl Share {
    fn fuller(&self, other: &Self) -> Ordering {
        let (own, others) = (u128::from(self.bytes_max.max(1)), u128::from(other.bytes_max.max(1)));
        (u128::from(self.bytes) * others).cmp(&(u128::from(other.bytes) * own))
    }
}
