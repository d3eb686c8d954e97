//! Single flight: a layer block is read from a slower tier by one reader at a time; others who want it wait for that one.
//!
//! Whoever leads lands what it leads before it waits for others, so nobody waits in a circle. A leader that goes without
//! landing (it was late, or it panicked) lets its followers know, and they try for themselves.

use std::{collections::HashMap, sync::Arc, time::Instant};

use kvasir_block::LayerBlockKey;
use parking_lot::{Condvar, Mutex};

use super::GetOutcome;

/// What is being read.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    flying: Mutex<HashMap<LayerBlockKey, Arc<Flight>>>,
}

/// One read under way.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    landed: Mutex<Option<Landed>>,
    changed: Condvar,
}

/// How a flight ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Landed {
    /// With an answer that is as good for everybody.
    With(GetOutcome),
    /// Without one.
    GaveUp,
}

/// A reader's part in a flight.
#[derive(Debug)]
pub(crate) enum Seat<'a> {
    /// Reads, and lands.
    Lead(Lead<'a>),
    /// Waits.
    Follow(Arc<Flight>),
}

/// The duty to read; gives up when dropped.
#[derive(Debug)]
pub(crate) struct Lead<'a> {
    flights: &'a Flights,
    key: LayerBlockKey,
    flight: Arc<Flight>,
}

impl Flights {
    /// A seat in the flight of `key`: leads it if there is none.
    pub(crate) fn board(&self, key: LayerBlockKey) -> Seat<'_> {
        let mut flying = self.flying.lock();
        if let Some(flight) = flying.get(&key) {
            return Seat::Follow(Arc::clone(flight));
        }
        let flight = Arc::<Flight>::default();
        flying.insert(key, Arc::clone(&flight));
        Seat::Lead(Lead {
            flights: self,
            key,
            flight,
        })
    }

    /// Reads under way.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.flying.lock().len()
    }

    /// Whether somebody waits for `key`.
    #[cfg(test)]
    pub(crate) fn followers(&self, key: LayerBlockKey) -> usize {
        // The table and the leader hold one each.
        self.flying
            .lock()
            .get(&key)
            .map_or(0, |flight| Arc::strong_count(flight).saturating_sub(2))
    }
}

impl Flight {
    /// Waits for the end of the flight; `None` when the deadline came first.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<Landed> {
        let mut landed = self.landed.lock();
        while landed.is_none() {
            match deadline {
                Some(deadline) => {
                    if self.changed.wait_until(&mut landed, deadline).timed_out() {
                        break;
                    }
                }
                None => self.changed.wait(&mut landed),
            }
        }
        landed.clone()
    }
}

impl Lead<'_> {
    /// What is to be read.
    pub(crate) fn key(&self) -> LayerBlockKey {
        self.key
    }

    /// Ends the flight with an answer for all who wait.
    pub(crate) fn land(self, outcome: GetOutcome) {
        self.end(Landed::With(outcome));
    }

    fn end(&self, how: Landed) {
        let mut landed = self.flight.landed.lock();
        if landed.is_some() {
            return;
        }
        *landed = Some(how);
        drop(landed);
        self.flights.flying.lock().remove(&self.key);
        self.flight.changed.notify_all();
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        self.end(Landed::GaveUp);
    }
}

#[cfg(test)]
mod tests {
    use kvasir_block::{BlockHash, NamespaceId};

    use super::*;

    fn key(layer: u16) -> LayerBlockKey {
        NamespaceId::from_bytes([1; 32])
            .block(BlockHash::from_bytes([2; 32]))
            .layer(layer)
    }

    fn lead(flights: &Flights, layer: u16) -> Lead<'_> {
        match flights.board(key(layer)) {
            Seat::Lead(lead) => lead,
            Seat::Follow(_) => panic!("someone leads already"),
        }
    }

    fn follow(flights: &Flights, layer: u16) -> Arc<Flight> {
        match flights.board(key(layer)) {
            Seat::Lead(_) => panic!("nobody leads"),
            Seat::Follow(flight) => flight,
        }
    }

    #[test]
    fn followers_get_what_the_leader_lands() {
        let flights = Flights::default();
        let (first, other) = (lead(&flights, 0), lead(&flights, 1));
        let flight = follow(&flights, 0);
        assert_eq!(flight.wait(Some(Instant::now())), None, "not yet");
        assert_eq!(
            (flights.len(), flights.followers(key(0)), flights.followers(key(1))),
            (2, 1, 0)
        );
        first.land(GetOutcome::Miss);
        assert_eq!(flight.wait(None), Some(Landed::With(GetOutcome::Miss)));
        drop(other);
        assert_eq!(flights.len(), 0);
        lead(&flights, 0);
    }

    #[test]
    fn a_leader_that_leaves_lets_the_next_one_lead() {
        let flights = Flights::default();
        let first = lead(&flights, 0);
        let flight = follow(&flights, 0);
        drop(first);
        assert_eq!(flight.wait(None), Some(Landed::GaveUp));
        lead(&flights, 0).land(GetOutcome::Miss);
        assert_eq!(
            flight.wait(None),
            Some(Landed::GaveUp),
            "the end of a flight does not change"
        );
    }
}
