//! How many prompts may be in flight, and when to come back if there is no room.
//!
//! A request holds one place from before its body is read until its answer has ended, and one more for each further
//! prompt in it. So the number of places also bounds the memory that bodies and prompts take.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{metrics, policy::Load};

/// The places, and how long requests have been taking.
#[derive(Debug)]
pub(crate) struct Admission {
    places: Arc<Semaphore>,
    max: usize,
    mean: Mutex<MeanDuration>,
}

/// Places of one request; given back on drop.
#[derive(Debug)]
pub(crate) struct Place {
    admission: Arc<Admission>,
    /// Taken out on drop, so that the gauge is set after the places are free.
    permit: Option<OwnedSemaphorePermit>,
    since: Instant,
}

/// All places are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full {
    /// Places there are.
    pub(crate) max: usize,
}

impl Admission {
    /// With `max` places.
    pub(crate) fn new(max: usize) -> Arc<Self> {
        let max = max.min(Semaphore::MAX_PERMITS);
        metrics::in_flight(0, max);
        Arc::new(Self {
            places: Arc::new(Semaphore::new(max)),
            max,
            mean: Mutex::new(MeanDuration::default()),
        })
    }

    /// Takes one place, if there is one.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Place, Full> {
        let permit = Arc::clone(&self.places).try_acquire_owned();
        let permit = permit.map_err(|_| Full { max: self.max })?;
        self.publish();
        Ok(Place {
            admission: Arc::clone(self),
            permit: Some(permit),
            since: Instant::now(),
        })
    }

    /// Seconds after which trying again is reasonable, given what the workers report.
    pub(crate) fn retry_after(&self, loads: impl IntoIterator<Item = Load>) -> u64 {
        let (running, waiting) = loads.into_iter().fold((0u64, 0u64), |(running, waiting), load| {
            (running + u64::from(load.running), waiting + u64::from(load.waiting))
        });
        let mean = self.mean.lock().get();
        retry_after(mean, running, waiting)
    }

    fn publish(&self) {
        metrics::in_flight(self.max - self.places.available_permits().min(self.max), self.max);
    }
}

impl Place {
    /// Takes `more` places besides the one held.
    pub(crate) fn extend(&mut self, more: usize) -> Result<(), Full> {
        let full = Full {
            max: self.admission.max,
        };
        let more = u32::try_from(more).map_err(|_| full)?;
        let permit = Arc::clone(&self.admission.places).try_acquire_many_owned(more);
        let permit = permit.map_err(|_| full)?;
        match &mut self.permit {
            Some(held) => held.merge(permit),
            None => self.permit = Some(permit),
        }
        self.admission.publish();
        Ok(())
    }

    /// The request was served: how long it took counts for [`Admission::retry_after`].
    pub(crate) fn served(&self) {
        self.admission.mean.lock().add(self.since.elapsed());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.permit.take();
        self.admission.publish();
    }
}

/// A mean that forgets: each new duration counts one eighth.
#[derive(Debug, Default)]
struct MeanDuration(Option<Duration>);

impl MeanDuration {
    fn add(&mut self, took: Duration) {
        self.0 = Some(self.0.map_or(took, |mean| mean.mul_f64(0.875) + took.mul_f64(0.125)));
    }

    /// Before anything was served: a guess of one second.
    fn get(&self) -> Duration {
        self.0.unwrap_or(Duration::from_secs(1))
    }
}

/// With `waiting` requests in line for `running` places that each free up after `mean`, the line is gone after
/// `mean * waiting / running`; at least a second, so that clients do not hammer, and at most a minute.
fn retry_after(mean: Duration, running: u64, waiting: u64) -> u64 {
    let rounds = (waiting as f64 / running.max(1) as f64).max(1.0);
    (mean.as_secs_f64() * rounds).ceil().clamp(1.0, 60.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_when_the_line_is_longer() {
        // (mean seconds, running, waiting) -> seconds
        let table = [
            ((0.0, 0, 0), 1),
            ((0.2, 4, 0), 1),
            ((2.5, 4, 0), 3),
            ((2.5, 4, 16), 10),
            ((2.5, 0, 4), 10),
            ((1e9, 1, 1), 60),
        ];
        for ((mean, running, waiting), expected) in table {
            let found = retry_after(Duration::from_secs_f64(mean), running, waiting);
            assert_eq!(found, expected, "{mean} s, {running} running, {waiting} waiting");
        }
    }

    #[test]
    fn places_are_counted_and_come_back() {
        let admission = Admission::new(3);
        let mut first = admission.enter().expect("a place");
        first.extend(1).expect("a second place");
        assert_eq!(first.extend(2).expect_err("one is left"), Full { max: 3 });
        let last = admission.enter().expect("the third place");
        assert!(admission.enter().is_err());
        drop(first);
        drop(last);
        assert_eq!(admission.places.available_permits(), 3);
    }

    #[test]
    fn the_mean_follows_what_is_served() {
        let mut mean = MeanDuration::default();
        assert_eq!(mean.get(), Duration::from_secs(1));
        for _ in 0..100 {
            mean.add(Duration::from_secs(8));
        }
        assert_eq!(mean.get().as_secs_f64().round(), 8.0);
    }
}
