//! Columns whose segments are clustered.

use kvasir_simd::{GROUP, Line, SEGMENT};

use super::*;
use crate::sketch::cluster::{SEGMENT_GROUPS, cluster};

impl Case {
    fn column(&self) -> Column {
        let mut column = Column::new(self.format());
        self.sketches.iter().for_each(|sketch| column.push(sketch).unwrap());
        column
    }

    fn cluster(&self, column: &mut Column) {
        column.cluster_all(&self.values).unwrap();
    }

    fn over<'a>(&'a self, column: &'a Column, excluded: &[Excluded]) -> SketchScan<'a> {
        let mut scan = SketchScan::new(self.format(), self.scale());
        scan.begin(&self.q, &self.basis).unwrap();
        let segments = self.segments().map(|(segment, _)| Some(segment));
        scan.scan_column(column, segments, excluded).unwrap();
        scan
    }
}

/// Every key keeps its digits and its mark, whatever the order; alike ones come to lie together.
#[test]
fn keys_are_moved_and_not_changed() {
    for width in [Width::Four, Width::Eight] {
        let format = SketchFormat {
            width,
            ..SketchFormat::new(64)
        };
        let lines = format.nibbles() / 8;
        let mut rng = SmallRng::seed_from_u64(3);
        let codes: Vec<Line> = (0..SEGMENT_GROUPS * lines)
            .map(|_| Line(std::array::from_fn(|_| rng.random())))
            .collect();
        let masks: Vec<u16> = (0..SEGMENT_GROUPS).map(|_| rng.random()).collect();
        let found = cluster(format, &codes, &[0.3; SEGMENT_GROUPS], &masks);
        let coordinates = |codes: &[Line]| -> Vec<Vec<f32>> {
            let mut z = vec![[0.0; GROUP]; format.directions()];
            let mut keys = Vec::new();
            for codes in codes.chunks(lines) {
                format.coordinates(0.3, codes, &mut z);
                keys.extend((0..GROUP).map(|key| z.iter().map(|z| z[key]).collect()));
            }
            keys
        };
        let (before, after) = (coordinates(&codes), coordinates(&found.codes));
        let mut seen = found.order.clone();
        seen.sort_unstable();
        assert!(seen.iter().enumerate().all(|(at, row)| at == usize::from(*row)) && seen.len() == SEGMENT);
        let bit = |masks: &[u16], at: usize| (masks[at / GROUP] >> (at % GROUP)) & 1;
        for (slot, row) in found.order.iter().enumerate() {
            let row = usize::from(*row);
            assert_eq!(after[slot], before[row], "{width:?} slot {slot}");
            assert_eq!(bit(&found.masks, slot), bit(&masks, row));
        }
        let spread = |keys: &[Vec<f32>]| -> f32 {
            let of = |keys: &[Vec<f32>]| {
                let mean = keys.iter().map(|key| key[0]).sum::<f32>() / keys.len() as f32;
                keys.iter().map(|key| (key[0] - mean).powi(2)).sum::<f32>()
            };
            keys.chunks(GROUP).map(of).sum()
        };
        assert!(spread(&after) < 0.1 * spread(&before), "along the leading direction");
        assert_eq!(found.step, 0.3);
        // A centroid is about the mean of its group's marked keys.
        let centroids = coordinates(&found.centroids);
        for (group, centroid) in centroids.iter().enumerate() {
            let own = (group * GROUP..(group + 1) * GROUP).filter(|slot| bit(&found.masks, *slot) == 1);
            let count = own.clone().count().max(1) as f32;
            for (direction, x) in centroid.iter().enumerate() {
                let mean = own.clone().map(|slot| after[slot][direction]).sum::<f32>() / count;
                assert!((mean - x).abs() <= 0.31, "{width:?} {group} {direction}: {mean} {x}");
            }
        }
    }
}

#[test]
fn exact_answers_are_those_of_every_key() {
    for (seed, d, block, n) in [(31, 64, 64, 2500), (32, 128, 16, 1500), (33, 24, 256, 3000)] {
        let mut case = Case::new(seed, d, 3, block, n);
        // Keys that are not finite are not found wherever they come to lie.
        for at in [5, 700, 1023] {
            case.keys[at * d + 1] = f16::NAN;
        }
        case.sketch();
        let mut column = case.column();
        case.cluster(&mut column);
        let excluded = Excluded::new(&[0..4, 5..6, 700..705, 900..1100, n as u32 - 300..n as u32]);
        let mut scan = case.over(&column, std::slice::from_ref(&excluded));
        let flat = case.flat(&excluded);
        let (found, truth) = (scan.attend(EXACT), flat.attend(1.0, None));
        close(&found.o, &truth.o, 1e-4);
        close(&found.lse, &truth.lse, 1e-4);
        let (rows, expected) = (scan.rows(20, 1.0), flat.rows(20));
        assert_eq!(rows.positions(), expected.positions());
        let mut taken = Vec::new();
        scan.each_row(&rows, |key, value| taken.push((key.to_vec(), value.to_vec())));
        for (position, (key, value)) in rows.positions().iter().zip(taken) {
            let row = *position as usize * d..(*position as usize + 1) * d;
            assert_eq!((&key[..], &value[..]), (&case.keys[row.clone()], &case.values[row]));
        }
        let positions = scan.candidates(50);
        assert!(positions.is_sorted() && positions.iter().all(|at| *at < n as u32));
    }
}

/// Of the groups those are read that matter; what is found is about what a scan of all finds, and bounds hold.
#[test]
fn the_first_level_leaves_out_what_does_not_matter() {
    let mut case = Case::new(41, 64, 4, 64, 24 * SEGMENT);
    // As of attention: a few directions decide nearly all.
    case.q
        .iter_mut()
        .enumerate()
        .for_each(|(i, q)| *q *= 3.0 / (1.0 + (i % 64) as f32));
    let whole = case.column();
    let mut column = whole.clone();
    case.cluster(&mut column);
    assert!(column.bytes() <= whole.bytes() + column.groups() * Column::CLUSTERED_GROUP_BYTES + 64);
    let none = [Excluded::none()];
    let truth = case.flat(&Excluded::none()).attend(1.0, None);
    let how = Attend {
        target_mass: 1.0,
        effort: 0.003,
        ..Attend::default()
    };
    let (mut all, mut near) = (case.over(&whole, &none), case.over(&column, &none));
    let (expected, found) = (all.candidates(74), near.candidates(74));
    let same = found.iter().filter(|at| expected.binary_search(at).is_ok()).count();
    assert!(same * 20 >= expected.len() * 17, "{same} of {}", expected.len());
    let (read, of) = (near.cost().bytes_read, all.cost().bytes_read);
    assert!(read * 10 < of * 6, "{read} of {of} bytes of codes");
    let (all, near) = (all.attend(how), near.attend(how));
    assert!(error(&near.o, &truth.o) < 1.2 * error(&all.o, &truth.o));
    for head in 0..4 {
        let missed = 1.0 - near.mass[head] * (near.lse[head] - truth.lse[head]).exp2();
        assert!(near.missed_max[head] >= missed, "head {head}");
        assert!((near.lse[head] - truth.lse[head]).abs() < 0.1);
    }
}

#[test]
fn a_prediction_from_before_is_scanned_for_anew() {
    let case = Case::new(43, 64, 2, 64, 2 * SEGMENT);
    let mut column = case.column();
    let none = [Excluded::none()];
    let how = Attend {
        effort: 0.1,
        ..Attend::default()
    };
    let parked = case.over(&column, &none).park(how);
    case.cluster(&mut column);
    let fresh = case.over(&column, &none).park(how);
    let answer = |parked: Parked| {
        let mut scan = SketchScan::new(case.format(), case.scale());
        scan.begin_parked(parked, &case.q).unwrap();
        let segments = case.segments().map(|(segment, _)| Some(segment));
        scan.scan_column(&column, segments, &none).unwrap();
        let found = scan.attend(how);
        (found.o, found.lse, found.bytes_read)
    };
    let (before, after) = (answer(parked), answer(fresh));
    assert_eq!((before.0, before.1), (after.0, after.1));
    assert!(before.2 > after.2, "its codes were read");
}

#[test]
fn segments_are_whole() {
    let case = Case::new(47, 64, 1, 64, SEGMENT + 64);
    let mut column = case.column();
    assert_eq!(column.next_segment(), Some(0..16));
    let values = vec![&case.values[..64 * 64]; 16];
    for wrong in [&values[..15], &[][..], &[&case.values[..64]; 16][..]] {
        assert!(matches!(column.cluster(wrong), Err(IndexError::Invalid { .. })));
    }
    assert!(column.learns(0));
    column.cluster(&values).unwrap();
    assert!(!column.learns(0) && column.next_segment().is_none() && column.cluster(&values).is_err());
    // Its blocks are not given again, the one behind it may be.
    assert!(matches!(
        column.set(3, &case.sketches[3]),
        Err(IndexError::Invalid { .. })
    ));
    column.push(&case.sketches[3]).unwrap();
    for (block, keys) in [(48, 2048), (8, 2048), (64, 1000)] {
        let case = Case::new(48, 64, 1, block, keys);
        assert_eq!(case.column().next_segment(), None, "blocks of {block}");
    }
}
