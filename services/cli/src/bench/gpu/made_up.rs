//! `kvasir bench gpu --made-up`: the shape of Llama-3-8B with weights of noise. Everything that computes, copies and searches is
//! what serves real models; what is noise is the weights and the prompt, and so what attention looks at: scores that are about
//! normal, of a spread that is chosen, and the same in every head. Real heads differ from each other, and their scores are
//! no noise: how many keys must be read for a given mass is theirs to say, not this bench's.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kvasir_block::BlockHash;
use kvasir_client::{AttendOptions, ClientConfig, Form, Report, StoreClient};
use kvasir_model::{Device, MadeUp, Model};
use kvasir_runtime::units::ByteSize;
use kvasir_worker::{DeviceKind, WorkerConfig};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;
use tokio::runtime::Runtime;

use super::{
    basis::Gathered,
    forward::Forward,
    push::{self, PushCost, Pushing},
    remote::{Asking, Remote, put},
};
use crate::{
    args::{ConfigArgs, GpuArgs},
    bench::store::{Host, Wanted, hash, settle},
    measure::{Machine, median},
    output::{print, say},
    tree::Configuration,
    version::VERSION,
};

const SEED: u64 = 1;
/// Prompts whose prefill is measured with and without push.
const PROMPTS: [usize; 2] = [8192, 32_768];
const STEP_TOKENS: usize = 8192;
/// Tokens decoded per measurement; those before are not counted.
const DECODED: usize = 32;
const WARM: usize = 3;
/// Room behind the context for what is decoded.
const ROOM_TOKENS: usize = 128;

#[derive(Debug, Serialize)]
struct MadeUpReport {
    shape: &'static str,
    noise: &'static str,
    score_deviation: f32,
    gpu: String,
    context: usize,
    /// GiB of weights, and of the context's keys and values.
    weights_gib: f64,
    context_gib: f64,
    prefill: Vec<PushCost>,
    prefill_context_seconds: f64,
    decode_full: Steps,
    /// With the exact scan, with sketches, and with sketches whose searches hints begin.
    decode_attend: Vec<Attended>,
    kvasir: &'static str,
    machine: Machine,
}

/// Decode steps of one sequence.
#[derive(Debug, Serialize)]
struct Steps {
    milliseconds_per_token: f64,
    slowest_milliseconds: f64,
    /// GiB on the GPU besides the weights.
    kv_on_gpu_gib: f64,
}

#[derive(Debug, Serialize)]
struct Attended {
    steps: Steps,
    index: String,
    index_reason: String,
    /// First layer that a hint was sent for; none without hints.
    hint_from_layer: Option<usize>,
    /// Hints that were sent, and those whose search was used.
    hints: u64,
    hints_used: u64,
    put_seconds: f64,
    /// Of a step: waiting for the store, and the store's own searches.
    waited_milliseconds: f64,
    searched_milliseconds: f64,
    /// Of the searches, before their queries came.
    hidden_milliseconds: f64,
    /// Shares of all keys of the context: attended to, and scored exactly, means over layers and heads.
    keys_attended: f64,
    keys_scored: f64,
    mass_covered_mean: f64,
    mass_covered_least: f64,
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

pub(crate) fn made_up(
    configuration: &Configuration,
    config: &ConfigArgs,
    args: &GpuArgs,
    runtime: &Runtime,
) -> Result<()> {
    let worker = WorkerConfig {
        device: DeviceKind::Gpu,
        ..configuration.tree().worker.clone()
    };
    let Device::Gpu(gpu) = worker.open_device()? else {
        anyhow::bail!("the device is no GPU");
    };
    let block_tokens = usize::from(worker.block_tokens);
    let context = args.context as usize / block_tokens * block_tokens;
    let before = gpu.free_bytes()?;
    let noise = MadeUp::llama_3_8b(context + ROOM_TOKENS, SEED, args.score_deviation);
    let model = Model::made_up(&noise, &gpu, worker.block_tokens)?;
    let weights = before.saturating_sub(gpu.free_bytes()?);
    let mut forward = Forward::new(model, context + ROOM_TOKENS, 1)?;
    let mut rng = StdRng::seed_from_u64(SEED);
    let vocab = forward.shape().vocab as u32;
    let tokens: Vec<u32> = (0..context).map(|_| rng.random_range(0..vocab)).collect();

    let mut prefill = Vec::new();
    let prompts: Vec<usize> = PROMPTS.into_iter().filter(|prompt| *prompt <= context).collect();
    if let Some(&longest) = prompts.last() {
        let pushing = Pushing::start(&worker, config, &args.out, runtime, &forward, longest)?;
        for prompt in prompts {
            for step_tokens in [DeviceKind::Gpu.step_tokens(), STEP_TOKENS] {
                say(format_args!("prefill of {prompt} in steps of {step_tokens}"));
                prefill.push(pushing.measure(&mut forward, &tokens[..prompt], step_tokens, args)?);
            }
        }
        pushing.stop()?;
    }
    say(format_args!("prefill of {context}"));
    let begun = Instant::now();
    forward.prompt(0, &tokens, STEP_TOKENS)?;
    let prefill_context_seconds = begun.elapsed().as_secs_f64();

    say("decode, keys and values on the GPU");
    let mut times = Vec::new();
    let mut next = tokens[0];
    for step in 0..WARM + DECODED {
        let begun = Instant::now();
        next = forward.next_token(next, context + step)?;
        times.push(1e3 * begun.elapsed().as_secs_f64());
    }
    let decode_full = steps(&times[WARM..], forward.pool_bytes());
    let context_gib = gib(context / block_tokens * forward.schema().block_bytes());

    let decode_attend = attend(&worker, config, args, runtime, &mut forward, context)?;
    let report = MadeUpReport {
        shape: "Llama-3-8B: 32 layers, hidden 4096, 32 query heads, 8 KV heads, d 128, f16",
        noise: "weights and prompt; scores of attention are about normal in every head",
        score_deviation: args.score_deviation,
        gpu: gpu.name().to_owned(),
        context,
        weights_gib: gib(weights),
        context_gib,
        prefill,
        prefill_context_seconds,
        decode_full,
        decode_attend,
        kvasir: VERSION,
        machine: Machine::here(),
    };
    show(&report);
    if args.json {
        print(serde_json::to_string_pretty(&report).context("the result cannot be written as JSON")?);
    }
    Ok(())
}

/// Puts the context to a store on this host, lets all of it but the static set go, and decodes over what the store answers.
fn attend(
    worker: &WorkerConfig,
    config: &ConfigArgs,
    args: &GpuArgs,
    runtime: &Runtime,
    forward: &mut Forward,
    context: usize,
) -> Result<Vec<Attended>> {
    let block_tokens = usize::from(worker.block_tokens);
    let blocks = context / block_tokens;
    let bytes = blocks * forward.schema().block_bytes();
    say("the context goes to the store");
    let wanted = Wanted {
        running: None,
        running_pid: None,
        out: &args.out,
        host_bytes: ByteSize::bytes(bytes as u64 + bytes as u64 / 2 + (2 << 30)),
        disk_bytes: Some(ByteSize::bytes(bytes as u64 + bytes as u64 / 2)),
        objects: false,
        // A context that finds no room here is read and verified anew for every query.
        context_bytes: Some(ByteSize::bytes(bytes as u64 + bytes as u64 / 2)),
    };
    let host = runtime.block_on(Host::start(wanted, config))?;
    let client = {
        let _inside = runtime.enter();
        StoreClient::new(ClientConfig::to(host.url()))?
    };
    let namespace = runtime.block_on(client.open_namespace(&host.tenant()?, forward.schema()))?;
    let run = host.next_run();
    let chain: Vec<BlockHash> = (0..blocks as u64).map(|at| hash(run, 0, at)).collect();
    let put_seconds = runtime.block_on(put(&client, &namespace, forward, &chain))?;
    runtime.block_on(settle(&client))?;

    let asked = worker.attention;
    let whole = |tokens: u32| tokens as usize / block_tokens * block_tokens;
    let (sink, window) = (whole(asked.sink), whole(asked.window));
    ensure!(sink + window < context, "the static set is the whole context");
    let first = context - window;
    let gathered = Gathered::keys(forward, blocks)?;
    forward.keep(
        blocks,
        |block| block * block_tokens < sink || block * block_tokens >= first,
        ROOM_TOKENS / block_tokens,
    )?;
    let excluded = [0..sink as u32, first as u32..context as u32];
    let asking = Asking {
        form: Form::Attend {
            target_mass: asked.target_mass,
            k_max: 0,
            options: AttendOptions {
                tail: asked.tail,
                effort: asked.effort,
                ..AttendOptions::default()
            },
        },
        excluded: excluded.into_iter().filter(|range| !range.is_empty()).collect(),
        // The exact scan takes nothing from a forecast, and a worker sends it none.
        hint_from: None,
    };
    let local = move |position: usize| [0..sink, first..position + 1];
    say("decode, the context at the store, every key scanned");
    let mut remote = Remote::open(runtime, &client, &namespace, forward, &chain, asking.clone())?;
    let flat = attended(forward, &mut remote, context, put_seconds, local)?;
    say("directions for sketches");
    let basis = gathered.basis(forward, remote.queries())?;
    drop(remote);
    let tenant = host.tenant()?;
    let opened = client.open_namespace_with(&tenant, forward.schema(), basis.encode().into());
    let namespace = runtime.block_on(opened)?;
    let mut measured = vec![flat];
    for hint_from in [None, Some(asked.hint_from_layer as usize)] {
        let hints = if hint_from.is_some() { "with" } else { "without" };
        say(format_args!(
            "decode, the context at the store, through sketches, {hints} hints"
        ));
        let asking = Asking {
            hint_from,
            ..asking.clone()
        };
        let mut remote = Remote::open(runtime, &client, &namespace, forward, &chain, asking)?;
        measured.push(attended(forward, &mut remote, context, put_seconds, local)?);
    }
    runtime.block_on(host.stop())?;
    Ok(measured)
}

/// Decodes over `local` positions and what a store answers.
fn attended(
    forward: &mut Forward,
    remote: &mut Remote<'_>,
    context: usize,
    put_seconds: f64,
    local: impl Fn(usize) -> [Range<usize>; 2],
) -> Result<Attended> {
    let (index, index_reason) = remote.index();
    let (mut times, mut waits, mut reports, mut hints) = (Vec::new(), Vec::new(), Vec::<Report>::new(), 0);
    let mut next = 0;
    for step in 0..WARM + DECODED {
        let position = context + step;
        let begun = Instant::now();
        let logits = forward.next_local(
            next,
            position,
            local(position).into_iter().filter(|range| !range.is_empty()).collect(),
            remote,
        )?;
        next = largest(&logits);
        let time = 1e3 * begun.elapsed().as_secs_f64();
        let since = remote.take();
        if step >= WARM {
            times.push(time);
            waits.push(1e3 * since.waited.as_secs_f64());
            reports.extend(since.reports);
            hints += since.hints;
        }
    }
    let shape = forward.shape();
    let total: u64 = reports.iter().map(|report| report.keys_total).sum();
    let attended: u64 = reports.iter().map(|report| report.keys_attended).sum();
    let scored: u64 = reports
        .iter()
        .map(|report| report.keys_scanned + report.keys_rescored)
        .sum();
    let mass: Vec<f64> = reports
        .iter()
        .flat_map(|report| report.mass_covered.iter().map(|&mass| f64::from(mass)))
        .collect();
    let per_token =
        |time: fn(&Report) -> Duration| 1e3 * reports.iter().map(time).sum::<Duration>().as_secs_f64() / DECODED as f64;
    Ok(Attended {
        steps: steps(&times, forward.pool_bytes()),
        index,
        index_reason,
        hint_from_layer: remote.hint_from(),
        hints,
        hints_used: reports.iter().map(|report| u64::from(report.hinted)).sum(),
        put_seconds,
        waited_milliseconds: median(waits),
        searched_milliseconds: per_token(|report| report.search),
        hidden_milliseconds: per_token(|report| report.hidden),
        // Attended keys are counted by query head.
        keys_attended: attended as f64 / (total.max(1) * shape.group() as u64) as f64,
        keys_scored: scored as f64 / total.max(1) as f64,
        mass_covered_mean: mass.iter().sum::<f64>() / mass.len().max(1) as f64,
        mass_covered_least: mass.iter().copied().fold(1.0, f64::min),
    })
}

fn steps(milliseconds: &[f64], pool_bytes: usize) -> Steps {
    Steps {
        milliseconds_per_token: median(milliseconds.to_vec()),
        slowest_milliseconds: milliseconds.iter().copied().fold(0.0, f64::max),
        kv_on_gpu_gib: gib(pool_bytes),
    }
}

fn largest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(index, _)| index as u32)
}

fn show(report: &MadeUpReport) {
    say(format_args!(
        "{} with noise for weights ({:.1} GiB) on {}; a context of {} tokens has {:.1} GiB",
        report.shape, report.weights_gib, report.gpu, report.context, report.context_gib
    ));
    report.prefill.iter().for_each(push::show);
    say(format_args!(
        "prefill {:6}: {:.1} s",
        report.context, report.prefill_context_seconds
    ));
    say(format_args!(
        "decode, everything on the GPU ({:.1} GiB): {:.2} ms a token",
        report.decode_full.kv_on_gpu_gib, report.decode_full.milliseconds_per_token
    ));
    for attended in &report.decode_attend {
        say(format_args!(
            "decode, the context at a store ({:.2} GiB on the GPU): {:.1} ms a token, {:.1} ms of it waiting; index {}, {} of {} hints of \
             use, {:.2} % of the keys attended, {:.2} % scored, mass covered {:.3} (least {:.3})",
            attended.steps.kv_on_gpu_gib,
            attended.steps.milliseconds_per_token,
            attended.waited_milliseconds,
            attended.index,
            attended.hints_used,
            attended.hints,
            100.0 * attended.keys_attended,
            100.0 * attended.keys_scored,
            attended.mass_covered_mean,
            attended.mass_covered_least
        ));
    }
}
