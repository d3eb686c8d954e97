//! Agreement with an independent forward (`tests/golden/generate.py`: plain numpy, f32, dequantised weights).
//!
//! The crate's forward rounds activations to int8 in blocks of 32 and keeps K and V in f16; numpy does neither. What that
//! does to the logits is measured here on every run, and bounded.

use kvasir_model::{Attention, ChatMessage, Logits, Model, PagePool, Sampler, Sampling, StepSequence};
use serde::Deserialize;

use crate::{
    made_up::{pages, pool_for},
    smollm,
};

/// Largest difference of a logit; logits of this model lie between -20 and 35. Measured: 0.99.
const LOGIT_ERROR_MAX: f32 = 1.25;
/// Mean difference of a logit. Measured: 0.16.
const LOGIT_ERROR_MEAN_MAX: f32 = 0.2;
/// Where numpy's two best are nearer than this, either may win: three times the mean difference. 351 of the 480 tokens
/// are further apart, and all of those must agree. llama.cpp (0.3.36 of its Python package, same file), which rounds
/// activations to int8 as well, differs from numpy by 0.17 on average and 1.00 at most.
const NEAR_TIE: f32 = 0.5;

#[derive(Deserialize)]
struct Golden {
    new_tokens: usize,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    steps: Vec<Step>,
    /// `(role, content)`, where the text is a rendered conversation.
    #[serde(default)]
    messages: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct Step {
    token: u32,
    /// Between the two largest logits.
    gap: f32,
    /// `(id, logit)` of some.
    logits: Vec<(usize, f32)>,
}

fn golden() -> Golden {
    let golden: Golden = serde_json::from_str(include_str!("../golden/golden.json")).expect("made by generate.py");
    assert_eq!((golden.cases.len(), golden.new_tokens), (20, 24));
    golden
}

#[test]
fn texts_have_the_ids_of_an_independent_tokenizer() {
    let file = smollm::file();
    for case in golden().cases {
        assert_eq!(
            file.tokenizer().encode(&case.text, true).expect("any text"),
            case.ids,
            "{:?}",
            case.text
        );
        if !case.messages.is_empty() {
            let messages: Vec<ChatMessage> = case
                .messages
                .into_iter()
                .map(|(role, content)| ChatMessage { role, content })
                .collect();
            let template = file.template().expect("an instruct model has one");
            assert_eq!(
                template.render(&messages, true).expect("a plain conversation"),
                case.text
            );
        }
    }
}

#[test]
fn greedy_tokens_and_logits_agree_with_numpy() {
    let mut model = smollm::model(2);
    let mut pool = pool_for(&model, 8);
    let (mut errors, mut compared, mut near_ties) = (Vec::new(), 0, 0);
    for case in golden().cases {
        // Numpy's tokens are fed, so that every step is compared on the same context.
        let mut logits = step(&mut model, &mut pool, &case.ids, 0);
        for (index, expected) in case.steps.iter().enumerate() {
            let found = Sampler::new(Sampling::greedy()).sample(&logits);
            if expected.gap > NEAR_TIE {
                assert_eq!(
                    found, expected.token,
                    "step {index} of {:?}, gap {}",
                    case.text, expected.gap
                );
                compared += 1;
            } else {
                let lag = logits[found as usize] - logits[expected.token as usize];
                assert!(
                    lag <= NEAR_TIE,
                    "step {index} of {:?}: numpy's token is {lag} behind",
                    case.text
                );
                near_ties += 1;
            }
            errors.extend(expected.logits.iter().map(|(id, logit)| (logits[*id] - logit).abs()));
            logits = step(&mut model, &mut pool, &[expected.token], case.ids.len() + index);
        }
    }
    let mean = errors.iter().sum::<f32>() / errors.len() as f32;
    let max = errors.iter().copied().fold(0.0, f32::max);
    let summary = format!("logit error mean {mean}, max {max}; {compared} tokens compared, {near_ties} near-ties");
    assert!(max <= LOGIT_ERROR_MAX && mean <= LOGIT_ERROR_MEAN_MAX, "{summary}");
    assert!(compared >= 351, "{summary}");
}

/// Logits after the last of `tokens`.
fn step(model: &mut Model, pool: &mut PagePool, tokens: &[u32], position: usize) -> Vec<f32> {
    let pages = pages(0, 8);
    let sequence = StepSequence {
        tokens,
        position,
        pages: &pages,
        attention: Attention::Full,
        logits: Logits::Last,
    };
    model
        .step(&[sequence], pool, &mut ())
        .expect("a sound step")
        .rows
        .remove(0)
}
