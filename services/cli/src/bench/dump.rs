//! `kvasir bench dump`: queries, keys and values of a real text as raw files, so that indexes can be measured on what they will
//! meet, here or in any other program.
//!
//! Per layer `L<layer>.q`, `.k`, `.v` and, from layer 1 on, `.p` (the queries as they were forecast a layer earlier): f16,
//! little-endian, `[heads, tokens, head_dim]`, rotated as attention sees them. `meta.json` says the sizes, and the perplexity of
//! the text, which a mistaken rope or tokenizer would drive up at once.

mod meta;

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use half::f16;
use kvasir_model::{CaptureOptions, CaptureSink, CapturedLayer, ModelShape, StepAborted, capture};

pub(super) use self::meta::Meta;
use crate::{
    args::DumpArgs,
    calibrate::load,
    corpus::Corpus,
    output::{print, say},
    token_bar::TokenBar,
    tree::Configuration,
    up::open_model_blocking,
};

pub(crate) fn dump(configuration: &Configuration, args: &DumpArgs) -> Result<()> {
    let file = open_model_blocking(&configuration.tree().model.path)?;
    let shape = file.shape();
    let corpus = Corpus::read(&args.text, &file)?;
    let count = args.tokens.unwrap_or(shape.context_tokens_max);
    ensure!(
        (2..=shape.context_tokens_max).contains(&count),
        "{count} tokens (--tokens) cannot be dumped: give from 2 to the {} of the model's context",
        shape.context_tokens_max
    );
    ensure!(
        count <= corpus.len(),
        "the text has {} tokens, and {count} are wanted: give a longer text (--text) or fewer tokens (--tokens)",
        corpus.len()
    );
    let mut layers = args.layers.clone();
    if layers.is_empty() {
        layers = (0..shape.layers)
            .filter(|layer| shape.window(*layer).is_none())
            .collect();
    }
    layers.sort_unstable();
    layers.dedup();
    if let Some(layer) = layers.iter().find(|layer| **layer >= shape.layers) {
        anyhow::bail!("there is no layer {layer} (--layers): the model has {}", shape.layers);
    }
    if let Some(layer) = layers.iter().find(|layer| shape.window(**layer).is_some()) {
        anyhow::bail!(
            "layer {layer} (--layers) sees a window only, and no index is asked there: name layers that see everything"
        );
    }
    let tokens = corpus.tokens(0..count);
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let mut model = load(&file, threads)?;
    let mut dump = Dump::create(&args.out, &layers, shape, tokens)?;
    let options = CaptureOptions {
        predicted: true,
        logits: true,
        ..CaptureOptions::default()
    };
    capture(&mut model, tokens, &options, &mut dump)?;
    dump.bar.finish();
    let (whole, second) = dump.perplexities();
    let fingerprint = file.schema(1).model_fingerprint();
    let meta = Meta {
        model: file.name().to_owned(),
        model_fingerprint: Some(fingerprint.iter().map(|byte| format!("{byte:02x}")).collect()),
        layers,
        layers_total: shape.layers,
        softmax_scale: model.softmax_scale(),
        rope_theta: shape.rope_theta,
        text: corpus.source,
        perplexity: Some(whole),
        perplexity_second_half: Some(second),
        seconds: Some(dump.bar.seconds()),
        ..Meta::new(shape.q_heads, shape.kv_heads, count, shape.head_dim)
    };
    let path = meta.write(&args.out)?;
    say(format_args!(
        "{count} tokens in {:.1} s, perplexity {whole:.2} ({second:.2} in the second half)",
        dump.bar.seconds()
    ));
    print(path.display());
    Ok(())
}

struct Dump {
    files: BTreeMap<usize, Files>,
    shape: ModelShape,
    tokens: Vec<u32>,
    /// Negative log-likelihoods, of token 1 on.
    losses: Vec<f64>,
    bar: TokenBar,
    /// Reused.
    values: Vec<f16>,
}

/// The files of a layer.
struct Files {
    q: Raw,
    k: Raw,
    v: Raw,
    p: Option<Raw>,
}

/// A file of `[heads, tokens, head_dim]` that is written step by step.
struct Raw {
    path: PathBuf,
    file: File,
    tokens: usize,
    head_dim: usize,
}

impl Dump {
    fn create(folder: &Path, layers: &[usize], shape: &ModelShape, tokens: &[u32]) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        // An older dump's would call a half-written one whole.
        let meta = folder.join("meta.json");
        if meta.exists() {
            std::fs::remove_file(&meta).with_context(|| format!("cannot replace {}", meta.display()))?;
        }
        let raw = |layer: usize, what: &str| {
            let path = folder.join(format!("L{layer}.{what}"));
            let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
            anyhow::Ok(Raw {
                path,
                file,
                tokens: tokens.len(),
                head_dim: shape.head_dim,
            })
        };
        let files = layers.iter().map(|&layer| {
            let files = Files {
                q: raw(layer, "q")?,
                k: raw(layer, "k")?,
                v: raw(layer, "v")?,
                p: (layer > 0).then(|| raw(layer, "p")).transpose()?,
            };
            anyhow::Ok((layer, files))
        });
        Ok(Self {
            files: files.collect::<Result<_>>()?,
            shape: shape.clone(),
            tokens: tokens.to_vec(),
            losses: Vec::with_capacity(tokens.len()),
            bar: TokenBar::new(tokens.len()),
            values: Vec::new(),
        })
    }

    fn perplexities(&self) -> (f64, f64) {
        let of = |losses: &[f64]| (losses.iter().sum::<f64>() / losses.len().max(1) as f64).exp();
        (of(&self.losses), of(&self.losses[self.losses.len() / 2..]))
    }
}

impl CaptureSink for Dump {
    fn layer(&mut self, layer: &CapturedLayer<'_>) -> Result<(), StepAborted> {
        let Some(files) = self.files.get(&layer.layer) else {
            return Ok(());
        };
        let (shape, values, tokens) = (&self.shape, &mut self.values, &layer.tokens);
        let predicted = files.p.as_ref().zip(layer.predicted);
        for (raw, rows) in [(&files.q, layer.q)].into_iter().chain(predicted) {
            for head in 0..shape.q_heads {
                values.clear();
                for row in rows.chunks_exact(shape.q_heads * shape.head_dim) {
                    let row = &row[head * shape.head_dim..][..shape.head_dim];
                    values.extend(row.iter().map(|value| f16::from_f32(*value)));
                }
                raw.write(head, tokens, values)?;
            }
        }
        for head in 0..shape.kv_heads {
            values.clear();
            layer.keys(head, tokens.clone(), values);
            files.k.write(head, tokens, values)?;
            values.clear();
            layer.values(head, tokens.clone(), values);
            files.v.write(head, tokens, values)?;
        }
        Ok(())
    }

    fn step(&mut self, tokens: Range<usize>, logits: &[f32]) -> Result<(), StepAborted> {
        let next = self.tokens.get(tokens.start + 1..).unwrap_or_default();
        for (logits, next) in logits.chunks_exact(self.shape.vocab).zip(next) {
            self.losses.push(loss(logits, *next as usize));
        }
        self.bar.add(tokens.len());
        Ok(())
    }
}

impl Raw {
    fn write(&self, head: usize, tokens: &Range<usize>, values: &[f16]) -> Result<(), StepAborted> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let offset = 2 * self.head_dim * (head * self.tokens + tokens.start);
        let written = self.file.write_all_at(&bytes, offset as u64);
        written.map_err(|error| StepAborted(format!("cannot write {}: {error}", self.path.display())))
    }
}

/// `-ln` of the probability that `logits` give to token `next`.
fn loss(logits: &[f32], next: usize) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
    sum.ln() - f64::from(logits[next] - most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_of_the_softmax() {
        assert!((loss(&[1.0, 1.0, 1.0, 1.0], 2) - 4_f64.ln()).abs() < 1e-12);
        assert!(loss(&[500.0, -500.0], 0).abs() < 1e-12);
        assert!((loss(&[500.0, -500.0], 1) - 1000.0).abs() < 1e-9);
    }
}
