use super::*;

fn two_layers() -> HeadPatterns {
    let first = vec![
        Pattern::Dense,
        Pattern::AShape {
            initial: 64,
            local: 512,
        },
        Pattern::vertical_slash(100, 800),
    ];
    let second = vec![
        Pattern::BlockSparse { blocks: 12 },
        Pattern::flex_prefill(0.9, 0.1),
        Pattern::XAttention {
            stride: 8,
            threshold: 0.85,
        },
    ];
    let mut patterns = HeadPatterns::new(vec![first, second])
        .expect("sound")
        .found_by(FoundBy {
            model: "a model".to_owned(),
            criterion: "output error".to_owned(),
            text: "a \"layers\": [] text".to_owned(),
            tokens: 8192,
            budget: "256+1024".to_owned(),
            tile_rows: 64,
            score: 0.0625,
        });
    patterns.model_fingerprint = Some("ab".repeat(32));
    patterns
}

#[test]
fn what_is_written_is_read() {
    let patterns = two_layers();
    let bytes = patterns.write().expect("JSON");
    assert_eq!(HeadPatterns::read(&bytes, 3).expect("ours"), patterns);
}

#[test]
fn minference_files_are_read() {
    // Two layers in the form of minference/configs/*.json; a head is missing.
    let text = br#"[{"0": ["vertical_and_slash", 30, 800, 336379.4], "1": ["stream_llm", 100, 800, 12.5], "2": ["block_sparse", 50, 0, 1.0]},
                    {"1": ["vertical_and_slash", 3500, 10, 0.5], "2": ["vertical_and_slash", 10, 50, 2.5]}]"#;
    let patterns = HeadPatterns::read(text, 3).expect("theirs");
    let layers = [
        vec![
            Pattern::vertical_slash(30, 800),
            Pattern::AShape {
                initial: 100,
                local: 800,
            },
            Pattern::BlockSparse { blocks: 100 },
        ],
        vec![
            Pattern::vertical_slash(1000, 6096),
            Pattern::vertical_slash(3500, 50),
            Pattern::vertical_slash(30, 50),
        ],
    ];
    assert_eq!(patterns.layers(), layers);
    assert_eq!(patterns.model_fingerprint, None);
}

#[test]
fn errors_say_where() {
    let ours =
        |layers: &str| format!(r#"{{"format": "kvasir-sparse-prefill/1", "dense_up_to": 0, "layers": {layers}}}"#);
    let table = [
        ("[]".to_owned(), "0 layers of 0 heads"),
        (
            "[{\"7\": [\"stream_llm\", 1, 1, 0]}]".to_owned(),
            "has a head \"7\", and the model 3",
        ),
        (
            "[{\"1\": [\"vertical\", 1, 1, 0]}]".to_owned(),
            "head 1: \"vertical\" with 1 and 1 is not known",
        ),
        ("[{\"1\": [\"stream_llm\", -1, 1, 0]}]".to_owned(), "is not known"),
        (
            "{\"format\": \"kvasir-sparse-prefill/9\", \"new\": 1}".to_owned(),
            "this program reads",
        ),
        ("{}".to_owned(), "neither a file of"),
        ("nothing".to_owned(), "neither a file of"),
        (ours("[]"), "0 layers"),
        (ours("[[{\"kind\": \"dense\"}], []]"), "layer 1 has 0 heads"),
        (
            ours("[[{\"kind\": \"x-attention\", \"stride\": 7, \"threshold\": 0.5}]]"),
            "stride is 7: a divisor of 64",
        ),
        (
            ours("[[{\"kind\": \"x-attention\", \"stride\": 8, \"threshold\": 1.5}]]"),
            "layer 0, head 0: x-attention: threshold",
        ),
        (ours("[[{\"kind\": \"block-sparse\", \"blocks\": 0}]]"), "blocks is 0"),
        (
            ours("[[{\"kind\": \"a-shape\", \"initial\": 4000000000, \"local\": 1}]]"),
            "initial is 4000000000",
        ),
        (
            ours("[[{\"kind\": \"flex-prefill\", \"gamma\": 0.9, \"tau\": -1}]]"),
            "tau is -1",
        ),
        (
            ours("[[{\"kind\": \"block-sparse\", \"blocks\": 1, \"block\": 1}]]"),
            "neither a file of",
        ),
    ];
    for (text, expected) in table {
        let error = HeadPatterns::read(text.as_bytes(), 3).expect_err(&text).to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
    assert!(matches!(
        HeadPatterns::read(&vec![b' '; FILE_BYTES_MAX + 1], 3),
        Err(BadPatterns::TooLong(_))
    ));
}

/// Two sets of patterns that could give one different byte have two fingerprints; notes for people change nothing.
#[test]
fn fingerprints_follow_the_masks() {
    let patterns = two_layers();
    let change = |to: Pattern| {
        let mut layers = patterns.layers().to_vec();
        layers[1][2] = to;
        HeadPatterns::new(layers).expect("sound").fingerprint()
    };
    let mut all = vec![
        patterns.fingerprint(),
        HeadPatterns {
            dense_up_to: 4096,
            ..patterns.clone()
        }
        .fingerprint(),
        HeadPatterns::new(vec![patterns.layers().concat()])
            .expect("sound")
            .fingerprint(),
        change(Pattern::XAttention {
            stride: 16,
            threshold: 0.85,
        }),
        change(Pattern::XAttention {
            stride: 8,
            threshold: 0.850_000_1,
        }),
        change(Pattern::FlexPrefill {
            gamma: 0.85,
            tau: 0.0,
            budget_min: 8,
        }),
        change(Pattern::FlexPrefill {
            gamma: 0.85,
            tau: 0.0,
            budget_min: 9,
        }),
        change(Pattern::VerticalSlash {
            verticals: 100,
            slashes: 100,
            sink: 30,
            near: 100,
        }),
        change(Pattern::VerticalSlash {
            verticals: 100,
            slashes: 100,
            sink: 31,
            near: 100,
        }),
        change(Pattern::AShape { initial: 8, local: 8 }),
        change(Pattern::BlockSparse { blocks: 8 }),
        change(Pattern::Dense),
    ];
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count, "two of them are the same");
    let bare = HeadPatterns {
        found_by: None,
        model_fingerprint: None,
        ..patterns.clone()
    };
    assert_eq!(bare.fingerprint(), patterns.fingerprint());
}
