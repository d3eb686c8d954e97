//! `kvasir bench gpu --made-up --sparse`: sparse prefill beside dense, step by step, and the length from which it pays.
//!
//! Weights and prompt are noise, so what a list chooses means nothing, and is chosen to cost what it costs on real text: an A-shape and
//! the best blocks cost the same whatever the prompt, and of diagonals those next to each query are forced, side by side (noise
//! alone would choose them far apart, and 6,096 of them cover nearly everything). The making of the lists costs the same either way.

use std::time::Instant;

use anyhow::{Context, Result};
use kvasir_model::{Device, GpuDevice, MadeUp, Model, TileRows};
use kvasir_sparse::{HeadPatterns, Pattern};
use kvasir_worker::{DeviceKind, WorkerConfig};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;

use super::forward::Forward;
use crate::{
    args::GpuArgs,
    measure::Machine,
    output::{print, say},
    tree::Configuration,
    version::VERSION,
};

const SEED: u64 = 1;
/// Prompt tokens of a step: each is timed.
const STEP_TOKENS: usize = 4096;
/// Prompts whose time to the first token is told: their steps, and one of the last token, that the next is drawn from.
const PROMPTS: [usize; 6] = [4096, 8192, 16_384, 32_768, 65_536, 131_072];

/// MInference's widest Vertical-Slash, its diagonals side by side.
const VERTICAL_SLASH: Pattern = Pattern::VerticalSlash {
    verticals: 1000,
    slashes: 6096,
    sink: 30,
    near: 6096,
};
const A_SHAPE: Pattern = Pattern::AShape {
    initial: 1024,
    local: 4096,
};
const BLOCK_SPARSE: Pattern = Pattern::BlockSparse { blocks: 100 };

/// Blocks, the unit that is planned for, and what is measured with them. How large they are matters where each costs an estimate.
const CASES: [(u16, &[Pattern]); 2] = [
    (1024, &[VERTICAL_SLASH, A_SHAPE, BLOCK_SPARSE]),
    (4096, &[VERTICAL_SLASH]),
];

#[derive(Debug, Serialize)]
struct Report {
    shape: &'static str,
    noise: &'static str,
    gpu: String,
    step_tokens: usize,
    cases: Vec<Case>,
    kvasir: &'static str,
    machine: Machine,
}

#[derive(Debug, Serialize)]
struct Case {
    pattern: String,
    block_tokens: u16,
    /// Position from which on every step was faster sparsely; none if the last was not.
    pays_from: Option<usize>,
    prompts: Vec<Prompt>,
    dense_step_seconds: Vec<f64>,
    sparse_step_seconds: Vec<f64>,
}

/// Seconds to the first token.
#[derive(Debug, Serialize)]
struct Prompt {
    tokens: usize,
    dense: f64,
    sparse: f64,
    /// Dense steps up to `pays_from`, sparse ones from there.
    with_fall_back: f64,
}

pub(crate) fn crossing(configuration: &Configuration, args: &GpuArgs) -> Result<()> {
    let worker = WorkerConfig {
        device: DeviceKind::Gpu,
        ..configuration.tree().worker.clone()
    };
    let Device::Gpu(gpu) = worker.open_device()? else {
        anyhow::bail!("the device is no GPU");
    };
    let context = args.context as usize / STEP_TOKENS * STEP_TOKENS;
    let mut cases = Vec::new();
    for (block_tokens, patterns) in CASES {
        measure(&gpu, context, block_tokens, patterns, args, &mut cases)?;
    }
    let report = Report {
        shape: "Llama-3-8B: 32 layers, hidden 4096, 32 query heads, 8 KV heads, d 128, f16",
        noise: "weights and prompt; which columns and blocks are chosen means nothing, diagonals are forced side by side",
        gpu: gpu.name().to_owned(),
        step_tokens: STEP_TOKENS,
        cases,
        kvasir: VERSION,
        machine: Machine::here(),
    };
    report.cases.iter().for_each(show);
    if args.json {
        print(serde_json::to_string_pretty(&report).context("the result cannot be written as JSON")?);
    }
    Ok(())
}

fn measure(
    gpu: &GpuDevice,
    context: usize,
    block_tokens: u16,
    patterns: &[Pattern],
    args: &GpuArgs,
    cases: &mut Vec<Case>,
) -> Result<()> {
    let noise = MadeUp::llama_3_8b(context + usize::from(block_tokens), SEED, args.score_deviation);
    let mut forward = Forward::new(Model::made_up(&noise, gpu, block_tokens)?, context + 1, 1)?;
    let mut rng = StdRng::seed_from_u64(SEED);
    let vocab = forward.shape().vocab as u32;
    let tokens: Vec<u32> = (0..context).map(|_| rng.random_range(0..vocab)).collect();
    let run = |forward: &mut Forward, what: &str| -> Result<Vec<f64>> {
        say(format_args!("{what}, blocks of {block_tokens}"));
        // Loads kernels, and makes the buffers that the last step needs.
        forward.steps(&tokens, context - STEP_TOKENS, STEP_TOKENS)?;
        forward.steps(&tokens, 0, STEP_TOKENS)
    };
    let dense = Dense {
        steps: run(&mut forward, "dense")?,
        last: PROMPTS
            .into_iter()
            .filter(|prompt| *prompt <= context)
            .map(|prompt| {
                // The first draws load kernels and are recorded.
                let mut time = 0.0;
                for _ in 0..3 {
                    let begun = Instant::now();
                    forward.next_token(tokens[prompt - 1], prompt)?;
                    time = begun.elapsed().as_secs_f64();
                }
                Ok(time)
            })
            .collect::<Result<_>>()?,
    };
    for pattern in patterns {
        let (layers, q_heads) = (forward.shape().layers, forward.shape().q_heads);
        let mut heads = HeadPatterns::uniform(*pattern, layers, q_heads)?;
        heads.dense_up_to = 0;
        forward = forward.sparse(heads, TileRows::Rows128)?;
        let sparse = run(&mut forward, &pattern.to_string())?;
        cases.push(Case::new(pattern, block_tokens, &dense, sparse));
    }
    Ok(())
}

/// Seconds of dense steps, and of the last token of each of [`PROMPTS`].
struct Dense {
    steps: Vec<f64>,
    last: Vec<f64>,
}

impl Case {
    fn new(pattern: &Pattern, block_tokens: u16, Dense { steps: dense, last }: &Dense, sparse: Vec<f64>) -> Self {
        let slower = sparse.iter().zip(dense).rposition(|(sparse, dense)| sparse >= dense);
        let pays = slower.map_or(0, |step| step + 1);
        let prompt = |(tokens, last): (usize, &f64)| {
            let steps = tokens / STEP_TOKENS;
            let sum = |times: &[f64]| times.iter().sum::<f64>();
            let cut = pays.min(steps);
            Prompt {
                tokens,
                dense: sum(&dense[..steps]) + last,
                sparse: sum(&sparse[..steps]) + last,
                with_fall_back: sum(&dense[..cut]) + sum(&sparse[cut..steps]) + last,
            }
        };
        let measured = PROMPTS.into_iter().zip(last);
        Self {
            pattern: pattern.to_string(),
            block_tokens,
            pays_from: (pays < dense.len()).then_some(pays * STEP_TOKENS),
            prompts: measured.map(prompt).collect(),
            dense_step_seconds: dense.clone(),
            sparse_step_seconds: sparse,
        }
    }
}

fn show(case: &Case) {
    let from = case
        .pays_from
        .map_or("nowhere".to_owned(), |from| format!("from {from} on"));
    say(format_args!(
        "{}, blocks of {}: pays {from}",
        case.pattern, case.block_tokens
    ));
    for prompt in &case.prompts {
        say(format_args!(
            "  {:6} tokens: dense {:.3} s, sparse {:.3} s, dense up to there {:.3} s ({:.2} times faster)",
            prompt.tokens,
            prompt.dense,
            prompt.sparse,
            prompt.with_fall_back,
            prompt.dense / prompt.with_fall_back
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparsity_pays_from_the_last_step_on_that_was_slower() {
        // Seconds by step of 4,096 tokens, the dense ones being 1, 2, 3, 4; where it pays; 8,192 tokens with the fall-back.
        for (sparse, from, seconds) in [
            ([2.0, 2.5, 2.0, 2.0], Some(8192), 3.0),
            ([0.5, 2.5, 2.0, 3.0], Some(8192), 3.0),
            ([0.5, 0.5, 0.5, 0.5], Some(0), 1.0),
            ([5.0, 5.0, 5.0, 5.0], None, 3.0),
        ] {
            let dense = Dense {
                steps: vec![1.0, 2.0, 3.0, 4.0],
                last: vec![0.25; 3],
            };
            let case = Case::new(&A_SHAPE, 1024, &dense, sparse.to_vec());
            assert_eq!(case.pays_from, from, "{sparse:?}");
            let told: Vec<(usize, f64)> = case.prompts.iter().map(|p| (p.tokens, p.with_fall_back)).collect();
            assert_eq!(told.len(), 3, "4K, 8K and 16K");
            assert_eq!(told[1], (8192, seconds + 0.25), "{sparse:?}");
        }
    }
}
