//! One suite that every index must pass, against an exact answer in f64.

use half::f16;
use kvasir_simd::Pool;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use crate::*;

const ORIGIN: Origin = Origin([3; 32]);
const BLOCK: usize = 64;

/// Keys in clusters around a common mean, queries far from all of them: what attention looks like, in small.
pub(crate) struct Data {
    pub(crate) head_dim: usize,
    pub(crate) heads: usize,
    pub(crate) keys: Vec<f16>,
    pub(crate) values: Vec<f16>,
    /// What prefill would have sampled.
    pub(crate) samples: Vec<f32>,
    pub(crate) q: Vec<f32>,
}

impl Data {
    pub(crate) fn clustered(seed: u64, keys: usize, head_dim: usize, heads: usize) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut normal = move || (0..4).map(|_| rng.random_range(-0.87..0.87_f32)).sum::<f32>();
        let topics: Vec<Vec<f32>> = (0..(keys / 40).max(1))
            .map(|_| (0..head_dim).map(|_| normal()).collect())
            .collect();
        let mean: Vec<f32> = (0..head_dim).map(|_| 1.5 * normal()).collect();
        // Queries see few directions.
        let seen: Vec<f32> = (0..head_dim).map(|at| 3.0 / (1.0 + at as f32)).collect();
        let mut rng = SmallRng::seed_from_u64(seed + 1);
        let mut normal_too = move || (0..4).map(|_| rng.random_range(-0.87..0.87_f32)).sum::<f32>();
        let key_rows: Vec<f32> = (0..keys)
            .flat_map(|at| {
                let topic = &topics[at * 31 / 7 % topics.len()];
                let row: Vec<f32> = (0..head_dim).map(|d| mean[d] + topic[d] + 0.6 * normal_too()).collect();
                row
            })
            .collect();
        let mut rng = SmallRng::seed_from_u64(seed + 2);
        let mut query = |out: &mut Vec<f32>| {
            let topic = &topics[rng.random_range(0..topics.len())];
            out.extend((0..head_dim).map(|d| seen[d] * (topic[d] + rng.random_range(-0.5..0.5)) - 0.2 * mean[d]));
        };
        let (mut samples, mut q) = (Vec::new(), Vec::new());
        (0..keys / 2 + 1).for_each(|_| query(&mut samples));
        (0..heads).for_each(|_| query(&mut q));
        let halves = |rows: &[f32]| rows.iter().map(|x| f16::from_f32(*x)).collect();
        let values: Vec<f32> = key_rows.iter().map(|x| x.sin()).collect();
        Self {
            head_dim,
            heads,
            keys: halves(&key_rows),
            values: halves(&values),
            samples,
            q,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.keys.len() / self.head_dim
    }

    pub(crate) fn blocks(&self) -> Vec<&[f16]> {
        self.keys.chunks(BLOCK * self.head_dim).collect()
    }

    pub(crate) fn search<'a>(
        &'a self,
        blocks: &'a [&'a [f16]],
        k: usize,
        effort: f32,
        excluded: &'a Excluded,
    ) -> Search<'a> {
        Search {
            q: &self.q,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            keys: KeyRows::new(blocks, BLOCK, self.head_dim),
            k,
            effort,
            mass: 1.0,
            excluded,
        }
    }

    /// Base-2 score in f64.
    pub(crate) fn score(&self, head: usize, position: u32) -> f64 {
        let q = &self.q[head * self.head_dim..][..self.head_dim];
        let key = &self.keys[position as usize * self.head_dim..][..self.head_dim];
        let dot: f64 = q.iter().zip(key).map(|(q, k)| f64::from(*q) * k.to_f64()).sum();
        dot * f64::from(1.0 / (self.head_dim as f32).sqrt()) * std::f64::consts::LOG2_E
    }

    /// The exact best positions, best first.
    pub(crate) fn exact(&self, head: usize, k: usize, excluded: &Excluded) -> Vec<u32> {
        let mut scored: Vec<(f64, u32)> = (0..self.len() as u32)
            .filter(|position| !excluded.contains(*position))
            .map(|position| (self.score(head, position), position))
            .filter(|(score, _)| score.is_finite())
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        scored.into_iter().take(k).map(|(_, position)| position).collect()
    }
}

type Decode = fn(&[u8], Origin) -> Result<Box<dyn KeyIndex>, IndexError>;

/// An index under test.
struct Subject {
    built: fn(&Data) -> Box<dyn KeyIndex>,
    decode: Decode,
    /// An effort of 1 finds everything.
    exact_at_full_effort: bool,
    /// Work of the golden search and how many of the 30 best keys it found, so that drift shows.
    golden: (Cost, usize),
}

const fn golden(keys_scored: u64, bytes_read: u64, found: usize) -> (Cost, usize) {
    let cost = Cost {
        keys_scored,
        bytes_read,
    };
    (cost, found)
}

fn boxed<T: KeyIndex + 'static>(index: Result<T, IndexError>) -> Result<Box<dyn KeyIndex>, IndexError> {
    index.map(|index| Box::new(index) as Box<dyn KeyIndex>)
}

fn roar(data: &Data, samples: Samples<'_>) -> Box<dyn KeyIndex> {
    let blocks = data.blocks();
    let params = RoarParams {
        nearest: 32,
        degree: 16,
        connections: 16,
        beam: 64,
        metric: Metric::Keys,
    };
    let keys = KeyRows::new(&blocks, BLOCK, data.head_dim);
    boxed(Roar::build(keys, samples, params, ORIGIN, &Pool::new(2))).expect("roar")
}

fn subjects() -> Vec<Subject> {
    vec![
        Subject {
            built: |data| roar(data, Samples::Shared(&data.samples)),
            decode: |bytes, origin| boxed(Roar::decode(bytes, origin)),
            exact_at_full_effort: true,
            golden: golden(540, 72516, 22),
        },
        Subject {
            built: |data| {
                let samples: Vec<&[f32]> = vec![&data.samples; data.heads];
                roar(data, Samples::PerQueryHead(&samples))
            },
            decode: |bytes, origin| boxed(Roar::decode(bytes, origin)),
            exact_at_full_effort: true,
            golden: golden(540, 72516, 22),
        },
        Subject {
            built: |data| {
                let params = WaveParams {
                    segment_keys: 512,
                    ..WaveParams::default()
                };
                let mut index = Wave::new(data.head_dim, params, false, ORIGIN).expect("wave");
                index.append(&data.keys).expect("keys");
                Box::new(index)
            },
            decode: |bytes, origin| boxed(Wave::decode(bytes, origin)),
            exact_at_full_effort: true,
            golden: golden(1731, 94952, 13),
        },
        Subject {
            built: |data| {
                let mut index = Wave::new(data.head_dim, WaveParams::default(), true, ORIGIN).expect("wave");
                index.append_rows(&data.keys, &data.values).expect("rows");
                Box::new(index)
            },
            decode: |bytes, origin| boxed(Wave::decode(bytes, origin)),
            exact_at_full_effort: true,
            golden: golden(8940, 381440, 30),
        },
        Subject {
            built: |data| {
                let mut index = Quest::new(data.head_dim, ORIGIN);
                index.append(&data.keys).expect("keys");
                Box::new(index)
            },
            decode: |bytes, origin| boxed(Quest::decode(bytes, origin)),
            exact_at_full_effort: true,
            golden: golden(540, 96768, 6),
        },
        Subject {
            built: |data| {
                let blocks = data.blocks();
                let keys = KeyRows::new(&blocks, BLOCK, data.head_dim);
                boxed(Ivf::build(keys, None, ORIGIN, &Pool::new(2))).expect("ivf")
            },
            decode: |bytes, origin| boxed(Ivf::decode(bytes, origin)),
            exact_at_full_effort: true,
            golden: golden(537, 94172, 29),
        },
        #[cfg(feature = "hnsw")]
        Subject {
            built: |data| {
                let mut index = Hnsw::new(data.head_dim, data.len(), ORIGIN);
                index.append(&data.keys).expect("keys");
                Box::new(index)
            },
            decode: |bytes, origin| boxed(Hnsw::decode(bytes, origin)),
            exact_at_full_effort: false,
            golden: golden(1092, 301104, 28),
        },
        #[cfg(feature = "faiss")]
        Subject {
            built: |data| {
                let blocks = data.blocks();
                boxed(FaissIvf::build(
                    KeyRows::new(&blocks, BLOCK, data.head_dim),
                    None,
                    ORIGIN,
                ))
                .expect("ivf-faiss")
            },
            decode: |bytes, origin| boxed(FaissIvf::decode(bytes, origin)),
            exact_at_full_effort: false,
            golden: golden(506, 171168, 28),
        },
        #[cfg(feature = "faiss")]
        Subject {
            built: |data| {
                let mut index = FaissHnsw::new(data.head_dim, ORIGIN).expect("hnsw-faiss");
                index.append(&data.keys).expect("keys");
                Box::new(index)
            },
            decode: |bytes, origin| boxed(FaissHnsw::decode(bytes, origin)),
            exact_at_full_effort: false,
            // Costs are not counted; what is found is the same on any number of threads.
            golden: golden(0, 0, 9),
        },
    ]
}

/// Whatever was asked: no position twice, none excluded, none that is not there, true scores, sorted, at most `k`.
fn assert_sound(what: &str, data: &Data, search: &Search<'_>, hits: &Hits) {
    assert_eq!(hits.heads.len(), data.heads, "{what}");
    for (head, found) in hits.heads.iter().enumerate() {
        assert!(found.len() <= search.k, "{what}: {} keys", found.len());
        let mut positions: Vec<u32> = found.iter().map(|(position, _)| *position).collect();
        for &(position, score) in found {
            assert!((position as usize) < data.len(), "{what}: position {position}");
            assert!(!search.excluded.contains(position), "{what}: {position} is excluded");
            let exact = data.score(head, position);
            let near = (f64::from(score) - exact).abs() <= 1e-4 * (1.0 + exact.abs());
            assert!(near, "{what}: {position} scored {score}, not {exact}");
        }
        let sorted = found
            .windows(2)
            .all(|pair| pair[0].1 > pair[1].1 || (pair[0].1 == pair[1].1 && pair[0].0 < pair[1].0));
        assert!(sorted, "{what}: {found:?}");
        positions.sort_unstable();
        positions.dedup();
        assert_eq!(positions.len(), found.len(), "{what}: a position twice");
    }
}

/// How many of the exact best keys were found.
fn found(data: &Data, search: &Search<'_>, hits: &Hits) -> usize {
    let heads = hits.heads.iter().enumerate();
    let found = heads.map(|(head, hits)| {
        let exact = data.exact(head, search.k, search.excluded);
        hits.iter().filter(|(position, _)| exact.contains(position)).count()
    });
    found.sum()
}

fn each(mut with: impl FnMut(&Subject, &Data, &dyn KeyIndex, &str)) {
    for (seed, keys, head_dim, heads) in [(1, 1100, 64, 3), (2, 40, 16, 1), (3, 3, 24, 2), (4, 700, 96, 9)] {
        let data = Data::clustered(seed, keys, head_dim, heads);
        for (at, subject) in subjects().iter().enumerate() {
            let index = (subject.built)(&data);
            let what = format!("{} ({at}) of {keys} keys, d {head_dim}", index.name());
            with(subject, &data, index.as_ref(), &what);
        }
    }
}

#[test]
fn answers_are_sound_and_exact_at_full_effort() {
    each(|subject, data, index, what| {
        assert_eq!(index.keys(), data.len(), "{what}");
        let blocks = data.blocks();
        let n = data.len() as u32;
        for excluded in [
            Excluded::none(),
            Excluded::new(&[0..4, n.saturating_sub(64)..n]),
            Excluded::new(std::slice::from_ref(&(0..n))),
        ] {
            for (k, effort) in [
                (1, 0.02),
                (10, 0.1),
                (10, 1.0),
                (100, 0.3),
                (usize::MAX, 1.0),
                (5000, 0.01),
            ] {
                let search = data.search(&blocks, k, effort, &excluded);
                let found = index.search(&search).expect(what);
                let what = format!("{what}, k {k}, effort {effort}, without {excluded:?}");
                assert_sound(&what, data, &search, &found);
                assert_eq!(
                    found,
                    index.search(&search).expect("again"),
                    "{what}: the same answer twice"
                );
                if subject.exact_at_full_effort && effort == 1.0 {
                    for (head, hits) in found.heads.iter().enumerate() {
                        let positions: Vec<u32> = hits.iter().map(|(position, _)| *position).collect();
                        assert_eq!(positions, data.exact(head, k, &excluded), "{what}, head {head}");
                    }
                }
            }
        }
    });
}

#[test]
fn work_stays_within_the_effort() {
    let none = Excluded::none();
    each(|subject, data, index, what| {
        let blocks = data.blocks();
        for effort in [0.01, 0.1, 0.5, 1.0] {
            let found = index.search(&data.search(&blocks, 10, effort, &none)).expect(what);
            let budget = (f64::from(effort) * data.len() as f64).ceil() as u64;
            // Keys that are not in a segment yet are scanned whatever the effort.
            let fresh = if index.name() == "wave" { data.len() as u64 } else { 0 };
            let most = (budget + fresh) * data.heads as u64;
            assert!(
                !subject.exact_at_full_effort || found.cost.keys_scored <= most,
                "{what}: {} keys scored at effort {effort}",
                found.cost.keys_scored
            );
            let counted = found.cost.bytes_read >= 2 * data.head_dim as u64;
            assert_eq!(counted, index.counts(), "{what}");
        }
    });
}

#[test]
fn decoded_answers_alike() {
    let none = Excluded::none();
    each(|subject, data, index, what| {
        let file = index.encode();
        let blocks = data.blocks();
        let search = data.search(&blocks, 10, 0.1, &none);
        let decoded = (subject.decode)(&file, ORIGIN).expect(what);
        assert_eq!(decoded.search(&search), index.search(&search), "{what}");
        assert_eq!(decoded.encode(), file, "{what}");
        assert_eq!(decoded.bytes(), index.bytes(), "{what}");
        assert!(
            (subject.decode)(&file, Origin([4; 32])).is_err(),
            "{what}: another origin"
        );
    });
}

/// The payload is rewritten and the checksums made right again: what a checksum cannot know is refused or harmless.
#[test]
fn forged_payloads_never_panic() {
    let none = Excluded::none();
    let data = Data::clustered(5, 600, 16, 2);
    let blocks = data.blocks();
    let search = data.search(&blocks, 10, 0.2, &none);
    let kinds = [
        Kind::Roar,
        Kind::Roar,
        Kind::Wave,
        Kind::Wave,
        Kind::Quest,
        Kind::Ivf,
        Kind::Hnsw,
        Kind::FaissIvf,
        Kind::FaissHnsw,
    ];
    let mut rng = SmallRng::seed_from_u64(9);
    for (subject, kind) in subjects().iter().zip(kinds) {
        let file = (subject.built)(&data).encode();
        let payload = &file[72..];
        // The slow ones are built again for each.
        let rounds = match kind {
            Kind::Hnsw | Kind::FaissIvf | Kind::FaissHnsw => 3,
            _ => 300,
        };
        for round in 0..rounds {
            let mut forged = payload.to_vec();
            for _ in 0..rng.random_range(1..4) {
                // Counts are at the front: half of the changes go there.
                let reach = if rng.random_bool(0.5) {
                    64.min(forged.len())
                } else {
                    forged.len()
                };
                let at = rng.random_range(0..reach);
                forged[at] = rng.random();
            }
            if rng.random_bool(0.2) {
                forged.truncate(rng.random_range(0..forged.len()));
            }
            let file = file::seal(kind, 1, data.head_dim, data.len(), ORIGIN, &forged);
            if let Ok(index) = (subject.decode)(&file, ORIGIN) {
                let found = index.search(&search).expect("a decoded index searches");
                assert_sound(&format!("{kind:?}, round {round}"), &data, &search, &found);
            }
        }
    }
}

#[test]
fn keys_that_are_not_numbers_are_never_found() {
    let none = Excluded::none();
    let mut data = Data::clustered(6, 600, 16, 2);
    for (at, value) in [
        (0, f16::NAN),
        (5, f16::INFINITY),
        (599, f16::NEG_INFINITY),
        (300, f16::NAN),
    ] {
        data.keys[at * 16 + at % 16] = value;
    }
    let blocks = data.blocks();
    for subject in subjects() {
        let index = (subject.built)(&data);
        for effort in [0.1, 1.0] {
            let search = data.search(&blocks, 700, effort, &none);
            let found = index.search(&search).expect("a search");
            assert_sound(index.name(), &data, &search, &found);
            for hits in &found.heads {
                assert!(
                    hits.iter().all(|(position, _)| ![0, 5, 599, 300].contains(position)),
                    "{}",
                    index.name()
                );
                assert!(
                    !subject.exact_at_full_effort || effort < 1.0 || hits.len() == 596,
                    "{}: {}",
                    index.name(),
                    hits.len()
                );
            }
        }
    }
    let mut lost = Data::clustered(6, 100, 16, 2);
    lost.keys.fill(f16::NAN);
    let blocks = lost.blocks();
    for subject in subjects() {
        let index = (subject.built)(&lost);
        let found = index.search(&lost.search(&blocks, 5, 0.5, &none)).expect("a search");
        assert!(found.heads.iter().all(Vec::is_empty), "{}", index.name());
    }
}

#[test]
fn no_keys_are_an_empty_answer() {
    let none = Excluded::none();
    let mut data = Data::clustered(6, 2, 16, 2);
    data.keys.clear();
    data.values.clear();
    for subject in subjects() {
        let index = (subject.built)(&data);
        let found = index.search(&data.search(&[], 5, 0.5, &none)).expect("a search");
        assert!(found.heads.iter().all(Vec::is_empty), "{}", index.name());
        let decoded = (subject.decode)(&index.encode(), ORIGIN).expect("a file");
        assert_eq!(decoded.keys(), 0);
    }
}

#[test]
fn what_cannot_be_searched_is_named() {
    let none = Excluded::none();
    let data = Data::clustered(7, 200, 16, 2);
    let blocks = data.blocks();
    let base = data.search(&blocks, 5, 0.5, &none);
    let nan = [f32::NAN; 16];
    let short: Vec<&[f16]> = blocks[..2].to_vec();
    let cases = [
        (Search { k: 0, ..base }, "k: 0 keys are wanted; ask for at least 1"),
        (Search { effort: 0.0, ..base }, "effort: 0 is not above 0 and at most 1"),
        (
            Search {
                effort: f32::NAN,
                ..base
            },
            "effort: NaN is not above 0 and at most 1",
        ),
        (Search { q: &nan, ..base }, "q: an element is not finite"),
        (Search { q: &nan[..3], ..base }, "q: 3 elements are not rows of 16"),
        (Search { q: &[], ..base }, "q: 0 elements are not rows of 16"),
        (
            Search {
                scale: f32::INFINITY,
                ..base
            },
            "scale: inf is not finite",
        ),
        (
            Search {
                keys: KeyRows::new(&short, BLOCK, 16),
                ..base
            },
            "keys: 128 rows, the index was given 200",
        ),
        (
            Search {
                keys: KeyRows::new(&[], BLOCK, 32),
                ..base
            },
            "keys: rows of 32, the index has rows of 16",
        ),
    ];
    for subject in subjects() {
        let index = (subject.built)(&data);
        for (search, expected) in &cases {
            let error = index.search(search).expect_err(expected);
            assert_eq!(&error.to_string(), expected, "{}", index.name());
        }
        let mut index = index;
        let error = index.append(&data.keys[..7]).expect_err("half a row");
        assert!(
            matches!(
                error,
                IndexError::Invalid { argument: "keys", .. } | IndexError::Unsupported { .. }
            ),
            "{error}"
        );
    }
}

#[test]
fn appended_bit_by_bit_is_as_appended_at_once() {
    let none = Excluded::none();
    let data = Data::clustered(8, 1100, 16, 2);
    let blocks = data.blocks();
    for (at, subject) in subjects().iter().enumerate() {
        let whole = (subject.built)(&data);
        // Those that are built at once from all keys, or with values, are tested beside their code.
        if !matches!((whole.name(), at), ("wave", 2) | ("quest" | "hnsw", _)) {
            continue;
        }
        let empty = Data {
            keys: Vec::new(),
            values: Vec::new(),
            samples: Vec::new(),
            q: Vec::new(),
            ..data
        };
        let mut index = (subject.built)(&empty);
        for part in data.keys.chunks(16 * 37) {
            index.append(part).expect("a part");
        }
        let search = data.search(&blocks, 20, 0.2, &none);
        assert_eq!(index.search(&search), whole.search(&search), "{}", whole.name());
        assert_eq!(index.encode(), whole.encode(), "{}", whole.name());
    }
}

/// What an index costs and finds does not drift unseen.
#[test]
fn golden_work() {
    let excluded = Excluded::new(&[0..4, 2984..3000]);
    let data = Data::clustered(11, 3000, 64, 3);
    let blocks = data.blocks();
    let search = data.search(&blocks, 10, 0.06, &excluded);
    for (at, subject) in subjects().iter().enumerate() {
        let index = (subject.built)(&data);
        let hits = index.search(&search).expect("a search");
        let found = found(&data, &search, &hits);
        assert_eq!((hits.cost, found), subject.golden, "{} ({at})", index.name());
    }
}
