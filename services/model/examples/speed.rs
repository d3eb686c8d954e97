//! Prefill and decode speed of a model file: `speed MODEL.gguf [threads]`.

use std::{path::Path, time::Instant};

use kvasir_model::{Attention, LoadOptions, Logits, Model, ModelFile, PageId, PagePool, StepHooks, StepSequence};

/// Tokens per prefill step, as a worker would cut them.
const CHUNK: usize = 512;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: speed MODEL.gguf [threads]")?;
    let threads = args.next().map_or(Ok(2), |threads| threads.parse())?;
    let started = Instant::now();
    let file = ModelFile::open(Path::new(&path))?;
    let opened = started.elapsed();
    let mut model = Model::load(
        &file,
        &LoadOptions {
            threads,
            block_tokens: 64,
        },
    )?;
    say(format!(
        "{}, {threads} threads: opened in {opened:.2?}, loaded in {:.2?}",
        file.name(),
        started.elapsed() - opened
    ));

    let pages: Vec<_> = (0..80).map(|page| Some(PageId(page))).collect();
    let mut pool = PagePool::new(model.schema().layout(), model.shape().layers, pages.len())?;
    let tokens: Vec<u32> = (0..4096_u32)
        .map(|i| i.wrapping_mul(2_654_435_761) % model.shape().vocab as u32)
        .collect();
    let mut step = |model: &mut Model, range: std::ops::Range<usize>, logits, hooks: &mut dyn StepHooks| {
        let started = Instant::now();
        let sequence = StepSequence {
            tokens: &tokens[range.clone()],
            position: range.start,
            pages: &pages,
            attention: Attention::Full,
            logits,
        };
        model
            .step(&[sequence], &mut pool, hooks)
            .map(|_| range.len() as f64 / started.elapsed().as_secs_f64())
    };
    step(&mut model, 0..CHUNK, Logits::Last, &mut ())?;
    let mut rates = Vec::new();
    for _ in 0..5 {
        rates.push(step(&mut model, 0..CHUNK, Logits::Last, &mut ())?);
    }
    say(format!(
        "prefill 512 tokens: {:.0} tok/s (median of 5)",
        median(&mut rates)
    ));
    for context in [512, 4096] {
        for start in (512..context).step_by(CHUNK) {
            let rate = step(&mut model, start..start + CHUNK, Logits::None, &mut ())?;
            if start + CHUNK == context {
                say(format!("prefill 512 tokens from {start} on: {rate:.0} tok/s"));
            }
        }
        let (mut rates, mut watched) = (Vec::new(), Vec::new());
        for _ in 0..32 {
            let last = context - 1..context;
            rates.push(step(&mut model, last.clone(), Logits::Last, &mut ())?);
            watched.push(step(&mut model, last, Logits::Last, &mut Forecasts)?);
        }
        say(format!(
            "decode at context {context}: {:.1} tok/s, {:.1} with forecasts of the next layer's queries (medians of 32, in turns)",
            median(&mut rates),
            median(&mut watched)
        ));
    }
    Ok(())
}

/// Asks for forecasts and looks away.
struct Forecasts;

impl StepHooks for Forecasts {
    fn wants_predicted(&self, _: usize) -> bool {
        true
    }
}

fn median(rates: &mut [f64]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

#[expect(clippy::print_stdout, reason = "an example that reports to the terminal")]
fn say(line: String) {
    println!("{line}");
}
