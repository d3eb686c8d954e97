use super::*;

fn limits() -> Limits {
    Limits {
        vocab: 100,
        context_tokens_max: 128,
        block_tokens: 16,
        pages: 6,
        max_tokens: 20,
        attention: AttentionConfig::default(),
    }
}

fn asked(prompt: usize) -> Asked {
    Asked {
        prompt: vec![7; prompt],
        ..Asked::default()
    }
}

fn check(asked: Asked) -> Result<Request, Refusal> {
    Request::check("r".parse().expect("an id"), asked, &limits(), 42)
}

#[test]
fn refusals_name_the_field_and_what_to_do() {
    let sampled = |temperature, top_p| Asked {
        sampling: Some(AskedSampling {
            temperature,
            top_p,
            seed: None,
        }),
        ..asked(4)
    };
    let attending = |attention| Asked { attention, ..asked(4) };
    let table: Vec<(Asked, &str, &str)> = vec![
        (asked(0), "prompt", "at least one token"),
        (
            asked(128),
            "prompt",
            "128 tokens and one new token do not fit the context window of 128",
        ),
        (asked(96), "prompt", "page pool of 96 tokens"),
        (
            Asked {
                prompt: vec![1, 100],
                ..asked(0)
            },
            "prompt",
            "index 1 is not in the vocabulary of 100",
        ),
        (
            Asked {
                forced: vec![100],
                ..asked(4)
            },
            "forced",
            "index 0",
        ),
        (
            Asked {
                max_tokens: Some(93),
                ..asked(4)
            },
            "max_tokens",
            "ask for at most 92",
        ),
        (sampled(-1.0, 1.0), "sampling.temperature", "from 0 to 2"),
        (sampled(f32::NAN, 1.0), "sampling.temperature", "from 0 to 2"),
        (sampled(1.0, 0.0), "sampling.top_p", "above 0 and at most 1"),
        (sampled(1.0, f32::INFINITY), "sampling.top_p", "above 0 and at most 1"),
        (
            Asked {
                stop: vec![String::new()],
                ..asked(4)
            },
            "stop",
            "leave it out",
        ),
        (
            Asked {
                stop: vec!["x".repeat(1025)],
                ..asked(4)
            },
            "stop",
            "at most 1024",
        ),
        (
            Asked {
                stop: vec!["x".into(); 17],
                ..asked(4)
            },
            "stop",
            "at most 16",
        ),
        (
            Asked {
                cache_salt: "x".repeat(1025),
                ..asked(4)
            },
            "cache_salt",
            "at most 1024",
        ),
        (
            attending(AskedAttention {
                target_mass: Some(1.5),
                ..AskedAttention::default()
            }),
            "attention.target_mass",
            "(0, 1]",
        ),
        (
            Asked {
                no_cache: true,
                ..attending(AskedAttention {
                    mode: Some(AttentionMode::Rows),
                    ..AskedAttention::default()
                })
            },
            "attention.mode",
            "no_cache forbids it",
        ),
    ];
    for (asked, field, words) in table {
        let refusal = check(asked).expect_err(words);
        assert_eq!(refusal.field, field);
        assert!(refusal.problem.contains(words), "{} lacks {words:?}", refusal.problem);
    }
}

#[test]
fn new_tokens_are_bounded_by_wish_default_forced_window_and_pool() {
    let table = [
        // prompt, wanted, forced, granted
        (4, None, 0, 20),
        (4, Some(0), 0, 20),
        (4, Some(50), 0, 50),
        (4, Some(5), 9, 5),
        (4, None, 9, 9),
        (90, None, 0, 6),
        (95, None, 0, 1),
    ];
    for (prompt, wanted, forced, granted) in table {
        let asked = Asked {
            max_tokens: wanted,
            forced: vec![1; forced],
            ..asked(prompt)
        };
        let request = check(asked).expect("fits");
        assert_eq!(
            request.max_tokens, granted,
            "prompt {prompt}, wanted {wanted:?}, forced {forced}"
        );
        assert_eq!(request.forced.len(), forced.min(granted));
    }
    let roomy = Limits { pages: 100, ..limits() };
    let long = Asked {
        max_tokens: Some(1000),
        ..asked(100)
    };
    let request = Request::check("r".parse().expect("an id"), long, &roomy, 1).expect("cut to the window");
    assert_eq!(request.max_tokens, 28);
    assert_eq!(request.pages(16), 8);
}

#[test]
fn defaults_fill_what_was_left_out() {
    let request = check(asked(4)).expect("fits");
    assert_eq!((request.sampling.temperature, request.sampling.seed), (0.0, 42));
    assert_eq!(request.attention.mode, AttentionMode::Full);
    let rows = AskedAttention {
        mode: Some(AttentionMode::Rows),
        window: Some(0),
        ..AskedAttention::default()
    };
    let rows = check(Asked {
        attention: rows,
        ..asked(4)
    })
    .expect("fits")
    .attention;
    assert_eq!((rows.k, rows.sink, rows.window), (256, 128, 0));
    let attend = AskedAttention {
        mode: Some(AttentionMode::Attend),
        ..AskedAttention::default()
    };
    let attend = check(Asked {
        attention: attend,
        ..asked(4)
    })
    .expect("fits")
    .attention;
    assert_eq!(
        (attend.k_max, attend.target_mass),
        (0, 0.99),
        "attend is bounded only where asked"
    );
}
