//! The worker's load, as a router wants to know it, and the door where waiting is bounded.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// What a router weighs against a cached prefix.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Load {
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    /// Tokens of prompts that are not computed yet.
    pub(crate) prefill_tokens_waiting: usize,
    /// Share of the pool that running sequences hold or were promised.
    pub(crate) kv_usage: f32,
    pub(crate) draining: bool,
}

/// Counts who waits; a request enters with a [`Ticket`] or is refused.
#[derive(Debug)]
pub(crate) struct Door {
    waiting: Arc<AtomicUsize>,
    waiting_max: usize,
}

/// A place in the queue; dropping it makes room.
#[derive(Debug)]
pub(crate) struct Ticket(Arc<AtomicUsize>);

impl Door {
    pub(crate) fn new(waiting_max: usize) -> Self {
        Self {
            waiting: Arc::default(),
            waiting_max,
        }
    }

    /// A place, or `None` when the queue is full.
    pub(crate) fn enter(&self) -> Option<Ticket> {
        let enter = |waiting: usize| (waiting < self.waiting_max).then_some(waiting + 1);
        self.waiting
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, enter)
            .ok()
            .map(|_| Ticket(Arc::clone(&self.waiting)))
    }

    pub(crate) fn waiting_max(&self) -> usize {
        self.waiting_max
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_door_lets_in_as_many_as_may_wait() {
        let door = Door::new(2);
        let first = door.enter().expect("a place");
        let second = door.enter().expect("a place");
        assert!(door.enter().is_none());
        drop(first);
        let third = door.enter().expect("a place again");
        assert!(door.enter().is_none());
        drop((second, third));
        assert!(door.enter().is_some());
    }
}
