//! Random replacement against plain models.

use std::collections::VecDeque;

use super::*;

/// What each policy promises, in its simplest form.
#[derive(Debug, Default)]
struct Model {
    /// Least recently matched first.
    recency: VecDeque<u32>,
    parents: Vec<(u32, u32)>,
}

impl Model {
    /// Whether `victims`, in their order, are what the policy may evict of what is here.
    fn allows(&self, policy: HostPolicy, victims: &[u32], stays: impl Fn(u32) -> bool) -> bool {
        let mut here = self.recency.clone();
        for &victim in victims {
            let right = match policy {
                HostPolicy::Lru => here.iter().find(|&&i| !stays(i)) == Some(&victim),
                HostPolicy::S3Fifo => here.contains(&victim),
                HostPolicy::Prefix => {
                    here.contains(&victim)
                        && !self
                            .parents
                            .iter()
                            .any(|&(child, parent)| parent == victim && here.contains(&child))
                }
            };
            if !right || stays(victim) {
                return false;
            }
            here.retain(|&i| i != victim);
        }
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// Under each policy: victims as the model allows, nothing that must stay among them, the budget and every byte right.
    #[test]
    fn victims_are_those_of_the_model(
        policy in prop::sample::select(HostPolicy::ALL.to_vec()),
        steps in prop::collection::vec((0..10u8, 0..40u32), 1..250),
        blocks in 1..20u64,
    ) {
        let mut host = tier_of(blocks, policy);
        let mut model = Model::default();
        // A tree: the parent of i is i / 3, as its chain is noted before it is put.
        let line = |i: u32| {
            let mut line: Vec<u32> = std::iter::successors(Some(i), |&i| (i > 0).then_some(i / 3)).collect();
            line.reverse();
            line
        };
        let pinned = [0, 5, 17];
        // What is read, and whether the tier still holds that payload: the same block may come again after it went.
        let mut reading: Option<(u32, Bytes)> = None;
        let mut read_is_held = false;
        for (what, i) in steps {
            match what {
                0..=5 => {
                    host.note_chain(NAMESPACE, &chain(line(i)));
                    for pair in line(i).windows(2) {
                        // Learnt where both are here, or the child comes now.
                        let parent_here = model.recency.contains(&pair[0]);
                        if parent_here && (model.recency.contains(&pair[1]) || pair[1] == i) {
                            model.parents.push((pair[1], pair[0]));
                        }
                    }
                    let before = host.contains(block(i).layer(0));
                    let result = put(&mut host, i, 0, &pinned);
                    let evicted: Vec<u32> = match &result {
                        Ok(evicted) => evicted.iter().map(|key| u32::from_be_bytes(key.hash.as_bytes()[..4].try_into().unwrap())).collect(),
                        Err(no_room) => { prop_assert_eq!(&no_room.evicted, &vec![]); vec![] }
                    };
                    let stays = |i: u32| pinned.contains(&i) || read_is_held && reading.as_ref().is_some_and(|(read, _)| *read == i);
                    prop_assert!(model.allows(policy, &evicted, stays), "{:?} {:?}", model, evicted);
                    // What was passed over counts as matched just now.
                    if policy == HostPolicy::Lru && !before && (!evicted.is_empty() || result.is_err()) {
                        let last = evicted.last().and_then(|last| model.recency.iter().position(|i| i == last));
                        let passed: Vec<u32> = model.recency.iter().take(last.map_or(usize::MAX, |last| last)).copied().filter(|&i| stays(i)).collect();
                        model.recency.retain(|i| !passed.contains(i));
                        model.recency.extend(passed);
                    }
                    model.recency.retain(|i| !evicted.contains(i));
                    model.parents.retain(|(child, parent)| !evicted.contains(child) && !evicted.contains(parent));
                    if result.is_ok() && !before {
                        model.recency.push_back(i);
                    }
                    if result.is_err() {
                        // A parent waits for its children; all blocks are of one size, so one victim would do.
                        let waits = |i: u32| {
                            policy == HostPolicy::Prefix
                                && model.parents.iter().any(|&(child, parent)| parent == i && model.recency.contains(&child))
                        };
                        let could_go = model.recency.iter().filter(|&&i| !stays(i) && !waits(i)).count();
                        let read_but_gone = reading.is_some() && !read_is_held;
                        prop_assert!(could_go == 0 || (read_but_gone && blocks == 1));
                    }
                }
                6 | 7 => {
                    host.touch(&block(i));
                    if model.recency.contains(&i) {
                        model.recency.retain(|&other| other != i);
                        model.recency.push_back(i);
                    }
                }
                8 => {
                    let was = model.recency.contains(&i);
                    read_is_held &= reading.as_ref().is_some_and(|(read, _)| *read != i);
                    prop_assert_eq!(host.remove(block(i).layer(0)), was);
                    model.recency.retain(|&other| other != i);
                    model.parents.retain(|(child, parent)| *child != i && *parent != i);
                }
                _ => {
                    if let Some((read, bytes)) = reading.take() {
                        prop_assert_eq!(bytes, payload(read, 0, PAYLOAD), "as it was, whatever happened meanwhile");
                    }
                    reading = host.get(block(i).layer(0)).map(|(bytes, _)| (i, bytes));
                    read_is_held = reading.is_some();
                }
            }
            check(&host);
            prop_assert_eq!(host.index.len(), model.recency.len());
            for &i in &model.recency {
                prop_assert_eq!(host.get(block(i).layer(0)).map(|(bytes, _)| bytes), Some(payload(i, 0, PAYLOAD)));
            }
        }
    }
}
