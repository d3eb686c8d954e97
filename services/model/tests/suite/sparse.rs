//! Sparse prefill: what masks leave out is left out, what they hold is attended to as ever, and a block's bits depend on the
//! tokens up to its end alone.

use half::f16;
use kvasir_model::{
    Attention, LoadError, LoadOptions, Logits, Model, ModelFile, PageId, PagePool, SparsePrefill, StepError,
    StepSequence, TileRows,
};
use kvasir_sparse::{HeadPatterns, Pattern};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::made_up::{Gguf, pages, pool_for};

const BLOCK: usize = 64;

fn file() -> ModelFile {
    Gguf::small().open().expect("the small model is sound")
}

fn dense(threads: usize) -> Model {
    let options = LoadOptions {
        threads,
        block_tokens: BLOCK as u16,
    };
    Model::load(&file(), &options).expect("the small model is sound")
}

/// The small model with one pattern for all of its heads, sparse from the first block on.
fn sparse(pattern: Pattern, threads: usize) -> Model {
    let mut patterns = HeadPatterns::uniform(pattern, 2, 4).expect("a sound pattern");
    patterns.dense_up_to = 0;
    with(patterns, threads)
}

fn with(patterns: HeadPatterns, threads: usize) -> Model {
    let file = file();
    let sparse = SparsePrefill::new(patterns, file.shape(), &file.schema(BLOCK as u16), TileRows::Rows64)
        .expect("patterns of this model");
    dense(threads).with_sparse_prefill(sparse).expect("a CPU")
}

fn tokens(len: usize, seed: u64) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(0..250)).collect()
}

/// Keys and values of the first `blocks` blocks in all layers, and the logits of all tokens.
type Made = (Vec<u16>, Vec<f32>);

fn run(
    model: &mut Model,
    tokens: &[u32],
    attention: impl Fn(usize) -> Attention,
    mut cut: impl FnMut() -> usize,
) -> Made {
    let own = pages(0, tokens.len().div_ceil(BLOCK) as u32);
    let mut pool = pool_for(model, own.len());
    let (mut position, mut logits) = (0, Vec::new());
    while position < tokens.len() {
        let end = (position + cut()).min(tokens.len());
        let sequence = StepSequence {
            tokens: &tokens[position..end],
            position,
            pages: &own,
            attention: attention(position),
            logits: Logits::All,
        };
        logits.append(&mut model.step(&[sequence], &mut pool, &mut ()).expect("a sound step").rows[0]);
        position = end;
    }
    (bits(model, &pool, &own, tokens.len() / BLOCK), logits)
}

fn bits(model: &Model, pool: &PagePool, own: &[Option<PageId>], blocks: usize) -> Vec<u16> {
    let pages = (0..model.shape().layers).flat_map(|layer| {
        own[..blocks]
            .iter()
            .map(move |page| pool.page(layer, page.expect("resident")))
    });
    pages.flatten().map(|value: &f16| value.to_bits()).collect()
}

fn patterns() -> Vec<Pattern> {
    vec![
        Pattern::AShape { initial: 4, local: 64 },
        Pattern::VerticalSlash {
            verticals: 12,
            slashes: 8,
            sink: 2,
            near: 4,
        },
        Pattern::BlockSparse { blocks: 3 },
        Pattern::FlexPrefill {
            gamma: 0.7,
            tau: 0.0,
            budget_min: 64,
        },
        Pattern::FlexPrefill {
            gamma: 0.7,
            tau: 1.0,
            budget_min: 64,
        },
        Pattern::XAttention {
            stride: 8,
            threshold: 0.6,
        },
    ]
}

#[test]
fn heads_that_see_everything_have_the_bits_of_full_attention() {
    let tokens = tokens(1100, 1);
    let full = run(&mut dense(2), &tokens, |_| Attention::Full, || 200);
    for threads in [1, 3] {
        let mut model = sparse(Pattern::Dense, threads);
        let found = run(&mut model, &tokens, |_| Attention::Sparse, || 192);
        assert!(found == full, "{threads} threads");
    }
    // Where everything lies below the first sparse block nothing is planned, whatever the pattern.
    let mut short = HeadPatterns::uniform(Pattern::AShape { initial: 1, local: 1 }, 2, 4).expect("sound");
    short.dense_up_to = 1100;
    assert!(run(&mut with(short, 2), &tokens, |_| Attention::Sparse, || 192) == full);
}

/// Largest difference of logits.
fn apart(a: &Made, b: &Made) -> f32 {
    a.1.iter().zip(&b.1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn masks_that_hold_everything_change_nothing_but_rounding() {
    let tokens = tokens(640, 2);
    let full = run(&mut dense(2), &tokens, |_| Attention::Full, || 640);
    let whole = [
        Pattern::AShape { initial: 1, local: 640 },
        Pattern::VerticalSlash {
            verticals: 640,
            slashes: 1,
            sink: 640,
            near: 1,
        },
        Pattern::BlockSparse { blocks: 10 },
        Pattern::FlexPrefill {
            gamma: 1.0,
            tau: 0.0,
            budget_min: 640,
        },
        Pattern::FlexPrefill {
            gamma: 1.0,
            tau: 1.0,
            budget_min: 640,
        },
        Pattern::XAttention {
            stride: 16,
            threshold: 1.0,
        },
    ];
    for pattern in whole {
        let found = run(&mut sparse(pattern, 2), &tokens, |_| Attention::Sparse, || 320);
        let difference = apart(&found, &full);
        // Activations are rounded to 8 bits between layers, so one last bit may become one in 127 of a column.
        assert!(difference < 0.05, "{pattern:?}: {difference}");
    }
    for pattern in patterns() {
        let found = run(&mut sparse(pattern, 2), &tokens, |_| Attention::Sparse, || 320);
        let difference = apart(&found, &full);
        assert!(difference > 0.05, "{pattern:?} leaves nothing out: {difference}");
    }
}

/// An A-shape is the same for all heads, so it can be said with local ranges: block by block, these attend to the same keys.
#[test]
fn what_a_mask_leaves_out_is_left_out() {
    let tokens = tokens(640, 3);
    let full = run(&mut dense(2), &tokens, |_| Attention::Full, || 640);
    for (initial, local) in [(4, 64), (1, 1), (100, 130)] {
        let attention = |position: usize| {
            // As kvasir-sparse defines it: from the end of the block, whole tiles over `local` and a block's rows.
            let reach = (local + BLOCK).next_multiple_of(BLOCK);
            let end = position + BLOCK;
            let near = end.saturating_sub(reach).max(initial).min(end)..end;
            Attention::Local(vec![0..initial.min(end), near])
        };
        let masked = run(&mut dense(2), &tokens, attention, || BLOCK);
        let pattern = Pattern::AShape {
            initial: initial as u32,
            local: local as u32,
        };
        let found = run(&mut sparse(pattern, 2), &tokens, |_| Attention::Sparse, || 320);
        let (close, far) = (apart(&found, &masked), apart(&full, &masked));
        assert!(close < 0.2 && far > 20.0 * close, "{pattern:?}: {close} beside {far}");
    }
}

#[test]
fn a_block_depends_on_the_tokens_up_to_its_end_alone() {
    let tokens = tokens(64 * 9 + 20, 4);
    let mut other = tokens.clone();
    other[64 * 6..].iter_mut().for_each(|token| *token = (*token + 1) % 250);
    let mut rng = StdRng::seed_from_u64(5);
    for pattern in patterns() {
        let whole = run(&mut sparse(pattern, 2), &tokens, |_| Attention::Sparse, || tokens.len());
        for threads in [1, 2, 3] {
            let cut = || BLOCK * rng.random_range(1..=4);
            let cut = run(&mut sparse(pattern, threads), &tokens, |_| Attention::Sparse, cut);
            assert!(cut == whole, "{pattern:?}, {threads} threads");
        }
        let found = run(&mut sparse(pattern, 2), &other, |_| Attention::Sparse, || tokens.len());
        // Layer after layer, each block at its place.
        let block = whole.0.len() / 2 / 9;
        for layer in 0..2 {
            let layer = |made: &Made| made.0[layer * 9 * block..][..9 * block].to_vec();
            let (found, whole) = (layer(&found), layer(&whole));
            assert!(found[..6 * block] == whole[..6 * block], "{pattern:?}");
            assert!(found[6 * block..] != whole[6 * block..]);
        }
    }
}

#[test]
fn what_cannot_be_sparse_is_refused() {
    let tokens = tokens(100, 6);
    let own = pages(0, 2);
    let step = |model: &mut Model, position: usize| {
        let mut pool = pool_for(model, 2);
        let sequence = StepSequence {
            tokens: &tokens[position..],
            position,
            pages: &own,
            attention: Attention::Sparse,
            logits: Logits::None,
        };
        model.step(&[sequence], &mut pool, &mut ())
    };
    let said = |result: Result<_, StepError>| result.expect_err("no step").to_string();
    assert!(said(step(&mut dense(1), 0)).contains("was given no patterns"));
    let mut model = sparse(Pattern::BlockSparse { blocks: 1 }, 1);
    assert!(said(step(&mut model, 3)).contains("in the middle of a block"));
    assert!(step(&mut model, 0).is_ok() && step(&mut model, 64).is_ok());

    let of = |layers, heads| HeadPatterns::uniform(Pattern::Dense, layers, heads).expect("sound");
    let mut others = of(2, 4);
    others.model_fingerprint = Some("00".repeat(32));
    for (patterns, block_tokens, expected) in [
        (
            of(3, 4),
            64,
            "patterns of 3 layers of 4 heads, and the model has 2 of 4",
        ),
        (of(2, 2), 64, "patterns of 2 layers of 2 heads"),
        (others, 64, "this one's is"),
        (of(2, 4), 4, "blocks of 4 tokens"),
        (of(2, 4), 96, "blocks of 96 tokens"),
    ] {
        let (file, rows) = (file(), TileRows::Rows64);
        let error = SparsePrefill::new(patterns, file.shape(), &file.schema(block_tokens), rows).expect_err(expected);
        assert!(
            matches!(&error, LoadError::Sparse(_)) && error.to_string().contains(expected),
            "{error}"
        );
    }
}

/// KV of another mask has another name; what is learnt about the model's keys stays valid.
#[test]
fn the_masks_are_part_of_the_name() {
    let plain = dense(1).schema().clone();
    let mut names = vec![plain.fingerprint()];
    for pattern in patterns() {
        let model = sparse(pattern, 1);
        assert_eq!(model.schema().first_difference(&plain), Some("numerics"));
        assert_eq!(model.schema().model_fingerprint(), plain.model_fingerprint());
        names.push(model.schema().fingerprint());
    }
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 1 + patterns().len());
}
