//! Decoding speed and agreement of each attention mode over one real prompt, beside full attention.
//!
//! `cargo run -p kvasir-integration --example decode -- [PROMPT_TOKENS] [NEW_TOKENS] [TEXT_FILE] [THREADS] [ROWS,OF,THE,TABLE] [own|text]
//! [margins]`
//!
//! A store, a worker and a router run in this process, over their real protocols. Every mode is fed the same tokens, so that an early
//! difference does not make the rest incomparable: those of the text behind the prompt, or, with `own`, those that full attention
//! chose. Agreement is that of the model's choices with those of full attention. `flat-1` attends to every key exactly: what it
//! differs by is not retrieval's doing but that of activations that are rounded to 8 bits after sums in another order. With `margins`
//! each row also says how many of its other choices are no further apart in full attention's logits than the furthest that `flat-1`
//! chose otherwise: near-ties. That computes the text once more.
//!
//! The prompt's context is held open throughout, and rows begin once the store has put its sketches in clusters: before that answers have
//! other last bits, and the thread that does it takes part of the machine.
#![expect(clippy::print_stdout, reason = "an example prints what it measured")]

use std::{ops::Range, time::Duration};

use anyhow::{Context, Result, ensure};
use kvasir_block::{ExtraKeys, Tenant, block_hashes};
use kvasir_client::{ClientConfig, DecodeStream, Form, IndexChoice, OpenContext, Query, StoreClient};
use kvasir_model::{CaptureOptions, CaptureSink, CapturedLayer, LoadOptions, Model, ModelFile, StepAborted, capture};
use kvasir_proto::v1::{AttentionMode, AttentionOptions, GenerateRequest};
use kvasir_testkit::{Cluster, Generated, Metrics, Options, eventually, generate, request, until_durable};

/// Query heads of SmolLM2 per KV head: attended keys are counted per query head, searchable ones per KV head.
const GROUP: u64 = 3;

/// Tokens of a block, as workers have them by default.
const BLOCK_TOKENS: u16 = 64;

/// Fewest tokens that a store clusters.
const SEGMENT_TOKENS: usize = 1024;

type Change = fn(&mut AttentionOptions);

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| arguments.get(at).map_or(Ok(default), |text| text.parse());
    let (tokens, new, threads) = (number(0, 4500)?, number(1, 256)?, number(3, 0)?);
    let text = match arguments.get(2).filter(|path| *path != "-") {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?,
        None => kvasir_integration::PAGE.to_owned(),
    };
    let wanted: Vec<&str> = arguments.get(4).map_or(Vec::new(), |names| names.split(',').collect());
    let mut options = Options::default();
    options.worker_config.threads = threads;
    let cluster = Cluster::start(options).await?;
    let worker = cluster.worker_url(0);
    let mut prompt = cluster.file().tokenizer().encode(&text, false)?;
    ensure!(prompt.len() >= tokens + new, "the text has {} tokens", prompt.len());
    prompt.truncate(tokens + new);
    let mut forced = prompt.split_off(tokens);
    if arguments.get(5).is_some_and(|fed| fed == "own") {
        forced = generate(&worker, request(&prompt, new as u32)).await?.ids;
    }
    let asked = |attention| GenerateRequest {
        attention,
        forced: forced.clone(),
        ..request(&prompt, new as u32)
    };
    generate(&worker, request(&prompt, 1)).await?;
    until_durable(&cluster.store_url(), tokens as u64 / 64).await?;
    let held = hold_clustered(&cluster, &prompt).await?;
    let full = generate(&worker, asked(None)).await?;
    println!("{tokens} prompt tokens, {} fed behind them", forced.len());
    print_line("full", &full, &full);
    let ties = match arguments.get(6).is_some_and(|wanted| wanted == "margins") {
        true => {
            let margins = margins(cluster.file(), &prompt, &forced, threads)?;
            let mut exact = AttentionOptions::default();
            exact.set_mode(AttentionMode::Attend);
            (exact.target_mass, exact.index) = (1.0, "flat".to_owned());
            let exact = generate(&worker, asked(Some(exact))).await?;
            Some(NearTies::of(margins, &exact, &full))
        }
        false => None,
    };
    for &(name, mode, change) in TABLE {
        if !wanted.is_empty() && !wanted.contains(&name) {
            continue;
        }
        let mut options = AttentionOptions::default();
        options.set_mode(mode);
        change(&mut options);
        let answer = generate(&worker, asked(Some(options))).await?;
        print_line(name, &answer, &full);
        if let Some(ties) = &ties {
            ties.print(&answer, &full);
        }
    }
    drop(held);
    cluster.stop().await
}

/// Opens the context that decoding behind `prompt` opens, and waits until all its layers are clustered; they are while this is held.
async fn hold_clustered(cluster: &Cluster, prompt: &[u32]) -> Result<DecodeStream> {
    let client = StoreClient::new(ClientConfig::to(cluster.store_url()))?;
    let tenant = Tenant::new("default").context("a tenant's name")?;
    let (file, shape) = (cluster.file(), cluster.file().shape());
    let namespace = client.open_namespace(&tenant, &file.schema(BLOCK_TOKENS)).await?;
    let context = OpenContext {
        chain: block_hashes(prompt, BLOCK_TOKENS.into(), &ExtraKeys::none()),
        q_heads: shape.q_heads,
        softmax_scale: 1.0 / (shape.head_dim as f32).sqrt(),
        index: IndexChoice::Best,
        row_cache_rows: 0,
    };
    let mut held = client.decode(&namespace, context).await?;
    if held.opened().index != "sketch" || prompt.len() < SEGMENT_TOKENS {
        return Ok(held);
    }
    // What is asked does not matter: each layer is read and sketched.
    let q: Vec<f32> = (0..shape.q_heads * shape.head_dim)
        .map(|at| (at as f32).sin())
        .collect();
    for layer in 0..shape.layers as u16 {
        let query = Query {
            sequence: layer.into(),
            layer,
            q: q.clone(),
            form: Form::Attend {
                target_mass: 0.9,
                k_max: 0,
                options: kvasir_client::AttendOptions::default(),
            },
            excluded: vec![],
            deadline: None,
            local_lse: vec![],
        };
        held.send(query).await?;
        held.receive().await?;
    }
    let (store, layers) = (cluster.store_admin_url(), shape.layers as f64);
    eventually("all layers clustered", Duration::from_secs(60), async || {
        let clustered = Metrics::of(&store).await?.sum("kvasir_store_clustered_layers_total");
        Ok(clustered.is_some_and(|clustered| clustered >= layers))
    })
    .await?;
    Ok(held)
}

/// How far apart the two best logits are with full attention, at each step behind the prompt.
fn margins(file: &ModelFile, prompt: &[u32], forced: &[u32], threads: usize) -> Result<Vec<f32>> {
    /// Takes them of the steps from one on.
    struct Margins {
        from: usize,
        vocab: usize,
        margins: Vec<f32>,
    }
    impl CaptureSink for Margins {
        fn layer(&mut self, _: &CapturedLayer<'_>) -> std::result::Result<(), StepAborted> {
            Ok(())
        }

        fn step(&mut self, tokens: Range<usize>, logits: &[f32]) -> std::result::Result<(), StepAborted> {
            for (_, logits) in tokens
                .zip(logits.chunks_exact(self.vocab))
                .filter(|(token, _)| *token >= self.from)
            {
                let mut best = [f32::NEG_INFINITY; 2];
                for &logit in logits {
                    best = [best[0].max(logit), best[1].max(best[0].min(logit))];
                }
                self.margins.push(best[0] - best[1]);
            }
            Ok(())
        }
    }
    let mut model = Model::load(
        file,
        &LoadOptions {
            threads: threads.max(1),
            block_tokens: 64,
        },
    )?;
    let mut sink = Margins {
        from: prompt.len() - 1,
        vocab: file.shape().vocab,
        margins: Vec::new(),
    };
    let options = CaptureOptions {
        logits: true,
        ..CaptureOptions::default()
    };
    capture(&mut model, &[prompt, forced].concat(), &options, &mut sink)?;
    Ok(sink.margins)
}

/// Steps that exact attention over every key decides otherwise than full attention.
struct NearTies {
    margins: Vec<f32>,
    /// The largest margin of such a step.
    largest: f32,
}

impl NearTies {
    fn of(margins: Vec<f32>, exact: &Generated, full: &Generated) -> Self {
        let other = others(exact, full);
        let largest = other.iter().map(|&step| margins[step]).fold(0.0, f32::max);
        println!(
            "{:20} exact attention over every key chooses otherwise in {} steps, of margins up to {largest:.3}",
            "",
            other.len()
        );
        Self { margins, largest }
    }

    fn print(&self, answer: &Generated, full: &Generated) {
        let other = others(answer, full);
        let near = other.iter().filter(|&&step| self.margins[step] <= self.largest).count();
        let margins: Vec<String> = other.iter().map(|&step| format!("{:.3}", self.margins[step])).collect();
        println!(
            "{:20} {near} of {} other choices are as near to a tie; their margins: {}",
            "",
            other.len(),
            margins.join(" ")
        );
    }
}

/// Steps whose choices differ.
fn others(answer: &Generated, full: &Generated) -> Vec<usize> {
    let pairs = answer.ids.iter().zip(&full.ids).enumerate();
    pairs.filter(|(_, (a, b))| a != b).map(|(step, _)| step).collect()
}

/// How attention is asked for, by name.
const TABLE: &[(&str, AttentionMode, Change)] = {
    use AttentionMode::{Attend, Rows};
    &[
        ("attend", Attend, |_| {}),
        ("flat-1", Attend, |o| {
            (o.target_mass, o.index) = (1.0, "flat".to_owned())
        }),
        ("flat-.99", Attend, |o| {
            (o.target_mass, o.index) = (0.99, "flat".to_owned())
        }),
        ("mass-1", Attend, |o| o.target_mass = 1.0),
        ("mass-.995", Attend, |o| o.target_mass = 0.995),
        ("mass-.99", Attend, |o| o.target_mass = 0.99),
        ("mass-.98", Attend, |o| o.target_mass = 0.98),
        ("mass-.95", Attend, |o| o.target_mass = 0.95),
        ("mass-.9", Attend, |o| o.target_mass = 0.9),
        ("effort-.02", Attend, |o| o.effort = 0.02),
        ("effort-.05", Attend, |o| o.effort = 0.05),
        ("effort-.1", Attend, |o| o.effort = 0.1),
        ("mass-.98-effort-.1", Attend, |o| {
            (o.target_mass, o.effort) = (0.98, 0.1)
        }),
        ("mass-.95-effort-.1", Attend, |o| {
            (o.target_mass, o.effort) = (0.95, 0.1)
        }),
        ("rows-128", Rows, |o| o.k = 128),
        ("rows-256", Rows, |o| o.k = 256),
    ]
};

fn print_line(name: &str, answer: &Generated, full: &Generated) {
    let report = answer.finished.report.clone().unwrap_or_default();
    let full_nll = full.finished.report.as_ref().map_or(0.0, |report| report.forced_nll);
    let agreeing = answer.ids.iter().zip(&full.ids).filter(|(a, b)| a == b).count();
    let steps = answer.ids.len().saturating_sub(1);
    println!(
        "{name:20} {:6.1} tok/s, {:6.2} % as full, nll {:+.4}, {:5.2} % of keys attended, mass p50 {:.4}, {} B/token{}",
        steps as f32 * 1e3 / report.decode_ms,
        agreeing as f64 * 100.0 / full.ids.len().max(1) as f64,
        report.forced_nll - full_nll,
        report.keys_attended as f64 * 100.0 / (report.keys_total * GROUP).max(1) as f64,
        report.mass_covered_p50,
        report.retrieved_bytes / steps.max(1) as u64,
        if report.fell_back {
            format!(", fell back: {}", report.fallback_reason)
        } else {
            String::new()
        }
    );
    if report.round_trips > 0 {
        let per_reply = |ms: f32| ms * 1e3 / report.round_trips as f32;
        println!(
            "{:20} {}: per reply {:.0} us searched, {:.0} us queued, {:.0} us waited for; wire p50 {:.0} us; {:.1} % of the \
             search hidden, {} of {} hinted; {} of {} rows kept",
            "",
            report.index,
            per_reply(report.search_ms),
            per_reply(report.store_queued_ms),
            per_reply(report.waited_ms),
            report.wire_us_p50,
            report.search_hidden * 100.0,
            report.hinted,
            report.round_trips,
            report.rows_kept,
            report.rows,
        );
    }
}
