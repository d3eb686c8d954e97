//! `kvasir-gpu-check`: every kernel on the GPU that is there against its CPU reference with fresh random inputs, and
//! `kvasir-gpu-check bench`: the kernels' speed beside the ceilings of the machine, as JSON.
//!
//! Needs a driver and NVRTC, no toolkit. Exit status 0 if all passed.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool")]
#![forbid(unsafe_code)]

mod batch;
mod bench;
mod bench_forward;
mod bench_prefill;
mod bench_step;
mod cases;
mod check;
mod forward;
mod linear;
mod planner;
mod prefill;
mod refusals;
mod sample;
mod shares;
mod transfer;

use std::{path::PathBuf, process::ExitCode, time::SystemTime};

use kvasir_cuda::{Gpu, Options, Variant};

const USAGE: &str =
    "usage: kvasir-gpu-check [bench | bench-prefill | bench-long | bench-forward] [--seed N] [--cases N] [--only NAME] [--direct] [--gpu INDEX] [--nvrtc FOLDER] [--cache FOLDER]
  without `bench`: checks every kernel; --seed repeats a run, --cases sets the random shapes per kernel (default 60),
  --only NAME checks one kernel alone, or measures one group of `bench` or what is named so in `bench-prefill`, --direct compiles kernels so that compute-sanitizer's racecheck can follow them
  bench, bench-prefill, bench-long (a million tokens; needs 22 GB), bench-forward: measure, and print JSON";

enum Mode {
    Check,
    Bench,
    Prefill,
    Long,
    Forward,
}

struct Arguments {
    mode: Mode,
    seed: u64,
    cases: usize,
    only: Option<String>,
    gpu: usize,
    options: Options,
}

fn arguments() -> Result<Arguments, String> {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let mut out = Arguments {
        mode: Mode::Check,
        seed: u64::from(now.subsec_nanos()) ^ now.as_secs(),
        cases: 60,
        only: None,
        gpu: 0,
        options: Options::default(),
    };
    let mut rest = std::env::args().skip(1);
    while let Some(name) = rest.next() {
        let mut value = || rest.next().ok_or(format!("{name} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|_| format!("{text} is not a number"));
        match name.as_str() {
            "bench" => out.mode = Mode::Bench,
            "bench-prefill" => out.mode = Mode::Prefill,
            "bench-long" => out.mode = Mode::Long,
            "bench-forward" => out.mode = Mode::Forward,
            "--seed" => out.seed = number(value()?)?,
            "--cases" => out.cases = number(value()?)? as usize,
            "--direct" => out.options.variant = Variant::Direct,
            "--only" => out.only = Some(value()?),
            "--gpu" => out.gpu = number(value()?)? as usize,
            "--nvrtc" => out.options.nvrtc = Some(PathBuf::from(value()?)),
            "--cache" => out.options.cache = Some(PathBuf::from(value()?)),
            _ => return Err(format!("unknown argument {name}")),
        }
    }
    Ok(out)
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(why) => {
            eprintln!("kvasir-gpu-check: {why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let gpu = match Gpu::open(arguments.gpu, &arguments.options) {
        Ok(gpu) => gpu,
        Err(error) => {
            eprintln!("kvasir-gpu-check: {error}");
            return ExitCode::from(2);
        }
    };
    let mut rng = rand::SeedableRng::seed_from_u64(arguments.seed);
    let figures = match arguments.mode {
        Mode::Check => None,
        Mode::Bench => Some(bench::run(&gpu, arguments.seed, arguments.only.as_deref())),
        Mode::Prefill => Some(bench_prefill::run(&gpu, &mut rng, arguments.only.as_deref())),
        Mode::Long => Some(bench_prefill::long(&gpu, &mut rng)),
        Mode::Forward => Some(bench_forward::run(&gpu, &mut rng)),
    };
    let outcome = if let Some(figures) = figures {
        figures.map(|figures| {
            println!("{figures:#}");
            true
        })
    } else {
        println!("{}, seed {}", gpu.name(), arguments.seed);
        let slow = Options {
            variant: Variant::Delays,
            ..arguments.options
        };
        let slow = || Gpu::open(arguments.gpu, &slow).map_err(|error| error.to_string());
        check::run(&gpu, &slow, arguments.seed, arguments.cases, arguments.only.as_deref())
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("kvasir-gpu-check: {error}");
            ExitCode::FAILURE
        }
    }
}
