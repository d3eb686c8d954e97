//! What is answered from a share of the keys.

use super::*;

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

/// Values that go with keys are estimated better by a column that has learnt how.
#[test]
fn slopes_bend_the_tail() {
    let mut errors = [0.0, 0.0];
    for seed in 0..6 {
        let (d, n) = (64, 4096);
        let mut case = Case::new(seed, d, 4, 64, n);
        for (value, key) in case.values.chunks_mut(d).zip(case.keys.chunks(d)) {
            for (at, value) in value.iter_mut().enumerate() {
                *value = f16::from_f32(value.to_f32() + 2.0 * key[at % 8].to_f32());
            }
        }
        // A value that is not a number is no lesson; nothing else changes.
        case.values[700 * d + 1] = f16::NAN;
        case.keys[700 * d] = f16::NAN;
        case.sketch();
        let none = [Excluded::none()];
        let truth = case.flat(&none[0]).attend(1.0, None);
        let mut columns = [Column::new(case.format()), Column::new(case.format())];
        let mut room = Vec::new();
        for (at, (segment, sketch)) in case.segments().enumerate() {
            columns[0].push(sketch).unwrap();
            columns[1].push_missing(segment.keys.len() / d).unwrap();
            columns[1]
                .sketch(at, &case.basis, segment.keys, segment.values, &mut room)
                .unwrap();
            assert_eq!(room, sketch, "the same sketch");
        }
        for (column, error_sum) in columns.iter().zip(&mut errors) {
            let mut scan = SketchScan::new(case.format(), case.scale());
            scan.begin(&case.q, &case.basis).unwrap();
            scan.scan_column(column, case.segments().map(|(segment, _)| Some(segment)), &none)
                .unwrap();
            let found = scan.attend(Attend {
                target_mass: 1.0,
                k_max: Some(80),
                effort: 0.04,
                ..Attend::default()
            });
            assert!(found.keys.iter().all(|keys| *keys == 80));
            *error_sum += error(&found.o, &truth.o);
        }
        let short = &case.keys[..63 * d];
        assert!(
            columns[1]
                .sketch(0, &case.basis, short, short, &mut room)
                .is_err_and(|error| error.to_string().contains("63 keys for block 0"))
        );
    }
    assert!(errors[1] < 0.7 * errors[0], "{errors:?}");
}

/// The sums behind a lifted answer are right in the mean over many draws, and each draw attends to as many keys as were asked for.
#[test]
fn lifted_answers_are_unbiased() {
    const DRAWS: u64 = 400;
    let case = Case::new(41, 64, 2, 64, 1000);
    let excluded = Excluded::new(std::slice::from_ref(&(100..200)));
    let truth = case.flat(&excluded).attend(1.0, None);
    let mut scan = case.scan(&excluded);
    let (mut found, mut weights, mut firsts) = (SketchAttended::default(), [0.0; 2], [[0.0_f64; 2]; 2]);
    for seed in 0..DRAWS {
        scan.attend_lifted(40, seed, &mut found);
        assert_eq!(found.keys, [40, 40]);
        for head in 0..2 {
            // The whole is 1 where the answer is exact.
            let whole = f64::from((found.lse[head] - truth.lse[head]).exp2());
            weights[head] += whole;
            let first = whole * f64::from(found.o[head * 64]) - f64::from(truth.o[head * 64]);
            firsts[head][0] += first;
            firsts[head][1] += first * first;
        }
    }
    for head in 0..2 {
        let mean = weights[head] / DRAWS as f64;
        assert!((mean - 1.0).abs() < 0.03, "head {head}: {mean} of the mass in the mean");
        let [sum, squares] = firsts[head];
        let error = (squares / DRAWS as f64 / DRAWS as f64).sqrt();
        assert!((sum / DRAWS as f64).abs() < 4.0 * error, "head {head}: {sum} {error}");
    }
    let first = found.clone();
    scan.attend_lifted(40, DRAWS - 1, &mut found);
    assert_eq!(
        (&found.o, &found.lse),
        (&first.o, &first.lse),
        "a function of what is asked"
    );
    // All keys are no sample.
    scan.attend_lifted(usize::MAX, 7, &mut found);
    assert_eq!(found.keys, [900, 900]);
    close(&found.o, &truth.o, 1e-4);
    close(&found.lse, &truth.lse, 1e-5);
    scan.attend_lifted(0, 7, &mut found);
    assert_eq!((found.lse[0], found.keys[0]), (f32::NEG_INFINITY, 0));
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
