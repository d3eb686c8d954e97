//! Gemma-3-270M from the cache folder, against an independent forward (`tests/golden/generate_gemma.py`). Its terms must be agreed to
//! before it is fetched, so these tests are run when asked for: `make gemma-test`.

use std::path::PathBuf;

use kvasir_model::{Attention, LoadOptions, Logits, Model, ModelFile, StepSequence};
use serde::Deserialize;

use crate::{
    made_up::{pages, pool_for},
    smollm,
};

/// Mean difference of a logit; the crate rounds weights and activations to int8, and keys and values to f16.
const LOGIT_ERROR_MEAN_MAX: f32 = 0.25;
/// Difference of the mean loss of a text, relative.
const LOSS_ERROR_MAX: f64 = 0.02;
/// Where numpy's two best are nearer than this, either may win.
const NEAR_TIE: f32 = 0.5;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    /// The most likely next token, and by how much of a logit.
    best: usize,
    gap: f32,
    /// `(id, logit)` of some.
    logits: Vec<(usize, f32)>,
    /// Of each token but the first.
    losses: Vec<f64>,
}

fn file() -> ModelFile {
    let path: PathBuf = smollm::path().with_file_name("gemma-3-270m-q4_k_m.gguf");
    ModelFile::open(&path).expect("the model file: run `deploy/bootstrap.sh gemma`")
}

#[test]
#[ignore = "needs the optional model: `make gemma-test`"]
fn ids_logits_and_losses_agree_with_numpy() {
    let golden: Golden =
        serde_json::from_str(include_str!("../golden/golden_gemma.json")).expect("made by the generator");
    assert_eq!(golden.cases.len(), 16);
    let file = file();
    let options = LoadOptions {
        threads: 2,
        block_tokens: 64,
    };
    let mut model = Model::load(&file, &options).expect("a sound model");
    let mut pool = pool_for(&model, 32);
    let own = pages(0, 32);
    let mut errors = Vec::new();
    for case in golden.cases {
        let ids = file.tokenizer().encode(&case.text, false).expect("any text");
        assert_eq!(ids, case.ids, "{:?}", case.text);
        let mut found = Vec::new();
        for (at, tokens) in ids.chunks(100).enumerate() {
            let sequence = StepSequence {
                tokens,
                position: at * 100,
                pages: &own,
                attention: Attention::Full,
                logits: Logits::All,
            };
            found.append(&mut model.step(&[sequence], &mut pool, &mut ()).expect("a sound step").rows[0]);
        }
        let rows: Vec<&[f32]> = found.chunks_exact(model.shape().vocab).collect();
        let last = rows.last().expect("at least the first token");
        errors.extend(case.logits.iter().map(|(id, logit)| (last[*id] - logit).abs()));
        let best = (0..last.len()).max_by(|a, b| last[*a].total_cmp(&last[*b]));
        if case.gap > NEAR_TIE {
            assert_eq!(best, Some(case.best), "{:?}, gap {}", case.text, case.gap);
        }
        let losses = rows.iter().zip(&ids[1..]).map(|(row, next)| loss(row, *next as usize));
        let (found, truth) = (losses.sum::<f64>(), case.losses.iter().sum::<f64>());
        assert!(
            (found - truth).abs() <= LOSS_ERROR_MAX * truth,
            "{:?}: losses {found}, numpy {truth}",
            case.text
        );
    }
    let mean = errors.iter().sum::<f32>() / errors.len() as f32;
    let max = errors.iter().copied().fold(0.0, f32::max);
    assert!(
        mean <= LOGIT_ERROR_MEAN_MAX,
        "logits differ by {mean} on average, by {max} at most"
    );
}

fn loss(logits: &[f32], next: usize) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
    sum.ln() - f64::from(logits[next] - most)
}
