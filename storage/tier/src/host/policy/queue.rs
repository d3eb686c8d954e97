//! Queues of places, linked through one table, so that a block can leave from the middle.

use super::Place;

const NONE: Place = Place::MAX;

/// Neighbours of each place, for all queues that share them; a place is in one queue at most.
#[derive(Debug, Default)]
pub(super) struct Links(Vec<(Place, Place)>);

impl Links {
    fn at(&mut self, place: Place) -> &mut (Place, Place) {
        let index = place as usize;
        if self.0.len() <= index {
            self.0.resize(index + 1, (NONE, NONE));
        }
        &mut self.0[index]
    }
}

/// Youngest to oldest.
#[derive(Debug)]
pub(super) struct Queue {
    youngest: Place,
    oldest: Place,
    len: usize,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            youngest: NONE,
            oldest: NONE,
            len: 0,
        }
    }
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn oldest(&self) -> Option<Place> {
        (self.oldest != NONE).then_some(self.oldest)
    }

    pub(super) fn push_youngest(&mut self, links: &mut Links, place: Place) {
        *links.at(place) = (NONE, self.youngest);
        match self.youngest {
            NONE => self.oldest = place,
            before => links.at(before).0 = place,
        }
        self.youngest = place;
        self.len += 1;
    }

    pub(super) fn push_oldest(&mut self, links: &mut Links, place: Place) {
        *links.at(place) = (self.oldest, NONE);
        match self.oldest {
            NONE => self.youngest = place,
            before => links.at(before).1 = place,
        }
        self.oldest = place;
        self.len += 1;
    }

    pub(super) fn remove(&mut self, links: &mut Links, place: Place) {
        let (younger, older) = *links.at(place);
        match younger {
            NONE => self.youngest = older,
            younger => links.at(younger).1 = older,
        }
        match older {
            NONE => self.oldest = younger,
            older => links.at(older).0 = younger,
        }
        self.len -= 1;
    }

    pub(super) fn renew(&mut self, links: &mut Links, place: Place) {
        self.remove(links, place);
        self.push_youngest(links, place);
    }
}
