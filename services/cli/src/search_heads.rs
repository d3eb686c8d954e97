//! `kvasir search-heads`: which sparse pattern each query head is given for prefill, found on a real text.
//!
//! The text goes through the model once, densely, in one step, so that each layer is there whole: its queries, keys and values
//! in memory, a task per head. What is planned for together is what the worker will plan for together, a block of tokens.

use std::{path::PathBuf, sync::atomic::AtomicUsize, sync::atomic::Ordering::Relaxed};

use anyhow::{Context, Result, ensure};
use half::f16;
use kvasir_model::{CaptureOptions, CaptureSink, CapturedLayer, ModelFile, ModelShape, StepAborted, capture};
use kvasir_sparse::{
    FoundBy, HeadPatterns, Pattern,
    search::{Criterion, Found, HeadText, Options, Space, default_budget, search},
};
use parking_lot::Mutex;

use crate::{
    args::{SearchCriterion, SearchHeadsArgs, SearchSpace},
    calibrate::load,
    corpus::Corpus,
    output::{print, say},
    token_bar::TokenBar,
    tree::Configuration,
    up::open_model_blocking,
};

pub(crate) fn run(configuration: &Configuration, args: &SearchHeadsArgs) -> Result<()> {
    let file = open_model_blocking(&configuration.tree().model.path)?;
    let shape = file.shape().clone();
    let corpus = Corpus::read(&args.text, &file)?;
    let count = args.tokens.unwrap_or(shape.context_tokens_max).min(corpus.len());
    ensure!(
        count <= shape.context_tokens_max,
        "{count} tokens (--tokens), and the model's context has {}",
        shape.context_tokens_max
    );
    ensure!(
        count > args.dense_up_to,
        "{count} tokens are no more than the {} that attend densely (--dense-up-to): give a longer text (--text) or more of it \
         (--tokens)",
        args.dense_up_to
    );
    ensure!(
        matches!(args.budget[..], [] | [_, _]) && !args.budget.contains(&0),
        "--budget takes two numbers above 0, as in --budget 1024,4096"
    );
    let options = options(configuration, args, count);
    // Before the work, not after it: a place that cannot be written to is found out now.
    let out = args.out.clone().unwrap_or_else(|| beside(&file));
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    let partial = tempfile_beside(&out);
    std::fs::write(&partial, b"").with_context(|| {
        format!(
            "cannot write to {}: name another place with --out",
            folder.unwrap_or_else(|| ".".as_ref()).display()
        )
    })?;
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let mut model = load(&file, threads)?;
    let range = corpus.windows(1, count)[0].clone();
    say(format_args!(
        "{}: {count} tokens of {}, each candidate at the cost of an A-shape {}+{} in tiles of {}x64",
        file.name(),
        corpus.source,
        options.budget.0,
        options.budget.1,
        options.rows
    ));
    let mut sink = Search {
        shape: shape.clone(),
        options,
        threads,
        bar: TokenBar::of(shape.layers * shape.q_heads, "heads"),
        found: Vec::new(),
        failed: None,
    };
    let whole = CaptureOptions {
        step_tokens: count,
        ..CaptureOptions::default()
    };
    sink.bar.doing("the text goes through the model");
    let captured = capture(&mut model, corpus.tokens(range), &whole, &mut sink);
    sink.bar.finish();
    // What the sink gave up for says more than that it did.
    if let Some(error) = sink.failed.take().or(captured.err().map(Into::into)) {
        let _gone_already = std::fs::remove_file(&partial);
        return Err(error);
    }
    show(&sink.found, &options);
    let patterns = patterns(&file, &sink.found, args, &options, &corpus.source, count)?;
    std::fs::write(&partial, patterns.write()?)
        .and_then(|()| std::fs::rename(&partial, &out))
        .with_context(|| format!("cannot write {}", out.display()))?;
    let id: String = patterns
        .fingerprint()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    print(format_args!("{}: id {id}", out.display()));
    Ok(())
}

fn options(configuration: &Configuration, args: &SearchHeadsArgs, tokens: usize) -> Options {
    let (space, usual) = match args.space {
        SearchSpace::Paper => (Space::Paper, Criterion::OutputError),
        SearchSpace::Wide => (Space::Wide, Criterion::OutputError),
        SearchSpace::Released => (Space::Released, Criterion::KeptMass),
    };
    let worker = &configuration.tree().worker;
    Options {
        rows: args.tile_rows.map_or(worker.device.tile_rows().rows(), usize::from),
        chunk_tokens: args.chunk_tokens.unwrap_or(usize::from(worker.block_tokens)),
        from: args.dense_up_to,
        budget: match args.budget[..] {
            [initial, local] => (initial, local),
            _ => default_budget(tokens),
        },
        criterion: match args.criterion {
            None => usual,
            Some(SearchCriterion::OutputError) => Criterion::OutputError,
            Some(SearchCriterion::KeptMass) => Criterion::KeptMass,
        },
        space,
        every: usize::from(args.every),
    }
}

/// Where the file goes unless told otherwise.
fn beside(file: &ModelFile) -> PathBuf {
    let mut path = file.path().to_owned().into_os_string();
    path.push(".heads.json");
    path.into()
}

fn tempfile_beside(out: &std::path::Path) -> PathBuf {
    let mut partial = out.to_owned().into_os_string();
    partial.push(".partial");
    partial.into()
}

fn patterns(
    file: &ModelFile,
    found: &[Vec<Found>],
    args: &SearchHeadsArgs,
    options: &Options,
    text: &str,
    tokens: usize,
) -> Result<HeadPatterns> {
    let layers = found
        .iter()
        .map(|heads| heads.iter().map(|head| head.pattern).collect());
    let all = || found.iter().flatten();
    let score = |of: fn(&Found) -> f64| all().map(of).sum::<f64>() / all().count().max(1) as f64;
    let (criterion, score) = match options.criterion {
        Criterion::OutputError => ("output error", score(|head| head.quality.output_error)),
        Criterion::KeptMass => ("kept mass", score(|head| head.quality.mass)),
    };
    let mut patterns = HeadPatterns::new(layers.collect())?.found_by(FoundBy {
        model: file.name().to_owned(),
        criterion: criterion.to_owned(),
        text: text.to_owned(),
        tokens,
        budget: match options.space {
            Space::Released => "each its own".to_owned(),
            Space::Paper | Space::Wide => format!("{}+{}", options.budget.0, options.budget.1),
        },
        tile_rows: options.rows,
        score,
    });
    let fingerprint = file.schema(1).model_fingerprint();
    patterns.model_fingerprint = Some(fingerprint.iter().map(|byte| format!("{byte:02x}")).collect());
    patterns.dense_up_to = args.dense_up_to;
    Ok(patterns)
}

/// Searches each layer as it is captured.
struct Search {
    shape: ModelShape,
    options: Options,
    threads: usize,
    bar: TokenBar,
    found: Vec<Vec<Found>>,
    failed: Option<anyhow::Error>,
}

impl CaptureSink for Search {
    fn layer(&mut self, layer: &CapturedLayer<'_>) -> Result<(), StepAborted> {
        self.bar
            .doing(&format!("layer {} of {}", layer.layer + 1, self.shape.layers));
        let heads = HeadTexts::new(layer, &self.shape);
        let results: Vec<Mutex<Option<_>>> = (0..self.shape.q_heads).map(|_| Mutex::new(None)).collect();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(|| {
                    loop {
                        let head = next.fetch_add(1, Relaxed);
                        let Some(result) = results.get(head) else { break };
                        *result.lock() = Some(heads.with(head, |text| search(text, &self.options)));
                    }
                });
            }
        });
        let mut found = Vec::with_capacity(results.len());
        for result in results {
            match result.into_inner() {
                Some(Ok(head)) => found.push(head),
                Some(Err(error)) => {
                    self.failed = Some(error.into());
                    return Err(StepAborted("the search cannot be done".to_owned()));
                }
                None => return Err(StepAborted("a head was not searched".to_owned())),
            }
        }
        self.bar.add(found.len());
        self.found.push(found);
        Ok(())
    }
}

/// All heads of a captured layer; keys and values once per KV head.
struct HeadTexts<'a> {
    shape: &'a ModelShape,
    q: &'a [f32],
    keys: Vec<Vec<f16>>,
    values: Vec<Vec<f16>>,
}

impl<'a> HeadTexts<'a> {
    fn new(layer: &CapturedLayer<'a>, shape: &'a ModelShape) -> Self {
        let gather = |of: &dyn Fn(usize, &mut Vec<f16>)| {
            (0..shape.kv_heads)
                .map(|head| {
                    let mut rows = Vec::new();
                    of(head, &mut rows);
                    rows
                })
                .collect()
        };
        let positions = || 0..layer.tokens.end;
        Self {
            shape,
            q: layer.q,
            keys: gather(&|head, rows| layer.keys(head, positions(), rows)),
            values: gather(&|head, rows| layer.values(head, positions(), rows)),
        }
    }

    fn with<T>(&self, head: usize, act: impl FnOnce(&HeadText<'_>) -> T) -> T {
        let d = self.shape.head_dim;
        let rows = self.q.chunks_exact(self.shape.q_heads * d);
        let q: Vec<f32> = rows.flat_map(|row| &row[head * d..][..d]).copied().collect();
        let kv_head = head / self.shape.group();
        act(&HeadText {
            q: &q,
            keys: &self.keys[kv_head],
            values: &self.values[kv_head],
            head_dim: d,
            scale: self.shape.softmax_scale(),
        })
    }
}

/// What was found, by layer and over all heads.
fn show(found: &[Vec<Found>], options: &Options) {
    print(format_args!(
        "{:>5}  {:>6} {:>7} {:>8} {:>7}   chosen",
        "layer", "mass", "error", "density", "work"
    ));
    for (layer, heads) in found.iter().enumerate() {
        let mean = |of: fn(&Found) -> f64| heads.iter().map(of).sum::<f64>() / heads.len().max(1) as f64;
        print(format_args!(
            "{layer:>5}  {:>6.4} {:>7.4} {:>8.4} {:>7.4}   {}",
            mean(|head| head.quality.mass),
            mean(|head| head.quality.output_error),
            mean(|head| head.quality.density),
            mean(|head| head.quality.work_share()),
            kinds(heads.iter().map(|head| head.pattern))
        ));
    }
    print(format_args!(
        "all heads: {}",
        kinds(found.iter().flatten().map(|head| head.pattern))
    ));
    let tried = found
        .first()
        .and_then(|heads| heads.first())
        .map_or(0, |head| head.tried.len());
    for candidate in 0..tried {
        let all: Vec<_> = found.iter().flatten().map(|head| &head.tried[candidate]).collect();
        let mean = |of: &dyn Fn(&kvasir_sparse::Quality) -> f64| {
            all.iter().map(|(_, quality)| of(quality)).sum::<f64>() / all.len().max(1) as f64
        };
        print(format_args!(
            "candidate {candidate} ({}): mass {:.4}, error {:.4}, density {:.4}, work {:.4}",
            all[0].0.kind(),
            mean(&|quality| quality.mass),
            mean(&|quality| quality.output_error),
            mean(&|quality| quality.density),
            mean(&kvasir_sparse::Quality::work_share)
        ));
    }
    print(format_args!(
        "mass: share of softmax mass kept; error: of attention outputs, relative 2-norm; density: share of pairs; work: tiles of \
         {}x64 beside full attention",
        options.rows
    ));
}

/// How many of each kind.
fn kinds(patterns: impl Iterator<Item = Pattern>) -> String {
    let mut counts = std::collections::BTreeMap::new();
    patterns.for_each(|pattern| *counts.entry(pattern.kind()).or_insert(0) += 1);
    let each: Vec<String> = counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    each.join(", ")
}
