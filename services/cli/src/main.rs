//! The one binary: `kvasir up`, its parts as processes of their own, the demo and the benchmark.
//!
//! It is the only place that reads the environment and that speaks to standard output. It knows how the parts depend on each
//! other (who needs whose address) and nothing of what they do.
//!
//! Meet first [`args::Args`] (what can be typed), [`tree::Tree`] (what can be configured, and which values follow from which)
//! and [`up::Parts`] (start in order, stop in reverse).
#![forbid(unsafe_code)]

mod args;
mod bench;
mod calibrate;
mod child;
mod corpus;
mod demo;
mod explain;
mod kernels;
mod measure;
mod output;
#[cfg(feature = "planted-bugs")]
mod planted;
mod ready;
mod search_heads;
mod token_bar;
mod tree;
mod up;
mod version;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use kvasir_runtime::config::ConfigError;

use crate::{
    args::{Args, BenchCommand, Command, ConfigCommand, KernelsCommand},
    output::say_error,
    tree::Configuration,
};

/// Large messages are allocated and freed all the time; glibc's allocator gives them back to the system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The exit status when the configuration is refused, as for a command line that is refused.
const REFUSED: u8 = 2;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say_error(&error);
            ExitCode::from(if error.is::<ConfigError>() { REFUSED } else { 1 })
        }
    }
}

fn run(args: Args) -> Result<()> {
    #[cfg(feature = "planted-bugs")]
    planted::choose()?;
    if let Command::Version = args.command {
        version::show();
        return Ok(());
    }
    let configuration = Configuration::load(&args.config)?;
    match args.command {
        Command::Version => Ok(()),
        Command::Config {
            command: ConfigCommand::Explain { format },
        } => explain::explain(&configuration, format),
        Command::Kernels {
            command: KernelsCommand::Build { arch },
        } => kernels::build(&configuration, &arch),
        Command::Bench { command } => match command {
            BenchCommand::Gpu(options) if options.sparse => bench::gpu::crossing(&configuration, &options),
            BenchCommand::Gpu(options) if options.made_up => {
                bench::gpu::made_up(&configuration, &args.config, &options, &runtime()?)
            }
            BenchCommand::Gpu(options) => bench::gpu::run(&configuration, &args.config, &options, &runtime()?),
            BenchCommand::Engine(options) => bench::engine::run(&configuration, &options),
            BenchCommand::Store(options) => runtime()?.block_on(bench::store::run(&options, &args.config)),
            BenchCommand::Trace(options) => runtime()?.block_on(bench::trace::run(&options, &args.config)),
            BenchCommand::Dump(options) => bench::dump::dump(&configuration, &options),
            BenchCommand::Index(options) => bench::index::run(&configuration, &options),
        },
        Command::Calibrate(options) => calibrate::run(&configuration, &options),
        Command::SearchHeads(options) => search_heads::run(&configuration, &options),
        Command::Demo(options) => runtime()?.block_on(demo::run(&configuration, &args.config, &options)),
        Command::Up(options) => up::serve(up::Which::All, configuration, &options),
        Command::Store(options) => up::serve(up::Which::Store, configuration, &options),
        Command::Worker(options) => up::serve(up::Which::Worker, configuration, &options),
        Command::Router(options) => up::serve(up::Which::Router, configuration, &options),
    }
}

/// The threads that everything asynchronous shares.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .thread_name("kvasir-async")
        .enable_all()
        .build()
        .context("cannot start the threads of the process")
}
