//! `kvasir bench index`: every index on the same keys and queries, against exact attention: what it finds, what it reads.
//!
//! On a dump of a real text (`kvasir bench dump`), or on a recording made up for lengths that no small model reaches. Each KV
//! head is one recording; those of the first three layers, which are unlike the rest, are summed apart. Counts, bytes and
//! recalls are the same on every machine; times are not.
//!
//! `tests/recall` reads the result and the arrays, and puts faiss and hnswlib beside it.

mod measure;
mod report;
mod source;
mod subject;

use anyhow::{Context, Result, ensure};
use kvasir_simd::Pool;

use self::{measure::Group, report::Report, source::Source};
use crate::{
    args::IndexBenchArgs,
    output::{print, say},
    tree::Configuration,
};

/// Layers before this one attend differently in every model that was looked at.
const FIRST_USUAL_LAYER: usize = 3;

pub(crate) fn run(configuration: &Configuration, args: &IndexBenchArgs) -> Result<()> {
    ensure!(
        args.efforts.iter().all(|effort| *effort > 0.0 && *effort <= 1.0),
        "--efforts are shares of the keys, above 0 and at most 1"
    );
    ensure!(args.mass > 0.0 && args.mass < 1.0, "--mass is above 0 and below 1");
    ensure!(args.stride > 0, "--stride is at least 1");
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let pool = Pool::new(threads);
    let before = load();
    let source = Source::open(args, configuration, &pool)?;
    let mut groups = Vec::new();
    match &source {
        Source::Synthetic(made) => {
            let mut group = Group::new("made up", args);
            let (recording, basis) = made.head();
            group.add(recording, basis, args, &pool)?;
            group.layers = vec![0];
            groups.push(group);
        }
        Source::Dump(dump) => {
            let mut first = Group::new("layers 0-2", args);
            let mut usual = Group::new("layers from 3 on", args);
            for &layer in &dump.layers {
                let arrays = dump.layer(layer)?;
                let group = if layer < FIRST_USUAL_LAYER {
                    &mut first
                } else {
                    &mut usual
                };
                group.layers.push(layer);
                for kv_head in 0..dump.meta.kv_shape[0] {
                    say(format_args!("layer {layer}, KV head {kv_head}"));
                    let (recording, basis) = dump.head(layer, &arrays, kv_head);
                    group
                        .add(recording, basis, args, &pool)
                        .with_context(|| format!("layer {layer}, KV head {kv_head}"))?;
                }
            }
            groups.extend([first, usual].into_iter().filter(|group| group.recordings > 0));
        }
    }
    let report = Report::new(args, &source, &groups, threads, [before, load()]);
    report.show();
    if args.json {
        print(serde_json::to_string_pretty(&report).context("the result cannot be written as JSON")?);
    }
    Ok(())
}

/// The load of the last minute.
fn load() -> Option<f32> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}
