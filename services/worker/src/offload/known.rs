//! A bounded set of names that forgets the oldest first. Forgetting costs a needless push, answered `PRESENT`.

use std::collections::{HashMap, VecDeque};

use kvasir_block::BlockHash;

#[derive(Debug)]
pub(super) struct Known {
    /// The turn in which a name was inserted last.
    turns: HashMap<BlockHash, u64>,
    /// Names by rising turn; an entry whose turn is not the name's is a leftover.
    order: VecDeque<(u64, BlockHash)>,
    turn: u64,
    len_max: usize,
}

impl Known {
    pub(super) fn new(len_max: usize) -> Self {
        Self {
            turns: HashMap::new(),
            order: VecDeque::new(),
            turn: 0,
            len_max,
        }
    }

    pub(super) fn contains(&self, hash: &BlockHash) -> bool {
        self.turns.contains_key(hash)
    }

    pub(super) fn insert(&mut self, hash: BlockHash) {
        self.turn += 1;
        self.turns.insert(hash, self.turn);
        self.order.push_back((self.turn, hash));
        while self.turns.len() > self.len_max {
            self.drop_front();
        }
        // Inserting a name again and again leaves leftovers; they are cleared before they double the memory.
        if self.order.len() > 2 * self.len_max {
            let turns = &self.turns;
            self.order.retain(|(turn, hash)| turns.get(hash) == Some(turn));
        }
    }

    pub(super) fn remove(&mut self, hash: &BlockHash) {
        self.turns.remove(hash);
    }

    pub(super) fn clear(&mut self) {
        self.turns.clear();
        self.order.clear();
    }

    fn drop_front(&mut self) {
        if let Some((turn, hash)) = self.order.pop_front()
            && self.turns.get(&hash) == Some(&turn)
        {
            self.turns.remove(&hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u8) -> BlockHash {
        BlockHash::from_bytes([n; 32])
    }

    #[test]
    fn the_oldest_is_forgotten_first_and_memory_is_bounded() {
        let mut known = Known::new(3);
        for n in [1, 2, 1, 3, 4] {
            known.insert(hash(n));
        }
        let held: Vec<u8> = (0..6).filter(|n| known.contains(&hash(*n))).collect();
        assert_eq!(held, [1, 3, 4], "1 was named again, so 2 was the oldest");
        for _ in 0..100 {
            known.insert(hash(4));
        }
        assert!(known.order.len() <= 7, "{}", known.order.len());
        assert!(known.contains(&hash(1)));
        known.remove(&hash(1));
        assert!(!known.contains(&hash(1)));
        known.clear();
        assert!(!known.contains(&hash(4)));
    }
}
