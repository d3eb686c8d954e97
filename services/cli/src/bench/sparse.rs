//! `kvasir bench sparse`: sparse prefill beside dense, same model, same text.
//!
//! Two views. *Masks*: on the queries, keys and values of a dense forward, how much softmax mass the masks of each pattern keep,
//! how far the attention outputs are off, and how dense they are. *Forward*: the text through the model under the patterns, its
//! negative log-likelihood beside that of the dense forward at the same positions, and the time.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use kvasir_model::{
    Attention, CaptureOptions, CaptureSink, CapturedLayer, LoadOptions, Logits, Model, ModelFile, ModelShape, PageId,
    SparsePrefill, StepAborted, StepSequence, capture,
};
use kvasir_sparse::{
    HeadPatterns, Quality,
    search::{Criterion, Options, Space, compare},
};
use serde::Serialize;

use super::dump::loss;
use crate::{
    args::SparseArgs,
    corpus::Corpus,
    measure::Machine,
    output::{print, say},
    search_heads::HeadTexts,
    token_bar::TokenBar,
    tree::Configuration,
    up::open_model_blocking,
    version::{PROFILE, VERSION},
};

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    text: String,
    tokens: usize,
    block_tokens: u16,
    dense: Forward,
    sparse: Vec<Measured>,
    threads: usize,
    kvasir: &'static str,
    profile: &'static str,
    machine: Machine,
}

#[derive(Debug, Serialize)]
struct Measured {
    name: String,
    dense_up_to: usize,
    /// Means over all heads of all layers, over queries behind `dense_up_to`.
    masks: Option<Masks>,
    forward: Forward,
    /// Of the forward under the patterns less that of the dense one, nats per token, over predictions behind `dense_up_to`.
    nll_added: f64,
    /// Mean and largest difference of a token's NLL, either way.
    nll_moved: f64,
    nll_moved_most: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Masks {
    mass: f64,
    mass_min: f64,
    output_error: f64,
    density: f64,
    work: f64,
}

#[derive(Clone, Debug, Serialize)]
struct Forward {
    seconds: f64,
    tokens_per_second: f64,
    /// Nats per token behind the first sparse block's beginning of the patterns with the lowest.
    nll: f64,
    #[serde(skip)]
    losses: Vec<f64>,
}

pub(crate) fn run(configuration: &Configuration, args: &SparseArgs) -> Result<()> {
    let file = open_model_blocking(&configuration.tree().model.path)?;
    let shape = file.shape().clone();
    let corpus = Corpus::read(&args.text, &file)?;
    let count = args.tokens.unwrap_or(shape.context_tokens_max).min(corpus.len());
    ensure!(
        (2..=shape.context_tokens_max).contains(&count),
        "{count} tokens (--tokens): give from 2 to the {} of the model's context",
        shape.context_tokens_max
    );
    let tokens = corpus.tokens(0..count);
    let sets = sets(args, &file)?;
    ensure!(
        !sets.is_empty(),
        "nothing to measure: name files of patterns, or patterns with --pattern"
    );
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let options = LoadOptions {
        threads,
        block_tokens: args.block_tokens,
    };
    let mut bar = TokenBar::new((1 + sets.len()) * count + if args.every > 0 { count } else { 0 });
    let mut masks = vec![None; sets.len()];
    if args.every > 0 {
        bar.doing("a dense forward, whose queries and keys the masks are judged on");
        let mut model = Model::load(&file, &options)?;
        masks = judge_masks(&mut model, tokens, &sets, args, threads)?;
        bar.add(count);
    }
    bar.doing("dense");
    let mut dense = forward(&file, &options, None, tokens, &mut bar)?;
    let mut measured = Vec::new();
    for ((name, patterns), masks) in sets.iter().zip(masks) {
        bar.doing(name);
        let sparse = SparsePrefill::new(patterns.clone(), &file, args.block_tokens)?;
        let from = sparse.from();
        let mut forward = forward(&file, &options, Some(sparse), tokens, &mut bar)?;
        // The loss at index i is that of the prediction made at position i.
        let behind = |losses: &[f64]| losses.get(from..).unwrap_or_default().to_vec();
        let (with, without) = (behind(&forward.losses), behind(&dense.losses));
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let moved: Vec<f64> = with
            .iter()
            .zip(&without)
            .map(|(with, without)| (with - without).abs())
            .collect();
        forward.nll = mean(&with);
        measured.push(Measured {
            name: name.clone(),
            dense_up_to: from,
            masks,
            nll_added: mean(&with) - mean(&without),
            nll_moved: mean(&moved),
            nll_moved_most: moved.iter().copied().fold(0.0, f64::max),
            forward,
        });
    }
    bar.finish();
    let least = measured.iter().map(|one| one.dense_up_to).min().unwrap_or(0);
    let behind = dense.losses.get(least..).unwrap_or_default();
    dense.nll = behind.iter().sum::<f64>() / behind.len().max(1) as f64;
    let report = Report {
        model: file.name().to_owned(),
        text: corpus.source,
        tokens: count,
        block_tokens: args.block_tokens,
        dense,
        sparse: measured,
        threads,
        kvasir: VERSION,
        profile: PROFILE,
        machine: Machine::here(),
    };
    show(&report);
    if args.json {
        print(serde_json::to_string(&report)?);
    }
    Ok(())
}

/// What is measured, with names.
fn sets(args: &SparseArgs, file: &ModelFile) -> Result<Vec<(String, HeadPatterns)>> {
    let shape = file.shape();
    let mut sets = Vec::new();
    for path in &args.files {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let patterns =
            HeadPatterns::read(&bytes, shape.q_heads).with_context(|| format!("{} cannot be used", path.display()))?;
        let name = path.file_name().unwrap_or(Path::new("").as_os_str()).to_string_lossy();
        sets.push((name.into_owned(), patterns));
    }
    for pattern in &args.pattern {
        let mut patterns = HeadPatterns::uniform(*pattern, shape.layers, shape.q_heads)?;
        patterns.dense_up_to = args.dense_up_to;
        sets.push((pattern.to_string(), patterns));
    }
    Ok(sets)
}

/// Judges all sets on the queries, keys and values of a dense forward.
fn judge_masks(
    model: &mut Model,
    tokens: &[u32],
    sets: &[(String, HeadPatterns)],
    args: &SparseArgs,
    threads: usize,
) -> Result<Vec<Option<Masks>>> {
    let mut judge = Judge {
        shape: model.shape().clone(),
        sets,
        args,
        threads,
        sums: vec![None; sets.len()],
        failed: None,
    };
    let whole = CaptureOptions {
        step_tokens: tokens.len(),
        ..CaptureOptions::default()
    };
    let captured = capture(model, tokens, &whole, &mut judge);
    if let Some(error) = judge.failed {
        return Err(error);
    }
    captured?;
    let masks = judge.sums.into_iter().map(|sum| {
        sum.map(|quality: Quality| Masks {
            mass: quality.mass,
            mass_min: quality.mass_min,
            output_error: quality.output_error,
            density: quality.density,
            work: quality.work_share(),
        })
    });
    Ok(masks.collect())
}

struct Judge<'a> {
    shape: ModelShape,
    sets: &'a [(String, HeadPatterns)],
    args: &'a SparseArgs,
    threads: usize,
    /// Of each set, over all heads so far.
    sums: Vec<Option<Quality>>,
    failed: Option<anyhow::Error>,
}

impl CaptureSink for Judge<'_> {
    fn layer(&mut self, layer: &CapturedLayer<'_>) -> Result<(), StepAborted> {
        let texts = HeadTexts::new(layer, &self.shape);
        let heads: Vec<usize> = (0..self.shape.q_heads).collect();
        let (sets, args) = (self.sets, self.args);
        let judged: Vec<Result<Vec<Quality>>> = std::thread::scope(|scope| {
            let running: Vec<_> = heads
                .chunks(heads.len().div_ceil(self.threads.max(1)))
                .map(|heads| {
                    let texts = &texts;
                    scope.spawn(move || {
                        let each = heads.iter().map(|&head| {
                            texts.with(head, |text| {
                                let mut all = Vec::new();
                                for (_, patterns) in sets {
                                    let options = Options {
                                        rows: 64,
                                        chunk_tokens: usize::from(args.block_tokens),
                                        from: patterns.dense_up_to,
                                        budget: (64, 64),
                                        criterion: Criterion::OutputError,
                                        space: Space::Paper,
                                        every: args.every,
                                    };
                                    let pattern = patterns.layers()[layer.layer][head];
                                    all.push(compare(text, &[pattern], &options)?[0].1);
                                }
                                anyhow::Ok(all)
                            })
                        });
                        each.collect::<Vec<_>>()
                    })
                })
                .collect();
            running
                .into_iter()
                .flat_map(|thread| match thread.join() {
                    Ok(judged) => judged,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
                .collect()
        });
        for head in judged {
            match head {
                Ok(qualities) => {
                    for (sum, quality) in self.sums.iter_mut().zip(qualities) {
                        *sum = Some(sum.map_or(quality, |sum| sum.join(quality)));
                    }
                }
                Err(error) => {
                    self.failed = Some(error);
                    return Err(StepAborted("the masks cannot be judged".to_owned()));
                }
            }
        }
        Ok(())
    }
}

/// The text through the model, block by block.
fn forward(
    file: &ModelFile,
    options: &LoadOptions,
    sparse: Option<SparsePrefill>,
    tokens: &[u32],
    bar: &mut TokenBar,
) -> Result<Forward> {
    let mut model = Model::load(file, options)?;
    let attention = match sparse {
        Some(sparse) => {
            model = model.with_sparse_prefill(sparse)?;
            Attention::Sparse
        }
        None => Attention::Full,
    };
    let block_tokens = usize::from(options.block_tokens);
    let blocks = tokens.len().div_ceil(block_tokens);
    let mut pool = model.pool(blocks)?;
    let pages: Vec<Option<PageId>> = (0..blocks as u32).map(|page| Some(PageId(page))).collect();
    let vocab = model.shape().vocab;
    let (mut losses, mut seconds) = (Vec::with_capacity(tokens.len()), 0.0);
    for (block, part) in tokens.chunks(block_tokens).enumerate() {
        let position = block * block_tokens;
        let sequence = StepSequence {
            tokens: part,
            position,
            pages: &pages,
            attention: attention.clone(),
            logits: Logits::All,
        };
        let begun = Instant::now();
        let output = model.step(&[sequence], &mut pool, &mut ())?;
        seconds += begun.elapsed().as_secs_f64();
        let next = tokens.get(position + 1..).unwrap_or_default();
        for (logits, next) in output.rows[0].chunks_exact(vocab).zip(next) {
            losses.push(loss(logits, *next as usize));
        }
        bar.add(part.len());
    }
    Ok(Forward {
        seconds,
        tokens_per_second: tokens.len() as f64 / seconds,
        nll: 0.0,
        losses,
    })
}

fn show(report: &Report) {
    say(format_args!(
        "{}, {} tokens of {}, blocks of {}; dense: NLL {:.4}, {:.0} tokens/s, logits of all tokens included",
        report.model, report.tokens, report.text, report.block_tokens, report.dense.nll, report.dense.tokens_per_second
    ));
    say(format_args!(
        "{:<28} {:>7} {:>7} {:>7} {:>7} {:>7}  {:>8} {:>7} {:>7}  {:>8}",
        "patterns", "mass", "least", "error", "density", "work", "NLL +", "moved", "most", "tokens/s"
    ));
    for one in &report.sparse {
        let masks = one.masks.map_or_else(
            || format!("{:>39}", "not judged"),
            |masks| {
                format!(
                    "{:>7.4} {:>7.4} {:>7.4} {:>7.4} {:>7.4}",
                    masks.mass, masks.mass_min, masks.output_error, masks.density, masks.work
                )
            },
        );
        say(format_args!(
            "{:<28} {masks}  {:>+8.4} {:>7.4} {:>7.3}  {:>8.0}",
            one.name, one.nll_added, one.nll_moved, one.nll_moved_most, one.forward.tokens_per_second
        ));
    }
}
