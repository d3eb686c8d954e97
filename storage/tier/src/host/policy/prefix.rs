//! Never a block before its descendants: only blocks without a child that is here are in the order of eviction.
//!
//! The one matched (or come) longest ago goes first; a parent that loses its last child comes in by the time of its own last
//! match.

use std::collections::BTreeSet;

use kvasir_block::BlockKey;

use super::{Place, Policy, Verdict};

const NONE: Place = Place::MAX;

#[derive(Clone, Copy, Debug)]
struct State {
    tick: u64,
    parent: Place,
    children: u32,
    /// Tells a block from an earlier one at the same place; 0 where none is.
    birth: u64,
    parent_birth: u64,
}

const ABSENT: State = State {
    tick: 0,
    parent: NONE,
    children: 0,
    birth: 0,
    parent_birth: 0,
};

#[derive(Debug, Default)]
pub(super) struct Prefix {
    states: Vec<State>,
    /// Blocks without children here, by when they were matched.
    leaves: BTreeSet<(u64, Place)>,
    clock: u64,
    #[cfg(test)]
    blocks: usize,
}

impl Prefix {
    fn state(&mut self, place: Place) -> &mut State {
        &mut self.states[place as usize]
    }

    fn rank(&self, place: Place) -> (u64, Place) {
        (self.states[place as usize].tick, place)
    }

    fn next_tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Changes a block's rank, wherever it stands.
    fn rerank(&mut self, place: Place, change: impl FnOnce(&mut State)) {
        let was = self.leaves.remove(&self.rank(place));
        change(self.state(place));
        if was {
            self.leaves.insert(self.rank(place));
        }
    }

    /// Takes a block out; its parent may become a leaf.
    fn forget(&mut self, place: Place) {
        self.leaves.remove(&self.rank(place));
        let State {
            parent, parent_birth, ..
        } = std::mem::replace(self.state(place), ABSENT);
        #[cfg(test)]
        {
            self.blocks -= 1;
        }
        if parent == NONE {
            return;
        }
        let above = self.state(parent);
        if above.birth == parent_birth {
            above.children -= 1;
            if above.children == 0 {
                self.leaves.insert(self.rank(parent));
            }
        }
    }
}

impl Policy for Prefix {
    fn added(&mut self, place: Place, _: &BlockKey) {
        let index = place as usize;
        if self.states.len() <= index {
            self.states.resize(index + 1, ABSENT);
        }
        let tick = self.next_tick();
        self.states[index] = State {
            tick,
            birth: tick,
            ..ABSENT
        };
        self.leaves.insert(self.rank(place));
        #[cfg(test)]
        {
            self.blocks += 1;
        }
    }

    fn touched(&mut self, place: Place) {
        let tick = self.next_tick();
        self.rerank(place, |state| state.tick = tick);
    }

    fn removed(&mut self, place: Place) {
        self.forget(place);
    }

    fn victim(&mut self, judge: &mut dyn FnMut(Place) -> Verdict) -> Option<Place> {
        for _ in 0..self.leaves.len() {
            let &(_, first) = self.leaves.first()?;
            match judge(first) {
                Verdict::Evict => {
                    self.forget(first);
                    return Some(first);
                }
                // Leased or read: as good as matched just now.
                Verdict::Spare => self.touched(first),
                Verdict::Stop => return None,
            }
        }
        None
    }

    fn restored(&mut self, place: Place, key: &BlockKey) {
        // Its links are learnt again when its chain is next asked for. It is as old as it can be.
        self.added(place, key);
        self.rerank(place, |state| state.tick = 0);
    }

    fn linked(&mut self, child: Place, parent: Place) {
        let birth = self.state(parent).birth;
        let below = self.state(child);
        if below.parent == parent && below.parent_birth == birth {
            return;
        }
        debug_assert!(child != parent && birth > 0 && below.birth > 0);
        (below.parent, below.parent_birth) = (parent, birth);
        self.leaves.remove(&self.rank(parent));
        self.state(parent).children += 1;
    }

    fn wants_links(&self) -> bool {
        true
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.blocks
    }
}
