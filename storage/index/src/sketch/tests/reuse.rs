//! Predictions that wait, columns, and scans that are used again.

use super::*;

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
