//! Places in the arena that a peer holds: what keeps them, and how many there may be.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use kvasir_device::Arena;

use crate::{StoreConfig, metrics};

/// What all connections hold together, and may.
#[derive(Debug)]
pub(crate) struct Budget {
    places: AtomicU64,
    bytes: AtomicU64,
    bytes_max: u64,
}

impl Budget {
    /// Half of the host tier, so that readers who return nothing leave the store memory to work with.
    pub(crate) fn of(config: &StoreConfig) -> Self {
        Self {
            places: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            bytes_max: config.host_bytes_max.as_u64() / 2,
        }
    }

    fn take(&self, bytes: u64) -> bool {
        let taken = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |before| {
            before.checked_add(bytes).filter(|&after| after <= self.bytes_max)
        });
        let Ok(before) = taken else { return false };
        let places = self.places.fetch_add(1, Ordering::Relaxed) + 1;
        metrics::local_held(places, before + bytes);
        true
    }

    fn give_back(&self, places: u64, bytes: u64) {
        let before = self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        let held = self.places.fetch_sub(places, Ordering::Relaxed);
        metrics::local_held(held - places, before - bytes);
    }
}

/// What a connection holds. Invariant: a number is given out once, and its bytes live from then until it is returned or this is
/// dropped.
#[derive(Debug)]
pub(crate) struct Places {
    budget: Arc<Budget>,
    held: HashMap<u64, Bytes>,
    bytes: u64,
    next: u64,
    count_max: usize,
    bytes_max: u64,
}

impl Places {
    pub(crate) fn new(budget: &Arc<Budget>, config: &StoreConfig) -> Self {
        Self {
            budget: Arc::clone(budget),
            held: HashMap::new(),
            bytes: 0,
            next: 1,
            count_max: config.local_places_max,
            bytes_max: config.local_bytes_max.as_u64(),
        }
    }

    /// Keeps the bytes where they are; the number that returns them, or `None` when the peer holds all that it may.
    pub(crate) fn hold(&mut self, payload: &Bytes) -> Option<u64> {
        let bytes = Arena::footprint(payload.len());
        if self.held.len() >= self.count_max || self.bytes + bytes > self.bytes_max || !self.budget.take(bytes) {
            return None;
        }
        let number = self.next;
        self.next += 1;
        self.bytes += bytes;
        self.held.insert(number, payload.clone());
        Some(number)
    }

    /// Ends a hold. A number that was not given out, or was returned, is a mistake of the peer that harms nobody else.
    pub(crate) fn give_back(&mut self, number: u64) {
        let Some(payload) = self.held.remove(&number) else {
            tracing::debug!(number, "a place was returned that was not held");
            return;
        };
        let bytes = Arena::footprint(payload.len());
        self.bytes -= bytes;
        self.budget.give_back(1, bytes);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        if !self.held.is_empty() {
            self.budget.give_back(self.held.len() as u64, self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use kvasir_runtime::units::ByteSize;

    use super::*;

    #[test]
    fn bounds_hold_and_what_is_returned_can_be_had_again() {
        let config = StoreConfig {
            host_bytes_max: ByteSize::kib(48),
            local_bytes_max: ByteSize::kib(16),
            local_places_max: 3,
            ..StoreConfig::default()
        };
        let budget = Arc::new(Budget::of(&config));
        let (small, large) = (Bytes::from_static(&[1; 10]), Bytes::from_static(&[2; 12_288]));
        let mut first = Places::new(&budget, &config);
        let numbers: Vec<_> = (0..4).map(|_| first.hold(&small)).collect();
        assert_eq!(numbers, [Some(1), Some(2), Some(3), None], "three places");
        first.give_back(2);
        first.give_back(2);
        first.give_back(99);
        assert_eq!(first.hold(&large), None, "sixteen KiB");
        assert_eq!(first.hold(&small), Some(4), "no number twice");
        let mut second = Places::new(&budget, &config);
        assert_eq!(second.hold(&large), Some(1));
        assert_eq!(second.hold(&small), None, "24 KiB for both");
        drop(first);
        assert_eq!(second.hold(&small), Some(2));
        drop(second);
        assert_eq!(budget.bytes.load(Ordering::Relaxed), 0);
        assert_eq!(budget.places.load(Ordering::Relaxed), 0);
    }
}
