//! Steps that cannot be are refused before anything is written.

use kvasir_block::{Dtype, LayerBlockLayout};
use kvasir_model::{Attention, Draw, Logits, PageId, PagePool, Sampler, Sampling, StepError, StepSequence};

use crate::made_up::{pool_for, small_model};

#[test]
fn a_batch_is_checked_before_work() {
    let mut model = small_model(1);
    let mut pool = pool_for(&model, 4);
    let page = |id| Some(PageId(id));
    let good = StepSequence {
        tokens: &[1, 2],
        position: 3,
        pages: &[page(0), page(1)],
        attention: Attention::Full,
        logits: Logits::Last,
    };
    let local = |ranges: &[std::ops::Range<usize>]| Attention::Local(ranges.to_vec());
    let table: [(&str, StepSequence<'_>); 10] = [
        (
            "has no tokens",
            StepSequence {
                tokens: &[],
                ..good.clone()
            },
        ),
        (
            "has token 259, and the vocabulary has 259",
            StepSequence {
                tokens: &[0, 259],
                ..good.clone()
            },
        ),
        (
            "has 2 tokens from position 2047 on, and the context ends at 2048",
            StepSequence {
                position: 2047,
                ..good.clone()
            },
        ),
        (
            "and the context ends at 2048",
            StepSequence {
                position: usize::MAX,
                ..good.clone()
            },
        ),
        (
            "has no page for block 1, which it needs",
            StepSequence {
                pages: &[page(0)],
                ..good.clone()
            },
        ),
        (
            "has no page for block 0",
            StepSequence {
                pages: &[None, page(1)],
                ..good.clone()
            },
        ),
        (
            "has page 4, and the pool has 4",
            StepSequence {
                pages: &[page(0), page(4)],
                ..good.clone()
            },
        ),
        (
            "has local range 1..2 behind 3: ranges must rise",
            StepSequence {
                attention: local(&[0..3, 1..2]),
                ..good.clone()
            },
        ),
        (
            "page 1 is written and has two owners",
            StepSequence {
                pages: &[page(1), page(1)],
                ..good.clone()
            },
        ),
        (
            "has no page for block 0",
            StepSequence {
                position: 4,
                pages: &[None, page(1)],
                attention: local(&[2..6]),
                ..good.clone()
            },
        ),
    ];
    for (expected, sequence) in table {
        let error = model.step(&[sequence], &mut pool, &mut ()).expect_err(expected);
        assert!(
            matches!(&error, StepError::Invalid(text) if text.contains(expected)),
            "{error}"
        );
    }
    let twice = [
        good.clone(),
        StepSequence {
            pages: &[page(2), page(1)],
            ..good.clone()
        },
    ];
    let error = model.step(&twice, &mut pool, &mut ()).expect_err("a shared page");
    assert!(
        error.to_string().contains("page 1 is written and has two owners"),
        "{error}"
    );
    for (layer, id) in (0..2).flat_map(|layer| (0..4).map(move |id| (layer, id))) {
        assert!(
            pool.page(layer, PageId(id)).iter().all(|value| value.to_bits() == 0),
            "nothing was written"
        );
    }

    // Sharing what is only read is what a prefix cache is for.
    let shared = [
        StepSequence {
            position: 4,
            tokens: &[1],
            ..good.clone()
        },
        StepSequence {
            position: 4,
            tokens: &[2],
            pages: &[page(0), page(2)],
            ..good.clone()
        },
    ];
    assert_eq!(
        model
            .step(&shared, &mut pool, &mut ())
            .expect("a shared prefix")
            .rows
            .len(),
        2
    );
    assert_eq!(
        model.step(&[], &mut pool, &mut ()).expect("an empty batch").rows.len(),
        0
    );
}

#[test]
fn a_pool_of_another_model_is_refused() {
    let mut model = small_model(1);
    let layout = model.schema().layout();
    for (layout, layers) in [
        (layout, 3),
        (
            LayerBlockLayout {
                block_tokens: 8,
                ..layout
            },
            2,
        ),
        (LayerBlockLayout { kv_heads: 1, ..layout }, 2),
    ] {
        assert_eq!(layout.dtype, Dtype::F16);
        let mut pool = PagePool::new(layout, layers, 1).expect("a small pool");
        let sequence = StepSequence {
            tokens: &[1],
            position: 0,
            pages: &[Some(PageId(0))],
            attention: Attention::Full,
            logits: Logits::None,
        };
        let error = model
            .step(&[sequence], &mut pool, &mut ())
            .expect_err("another pool")
            .to_string();
        assert!(error.starts_with("invalid step: the pool has"), "{error}");
    }
}

/// Who asks for a token gets the one that it would have drawn from the logits, and no logits; beside others who get theirs.
#[test]
fn a_token_is_drawn_where_it_is_asked_for() {
    let mut model = small_model(2);
    let hot = Sampling {
        temperature: 1.5,
        top_p: 0.9,
        seed: 11,
    };
    let mut draws = Sampler::new(hot.clone());
    let mut drawn = std::collections::HashSet::new();
    for nth in 0..20 {
        let draw = if nth == 0 { Draw::GREEDY } else { draws.next_draw() };
        let mut pool = pool_for(&model, 2);
        let pages = [Some(PageId(0)), Some(PageId(1))];
        let sequence = |page: usize, logits| StepSequence {
            tokens: &[1, 2],
            position: 0,
            pages: &pages[page..=page],
            attention: Attention::Full,
            logits,
        };
        let batch = [sequence(0, Logits::Drawn(draw)), sequence(1, Logits::Last)];
        let output = model.step(&batch, &mut pool, &mut ()).expect("a sound step");
        assert_eq!((output.rows[0].len(), output.drawn[1]), (0, None));
        let expected = Sampler::new(Sampling::greedy()).draw(&output.rows[1], draw);
        assert_eq!(output.drawn[0], Some(expected), "{draw:?}");
        drawn.insert(expected);
    }
    assert!(drawn.len() > 1, "chance changes nothing");
}
