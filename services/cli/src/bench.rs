//! `kvasir bench engine`: our forward beside llama.cpp's, same model file, same threads, in turns.
//!
//! Both engines stay loaded and are asked alternately, so that whatever else the machine does meets both. What is measured is
//! the forward alone: no tokenizer, no HTTP, no store.

mod dump;
mod ours;
mod peer;

use anyhow::{Context, Result};
use serde::Serialize;

pub(crate) use self::dump::dump;
use self::{ours::Ours, peer::Peer};
use crate::{
    args::EngineArgs,
    measure::{Machine, median},
    output::{print, say},
    tree::Configuration,
    up::open_model_blocking,
    version::{PROFILE, VERSION},
};

/// What is measured: tokens already there, tokens computed, whether one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Case {
    name: &'static str,
    /// Tokens in the cache before the clock starts.
    context: usize,
    /// Tokens computed while it runs.
    tokens: usize,
    /// One token per step, as in decoding; else all of them as a prompt.
    decode: bool,
}

const CASES: [Case; 4] = [
    case("prefill 512", 0, 512, false),
    case("prefill 2048", 0, 2048, false),
    case("decode at 512", 512, 48, true),
    case("decode at 2048", 2048, 48, true),
];

const fn case(name: &'static str, context: usize, tokens: usize, decode: bool) -> Case {
    Case {
        name,
        context,
        tokens,
        decode,
    }
}

/// Tokens of the longest case.
const TOKENS_MAX: usize = 2048 + 48;

/// The result of `--json`. Speeds are medians over the rounds.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    threads: usize,
    rounds: u16,
    cases: Vec<Compared>,
    /// The lowest ratios: what issue and reader ask about.
    prefill_ratio: Option<f64>,
    decode_ratio: Option<f64>,
    kvasir: &'static str,
    profile: &'static str,
    /// `llama-cpp-python` and what it says about its build.
    peer: Option<String>,
    machine: Machine,
}

#[derive(Debug, Serialize)]
struct Compared {
    #[serde(flatten)]
    case: Case,
    kvasir_tokens_per_second: f64,
    llama_cpp_tokens_per_second: Option<f64>,
    /// Ours over theirs.
    ratio: Option<f64>,
}

pub(crate) fn engine(configuration: &Configuration, args: &EngineArgs) -> Result<()> {
    let path = &configuration.tree().model.path;
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    // The peer first: it is what may be missing.
    let mut peer = match args.alone {
        true => None,
        false => Some(Peer::start(args.python.as_deref(), path, threads, TOKENS_MAX)?),
    };
    let file = open_model_blocking(path)?;
    let mut ours = Ours::load(&file, threads, TOKENS_MAX)?;
    let tokens = prompt(&file, TOKENS_MAX)?;
    let mut cases = Vec::new();
    for case in CASES {
        let mut speeds = (Vec::new(), Vec::new());
        // The first round warms caches and clocks and is not counted.
        for round in 0..=args.rounds {
            say(format_args!("{}: round {round} of {}", case.name, args.rounds));
            let ours = ours.run(&case, &tokens)?;
            let theirs = peer.as_mut().map(|peer| peer.run(&case, &tokens)).transpose()?;
            if round > 0 {
                speeds.0.push(case.tokens as f64 / ours);
                speeds.1.extend(theirs.map(|seconds| case.tokens as f64 / seconds));
            }
        }
        let theirs = (!speeds.1.is_empty()).then(|| median(speeds.1));
        let ours = median(speeds.0);
        cases.push(Compared {
            case,
            kvasir_tokens_per_second: ours,
            llama_cpp_tokens_per_second: theirs,
            ratio: theirs.map(|theirs| ours / theirs),
        });
    }
    let lowest = |decode: bool| {
        cases
            .iter()
            .filter(|compared| compared.case.decode == decode)
            .filter_map(|compared| compared.ratio)
            .min_by(f64::total_cmp)
    };
    let report = Report {
        model: file.name().to_owned(),
        threads,
        rounds: args.rounds,
        prefill_ratio: lowest(false),
        decode_ratio: lowest(true),
        cases,
        kvasir: VERSION,
        profile: PROFILE,
        peer: peer.map(|peer| peer.version().to_owned()),
        machine: Machine::here(),
    };
    show(&report);
    if args.json {
        print(serde_json::to_string_pretty(&report).context("the result cannot be written as JSON")?);
    }
    Ok(())
}

/// Token ids of a real text, as many as asked for; speed does not depend on what they say.
fn prompt(file: &kvasir_model::ModelFile, count: usize) -> Result<Vec<u32>> {
    let text = include_str!("../../../ARCHITECTURE.md");
    let tokens = file.tokenizer().encode(text, false)?;
    anyhow::ensure!(!tokens.is_empty(), "the tokenizer makes no tokens of a page of text");
    Ok(tokens.into_iter().cycle().take(count).collect())
}

fn show(report: &Report) {
    say(format_args!(
        "{}, {} threads, {} rounds, profile {}; {} ({} cores)",
        report.model, report.threads, report.rounds, report.profile, report.machine.cpu, report.machine.cores
    ));
    say(format_args!(
        "{:16}{:>14}{:>14}{:>8}",
        "", "kvasir", "llama.cpp", "ratio"
    ));
    let or_dash =
        |value: Option<f64>, digits: usize| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"));
    for compared in &report.cases {
        say(format_args!(
            "{:16}{:>8.1} tok/s{:>8} tok/s{:>8}",
            compared.case.name,
            compared.kvasir_tokens_per_second,
            or_dash(compared.llama_cpp_tokens_per_second, 1),
            or_dash(compared.ratio, 2)
        ));
    }
}
