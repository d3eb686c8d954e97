use super::*;

fn shape(seed: u64) -> Shape {
    Shape {
        tokens: 8192,
        head_dim: 64,
        heads: 4,
        theta: Shape::theta_for(8192),
        seed,
    }
}

#[test]
fn the_gate_accepts_what_was_made_like_attention() {
    let pool = Pool::new(2);
    let setting = Setting::default();
    let (made, measured) = Synthetic::accepted(shape(1), &setting, 1, &pool).expect("a good seed");
    assert_eq!(measured.gate(), Ok(()));
    assert_eq!(made.statistics(&setting, &pool), Ok(measured));
    let small = Shape {
        tokens: 2048,
        head_dim: 32,
        heads: 1,
        ..shape(1)
    };
    // One head has one N90, so the law of many cannot be met.
    let refused = Synthetic::accepted(small, &setting, 1, &pool).expect_err("one head");
    assert!(
        refused
            .to_string()
            .starts_with("seed: 1 recordings were refused, the last because its "),
        "{refused}"
    );
}

#[test]
fn the_gate_refuses_noise_and_names_why() {
    let pool = Pool::new(2);
    let mut rng = SmallRng::seed_from_u64(5);
    let mut noise = |count: usize| -> Vec<f16> { (0..count).map(|_| f16::from_f32(normal(&mut rng))).collect() };
    let (q, keys, values) = (noise(2 * 4096 * 64), noise(4096 * 64), noise(4096 * 64));
    let recording = Recording {
        q: &q,
        keys: &keys,
        values: &values,
        heads: 2,
        head_dim: 64,
    };
    let measured = Statistics::of(&recording, &Setting::default(), &pool).expect("long enough");
    let refused = measured.gate().expect_err("noise");
    assert_eq!(refused.statistic, "length of the mean key");
    // What is known of noise: every direction used alike, and queries among the keys.
    assert!((measured.directions_of_queries - 64.0).abs() < 3.0, "{measured:?}");
    assert!((measured.spread_of_keys - 1.0).abs() < 0.05, "{measured:?}");
    assert!((measured.mahalanobis - 1.0).abs() < 0.02, "{measured:?}");
    assert!(
        measured.cos_queries.abs() < 0.01 && measured.cos_keys.abs() < 0.01,
        "{measured:?}"
    );
}

#[test]
fn each_statistic_is_gated() {
    let good = Statistics {
        key_mean: 0.64,
        cos_keys: 0.41,
        cos_query_key: -0.12,
        cos_query_centred_key: 0.0,
        cos_queries: 0.45,
        spread_of_keys: 0.3,
        directions_of_queries: 4.6,
        mahalanobis: 2.3,
        sink: 0.24,
        last: 0.34,
        n90: crate::evaluate::Summary {
            mean: 150.0,
            p10: 7.0,
            p50: 56.0,
            p90: 436.0,
            p99: 1000.0,
        },
        top_100: 0.71,
        overlap_1: 0.58,
        overlap_64: 0.34,
    };
    assert_eq!(good.gate(), Ok(()), "what was measured on SmolLM2");
    type Change = fn(&mut Statistics);
    let changes: [(Change, &str); 6] = [
        (
            |it| it.key_mean = f64::NAN,
            "length of the mean key is NaN, attention has 0.5 to 0.85",
        ),
        (
            |it| it.mahalanobis = 1.0,
            "Mahalanobis ratio of queries to keys is 1.0000, attention has 1.7 to 9",
        ),
        (
            |it| it.directions_of_queries = 64.0,
            "directions of queries is 64.0000, attention has 2.5 to 12",
        ),
        (|it| it.n90.p50 = 4.0, "N90 p50 is 4.0000, attention has 25 to 2000"),
        (
            |it| it.top_100 = 0.1,
            "share of the best 100 is 0.1000, attention has 0.55 to 0.87",
        ),
        (
            |it| it.overlap_64 = 1.0,
            "overlap 64 steps apart is 1.0000, attention has 0.22 to 0.5",
        ),
    ];
    for (change, expected) in changes {
        let mut statistics = good;
        change(&mut statistics);
        assert_eq!(statistics.gate().expect_err(expected).to_string(), expected);
    }
}

#[test]
fn the_seed_decides() {
    let small = |seed, threads| {
        let shape = Shape {
            tokens: 2048,
            head_dim: 32,
            heads: 1,
            ..shape(seed)
        };
        let made = Synthetic::generate(shape, &Pool::new(threads)).expect("a shape");
        (made.q, made.keys, made.values)
    };
    let first = small(3, 1);
    assert!(first == small(3, 2), "threads change nothing");
    assert!(first != small(4, 1), "another seed is another recording");
    assert!(first.0.iter().chain(&first.1).chain(&first.2).all(|x| x.is_finite()));
}

#[test]
fn impossible_shapes_are_named() {
    let pool = Pool::new(1);
    for (shape, expected) in [
        (
            Shape {
                tokens: 100,
                ..shape(1)
            },
            "tokens: is 2,048 to 2,097,152",
        ),
        (
            Shape {
                head_dim: 63,
                ..shape(1)
            },
            "head_dim: is even, 32 to 256",
        ),
        (Shape { heads: 0, ..shape(1) }, "heads: is 1 to 16"),
        (
            Shape {
                theta: f64::NAN,
                ..shape(1)
            },
            "theta: is finite and above 1",
        ),
    ] {
        assert_eq!(
            Synthetic::generate(shape, &pool).expect_err(expected).to_string(),
            expected
        );
    }
}
