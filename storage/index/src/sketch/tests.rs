mod attend;
mod clustered;
mod reuse;

use half::f16;
use kvasir_simd::Segment;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{format::RANK, *};
use crate::{Excluded, Flat, FlatScan, HeadBasis, IndexError, KeyIndex, KeyRows, Origin, Search};

/// Keys along 32 directions with falling spread around a mean, and the basis that knows it.
struct Case {
    d: usize,
    block: usize,
    q: Vec<f32>,
    keys: Vec<f16>,
    values: Vec<f16>,
    basis: HeadBasis,
    sketches: Vec<Vec<u8>>,
}

impl Case {
    fn new(seed: u64, d: usize, heads: usize, block: usize, n: usize) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut draw = |count: usize| -> Vec<f32> {
            (0..count)
                .map(|_| (0..3).map(|_| rng.random_range(-1.0..1.0_f32)).sum())
                .collect()
        };
        // Coordinate i of a key spreads by spread(i); directions are the axes, as far as there are any.
        let spread = |i: usize| 2.0 / (1.0 + i as f32 / 4.0);
        let mean = draw(d);
        let keys = draw(n * d)
            .iter()
            .enumerate()
            .map(|(i, x)| f16::from_f32(x * spread(i % d) + mean[i % d]))
            .collect();
        let (mut to_keys, mut to_queries) = (vec![0.0; RANK * d], vec![0.0; RANK * d]);
        for i in 0..RANK.min(d) {
            (to_keys[i * d + i], to_queries[i * d + i]) = (1.0 / spread(i), spread(i));
        }
        let mut case = Self {
            d,
            block,
            q: draw(heads * d).iter().map(|q| q * 1.5).collect(),
            values: draw(n * d).into_iter().map(f16::from_f32).collect(),
            keys,
            basis: HeadBasis {
                mean,
                keys: to_keys,
                queries: to_queries,
                streaming: false,
            },
            sketches: Vec::new(),
        };
        case.sketch();
        case
    }

    fn format(&self) -> SketchFormat {
        SketchFormat::new(self.d)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.d as f32).sqrt()
    }

    fn sketch(&mut self) {
        let rows = self.block * self.d;
        let blocks = self.keys.chunks(rows).zip(self.values.chunks(rows));
        self.sketches = blocks
            .map(|(keys, values)| {
                let mut bytes = Vec::new();
                encode_block(self.format(), &self.basis, keys, values, &mut bytes).unwrap();
                assert_eq!(bytes.len(), self.format().bytes(keys.len() / self.d));
                bytes
            })
            .collect();
    }

    fn segments(&self) -> impl Iterator<Item = (Segment<'_>, &[u8])> {
        let rows = self.block * self.d;
        let blocks = self.keys.chunks(rows).zip(self.values.chunks(rows)).zip(&self.sketches);
        blocks.enumerate().map(move |(at, ((keys, values), sketch))| {
            (
                Segment {
                    keys,
                    values,
                    position: at * self.block,
                },
                sketch.as_slice(),
            )
        })
    }

    fn scan(&self, excluded: &Excluded) -> SketchScan<'_> {
        let mut scan = SketchScan::new(self.format(), self.scale());
        scan.begin(&self.q, &self.basis).unwrap();
        self.segments()
            .for_each(|(segment, sketch)| scan.scan(segment, sketch, excluded).unwrap());
        scan
    }

    fn flat(&self, excluded: &Excluded) -> FlatScan<'_> {
        let mut scan = FlatScan::new(self.d, self.scale());
        scan.begin(&self.q);
        self.segments().for_each(|(segment, _)| scan.scan(segment, excluded));
        scan
    }
}

const EXACT: Attend = Attend {
    target_mass: 1.0,
    k_max: None,
    effort: 1.0,
    tail: true,
    certificate: true,
    missed_mass_max: None,
};

fn close(found: &[f32], truth: &[f32], tolerance: f32) {
    assert_eq!(found.len(), truth.len());
    for (a, b) in found.iter().zip(truth) {
        assert!(
            a == b || (a - b).abs() <= tolerance * b.abs().max(1.0) || (a.is_nan() && b.is_nan()),
            "{a} {b}"
        );
    }
}

fn error(found: &[f32], truth: &[f32]) -> f32 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut found.iter().zip(truth).map(|(a, b)| a - b)) / norm(&mut truth.iter().copied())
}

#[test]
fn refuses_what_is_not_a_sketch() {
    let case = Case::new(2, 64, 1, 64, 64);
    let good = &case.sketches[0];
    let (segment, _) = case.segments().next().unwrap();
    let spoil = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    let cases = [
        (good[..7].to_vec(), "shorter"),
        (good[..good.len() - 1].to_vec(), "bytes for 64 keys"),
        (spoil(0, 1), "version 1"),
        (spoil(2, 63), "63 keys for a block of 64"),
        (spoil(2, 0), "bytes for 0 keys"),
        (spoil(7, 0xff), "step"),
    ];
    for (bytes, expected) in cases {
        let bytes: &'static [u8] = Box::leak(bytes.into_boxed_slice());
        let mut scan = SketchScan::new(case.format(), 1.0);
        scan.begin(&case.q, &case.basis).unwrap();
        let error = scan.scan(segment, bytes, &Excluded::none()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let mut out = Vec::new();
    for (keys, values) in [(0, 0), (63, 64), (257 * 64, 257 * 64), (64, 0)] {
        let (keys, values) = (vec![f16::ONE; keys], vec![f16::ONE; values]);
        assert!(matches!(
            encode_block(case.format(), &case.basis, &keys, &values, &mut out),
            Err(IndexError::Invalid { .. })
        ));
    }
    assert!(out.is_empty());
}

/// What every index promises, for those of this module.
#[test]
fn indexes_append_search_and_persist() {
    let case = Case::new(17, 64, 3, 64, 333);
    let id = Origin([7; 32]);
    let new = |kind: &str| -> Box<dyn KeyIndex> {
        match kind {
            "flat" => Box::new(Flat::new(64, id).unwrap()),
            "four" => Box::new(Sketch::new(64, Width::Four, case.basis.clone(), id).unwrap()),
            _ => Box::new(Sketch::new(64, Width::Eight, case.basis.clone(), id).unwrap()),
        }
    };
    let excluded = Excluded::new(&[10..20, 300..333]);
    let blocks: Vec<&[f16]> = case.keys.chunks(50 * 64).collect();
    let ask = |k, effort| Search {
        q: &case.q,
        scale: case.scale(),
        keys: KeyRows::new(&blocks, 50, 64),
        k,
        effort,
        mass: 1.0,
        excluded: &excluded,
    };
    let mut whole = new("flat");
    whole.append(&case.keys).unwrap();
    let truth = whole.search(&ask(12, 1.0)).unwrap();
    for kind in ["flat", "four", "eight"] {
        let mut index = new(kind);
        for part in case.keys.chunks(37 * 64) {
            index.append(part).unwrap();
        }
        assert_eq!((index.keys(), index.append(&case.keys[..3]).is_err()), (333, true));
        let found = index.search(&ask(12, 1.0)).unwrap();
        assert_eq!(found.heads, truth.heads, "{kind}");
        let some = index.search(&ask(12, 0.2)).unwrap();
        for (some, truth) in some.heads.iter().zip(&truth.heads) {
            assert!(
                some.iter().filter(|hit| truth.contains(hit)).count() >= 9,
                "{kind}: {some:?} {truth:?}"
            );
        }
        for bad in [
            ask(0, 1.0),
            ask(1, 0.0),
            ask(1, f32::NAN),
            Search {
                q: &[f32::NAN; 64],
                ..ask(1, 1.0)
            },
            Search {
                q: &[1.0],
                ..ask(1, 1.0)
            },
            Search {
                mass: 0.0,
                ..ask(1, 1.0)
            },
            Search {
                mass: f32::NAN,
                ..ask(1, 1.0)
            },
            Search {
                keys: KeyRows::new(&blocks[..2], 50, 64),
                ..ask(1, 1.0)
            },
        ] {
            assert!(matches!(index.search(&bad), Err(IndexError::Invalid { .. })), "{kind}");
        }
        let bytes = index.encode();
        let decode = |bytes: &[u8], id| -> Result<Vec<u8>, IndexError> {
            match kind {
                "flat" => Flat::decode(bytes, id).map(|index| index.encode()),
                _ => Sketch::decode(bytes, case.basis.clone(), id).map(|index| index.encode()),
            }
        };
        assert_eq!(decode(&bytes, id).as_ref(), Ok(&bytes));
        for at in (0..bytes.len()).step_by(bytes.len() / 40 + 1) {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert!(
                decode(&flipped, id).is_err() && decode(&bytes[..at], id).is_err(),
                "{kind} {at}"
            );
        }
        assert!(decode(&bytes, Origin([8; 32])).is_err(), "{kind} of other keys");
    }
    let mut again = Sketch::new(64, Width::Four, case.basis.clone(), id).unwrap();
    again.append(&case.keys).unwrap();
    let mut parts = Sketch::new(64, Width::Four, case.basis.clone(), id).unwrap();
    case.keys.chunks(64).for_each(|key| parts.append(key).unwrap());
    assert!(again == parts, "appended at once or key by key");
}

/// What is found holds about the mass that was asked for, of every head, and costs what it must; a search is a function of its keys.
#[test]
fn a_search_stops_where_the_mass_is() {
    let case = Case::new(23, 64, 3, 64, 2000);
    let excluded = Excluded::new(&[0..4, 900..1000]);
    let blocks: Vec<&[f16]> = case.keys.chunks(64 * 64).collect();
    let ask = |mass, effort| Search {
        q: &case.q,
        scale: case.scale(),
        keys: KeyRows::new(&blocks, 64, 64),
        k: 2000,
        effort,
        mass,
        excluded: &excluded,
    };
    let mut flat = Flat::new(64, Origin([1; 32])).unwrap();
    flat.append(&case.keys).unwrap();
    let truth = flat.search(&ask(1.0, 1.0)).unwrap();
    assert!(truth.covered.is_empty());
    for width in [Width::Four, Width::Eight] {
        let mut index = Sketch::new(64, width, case.basis.clone(), Origin([1; 32])).unwrap();
        index.append(&case.keys).unwrap();
        let mut before = 0;
        for mass in [0.3, 0.8, 0.95, 0.999] {
            let found = index.search(&ask(mass, 1.0)).unwrap();
            assert!(found.cost.bytes_read > before, "more mass costs more");
            before = found.cost.bytes_read;
            for ((hits, all), covered) in found.heads.iter().zip(&truth.heads).zip(&found.covered) {
                let high = all[0].1;
                let sum = |hits: &[(u32, f32)]| hits.iter().map(|(_, score)| (score - high).exp2()).sum::<f32>();
                let held = sum(hits) / sum(all);
                assert!(
                    *covered >= mass && held > mass - 0.1 * (1.0 - mass) - 0.02,
                    "{width:?} {mass}: {covered} {held}"
                );
                assert!(hits.windows(2).all(|pair| pair[0].1 >= pair[1].1));
                assert!(
                    hits.iter().all(|hit| all.contains(hit)),
                    "exact scores of searched keys"
                );
            }
            assert_eq!(index.search(&ask(mass, 1.0)).unwrap(), found);
        }
        let whole = index.search(&ask(1.0, 1.0)).unwrap();
        assert_eq!(whole.heads, truth.heads);
        assert!(before < whole.cost.bytes_read, "{before} of {}", whole.cost.bytes_read);
        let little = index.search(&ask(0.999, 0.01)).unwrap();
        assert!(
            little.heads.iter().all(|hits| hits.len() <= 3 * 19),
            "19 of 1,896 for each head"
        );
        let mut parts = Sketch::new(64, width, case.basis.clone(), Origin([1; 32])).unwrap();
        case.keys.chunks(77 * 64).for_each(|keys| parts.append(keys).unwrap());
        assert_eq!(parts.search(&ask(0.8, 1.0)), index.search(&ask(0.8, 1.0)));
        let none = Excluded::new(&[0..1000, 1000..2000]);
        let nothing = index
            .search(&Search {
                excluded: &none,
                ..ask(0.8, 1.0)
            })
            .unwrap();
        assert!(nothing.heads.iter().all(Vec::is_empty) && nothing.heads.len() == 3);
    }
}

/// Levels that cannot tell keys apart stop nothing: every key is read.
#[test]
fn a_search_by_mass_believes_no_levels_at_their_end() {
    let mut case = Case::new(29, 64, 2, 64, 300);
    case.q[..64].iter_mut().for_each(|q| *q *= 4000.0);
    let blocks: Vec<&[f16]> = case.keys.chunks(64 * 64).collect();
    let mut index = Sketch::new(64, Width::Four, case.basis.clone(), Origin([1; 32])).unwrap();
    index.append(&case.keys).unwrap();
    let search = Search {
        q: &case.q,
        scale: case.scale(),
        keys: KeyRows::new(&blocks, 64, 64),
        k: 300,
        effort: 1.0,
        mass: 0.5,
        excluded: &Excluded::none(),
    };
    let found = index.search(&search).unwrap();
    assert_eq!((found.heads[0].len(), found.heads[1].len()), (300, 300));
    assert_eq!(found.covered, [1.0, 1.0]);
}
