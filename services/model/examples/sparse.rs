//! Sparse prefill beside dense on a real text: `sparse MODEL.gguf TEXT TOKENS BLOCK_TOKENS DENSE_UP_TO PATTERN...`.
//!
//! A pattern is one for all heads (`a-shape:256,1024`), a file of patterns, or `search:paper` and `search:wide`, which search each
//! head's on the last TOKENS of the text. Judged is on the first TOKENS, in two views. *Masks*: on the queries, keys and values of a
//! dense forward, how much softmax mass the masks keep, how far the attention outputs are off, how dense they are. *Forward*:
//! the text through the model under the patterns, its negative log-likelihood beside that of the dense forward, and the processor
//! time of each block, logits of all its tokens included, from which it is seen where sparsity begins to pay.

use std::{path::Path, thread};

use half::f16;
use kvasir_model::{
    Attention, CaptureOptions, CaptureSink, CapturedLayer, LoadOptions, Logits, Model, ModelFile, ModelShape, PageId,
    SparsePrefill, StepAborted, StepSequence, TileRows, capture,
};
use kvasir_sparse::{
    HeadPatterns, Pattern, Quality,
    search::{Criterion, HeadText, Options, Space, compare, default_budget, search},
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const THREADS: usize = 2;
/// Each so-manieth query is judged.
const EVERY: usize = 32;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, tokens, block_tokens, dense_up_to, names @ ..] = &args[..] else {
        return Err("usage: sparse MODEL.gguf TEXT TOKENS BLOCK_TOKENS DENSE_UP_TO PATTERN...".into());
    };
    let file = ModelFile::open(Path::new(model))?;
    let (count, block_tokens, dense_up_to): (usize, u16, usize) =
        (tokens.parse()?, block_tokens.parse()?, dense_up_to.parse()?);
    let all = file.tokenizer().encode(&std::fs::read_to_string(text)?, false)?;
    if all.len() < 2 * count {
        return Err(format!("the text has {} tokens, and twice {count} are wanted", all.len()).into());
    }
    let load = || {
        let options = LoadOptions {
            threads: THREADS,
            block_tokens,
        };
        Model::load(&file, &options)
    };
    let options = Options {
        rows: 64,
        chunk_tokens: usize::from(block_tokens),
        from: dense_up_to,
        budget: default_budget(count),
        criterion: Criterion::OutputError,
        space: Space::Paper,
        every: EVERY,
    };
    let mut sets = Vec::new();
    for name in names {
        let mut patterns = match name.as_str() {
            "search:paper" => found(&mut load()?, &all[all.len() - count..], options)?,
            "search:wide" => {
                let space = Space::Wide;
                found(&mut load()?, &all[all.len() - count..], Options { space, ..options })?
            }
            path if Path::new(path).exists() => HeadPatterns::read(&std::fs::read(path)?, file.shape().q_heads)?,
            pattern => HeadPatterns::uniform(pattern.parse()?, file.shape().layers, file.shape().q_heads)?,
        };
        patterns.dense_up_to = dense_up_to;
        sets.push((name, patterns));
    }
    let tokens = &all[..count];
    let (dense, seconds) = forward(load()?, Attention::Full, block_tokens, tokens)?;
    let from = dense_up_to.next_multiple_of(usize::from(block_tokens));
    say(format!(
        "dense: NLL {:.4} behind {from}; processor seconds by block {seconds:.2?}",
        mean(&dense[from..])
    ));
    let masks = judge(&mut load()?, tokens, &sets, options)?;
    say(format!(
        "{:<24} {:>7} {:>7} {:>7} {:>7} {:>7}  {:>8} {:>7} {:>7}  {}",
        "patterns", "mass", "least", "error", "density", "work", "NLL +", "moved", "most", "processor seconds by block"
    ));
    for ((name, patterns), masks) in sets.into_iter().zip(masks) {
        let sparse = SparsePrefill::new(patterns, file.shape(), &file.schema(block_tokens), TileRows::Rows64)?;
        let model = load()?.with_sparse_prefill(sparse)?;
        let (losses, seconds) = forward(model, Attention::Sparse, block_tokens, tokens)?;
        let moved: Vec<f64> = losses[from..]
            .iter()
            .zip(&dense[from..])
            .map(|(a, b)| (a - b).abs())
            .collect();
        say(format!(
            "{name:<24} {:>7.4} {:>7.4} {:>7.4} {:>7.4} {:>7.4}  {:>+8.4} {:>7.4} {:>7.3}  {seconds:.2?}",
            masks.mass,
            masks.mass_min,
            masks.output_error,
            masks.density,
            masks.work_share(),
            mean(&losses[from..]) - mean(&dense[from..]),
            mean(&moved),
            moved.iter().copied().fold(0.0, f64::max)
        ));
    }
    Ok(())
}

/// The text through the model block by block: the loss of each prediction, and processor seconds of each block.
fn forward(mut model: Model, attention: Attention, block_tokens: u16, tokens: &[u32]) -> Result<(Vec<f64>, Vec<f64>)> {
    let block_tokens = usize::from(block_tokens);
    let blocks = tokens.len().div_ceil(block_tokens);
    let mut pool = model.pool(blocks)?;
    let pages: Vec<Option<PageId>> = (0..blocks as u32).map(|page| Some(PageId(page))).collect();
    let vocab = model.shape().vocab;
    let (mut losses, mut seconds) = (Vec::with_capacity(tokens.len()), Vec::new());
    for (block, part) in tokens.chunks(block_tokens).enumerate() {
        let position = block * block_tokens;
        let sequence = StepSequence {
            tokens: part,
            position,
            pages: &pages,
            attention: attention.clone(),
            logits: Logits::All,
        };
        let begun = processor_seconds()?;
        let output = model.step(&[sequence], &mut pool, &mut ())?;
        seconds.push(processor_seconds()? - begun);
        for (logits, next) in output.rows[0].chunks_exact(vocab).zip(&tokens[position + 1..]) {
            let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
            losses.push(sum.ln() - f64::from(logits[*next as usize] - most));
        }
    }
    Ok((losses, seconds))
}

/// Time that the processors have given to this process so far, all threads together: what a busy machine does not change much.
fn processor_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // Behind the name, which may hold spaces: user and system time are the 12th and 13th, in hundredths.
    let fields = stat
        .rsplit_once(')')
        .ok_or("/proc/self/stat has no name")?
        .1
        .split_whitespace();
    let ticks: Vec<f64> = fields
        .skip(11)
        .take(2)
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?;
    Ok(ticks.iter().sum::<f64>() / 100.0)
}

/// The best pattern of each head on a text.
fn found(model: &mut Model, tokens: &[u32], options: Options) -> Result<HeadPatterns> {
    let heads = each_head(model, tokens, &|_, _, text| {
        let found = search(text, &options).map_err(|error| error.to_string())?;
        Ok(found.pattern)
    })?;
    let mut kinds = std::collections::BTreeMap::new();
    heads
        .iter()
        .flatten()
        .for_each(|pattern: &Pattern| *kinds.entry(pattern.kind()).or_insert(0) += 1);
    say(format!(
        "searched at the cost of an A-shape {:?}: {kinds:?}",
        options.budget
    ));
    Ok(HeadPatterns::new(heads)?)
}

/// All sets on a text, over all heads.
fn judge(
    model: &mut Model,
    tokens: &[u32],
    sets: &[(&String, HeadPatterns)],
    options: Options,
) -> Result<Vec<Quality>> {
    let heads = each_head(model, tokens, &|layer, head, text| {
        let patterns: Vec<Pattern> = sets
            .iter()
            .map(|(_, patterns)| patterns.layers()[layer][head])
            .collect();
        let judged = compare(text, &patterns, &options).map_err(|error| error.to_string())?;
        Ok(judged.into_iter().map(|(_, quality)| quality).collect::<Vec<_>>())
    })?;
    let mut all = vec![Quality::default(); sets.len()];
    for head in heads.into_iter().flatten() {
        for (all, quality) in all.iter_mut().zip(head) {
            *all = all.join(quality);
        }
    }
    Ok(all)
}

type Act<'a, T> = &'a (dyn Fn(usize, usize, &HeadText<'_>) -> std::result::Result<T, String> + Sync);

/// `act` on each head of a dense forward, by layer and head.
fn each_head<T: Send>(model: &mut Model, tokens: &[u32], act: Act<'_, T>) -> Result<Vec<Vec<T>>> {
    let mut heads = Heads {
        shape: model.shape().clone(),
        act,
        layers: Vec::new(),
    };
    let whole = CaptureOptions {
        step_tokens: tokens.len(),
        ..CaptureOptions::default()
    };
    capture(model, tokens, &whole, &mut heads)?;
    Ok(heads.layers)
}

struct Heads<'a, T> {
    shape: ModelShape,
    act: Act<'a, T>,
    layers: Vec<Vec<T>>,
}

impl<T: Send> CaptureSink for Heads<'_, T> {
    fn layer(&mut self, layer: &CapturedLayer<'_>) -> std::result::Result<(), StepAborted> {
        let (shape, act) = (&self.shape, self.act);
        let d = shape.head_dim;
        let one = |head: usize| {
            let rows = layer.q.chunks_exact(shape.q_heads * d);
            let q: Vec<f32> = rows.flat_map(|row| &row[head * d..][..d]).copied().collect();
            let (mut keys, mut values): (Vec<f16>, Vec<f16>) = (Vec::new(), Vec::new());
            layer.keys(head / shape.group(), layer.tokens.clone(), &mut keys);
            layer.values(head / shape.group(), layer.tokens.clone(), &mut values);
            let text = HeadText {
                q: &q,
                keys: &keys,
                values: &values,
                head_dim: d,
                scale: shape.softmax_scale(),
            };
            act(layer.layer, head, &text)
        };
        let heads: Vec<usize> = (0..shape.q_heads).collect();
        let done: Vec<std::result::Result<T, String>> = thread::scope(|scope| {
            let running: Vec<_> = heads
                .chunks(heads.len().div_ceil(THREADS))
                .map(|heads| scope.spawn(|| heads.iter().map(|&head| one(head)).collect::<Vec<_>>()))
                .collect();
            let joined = running.into_iter().flat_map(|thread| match thread.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.collect()
        });
        let done: std::result::Result<Vec<T>, String> = done.into_iter().collect();
        self.layers.push(done.map_err(StepAborted)?);
        Ok(())
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

#[expect(clippy::print_stdout, reason = "a measurement's result")]
fn say(line: impl std::fmt::Display) {
    println!("{line}");
}
