//! A step's wanted pages on their way to the host, and hooks told of each layer as it lands.
//!
//! The host gives the device its work far ahead, so a step sends layer after layer before the first has landed, and may run out of
//! page-locked memory. Then it waits for its own oldest layer, tells hooks of it, and has its room again unless they keep it:
//! the device has all layers in between to compute meanwhile. Where nothing of the step is on its way any more, readers hold
//! the memory; nobody waits for them, and the layer is not sent.

use std::time::{Duration, Instant};

use super::step_error;
use crate::{PagePool, StepError, StepHooks};

/// What layers go through; separate from a device so that the order can be tested without one.
pub(super) trait Way {
    /// Sends a layer's pages; false without room for them.
    fn send(&mut self, layer: usize) -> Result<bool, StepError>;

    /// Whether nothing of a layer is still on its way.
    fn is_there(&mut self, layer: usize) -> bool;

    /// Tells hooks of a layer, which waits for what they read of it, and lets it go.
    fn tell(&mut self, layer: usize);
}

/// The pages of a pool and those who want some of them.
pub(super) struct Wanted<'a> {
    pub(super) pool: &'a mut PagePool,
    pub(super) hooks: &'a mut dyn StepHooks,
}

impl Way for Wanted<'_> {
    fn send(&mut self, layer: usize) -> Result<bool, StepError> {
        let pages = self.pool.device_mut();
        pages.map_or(Ok(true), |pages| pages.send(layer)).map_err(step_error)
    }

    fn is_there(&mut self, layer: usize) -> bool {
        self.pool.device_mut().is_none_or(|pages| pages.is_there(layer))
    }

    fn tell(&mut self, layer: usize) {
        self.hooks.after_layer(layer, self.pool);
        if let Some(pages) = self.pool.device_mut() {
            pages.forget(layer);
        }
    }
}

/// How far a step is: layers before `told` hooks know of.
#[derive(Debug)]
pub(super) struct Sending {
    /// Whether there is anything to send.
    any: bool,
    told: usize,
    waited: Duration,
}

impl Sending {
    pub(super) fn new(any: bool) -> Self {
        Self {
            any,
            told: 0,
            waited: Duration::ZERO,
        }
    }

    /// Sends a layer, behind all before it. Where there is no room for it, hooks are told of earlier ones until there is, or none is
    /// left.
    ///
    /// # Errors
    /// If the device failed.
    pub(super) fn send(&mut self, layer: usize, way: &mut impl Way) -> Result<(), StepError> {
        if !self.any {
            return Ok(());
        }
        while !way.send(layer)? && self.told < layer {
            let begun = Instant::now();
            self.tell(way);
            self.waited += begun.elapsed();
        }
        Ok(())
    }

    /// Tells of all layers before `end` that have landed; waits for none.
    pub(super) fn tell_landed(&mut self, end: usize, way: &mut impl Way) {
        while self.told < end && way.is_there(self.told) {
            self.tell(way);
        }
    }

    /// Tells of all layers before `end`. Returns how long the step has waited for room.
    pub(super) fn tell_all(mut self, end: usize, way: &mut impl Way) -> Duration {
        while self.told < end {
            self.tell(way);
        }
        self.waited
    }

    fn tell(&mut self, way: &mut impl Way) {
        way.tell(self.told);
        self.told += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: usize = 12;

    /// Room for so many layers; each lands so many sends after its own, and is kept by its reader from when it is told on.
    struct Bounded {
        room: usize,
        lands_after: usize,
        kept: usize,
        kept_most: usize,
        sent: Vec<bool>,
        told: Vec<usize>,
    }

    impl Bounded {
        fn new(room: usize, lands_after: usize, kept_most: usize) -> Self {
            Self {
                room,
                lands_after,
                kept: 0,
                kept_most,
                sent: Vec::new(),
                told: Vec::new(),
            }
        }

        fn held(&self) -> usize {
            let untold = self.sent[self.told.len().min(self.sent.len())..].iter();
            self.kept + untold.filter(|sent| **sent).count()
        }

        /// A whole step; layers that were sent.
        fn step(&mut self) -> Vec<usize> {
            let mut sending = Sending::new(true);
            for layer in 0..LAYERS {
                sending.send(layer, self).expect("nothing fails here");
                self.sent.resize(layer + 1, false);
                sending.tell_landed(layer + 1, self);
            }
            sending.tell_all(LAYERS, self);
            (0..LAYERS).filter(|layer| self.sent[*layer]).collect()
        }
    }

    impl Way for Bounded {
        fn send(&mut self, layer: usize) -> Result<bool, StepError> {
            assert_eq!(self.sent.len(), layer, "layers are sent in order, each once");
            let room = self.held() < self.room;
            if room {
                self.sent.push(true);
            }
            Ok(room)
        }

        fn is_there(&mut self, layer: usize) -> bool {
            !self.sent[layer] || layer + self.lands_after < self.sent.len()
        }

        fn tell(&mut self, layer: usize) {
            assert_eq!(self.told.len(), layer, "hooks are told of every layer in order, once");
            self.told.push(layer);
            if self.sent[layer] && self.kept < self.kept_most {
                self.kept += 1;
            }
        }
    }

    #[test]
    fn a_step_that_is_larger_than_the_room_sends_everything_if_readers_keep_up() {
        for room in 1..=LAYERS {
            // From layers that land at once to none that does before the step's end.
            for lands_after in 0..=LAYERS {
                let mut way = Bounded::new(room, lands_after, 0);
                assert_eq!(way.step().len(), LAYERS, "room for {room}, landing after {lands_after}");
                assert_eq!(way.told.len(), LAYERS);
            }
        }
    }

    #[test]
    fn what_readers_keep_is_not_waited_for() {
        for (room, lands_after, kept_most, sent) in [
            // The first three stay with their readers, and no room is left for anyone.
            (3, 0, LAYERS, vec![0, 1, 2]),
            (3, LAYERS, LAYERS, vec![0, 1, 2]),
            // Room for one is left, and enough.
            (3, LAYERS, 2, (0..LAYERS).collect()),
            (0, 0, 0, vec![]),
        ] {
            let mut way = Bounded::new(room, lands_after, kept_most);
            assert_eq!(way.step(), sent, "room for {room}, {kept_most} kept");
            assert_eq!(way.told.len(), LAYERS, "also of layers that were not sent");
        }
    }

    #[test]
    fn without_anything_to_send_hooks_are_told_at_once() {
        let mut way = Bounded::new(0, LAYERS, 0);
        let mut sending = Sending::new(false);
        for layer in 0..LAYERS {
            sending.send(layer, &mut way).expect("nothing is sent");
            way.sent.push(false);
            sending.tell_landed(layer + 1, &mut way);
            assert_eq!(way.told.len(), layer + 1);
        }
        assert_eq!(sending.tell_all(LAYERS, &mut way), Duration::ZERO);
    }
}
