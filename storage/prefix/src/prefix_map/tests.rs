use proptest::prelude::*;

use super::*;

fn hash(i: u8) -> BlockHash {
    BlockHash::from_bytes([i; 32])
}

fn namespace(i: u8) -> NamespaceId {
    NamespaceId::from_bytes([i; 32])
}

/// The obvious way: a list of (block, holder) facts, oldest block first.
#[derive(Default)]
struct Naive {
    blocks: Vec<(BlockKey, Vec<u8>)>,
}

impl Naive {
    fn insert(&mut self, key: BlockKey, holder: u8, max: usize) {
        let at = self.blocks.iter().position(|(known, _)| *known == key);
        let mut block = at.map_or((key, Vec::new()), |at| self.blocks.remove(at));
        if !block.1.contains(&holder) {
            block.1.push(holder);
        }
        self.blocks.push(block);
        if self.blocks.len() > max {
            self.blocks.remove(0);
        }
    }

    fn remove(&mut self, key: Option<BlockKey>, holder: u8) {
        for (known, holders) in &mut self.blocks {
            if key.is_none_or(|key| key == *known) {
                holders.retain(|&known| known != holder);
            }
        }
        self.blocks.retain(|(_, holders)| !holders.is_empty());
    }

    fn has(&self, key: BlockKey, holder: u8) -> bool {
        self.blocks
            .iter()
            .any(|(known, holders)| *known == key && holders.contains(&holder))
    }

    fn prefix(&self, namespace: NamespaceId, chain: &[BlockHash], holder: u8) -> usize {
        chain
            .iter()
            .take_while(|&&hash| self.has(namespace.block(hash), holder))
            .count()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u8, u8, u8),
    Remove(u8, u8, u8),
    RemoveHolder(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..2u8, 0..8u8, 0..4u8).prop_map(|(n, b, h)| Step::Insert(n, b, h)),
        3 => (0..2u8, 0..8u8, 0..4u8).prop_map(|(n, b, h)| Step::Remove(n, b, h)),
        1 => (0..4u8).prop_map(Step::RemoveHolder),
    ]
}

proptest! {
    #[test]
    fn agrees_with_the_naive_model(steps in prop::collection::vec(step(), 0..80), max in 1..12usize) {
        let mut map = PrefixMap::new(max);
        let mut naive = Naive::default();
        for step in steps {
            match step {
                Step::Insert(n, b, h) => {
                    let key = namespace(n).block(hash(b));
                    prop_assert_eq!(map.insert(key, h), !naive.has(key, h));
                    naive.insert(key, h, max);
                }
                Step::Remove(n, b, h) => {
                    let key = namespace(n).block(hash(b));
                    prop_assert_eq!(map.remove(key, h), naive.has(key, h));
                    naive.remove(Some(key), h);
                }
                Step::RemoveHolder(h) => {
                    map.remove_holder(h);
                    naive.remove(None, h);
                }
            }
            prop_assert_eq!(map.len(), naive.blocks.len());
            prop_assert_eq!(map.order.len(), map.entries.len());
            let chain: Vec<_> = (0..8).map(hash).collect();
            for n in 0..2 {
                let mut found = map.longest_prefix(namespace(n), &chain);
                prop_assert!(found.is_sorted_by(|a, b| a.1 >= b.1), "longest first");
                found.sort_unstable();
                let expected: Vec<_> = (0..4u8)
                    .map(|h| (h, naive.prefix(namespace(n), &chain, h)))
                    .filter(|&(_, blocks)| blocks > 0)
                    .collect();
                prop_assert_eq!(found, expected);
            }
        }
    }
}

#[test]
fn edges() {
    let mut map: PrefixMap<u8> = PrefixMap::new(0);
    assert_eq!((map.max_blocks(), map.is_empty()), (1, true));
    assert!(map.longest_prefix(namespace(0), &[]).is_empty());
    assert!(map.insert(namespace(0).block(hash(0)), 1));
    assert!(!map.insert(namespace(0).block(hash(0)), 1), "said twice, no news");
    assert!(
        map.longest_prefix(namespace(1), &[hash(0)]).is_empty(),
        "another namespace is another block"
    );
    map.insert(namespace(0).block(hash(1)), 1);
    assert_eq!((map.len(), map.forgotten()), (1, 1));
    assert!(
        map.longest_prefix(namespace(0), &[hash(0), hash(1)]).is_empty(),
        "a gap at the start is no hit"
    );
    assert_eq!(map.holders(namespace(0).block(hash(1))), [1]);
}
