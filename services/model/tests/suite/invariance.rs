//! Equal bits: KV and logits of a token do not depend on what else a step holds, how a prompt was cut, or on threads.

use kvasir_model::{Attention, Logits, Model, PageId, PagePool, StepSequence};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    gemma,
    made_up::{Gguf, load, pages, pool_for, small_model},
    smollm,
};

/// What a run of a prompt leaves: bits of KV of all its tokens, and of all its logits.
#[derive(PartialEq)]
struct Bits {
    kv: Vec<u16>,
    logits: Vec<u32>,
}

/// Runs `tokens` in steps of the lengths that `cut` gives.
fn run(
    model: &mut Model,
    pool: &mut PagePool,
    tokens: &[u32],
    pages: &[Option<PageId>],
    mut cut: impl FnMut() -> usize,
) -> Bits {
    let mut logits = Vec::new();
    let mut position = 0;
    while position < tokens.len() {
        let end = (position + cut()).min(tokens.len());
        let sequence = sequence(&tokens[position..end], position, pages);
        logits.append(&mut model.step(&[sequence], pool, &mut ()).expect("a sound step").rows[0]);
        position = end;
    }
    Bits {
        kv: kv(model, pool, tokens.len(), pages),
        logits: bits(&logits),
    }
}

fn sequence<'a>(tokens: &'a [u32], position: usize, pages: &'a [Option<PageId>]) -> StepSequence<'a> {
    StepSequence {
        tokens,
        position,
        pages,
        attention: Attention::Full,
        logits: Logits::All,
    }
}

/// Bits of the first `tokens` rows of all heads and layers.
fn kv(model: &Model, pool: &PagePool, tokens: usize, pages: &[Option<PageId>]) -> Vec<u16> {
    let layout = pool.layout();
    let mut out = Vec::new();
    for layer in 0..model.shape().layers {
        for position in 0..tokens {
            let page = pool.page(layer, pages[position / layout.block_tokens].expect("resident"));
            let at = position % layout.block_tokens * layout.head_dim;
            for head in 0..layout.kv_heads {
                for run in [layout.keys(head), layout.values(head)] {
                    out.extend(page[run][at..at + layout.head_dim].iter().map(|value| value.to_bits()));
                }
            }
        }
    }
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn random_tokens(model: &Model, len: usize, rng: &mut StdRng) -> Vec<u32> {
    (0..len)
        .map(|_| rng.random_range(0..model.shape().vocab as u32))
        .collect()
}

#[test]
fn chunks_batches_and_threads_do_not_change_a_bit() {
    no_bit_changes(&Gguf::small());
}

#[test]
fn nor_do_they_where_layers_see_a_window() {
    no_bit_changes(&gemma::small());
}

fn no_bit_changes(gguf: &Gguf) {
    let mut rng = StdRng::seed_from_u64(1);
    let mut model = load(gguf, 1);
    // Over two borders of the runs that attention is summed in.
    let tokens = random_tokens(&model, 1100, &mut rng);
    let own = pages(0, 275);
    let mut pool = pool_for(&model, 600);
    let whole = run(&mut model, &mut pool, &tokens, &own, || usize::MAX);
    assert!(whole.logits.iter().all(|bits| f32::from_bits(*bits).is_finite()));

    for threads in [1, 2, 3] {
        let mut model = load(gguf, threads);
        for round in 0..4 {
            let mut pool = pool_for(&model, 600);
            let most = [1100, 300, 40, 7][round];
            let chunked = run(&mut model, &mut pool, &tokens, &own, || rng.random_range(1..=most));
            assert!(chunked == whole, "{threads} threads, chunks up to {most}");
        }
        // The last tokens beside other sequences, of which one is long and one is being read in.
        let mut pool = pool_for(&model, 600);
        run(&mut model, &mut pool, &tokens[..1090], &own, || 200);
        let (long, others) = (pages(275, 275), pages(550, 40));
        let beside = random_tokens(&model, 1000, &mut rng);
        run(&mut model, &mut pool, &beside[..900], &long, || 900);
        let batch = [
            sequence(&beside[900..903], 900, &long),
            sequence(&tokens[1090..1100], 1090, &own),
            sequence(&beside[..150], 0, &others),
        ];
        let output = model.step(&batch, &mut pool, &mut ()).expect("a sound step");
        let tail = 1090 * model.shape().vocab;
        assert!(
            bits(&output.rows[1]) == whole.logits[tail..],
            "{threads} threads, in a batch"
        );
        assert!(
            kv(&model, &pool, 1100, &own) == whole.kv,
            "{threads} threads, in a batch"
        );
    }
}

#[test]
fn which_logits_are_asked_for_does_not_change_them() {
    let mut rng = StdRng::seed_from_u64(2);
    let mut model = small_model(2);
    let tokens = random_tokens(&model, 50, &mut rng);
    let own = pages(0, 13);
    let mut pool = pool_for(&model, 13);
    let whole = run(&mut model, &mut pool, &tokens, &own, || 50);
    let vocab = model.shape().vocab;
    for (logits, expected) in [
        (Logits::None, &[][..]),
        (Logits::Last, &whole.logits[49 * vocab..]),
        (Logits::All, &whole.logits[..]),
    ] {
        let mut pool = pool_for(&model, 13);
        let sequence = StepSequence {
            logits,
            ..sequence(&tokens, 0, &own)
        };
        let output = model.step(&[sequence], &mut pool, &mut ()).expect("a sound step");
        assert!(bits(&output.rows[0]) == expected, "{logits:?}");
        assert!(kv(&model, &pool, 50, &own) == whole.kv, "{logits:?}");
    }
}

#[test]
fn what_lies_in_pages_beyond_the_tokens_does_not_matter() {
    let mut rng = StdRng::seed_from_u64(3);
    let mut model = small_model(2);
    let tokens = random_tokens(&model, 10, &mut rng);
    let own = pages(0, 3);
    let mut pool = pool_for(&model, 3);
    let clean = run(&mut model, &mut pool, &tokens, &own, || 4);
    let mut pool = pool_for(&model, 3);
    for (layer, page) in (0..2).flat_map(|layer| (0..3).map(move |page| (layer, PageId(page)))) {
        pool.page_mut(layer, page).fill(half::f16::NAN);
    }
    assert!(run(&mut model, &mut pool, &tokens, &own, || 4) == clean);
}

#[test]
fn smollm_keeps_its_bits_too() {
    let mut rng = StdRng::seed_from_u64(4);
    let mut model = smollm::model(1);
    let tokens = random_tokens(&model, 600, &mut rng);
    let own = pages(0, 10);
    let mut pool = pool_for(&model, 20);
    let long = |model: &mut Model, pool: &mut PagePool, chunk: usize| {
        let mut position = 0;
        while position < 595 {
            let end = (position + chunk).min(595);
            let step = StepSequence {
                logits: Logits::None,
                ..sequence(&tokens[position..end], position, &own)
            };
            model.step(&[step], pool, &mut ()).expect("a sound step");
            position = end;
        }
    };
    long(&mut model, &mut pool, 595);
    let last = model
        .step(&[sequence(&tokens[595..], 595, &own)], &mut pool, &mut ())
        .expect("a sound step");
    let (whole, last) = (kv(&model, &pool, 600, &own), bits(&last.rows[0]));

    let mut model = smollm::model(2);
    let mut pool = pool_for(&model, 20);
    long(&mut model, &mut pool, 77);
    let others = pages(10, 3);
    for (index, token) in tokens[595..].iter().enumerate() {
        let beside = random_tokens(&model, 30, &mut rng);
        let token = std::slice::from_ref(token);
        let batch = [
            sequence(&beside, index * 30, &others),
            sequence(token, 595 + index, &own),
        ];
        let output = model.step(&batch, &mut pool, &mut ()).expect("a sound step");
        let vocab = model.shape().vocab;
        assert!(bits(&output.rows[1]) == last[index * vocab..][..vocab], "token {index}");
    }
    assert!(kv(&model, &pool, 600, &own) == whole);
}
