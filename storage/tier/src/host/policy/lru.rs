//! Least recently matched first.

use kvasir_block::BlockKey;

use super::{
    Place, Policy, Verdict,
    queue::{Links, Queue},
};

#[derive(Debug, Default)]
pub(super) struct Lru {
    links: Links,
    queue: Queue,
}

impl Policy for Lru {
    fn added(&mut self, place: Place, _: &BlockKey) {
        self.queue.push_youngest(&mut self.links, place);
    }

    fn touched(&mut self, place: Place) {
        self.queue.renew(&mut self.links, place);
    }

    fn removed(&mut self, place: Place) {
        self.queue.remove(&mut self.links, place);
    }

    fn victim(&mut self, judge: &mut dyn FnMut(Place) -> Verdict) -> Option<Place> {
        for _ in 0..self.queue.len() {
            let oldest = self.queue.oldest()?;
            match judge(oldest) {
                Verdict::Evict => {
                    self.queue.remove(&mut self.links, oldest);
                    return Some(oldest);
                }
                // Leased or read: as good as matched just now.
                Verdict::Spare => self.queue.renew(&mut self.links, oldest),
                Verdict::Stop => return None,
            }
        }
        None
    }

    fn restored(&mut self, place: Place, _: &BlockKey) {
        self.queue.push_oldest(&mut self.links, place);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.queue.len()
    }
}
