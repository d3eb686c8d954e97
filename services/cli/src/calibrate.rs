//! `kvasir calibrate`: learns from real text where a model's queries look, and writes the basis that its keys are sketched in.
//!
//! The text is run through the model in windows of its whole context, because rotary embedding turns the slow dimensions with
//! the position: a basis that has seen the first thousand positions only is of little use at the eight-thousandth. Moments of
//! queries and keys add up over windows. One more window repeats its first half: there, heads that can look far back have
//! something to find, and none of them may be taken for a head that attends to sink and window alone.

mod gather;
mod summary;

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use kvasir_index::{Basis, Calibrated};
use kvasir_model::{CaptureOptions, LoadOptions, Model, ModelFile, capture};

use self::gather::Gathered;
use crate::{
    args::CalibrateArgs,
    corpus::Corpus,
    output::{print, say},
    token_bar::TokenBar,
    tree::Configuration,
    up::open_model_blocking,
};

/// With fewer tokens in a window, slow dimensions have hardly turned.
const WINDOW_TOKENS_MIN: usize = 1024;

/// Windows of a model's context that are read unless told otherwise; one would do, two are of different subjects.
const WINDOWS: usize = 2;

/// Tokens per page while capturing, as a worker has them: the last bits of attention depend on it.
const BLOCK_TOKENS: u16 = 64;

pub(crate) fn run(configuration: &Configuration, args: &CalibrateArgs) -> Result<()> {
    let file = open_model_blocking(&configuration.tree().model.path)?;
    let shape = file.shape().clone();
    let corpus = Corpus::read(&args.text, &file)?;
    let wanted = args.tokens.unwrap_or(WINDOWS.saturating_mul(shape.context_tokens_max));
    let tokens = wanted.min(corpus.len());
    let window = tokens.min(shape.context_tokens_max);
    ensure!(
        window >= WINDOW_TOKENS_MIN,
        "{tokens} tokens are too few to calibrate on, at least {WINDOW_TOKENS_MIN} are needed: give a longer text (--text) or \
         more of it (--tokens)"
    );
    if window < shape.context_tokens_max {
        say(format_args!(
            "warning: the basis will have seen positions up to {window}, and the model goes up to {}: keys beyond will be \
             sketched badly; give a longer text (--text) or more of it (--tokens)",
            shape.context_tokens_max
        ));
    }
    let rank = usize::from(args.rank).min(shape.head_dim);
    if rank < usize::from(args.rank) {
        say(format_args!("rank {rank}, as keys have no more elements"));
    }
    // Before the work, not after it: a folder that cannot be written to is found out now.
    let output = Output::create(args.out.clone().unwrap_or_else(|| file.basis_path()))?;
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let mut model = load(&file, threads)?;
    let windows = corpus.windows(tokens / window, window);
    say(format_args!(
        "{}: {} windows of {window} tokens, and one that repeats itself, of {}",
        file.name(),
        windows.len(),
        corpus.source
    ));

    let mut gathered = Gathered::new(&shape, threads);
    let mut bar = TokenBar::new((windows.len() + 1) * window);
    for (at, range) in windows.iter().enumerate() {
        bar.doing(&format!("window {} of {}", at + 1, windows.len()));
        let mut sink = gathered.sink(true, &mut bar);
        capture(
            &mut model,
            &corpus.window(range.clone()),
            &CaptureOptions::default(),
            &mut sink,
        )?;
    }
    bar.doing("a window that repeats itself");
    let half = windows[0].start..windows[0].start + window / 2;
    let repeating = [corpus.window(half.clone()), corpus.tokens(half).to_vec()].concat();
    let mut sink = gathered.sink(false, &mut bar);
    capture(&mut model, &repeating, &CaptureOptions::default(), &mut sink)?;
    drop(sink);
    bar.finish();
    drop(model);

    let begun = Instant::now();
    let calibrated = decompose(&gathered, rank, threads)?;
    say(format_args!(
        "found the directions in {:.1} s",
        begun.elapsed().as_secs_f32()
    ));
    let kept: Vec<f64> = calibrated.iter().map(|head| head.kept).collect();
    let heads = calibrated.into_iter().zip(&gathered.heads).enumerate();
    let heads = heads.map(|(at, (mut head, seen))| {
        // Where a layer sees a window only, there is nothing beyond to be searched.
        let windowed = shape.window(at / shape.kv_heads).is_some();
        head.basis.streaming = windowed || seen.outside.is_streaming(&gathered.policy);
        head.basis
    });
    let basis = Basis {
        model: file.schema(BLOCK_TOKENS).model_fingerprint(),
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        rank,
        heads: heads.collect(),
    };
    let bytes = basis.encode();
    // What is written must be what can be read.
    let basis = Basis::decode(&bytes).context("the basis that was found cannot be written down")?;
    summary::show(&basis, &kept, &gathered);
    let path = output.finish(&bytes)?;
    let id: String = basis.id().iter().map(|byte| format!("{byte:02x}")).collect();
    print(format_args!("{}: {} bytes, id {id}", path.display(), bytes.len()));
    Ok(())
}

/// The model for a capture.
pub(crate) fn load(file: &ModelFile, threads: usize) -> Result<Model> {
    let options = LoadOptions {
        threads,
        block_tokens: BLOCK_TOKENS,
    };
    Ok(Model::load(file, &options)?)
}

/// The directions of all heads, shared by `threads` threads.
fn decompose(gathered: &Gathered, rank: usize, threads: usize) -> Result<Vec<Calibrated>> {
    let per_thread = gathered.heads.len().div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let running: Vec<_> = gathered
            .heads
            .chunks(per_thread)
            .map(|heads| {
                scope.spawn(move || {
                    let bases = heads.iter().map(|head| head.moments.basis(rank));
                    bases.collect::<Result<Vec<_>, _>>()
                })
            })
            .collect();
        let mut all = Vec::with_capacity(gathered.heads.len());
        for thread in running {
            match thread.join() {
                Ok(bases) => all.extend(bases?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(all)
    })
}

/// A file that is there whole or not at all.
struct Output {
    path: PathBuf,
    partial: PathBuf,
    file: File,
}

impl Output {
    fn create(path: PathBuf) -> Result<Self> {
        let mut partial = path.clone().into_os_string();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = File::create(&partial).with_context(|| {
            format!(
                "cannot write {}: name a place that can be written to with --out",
                path.display()
            )
        })?;
        Ok(Self { path, partial, file })
    }

    fn finish(mut self, bytes: &[u8]) -> Result<PathBuf> {
        let written = self.file.write_all(bytes).and_then(|()| self.file.sync_all());
        written
            .and_then(|()| std::fs::rename(&self.partial, &self.path))
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(self.path.clone())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // After `finish` it is gone already.
        let _ = std::fs::remove_file(Path::new(&self.partial));
    }
}
