use kvasir_simd::Pool;

use super::*;
use crate::{
    Attend, HeadBasis, Hits, KeyIndex, Moments, Origin, Quest, Search, Segment, Sketch, SketchAttended, SketchFormat,
    SketchScan, Wave, WaveParams, Width, encode_block, suite::Data,
};

/// A recording of 3 query heads over 900 tokens and its truth in f64.
struct Case {
    q: Vec<f16>,
    data: Data,
    setting: Setting,
}

impl Case {
    fn new() -> Self {
        let data = Data::clustered(21, 900, 32, 3);
        // Every query is one of the samples, in another order for each head.
        let rows = data.samples.len() / 32;
        let q = (0..3 * 900)
            .flat_map(|at| &data.samples[at * 7 % rows * 32..][..32])
            .map(|x| f16::from_f32(*x))
            .collect();
        let setting = Setting {
            decode: 40,
            stride: 8,
            sink: 4,
            window: 16,
        };
        Self { q, data, setting }
    }

    fn recording(&self) -> Recording<'_> {
        Recording {
            q: &self.q,
            keys: &self.data.keys,
            values: &self.data.values,
            heads: 3,
            head_dim: 32,
        }
    }

    fn prefill(&self) -> &[f16] {
        &self.data.keys[..860 * 32]
    }

    fn basis(&self) -> HeadBasis {
        let mut moments = Moments::new(32);
        moments.add_queries(&self.data.samples);
        moments.add_keys(self.prefill());
        moments.basis(32).expect("directions").basis
    }

    fn quest(&self) -> Quest {
        let mut quest = Quest::new(32, Origin::default());
        quest.append(self.prefill()).expect("keys");
        quest
    }

    /// Attention of a query head at a token over some positions, by the reference.
    fn attention(&self, head: usize, token: usize, positions: impl Iterator<Item = u32>) -> (Vec<f64>, f64) {
        let recording = self.recording();
        let row = |at: u32| at as usize * 32..(at as usize + 1) * 32;
        let seen: Vec<_> = positions
            .map(|at| (&recording.keys[row(at)], &recording.values[row(at)]))
            .collect();
        let q: Vec<f32> = recording.query(head, token).iter().map(|x| x.to_f32()).collect();
        kvasir_reference::attend(&q, &seen, recording.scale())
    }
}

#[test]
fn the_truth_is_attention() {
    let case = Case::new();
    let exact = Exact::of(case.recording(), &case.setting, 10, &Pool::new(2)).expect("a recording");
    assert_eq!((exact.searched(), exact.k()), (840, 10));
    let mut steps = case.setting.steps(&case.recording());
    let fixed = |token: u32| (0..4).chain(844..token + 1);
    exact
        .each(|question| {
            let token = steps.next().expect("as many steps");
            for (head, truth) in question.heads.iter().enumerate() {
                let near = |found: &[f64], expected: &[f64]| {
                    let apart = found
                        .iter()
                        .zip(expected)
                        .map(|(a, b)| (a - b).abs())
                        .fold(0.0, f64::max);
                    assert!(apart < 1e-4, "step {token}, head {head}: {apart}");
                };
                near(&truth.o, &case.attention(head, token, 0..token as u32 + 1).0);
                let (o, lse) = case.attention(head, token, fixed(token as u32));
                near(&truth.fixed.o, &o);
                near(&[truth.fixed.lse], &[lse]);
                near(&[truth.searched_lse], &[case.attention(head, token, 4..844).1]);
                assert_eq!(truth.best.len(), 10);
                assert!(truth.best.iter().all(|best| (4..844).contains(best)));
            }
            Ok(())
        })
        .expect("no error");
    assert_eq!(steps.next(), None);
}

#[test]
fn an_exact_index_is_judged_perfect() {
    let case = Case::new();
    let exact = Exact::of(case.recording(), &case.setting, 100, &Pool::new(1)).expect("a recording");
    let all = judge(&case.quest(), &exact, &[1, 10, 100], 840, 1.0, None).expect("a judgement");
    assert_eq!(all.recall, [(1, 1.0), (10, 1.0), (100, 1.0)]);
    assert_eq!((all.queries, all.keys_share), (15, 1.0));
    // Bounds of pages are an eighth of the keys, and the pages that hold excluded keys are read too.
    assert!((1.12..1.16).contains(&all.bytes_share), "{}", all.bytes_share);
    assert!(all.error.p99 < 1e-5 && all.mass.p10 > 1.0 - 1e-5, "{all:?}");
}

#[test]
fn less_effort_costs_less_and_errs_more() {
    let case = Case::new();
    let exact = Exact::of(case.recording(), &case.setting, 100, &Pool::new(1)).expect("a recording");
    let judged: Vec<Judgement> = [0.02, 0.2, 0.6]
        .map(|effort| judge(&case.quest(), &exact, &[10], 840, effort, None).expect("a judgement"))
        .to_vec();
    for pair in judged.windows(2) {
        assert!(pair[0].keys_share < pair[1].keys_share && pair[0].bytes_share < pair[1].bytes_share);
        assert!(pair[0].recall[0].1 <= pair[1].recall[0].1 && pair[0].mass.mean < pair[1].mass.mean);
        assert!(pair[0].error.mean > pair[1].error.mean, "{pair:?}");
    }
}

#[test]
fn a_tail_takes_part_in_the_output() {
    let case = Case::new();
    let exact = Exact::of(case.recording(), &case.setting, 10, &Pool::new(1)).expect("a recording");
    let params = WaveParams {
        segment_keys: 430,
        ..WaveParams::default()
    };
    let mut wave = Wave::new(32, params, true, Origin::default()).expect("parameters");
    wave.append_rows(case.prefill(), &case.data.values[..860 * 32])
        .expect("rows");
    let none = judge(&wave, &exact, &[10], 860, 0.05, None).expect("a judgement");
    let tail = |search: &Search<'_>, _: &Hits| wave.estimate(search, 1.0).map(|estimate| estimate.partial);
    let with = judge(&wave, &exact, &[10], 860, 0.05, Some(&tail)).expect("a judgement");
    assert_eq!(with.recall, none.recall);
    assert!(
        with.error.mean < 0.6 * none.error.mean,
        "{} without {}",
        with.error.mean,
        none.error.mean
    );
}

#[test]
fn bytes_for_a_mass_are_those_of_the_least_effort() {
    let case = Case::new();
    let exact = Exact::of(case.recording(), &case.setting, 10, &Pool::new(1)).expect("a recording");
    let quest = case.quest();
    let some = bytes_for_mass(&quest, &exact, 0.5, &[0.1, 0.3, 0.5, 0.7, 1.0]).expect("figures");
    assert_eq!(some.reached, 1.0, "an effort of 1 always does");
    let whole = bytes_for_mass(&quest, &exact, 0.5, &[1.0]).expect("figures");
    assert!(some.bytes.mean < whole.bytes.mean && some.effort.p10 < 1.0, "{some:?}");
    let never = bytes_for_mass(&quest, &exact, 1.1, &[0.1, 1.0]).expect("figures");
    assert_eq!((never.reached, never.bytes), (0.0, Summary::default()));
}

#[test]
fn an_index_that_stops_by_mass_is_asked_for_masses() {
    let case = Case::new();
    let exact = Exact::of(case.recording(), &case.setting, 10, &Pool::new(1)).expect("a recording");
    let mut sketch = Sketch::new(32, Width::Four, case.basis(), Origin::default()).expect("a basis");
    sketch.append(case.prefill()).expect("keys");
    // The efforts are for others: with this one alone they would read every key.
    let some = bytes_for_mass(&sketch, &exact, 0.8, &[1.0]).expect("figures");
    assert_eq!(some.reached, 1.0, "a mass of 1 always does");
    assert!(some.bytes_share.mean < 1.0, "keys and codes are 1.25: {some:?}");
    let more = bytes_for_mass(&sketch, &exact, 0.95, &[1.0]).expect("figures");
    assert!(
        some.bytes.mean < more.bytes.mean && some.effort.mean < more.effort.mean,
        "{more:?}"
    );
}

#[test]
fn recordings_add_up() {
    let case = Case::new();
    let exact = Exact::of(case.recording(), &case.setting, 100, &Pool::new(1)).expect("a recording");
    let (quest, one) = (
        case.quest(),
        judge(&case.quest(), &exact, &[10], 50, 0.1, None).expect("a judgement"),
    );
    let mut tally = Tally::new(&[10]);
    tally.add(&quest, &exact, 50, 0.1, None).expect("figures");
    assert_eq!(tally.judgement(), one);
    // The same once more, with everything found: every share lies in the middle.
    tally.add(&quest, &exact, 840, 1.0, None).expect("figures");
    let (both, all) = (
        tally.judgement(),
        judge(&quest, &exact, &[10], 840, 1.0, None).expect("a judgement"),
    );
    assert_eq!(both.queries, 30);
    for (both, one, all) in [
        (both.recall[0].1, one.recall[0].1, all.recall[0].1),
        (both.keys_share, one.keys_share, all.keys_share),
        (both.bytes_share, one.bytes_share, all.bytes_share),
        (both.bytes_per_search, one.bytes_per_search, all.bytes_per_search),
        (both.error.mean, one.error.mean, all.error.mean),
    ] {
        assert!(
            (both - f64::midpoint(one, all)).abs() < 1e-9 * both.abs().max(1.0),
            "{both} of {one} and {all}"
        );
    }
}

/// Attention by a sketch scan over the prefill, in blocks of 64.
fn served(case: &Case, basis: &HeadBasis, how: Attend) -> AttendJudgement {
    let exact = Exact::of(case.recording(), &case.setting, 10, &Pool::new(1)).expect("a recording");
    let format = SketchFormat::new(32);
    let (keys, values) = (case.prefill(), &case.data.values[..860 * 32]);
    let blocks: Vec<_> = keys.chunks(64 * 32).zip(values.chunks(64 * 32)).collect();
    let sketches: Vec<Vec<u8>> = blocks
        .iter()
        .map(|(keys, values)| {
            let mut sketch = Vec::new();
            encode_block(format, basis, keys, values, &mut sketch).expect("a block");
            sketch
        })
        .collect();
    let mut tally = AttendTally::default();
    let mut scan = SketchScan::new(format, case.recording().scale());
    tally
        .add(&exact, |search| {
            scan.begin(search.q, basis)?;
            for (at, ((keys, values), sketch)) in blocks.iter().zip(&sketches).enumerate() {
                let position = at * 64;
                let segment = Segment { keys, values, position };
                scan.scan(segment, sketch, search.excluded)?;
            }
            Ok(scan.attend(how))
        })
        .expect("figures");
    tally.judgement()
}

#[test]
fn finished_attention_is_judged_by_the_truth() {
    let case = Case::new();
    let basis = case.basis();
    let all = Attend {
        target_mass: 1.0,
        effort: 1.0,
        ..Attend::default()
    };
    let exact = served(&case, &basis, all);
    assert_eq!((exact.queries, exact.rows_share), (15, 1.0));
    assert!(exact.error.p99 < 1e-4 && exact.mass.p10 > 1.0 - 1e-4, "{exact:?}");
    let some = Attend {
        k_max: Some(20),
        effort: 0.05,
        ..all
    };
    let with = served(&case, &basis, some);
    let without = served(&case, &basis, Attend { tail: false, ..some });
    assert!(
        with.rows_share < 0.03 && with.bytes_share < exact.bytes_share,
        "{with:?}"
    );
    assert_eq!(with.certificates.count, 15);
    assert!(with.mass.p90 < 1.0 && with.mass.p10 > 0.0, "{with:?}");
    assert!(
        with.error.mean < without.error.mean,
        "{} without {}",
        with.error.mean,
        without.error.mean
    );
}

#[test]
fn an_answer_of_another_shape_is_refused() {
    let case = Case::new();
    let exact = Exact::of(case.recording(), &case.setting, 10, &Pool::new(1)).expect("a recording");
    let wrong = AttendTally::default().add(&exact, |_| Ok(SketchAttended::default()));
    assert_eq!(
        wrong.expect_err("no rows").to_string(),
        "not usable as an index: an answer for 0 of 3 heads"
    );
}

/// An index that finds nothing: what is left is the worker's own attention.
struct Nothing;

impl KeyIndex for Nothing {
    fn name(&self) -> &'static str {
        "nothing"
    }
    fn keys(&self) -> usize {
        860
    }
    fn bytes(&self) -> usize {
        0
    }
    fn append(&mut self, _: &[f16]) -> Result<(), IndexError> {
        Ok(())
    }
    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        Ok(Hits {
            heads: vec![Vec::new(); search.q.len() / 32],
            ..Hits::default()
        })
    }
    fn encode(&self) -> Vec<u8> {
        Vec::new()
    }
}

#[test]
fn finding_nothing_is_judged_so() {
    let case = Case::new();
    let exact = Exact::of(case.recording(), &case.setting, 10, &Pool::new(1)).expect("a recording");
    let found = judge(&Nothing, &exact, &[10], 10, 0.5, None).expect("a judgement");
    assert_eq!(
        (found.recall[0], found.keys_share, found.bytes_share),
        ((10, 0.0), 0.0, 0.0)
    );
    assert_eq!(found.mass, Summary::default());
    let recording = case.recording();
    let mut errors = Vec::new();
    for token in case.setting.steps(&recording) {
        for head in 0..3 {
            let all = case.attention(head, token, 0..token as u32 + 1).0;
            let fixed = case.attention(head, token, (0..4).chain(844..token as u32 + 1)).0;
            let length = |row: &mut dyn Iterator<Item = f64>| row.map(|x| x * x).sum::<f64>().sqrt();
            let apart = length(&mut all.iter().zip(&fixed).map(|(a, b)| a - b));
            errors.push(apart / length(&mut all.iter().copied()));
        }
    }
    assert!((found.error.mean - Summary::of(&mut errors).mean).abs() < 1e-5);
}

#[test]
fn what_cannot_be_judged_is_named() {
    let case = Case::new();
    let pool = Pool::new(1);
    let base = case.recording();
    let short = Setting {
        decode: 880,
        ..case.setting
    };
    for (recording, setting, k, expected) in [
        (base, case.setting, 0, "k: 0 best keys say nothing; ask for at least 1"),
        (
            Recording { heads: 2, ..base },
            case.setting,
            1,
            "q: 86400 elements are not [heads, tokens, head_dim]",
        ),
        (
            Recording {
                values: &base.values[1..],
                ..base
            },
            case.setting,
            1,
            "values: 28799 elements for 28800 of keys",
        ),
        (
            Recording { head_dim: 37, ..base },
            case.setting,
            1,
            "keys: 28800 elements are not rows of head_dim",
        ),
        (
            base,
            short,
            1,
            "setting: 900 tokens recorded; decode steps, sink and window leave none of 901",
        ),
    ] {
        let error = Exact::of(recording, &setting, k, &pool).expect_err(expected);
        assert_eq!(error.to_string(), expected);
    }
    let exact = Exact::of(base, &case.setting, 10, &pool).expect("a recording");
    for recalls in [&[0][..], &[11], &[10, 6]] {
        let k = if recalls == [10, 6] { 5 } else { 20 };
        let error = judge(&case.quest(), &exact, recalls, k, 0.5, None).expect_err("recall beyond what is known");
        assert!(error.to_string().starts_with("recalls: "), "{error}");
    }
}
