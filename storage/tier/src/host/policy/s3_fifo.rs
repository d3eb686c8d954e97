//! S3-FIFO on blocks: new ones pass through a small queue; those matched meanwhile go on to the main one, the others leave, and a
//! ghost of them says, if they come again, that they belong into the main queue at once.

use std::collections::{HashMap, VecDeque};

use kvasir_block::BlockKey;

use super::{
    Place, Policy, Verdict, fingerprint,
    queue::{Links, Queue},
};

/// A tenth of the blocks are in the small queue, as published.
const SMALL_PART: usize = 10;
/// Matches are counted up to it, as published.
const MATCHES_MAX: u8 = 3;

#[derive(Clone, Copy, Debug, Default)]
struct State {
    matches: u8,
    in_main: bool,
    name: u64,
}

#[derive(Debug, Default)]
pub(super) struct S3Fifo {
    links: Links,
    small: Queue,
    main: Queue,
    ghost: Ghost,
    states: Vec<State>,
}

impl S3Fifo {
    fn blocks(&self) -> usize {
        self.small.len() + self.main.len()
    }

    fn state(&mut self, place: Place) -> &mut State {
        &mut self.states[place as usize]
    }

    fn start(&mut self, place: Place, key: &BlockKey) -> &mut State {
        let index = place as usize;
        if self.states.len() <= index {
            self.states.resize(index + 1, State::default());
        }
        self.states[index] = State {
            name: fingerprint(key),
            ..State::default()
        };
        &mut self.states[index]
    }
}

impl Policy for S3Fifo {
    fn added(&mut self, place: Place, key: &BlockKey) {
        let name = self.start(place, key).name;
        if self.ghost.take(name) {
            self.state(place).in_main = true;
            self.main.push_youngest(&mut self.links, place);
        } else {
            self.small.push_youngest(&mut self.links, place);
        }
    }

    fn touched(&mut self, place: Place) {
        let state = self.state(place);
        state.matches = MATCHES_MAX.min(state.matches + 1);
    }

    fn removed(&mut self, place: Place) {
        let queue = match self.states[place as usize].in_main {
            true => &mut self.main,
            false => &mut self.small,
        };
        queue.remove(&mut self.links, place);
    }

    fn victim(&mut self, judge: &mut dyn FnMut(Place) -> Verdict) -> Option<Place> {
        // How many of each queue were spared, one after another: a queue of which all were has no victim. Whatever else moves
        // in the main queue starts its count anew, which happens at most once for each match.
        let (mut spared_small, mut spared_main) = (0, 0);
        loop {
            let (in_small, in_main) = (self.small.len() > spared_small, self.main.len() > spared_main);
            if !in_small && !in_main {
                return None;
            }
            let from_small = in_small && (self.small.len() * SMALL_PART >= self.blocks() || !in_main);
            let oldest = if from_small { &self.small } else { &self.main }.oldest()?;
            let state = &mut self.states[oldest as usize];
            if from_small {
                if state.matches > 0 {
                    (state.matches, state.in_main) = (0, true);
                    self.small.remove(&mut self.links, oldest);
                    self.main.push_youngest(&mut self.links, oldest);
                    spared_main = 0;
                    continue;
                }
            } else if state.matches > 0 {
                state.matches -= 1;
                self.main.renew(&mut self.links, oldest);
                spared_main = 0;
                continue;
            }
            let name = state.name;
            let queue = if from_small { &mut self.small } else { &mut self.main };
            match judge(oldest) {
                Verdict::Evict => {
                    queue.remove(&mut self.links, oldest);
                    if from_small {
                        self.ghost.push(name, self.main.len());
                    }
                    return Some(oldest);
                }
                Verdict::Spare => {
                    queue.renew(&mut self.links, oldest);
                    *if from_small {
                        &mut spared_small
                    } else {
                        &mut spared_main
                    } += 1;
                }
                Verdict::Stop => return None,
            }
        }
    }

    fn restored(&mut self, place: Place, key: &BlockKey) {
        let in_main = self.states[place as usize].in_main;
        let name = self.start(place, key).name;
        self.ghost.take(name);
        self.state(place).in_main = in_main;
        let queue = if in_main { &mut self.main } else { &mut self.small };
        queue.push_oldest(&mut self.links, place);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.blocks()
    }
}

/// Names of blocks that left the small queue, as many as the main queue has, and at least a few.
#[derive(Debug, Default)]
struct Ghost {
    /// Oldest first; a name taken meanwhile, or pushed again later, is found to be stale by its number.
    order: VecDeque<(u64, u64)>,
    numbers: HashMap<u64, u64>,
    next: u64,
}

const GHOSTS_MIN: usize = 64;

impl Ghost {
    fn push(&mut self, name: u64, main_blocks: usize) {
        self.next += 1;
        self.order.push_back((name, self.next));
        self.numbers.insert(name, self.next);
        while self.order.len() > main_blocks.max(GHOSTS_MIN) {
            if let Some((name, number)) = self.order.pop_front()
                && self.numbers.get(&name) == Some(&number)
            {
                self.numbers.remove(&name);
            }
        }
    }

    fn take(&mut self, name: u64) -> bool {
        self.numbers.remove(&name).is_some()
    }
}
