//! `kvasir bench gpu`: the model of the configuration on a GPU. Speed of prefill and decode, what it costs to push a prompt's
//! keys and values to a store on this host, and the greedy tokens beside those of the CPU.
//!
//! The kernels' own figures, beside the ceilings of the machine, are `kvasir-gpu-check bench`'s.

mod basis;
mod compare;
mod crossing;
mod forward;
mod made_up;
mod push;
mod remote;
mod sparse;

use anyhow::{Context, Result, ensure};
use kvasir_model::Device;
use kvasir_worker::{DeviceKind, WorkerConfig};
use serde::Serialize;
use tokio::runtime::Runtime;

use self::{
    compare::{Agreement, compare},
    forward::{Drawn, Forward},
    push::{PushCost, Pushing},
    sparse::{SparseAgreement, compare_sparse},
};
pub(crate) use self::{crossing::crossing, made_up::made_up};
use crate::{
    args::{ConfigArgs, GpuArgs},
    corpus::Corpus,
    measure::{Machine, median},
    output::{print, say},
    tree::Configuration,
    up::open_model_blocking,
    version::VERSION,
};

/// Prompts that are prefilled, in tokens.
const PROMPTS: [usize; 4] = [512, 2048, 4096, 8000];
/// Contexts and batches that are decoded at.
const DECODES: [(usize, usize); 5] = [(512, 1), (2048, 1), (8000, 1), (2048, 8), (2048, 32)];
/// Tokens decoded per measurement.
const DECODED: usize = 64;
/// Prompt tokens per step.
const STEP_TOKENS: usize = 4096;
/// Tokens of the prompts that greedy texts begin with.
const COMPARED_PROMPTS: [usize; 4] = [40, 200, 700, 2000];

/// The result of `--json`; medians over the rounds.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    gpu: String,
    text: String,
    rounds: u16,
    load_seconds: f64,
    prefill: Vec<PushCost>,
    decode: Vec<Decode>,
    agreement: Vec<Agreement>,
    sparse_agreement: Vec<SparseAgreement>,
    kvasir: &'static str,
    machine: Machine,
}

#[derive(Debug, Serialize)]
struct Decode {
    context: usize,
    sequences: usize,
    /// Tokens drawn on the GPU, and, for comparison, all logits brought to the host and drawn there.
    milliseconds_per_step: f64,
    milliseconds_per_step_drawn_on_host: f64,
    tokens_per_second: f64,
}

pub(crate) fn run(configuration: &Configuration, config: &ConfigArgs, args: &GpuArgs, runtime: &Runtime) -> Result<()> {
    let worker = WorkerConfig {
        device: DeviceKind::Gpu,
        ..configuration.tree().worker.clone()
    };
    let device = worker.open_device()?;
    let Device::Gpu(gpu) = &device else {
        anyhow::bail!("the device is no GPU");
    };
    let name = gpu.name().to_owned();
    let file = open_model_blocking(&configuration.tree().model.path)?;
    let corpus = Corpus::read(&args.text, &file)?;
    let most = file.shape().context_tokens_max - DECODED;
    let longest = most.min(PROMPTS[PROMPTS.len() - 1]) + DECODED;
    ensure!(
        corpus.len() >= longest,
        "the text has {} tokens, and {longest} are needed (--text)",
        corpus.len()
    );
    let tokens = corpus.tokens(0..longest);
    let prompts: Vec<usize> = PROMPTS.into_iter().filter(|prompt| *prompt <= most).collect();
    ensure!(
        !prompts.is_empty(),
        "the model's context is shorter than any prompt that is measured"
    );

    let begun = std::time::Instant::now();
    let mut forward = Forward::load(&file, &device, worker.block_tokens, tokens.len(), 32)?;
    let load_seconds = begun.elapsed().as_secs_f64();
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    let longest = prompts[prompts.len() - 1];
    let pushing = Pushing::start(&worker, config, &args.out, runtime, &forward, longest)?;
    for &prompt in &prompts {
        say(format_args!("prefill of {prompt}"));
        prefill.push(pushing.measure(&mut forward, &tokens[..prompt], STEP_TOKENS, args)?);
    }
    pushing.stop()?;
    for (context, sequences) in DECODES.into_iter().filter(|(context, _)| *context <= most) {
        say(format_args!("decode of {sequences} at {context}"));
        let (mut there, mut here) = (Vec::new(), Vec::new());
        for round in 0..=args.rounds {
            for (drawn, times) in [(Drawn::There, &mut there), (Drawn::Here, &mut here)] {
                let seconds = forward.decode(&tokens[..context], sequences, DECODED, drawn)?;
                // The first round records steps, and is not counted.
                if round > 0 {
                    times.push(seconds / DECODED as f64);
                }
            }
        }
        let per_step = median(there);
        decode.push(Decode {
            context,
            sequences,
            milliseconds_per_step: 1e3 * per_step,
            milliseconds_per_step_drawn_on_host: 1e3 * median(here),
            tokens_per_second: sequences as f64 / per_step,
        });
    }
    drop(forward);
    let (mut agreement, mut sparse_agreement) = (Vec::new(), Vec::new());
    if args.compare > 0 {
        say("greedy tokens beside the CPU's");
        let prompts: Vec<&[u32]> = COMPARED_PROMPTS
            .into_iter()
            .filter(|prompt| *prompt <= tokens.len())
            .map(|prompt| &tokens[..prompt])
            .collect();
        agreement = compare(&file, &device, &worker, &prompts, args.compare)?;
        say("sparse prefill beside the CPU's");
        sparse_agreement = compare_sparse(&file, &device, &worker, tokens, args.compare)?;
    }
    let report = Report {
        model: file.name().to_owned(),
        gpu: name,
        text: corpus.source.clone(),
        rounds: args.rounds,
        load_seconds,
        prefill,
        decode,
        agreement,
        sparse_agreement,
        kvasir: VERSION,
        machine: Machine::here(),
    };
    show(&report);
    if args.json {
        print(serde_json::to_string_pretty(&report).context("the result cannot be written as JSON")?);
    }
    Ok(())
}

fn show(report: &Report) {
    say(format_args!(
        "{} on {}, loaded in {:.1} s, medians of {}",
        report.model, report.gpu, report.load_seconds, report.rounds
    ));
    report.prefill.iter().for_each(push::show);
    for row in &report.decode {
        say(format_args!(
            "decode at {:5}, {:2} sequences: {:6.3} ms a step ({:.3} drawn on the host), {:7.0} tok/s",
            row.context,
            row.sequences,
            row.milliseconds_per_step,
            row.milliseconds_per_step_drawn_on_host,
            row.tokens_per_second
        ));
    }
    for row in &report.agreement {
        say(format_args!("{row}"));
    }
    for row in &report.sparse_agreement {
        say(format_args!("{row}"));
    }
}
