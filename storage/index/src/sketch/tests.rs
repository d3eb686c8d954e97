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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn full_effort_is_the_flat_scan(
        seed in 0_u64..1000,
        d in prop::sample::select(vec![64_usize, 96, 128, 256]),
        heads in 1_usize..9,
        block in prop::sample::select(vec![16_usize, 40, 64, 100, 256]),
        n in 0_usize..500,
        hole in (0_u32..500, 0_u32..300),
        spoiled in any::<bool>(),
    ) {
        let mut case = Case::new(seed, d, heads, block, n);
        if spoiled && n > 0 {
            case.keys[n / 2 * d] = f16::NAN;
            case.keys[n / 3 * d + 1] = f16::INFINITY;
            case.sketch();
        }
        let excluded = Excluded::new(std::slice::from_ref(&(hole.0..hole.0 + hole.1)));
        let (mut scan, flat) = (case.scan(&excluded), case.flat(&excluded));
        let (found, truth) = (scan.attend(EXACT), flat.attend(1.0, None));
        prop_assert_eq!(&found.keys, &truth.keys);
        close(&found.lse, &truth.lse, 1e-5);
        close(&found.o, &truth.o, 1e-4);
        prop_assert!(found.mass.iter().all(|mass| *mass == 1.0), "{:?}", found.mass);
        prop_assert!(found.missed_max.iter().all(|missed| *missed < 1e-5), "{:?}", found.missed_max);
        for k in [0, 1, 10, n + 1] {
            let (found, truth) = (scan.rows(k, 1.0), flat.rows(k));
            prop_assert_eq!(found.positions(), truth.positions(), "{}", k);
            close(&found.mass, &truth.mass, 1e-5);
            let mut rows = Vec::new();
            scan.each_row(&found, |key, _| rows.push(key));
            let mut expected = Vec::new();
            flat.each_row(&truth, |key, _| expected.push(key));
            prop_assert!(rows.iter().zip(&expected).all(|(a, b)| std::ptr::eq(*a, *b)) && rows.len() == expected.len());
        }
    }
}

#[test]
fn few_keys_answer_well_and_the_tail_helps() {
    let mut errors = [0.0, 0.0];
    let (mut bound_holds, mut heads) = (0, 0);
    for seed in 0..8 {
        let case = Case::new(seed, 64, 4, 64, 4096);
        let none = Excluded::none();
        let truth = case.flat(&none).attend(1.0, None);
        for (at, tail) in [false, true].into_iter().enumerate() {
            let found = case.scan(&none).attend(Attend {
                target_mass: 1.0,
                k_max: Some(200),
                effort: 0.1,
                tail,
                ..Attend::default()
            });
            assert!(found.keys.iter().all(|keys| *keys <= 200), "{:?}", found.keys);
            errors[at] += error(&found.o, &truth.o);
            if tail {
                close(&found.lse, &truth.lse, 0.05);
                for head in 0..4 {
                    let chosen = found.mass[head] * (found.lse[head] - truth.lse[head]).exp2();
                    bound_holds += usize::from(found.missed_max[head] >= 1.0 - chosen);
                    heads += 1;
                }
            }
        }
    }
    assert!(errors[1] < 0.6 * errors[0], "{errors:?}");
    assert!(bound_holds * 100 >= heads * 95, "{bound_holds} of {heads}");
}

#[test]
fn the_bound_escalates_to_what_was_asked() {
    let case = Case::new(3, 64, 3, 64, 2048);
    let mut scan = case.scan(&Excluded::none());
    let once = scan.attend(Attend {
        effort: 0.01,
        ..Attend::default()
    });
    assert!(
        once.missed_max.iter().any(|missed| *missed > 0.02),
        "{:?}",
        once.missed_max
    );
    let found = scan.attend(Attend {
        effort: 0.01,
        missed_mass_max: Some(0.02),
        ..Attend::default()
    });
    assert!(
        found.escalations > 0 && found.missed_max.iter().all(|missed| *missed <= 0.02),
        "{found:?}"
    );
}

#[test]
fn answers_are_functions_of_their_inputs() {
    let (case, other) = (Case::new(5, 128, 4, 64, 1500), Case::new(6, 128, 7, 64, 700));
    let mut scan = SketchScan::new(case.format(), case.scale());
    let mut run = |case: &'static Case| {
        scan.begin(&case.q, &case.basis).unwrap();
        case.segments()
            .for_each(|(segment, sketch)| scan.scan(segment, sketch, &Excluded::none()).unwrap());
        scan.attend(Attend::default())
    };
    // Leaked so that one scan can be used for both: buffers are reused with another number of heads and keys.
    let (case, other): (&Case, &Case) = (Box::leak(Box::new(case)), Box::leak(Box::new(other)));
    let first = run(case);
    run(other);
    assert_eq!(run(case), first);
}

#[test]
fn sequences_together_are_as_each_alone() {
    let case = Case::new(9, 64, 6, 64, 1000);
    let excluded = [Excluded::new(&[0..64, 900..1000]), Excluded::new(&[100..300, 250..300])];
    let mut together = SketchScan::new(case.format(), case.scale());
    together.begin(&case.q, &case.basis).unwrap();
    case.segments()
        .for_each(|(segment, sketch)| together.scan_each(segment, sketch, &excluded).unwrap());
    let found = together.attend(EXACT);
    for (sequence, excluded) in excluded.iter().enumerate() {
        let truth = case.flat(excluded).attend(1.0, None);
        let heads = sequence * 3..(sequence + 1) * 3;
        assert_eq!(found.keys[heads.clone()], truth.keys[heads.clone()]);
        close(&found.lse[heads.clone()], &truth.lse[heads.clone()], 1e-5);
        close(
            &found.o[heads.start * 64..heads.end * 64],
            &truth.o[heads.start * 64..heads.end * 64],
            1e-4,
        );
    }
}

#[test]
fn a_prediction_is_corrected() {
    let mut case = Case::new(11, 64, 4, 64, 2000);
    let real = case.q.clone();
    case.q
        .iter_mut()
        .enumerate()
        .for_each(|(i, q)| *q += 0.2 * (i as f32).sin());
    let truth = {
        let mut flat = case.flat(&Excluded::none());
        flat.begin(&real);
        case.segments()
            .for_each(|(segment, _)| flat.scan(segment, &Excluded::none()));
        flat.attend(1.0, None)
    };
    let how = Attend {
        effort: 0.2,
        target_mass: 0.999,
        ..Attend::default()
    };
    let mut scan = case.scan(&Excluded::none());
    assert!(scan.candidates(50).len() >= 50);
    scan.resume(&real).unwrap();
    let found = scan.attend(how);
    close(&found.lse, &truth.lse, 0.03);
    // Nearly as good as if the real queries had been there from the start.
    scan.begin(&real, &case.basis).unwrap();
    case.segments()
        .for_each(|(segment, sketch)| scan.scan(segment, sketch, &Excluded::none()).unwrap());
    let direct = error(&scan.attend(how).o, &truth.o);
    assert!(
        error(&found.o, &truth.o) < 1.5 * direct,
        "{} {direct}",
        error(&found.o, &truth.o)
    );
    assert!(scan.resume(&real[1..]).is_err());
}

#[test]
fn a_parked_prediction_answers_without_a_scan() {
    let mut case = Case::new(11, 64, 4, 64, 2000);
    let real = case.q.clone();
    let exact = case.scan(&Excluded::none()).park(EXACT);
    assert_eq!(exact.distance(&real), 0.0);
    case.q
        .iter_mut()
        .enumerate()
        .for_each(|(i, q)| *q += 0.2 * (i as f32).sin());
    let how = Attend {
        effort: 0.2,
        target_mass: 0.999,
        ..Attend::default()
    };
    // As a scan that stayed open: nothing of it is lost by parking.
    let mut open = case.scan(&Excluded::none());
    open.resume(&real).unwrap();
    let expected = open.attend(how);
    let mut scan = case.scan(&Excluded::none());
    let parked = scan.park(how);
    assert!(parked.distance(&real) > 0.0 && parked.distance(&real[1..]) == f32::INFINITY);
    assert!(parked.bytes() > 0 && parked.bytes() < 100_000, "{}", parked.bytes());
    assert_eq!(scan.keys_scanned(), 0);
    scan.begin_parked(parked.clone(), &real).unwrap();
    case.segments()
        .for_each(|(segment, sketch)| scan.scan(segment, sketch, &Excluded::none()).unwrap());
    let found = scan.attend(how);
    assert_eq!(found.o, expected.o);
    assert_eq!((&found.lse, &found.keys), (&expected.lse, &expected.keys));
    assert!(found.bytes_read < expected.bytes_read);
    // Over other blocks than were parked the prediction scans again, and nothing is mistaken.
    scan.begin_parked(parked, &real).unwrap();
    for (segment, sketch) in case.segments().take(10) {
        scan.scan(segment, sketch, &Excluded::none()).unwrap();
    }
    let mut flat = FlatScan::new(case.d, case.scale());
    flat.begin(&real);
    case.segments()
        .take(10)
        .for_each(|(segment, _)| flat.scan(segment, &Excluded::none()));
    close(&scan.attend(EXACT).lse, &flat.attend(1.0, None).lse, 1e-5);
    assert!(scan.begin_parked(exact, &real[1..]).is_err());
}

/// What a head attends to elsewhere counts as covered: the more that is, the fewer keys are wanted, and the whole is covered still.
#[test]
fn what_is_attended_to_elsewhere_counts() {
    let case = Case::new(12, 64, 4, 64, 2000);
    let none = Excluded::none();
    let truth = case.flat(&none).attend(1.0, None);
    let how = Attend {
        target_mass: 0.95,
        effort: 0.5,
        certificate: false,
        ..Attend::default()
    };
    let plain = case.scan(&none).attend(how);
    let mut before = plain.keys.clone();
    for more in [f32::NEG_INFINITY, -4.0, 0.0, 2.0, 8.0, 1e30] {
        let mut scan = case.scan(&none);
        let beside: Vec<f32> = truth.lse.iter().map(|lse| lse + more).collect();
        scan.beside(&beside).unwrap();
        let found = scan.attend(how);
        if more == f32::NEG_INFINITY {
            assert_eq!(found, plain);
        }
        let more = f64::from(more).exp2().min(1e300);
        for ((keys, before), mass) in found.keys.iter().zip(&before).zip(&found.mass) {
            assert!(keys <= before, "{more}: {found:?}");
            let covered = (f64::from(*mass) + more) / (1.0 + more);
            assert!(covered > 0.95 - 1e-3 || found.cut_short, "{more}: {covered}");
        }
        before.clone_from(&found.keys);
    }
    assert_eq!(before, [0; 4], "all that matters is elsewhere");
    let mut scan = case.scan(&none);
    assert!(scan.beside(&truth.lse[1..]).is_err() && scan.beside(&[f32::NAN; 4]).is_err());
}

#[test]
fn a_column_is_as_its_blocks() {
    for (block, n) in [(16, 500), (40, 333), (64, 1000), (100, 777), (256, 900)] {
        let case = Case::new(21, 64, 4, block, n);
        let mut column = Column::new(case.format());
        let blocks = case.sketches.len();
        for (segment, _) in case.segments() {
            column.push_missing(segment.keys.len() / case.d).unwrap();
        }
        // In any order; the third is never there.
        for at in (0..blocks).rev().filter(|at| *at != 2) {
            column.set(at, &case.sketches[at]).unwrap();
        }
        let excluded = Excluded::new(&[0..37, 200..210]);
        let segments = || {
            case.segments()
                .enumerate()
                .map(|(at, (segment, _))| (at != 2).then_some(segment))
        };
        let mut scan = SketchScan::new(case.format(), case.scale());
        scan.begin(&case.q, &case.basis).unwrap();
        scan.scan_column(&column, segments(), std::slice::from_ref(&excluded))
            .unwrap();
        let mut flat = FlatScan::new(case.d, case.scale());
        flat.begin(&case.q);
        segments().flatten().for_each(|segment| flat.scan(segment, &excluded));
        assert_eq!(scan.keys_scanned(), flat.keys_scanned());
        let (found, truth) = (scan.attend(EXACT), flat.attend(1.0, None));
        assert_eq!(found.keys, truth.keys);
        close(&found.o, &truth.o, 1e-4);
        // With a tail, as blocks given one by one.
        let mut each = SketchScan::new(case.format(), case.scale());
        each.begin(&case.q, &case.basis).unwrap();
        for (at, (segment, sketch)) in case.segments().enumerate().filter(|(at, _)| *at != 2) {
            assert_eq!(at * block, segment.position);
            each.scan(segment, sketch, &excluded).unwrap();
        }
        let (a, b) = (scan.attend(Attend::default()), each.attend(Attend::default()));
        // Runs that span the missing block are others, where blocks are not whole runs.
        close(&a.lse, &b.lse, 0.02);
        scan.begin(&case.q, &case.basis).unwrap();
        let fewer = case.segments().skip(1).map(|(segment, _)| Some(segment));
        assert!(scan.scan_column(&column, fewer, &[Excluded::none()]).is_err());
        assert!(
            column.set(blocks, &case.sketches[0]).is_err() && column.push_missing(block).is_err() == (n % block != 0)
        );
    }
}

#[test]
fn odd_queries() {
    let mut case = Case::new(13, 64, 3, 64, 300);
    case.q[5] = f32::NAN;
    // Scores over thousands of powers of two: levels cannot tell them apart, every key is re-scored.
    case.q[64..128].iter_mut().for_each(|q| *q *= 3000.0);
    let (mut scan, flat) = (case.scan(&Excluded::none()), case.flat(&Excluded::none()));
    let truth = flat.attend(1.0, None);
    let found = scan.attend(Attend {
        target_mass: 1.0,
        effort: 0.9,
        ..Attend::default()
    });
    assert_eq!(
        (found.lse[0], found.keys[0], found.mass[0]),
        (f32::NEG_INFINITY, 0, 1.0)
    );
    assert!(found.o[..64].iter().all(|o| *o == 0.0));
    close(&found.lse[1..2], &truth.lse[1..2], 1e-5);
    close(&found.o[64..128], &truth.o[64..128], 1e-4);
}

/// A digit of the leading direction moves a real head's score by two powers of two and more: such heads are still searched by
/// sketch, and find what exact scores say.
#[test]
fn steep_heads_are_searched_by_sketch() {
    for steep in [1.0_f32, 4.0, 12.0] {
        let mut case = Case::new(31, 64, 4, 64, 4000);
        case.q.iter_mut().for_each(|q| *q *= steep);
        let none = Excluded::none();
        let mut scan = case.scan(&none);
        let found = scan.attend(Attend {
            target_mass: 1.0,
            effort: 0.05,
            certificate: false,
            ..Attend::default()
        });
        assert_eq!(
            found.keys,
            vec![201; 4],
            "{steep}: a twentieth of the keys, of each head"
        );
        let truth = case.flat(&none).attend(1.0, None);
        for head in 0..4 {
            let missed = truth.lse[head] - found.lse[head];
            assert!(missed.abs() < 0.05, "{steep}: head {head} is off by {missed}");
        }
    }
}

/// Where the best keys are beyond the end of the scale of levels, at either end, all keys are scored.
#[test]
fn heads_off_the_scale_are_scored_whole() {
    for (far, steep) in [(60.0_f32, 1.0_f32), (-130.0, 8.0)] {
        let mut case = Case::new(32, 64, 1, 64, 640);
        case.q.iter_mut().for_each(|q| *q *= steep);
        let truth = case.flat(&Excluded::none()).attend(1.0, None);
        // The calibration's average key is far from every key, along the query: no key is near the middle of the scale.
        let square: f32 = case.q.iter().map(|q| q * q).sum();
        let q = case.q.clone();
        let off = far * 10.0 / square;
        case.basis
            .mean
            .iter_mut()
            .zip(&q)
            .for_each(|(mean, q)| *mean += off * q);
        case.sketch();
        let found = case.scan(&Excluded::none()).attend(Attend {
            target_mass: 1.0,
            effort: 0.1,
            certificate: false,
            ..Attend::default()
        });
        assert_eq!(found.keys, [640], "{far}");
        close(&found.lse, &truth.lse, 1e-4);
    }
}

#[test]
fn everything_excluded_or_nothing_there() {
    for (n, excluded) in [(0, Excluded::none()), (100, Excluded::new(&[0..100, 0..7]))] {
        let case = Case::new(1, 64, 2, 64, n);
        let mut scan = case.scan(&excluded);
        let found = scan.attend(Attend::default());
        assert_eq!(found.lse, [f32::NEG_INFINITY; 2]);
        assert_eq!((found.keys, found.mass), (vec![0, 0], vec![1.0, 1.0]));
        assert_eq!((scan.keys_scanned(), scan.rows(5, 0.5).positions().len()), (0, 0));
    }
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
        (spoil(0, 9), "version 9"),
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
