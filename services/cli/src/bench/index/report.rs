//! What was measured, for people and as JSON.

use kvasir_index::{
    Attend,
    evaluate::{Setting, Summary, synthetic::Statistics},
};
use serde::Serialize;

use super::{
    measure::{EffortSums, Group, IndexSums, ServedSums, setting},
    source::Source,
};
use crate::{
    args::IndexBenchArgs,
    measure::{Machine, median},
    output::say,
    version::{PROFILE, VERSION},
};

/// Version of the JSON; raised when a field goes or changes its meaning.
const SCHEMA: u32 = 1;

/// The result of `--json`. Shares are of the searched keys and their bytes (keys in halves, without sink, window and generated
/// tokens); a search is that of all query heads of one KV head; errors are relative, of the output merged with the rest.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema: u32,
    source: Described,
    setting: Parts,
    /// Queries per key that `roar` was built from.
    samples_per_key: f64,
    groups: Vec<Measured>,
    threads: usize,
    /// Processes that wanted a processor in the last minute, before and after: times are good for as much as this is low.
    load: [Option<f32>; 2],
    kvasir: &'static str,
    profile: &'static str,
    machine: Machine,
}

/// What was measured on.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Described {
    Dump {
        model: String,
        text: String,
        tokens: usize,
        perplexity: Option<f64>,
        basis: String,
    },
    Synthetic {
        tokens: usize,
        seed: u64,
        theta: f64,
        statistics: Box<Measurements>,
    },
}

/// The statistics that the gate looked at.
#[derive(Debug, Serialize)]
struct Measurements {
    key_mean: f64,
    cos_keys: f64,
    cos_query_key: f64,
    cos_query_centred_key: f64,
    cos_queries: f64,
    spread_of_keys: f64,
    directions_of_queries: f64,
    mahalanobis: f64,
    sink: f64,
    last: f64,
    n90: Spread,
    top_100: f64,
    overlap_1: f64,
    overlap_64: f64,
}

/// Which tokens play which part.
#[derive(Debug, Serialize)]
struct Parts {
    decode: usize,
    stride: usize,
    sink: usize,
    window: usize,
}

#[derive(Debug, Serialize)]
struct Spread {
    mean: f64,
    p10: f64,
    p50: f64,
    p90: f64,
    p99: f64,
}

/// Some layers.
#[derive(Debug, Serialize)]
struct Measured {
    name: &'static str,
    layers: Vec<usize>,
    /// KV heads measured.
    recordings: usize,
    heads: usize,
    head_dim: usize,
    searched_keys: usize,
    key_bytes: usize,
    indexes: Vec<IndexFigures>,
    served: Vec<ServedFigures>,
    /// Of the sketches with the mean values that the tail needs.
    served_bytes_per_token: f64,
}

#[derive(Debug, Serialize)]
struct IndexFigures {
    name: &'static str,
    /// Per KV head, mean.
    build_seconds: f64,
    /// Per token and KV head, beside keys and values.
    bytes_per_token: f64,
    curve: Vec<Point>,
    /// Nothing where the index does not count.
    for_mass: Option<ForMass>,
}

/// One effort.
#[derive(Debug, Serialize)]
struct Point {
    effort: f32,
    recall_10: f64,
    recall_100: f64,
    /// These three are nothing where the index does not count.
    keys_share: Option<f64>,
    bytes_share: Option<f64>,
    bytes_per_search: Option<f64>,
    mass: Spread,
    error: Spread,
    /// With the index's own estimate of the rest; not in the bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    error_estimated: Option<Spread>,
    micros_per_search: f64,
}

/// What must be read until the keys scored hold a share of the searched mass for every query head.
#[derive(Debug, Serialize)]
struct ForMass {
    mass: f64,
    reached: f64,
    bytes: Spread,
    bytes_share: Spread,
    effort: Spread,
}

/// Attention as a store serves it, by sketches.
#[derive(Debug, Serialize)]
struct ServedFigures {
    /// Of keys re-scored at most.
    effort: f32,
    target_mass: f32,
    queries: usize,
    rows_share: f64,
    /// Of keys and values.
    bytes_share: f64,
    bytes_per_search: f64,
    mass: Spread,
    error: Spread,
    /// Share of bounds that were kept.
    certificates_kept: f64,
    bound: Spread,
    missed: Spread,
    micros_per_search: f64,
}

impl Report {
    pub(super) fn new(
        args: &IndexBenchArgs,
        source: &Source,
        groups: &[Group],
        threads: usize,
        load: [Option<f32>; 2],
    ) -> Self {
        let Setting {
            decode,
            stride,
            sink,
            window,
        } = setting(args);
        Self {
            schema: SCHEMA,
            source: Described::of(source),
            setting: Parts {
                decode,
                stride,
                sink,
                window,
            },
            samples_per_key: args.samples,
            groups: groups.iter().map(|group| Measured::of(group, args.mass)).collect(),
            threads,
            load,
            kvasir: VERSION,
            profile: PROFILE,
            machine: Machine::here(),
        }
    }

    pub(super) fn show(&self) {
        for group in &self.groups {
            say(format_args!(
                "{}: {} KV heads, {} keys of {} searched",
                group.name, group.recordings, group.searched_keys, group.head_dim
            ));
            say("index    effort   keys   bytes  recall@10  @100   mass  error   p90   us/search");
            for index in &group.indexes {
                for at in &index.curve {
                    say(format_args!(
                        "{:<7} {:>7} {:>6} {:>7}      {:.3} {:.3}  {:.3}  {:.3} {:.3} {:>10.0}",
                        index.name,
                        at.effort,
                        percent(at.keys_share),
                        percent(at.bytes_share),
                        at.recall_10,
                        at.recall_100,
                        at.mass.mean,
                        at.error.mean,
                        at.error.p90,
                        at.micros_per_search
                    ));
                }
                say(format_args!(
                    "{:<7} built in {:.1} s, {:.1} bytes per token",
                    index.name, index.build_seconds, index.bytes_per_token
                ));
                if let Some(needed) = &index.for_mass {
                    say(format_args!(
                        "{:<7} {:.2} of the mass: {:.0} bytes ({:.1} %) on average, reached {:.2}",
                        index.name,
                        needed.mass,
                        needed.bytes.mean,
                        100.0 * needed.bytes_share.mean,
                        needed.reached
                    ));
                }
            }
            for at in &group.served {
                say(format_args!(
                    "served, effort {:.2}, target {:.2}: {:.2} % of rows, {:.1} % of bytes, mass {:.3}, error {:.4} (p90 {:.4}), \
                     bounds kept {:.3}, median {:.3} where {:.3} was missed, {:.0} us",
                    at.effort,
                    at.target_mass,
                    100.0 * at.rows_share,
                    100.0 * at.bytes_share,
                    at.mass.mean,
                    at.error.mean,
                    at.error.p90,
                    at.certificates_kept,
                    at.bound.p50,
                    at.missed.p50,
                    at.micros_per_search
                ));
            }
        }
    }
}

/// A share as a figure of one place; a dash where nothing is known.
fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.1}%", 100.0 * share))
}

impl Described {
    fn of(source: &Source) -> Self {
        match source {
            Source::Dump(dump) => Self::Dump {
                model: dump.meta.model.clone(),
                text: dump.meta.text.clone(),
                tokens: dump.meta.q_shape[1],
                perplexity: dump.meta.perplexity,
                basis: dump.basis_from.clone(),
            },
            Source::Synthetic(made) => Self::Synthetic {
                tokens: made.shape().tokens,
                seed: made.shape().seed,
                theta: made.shape().theta,
                statistics: Box::new(Measurements::of(&made.statistics)),
            },
        }
    }
}

impl Measurements {
    fn of(statistics: &Statistics) -> Self {
        Self {
            key_mean: statistics.key_mean,
            cos_keys: statistics.cos_keys,
            cos_query_key: statistics.cos_query_key,
            cos_query_centred_key: statistics.cos_query_centred_key,
            cos_queries: statistics.cos_queries,
            spread_of_keys: statistics.spread_of_keys,
            directions_of_queries: statistics.directions_of_queries,
            mahalanobis: statistics.mahalanobis,
            sink: statistics.sink,
            last: statistics.last,
            n90: Spread::of(&statistics.n90),
            top_100: statistics.top_100,
            overlap_1: statistics.overlap_1,
            overlap_64: statistics.overlap_64,
        }
    }
}

impl Spread {
    fn of(summary: &Summary) -> Self {
        Self {
            mean: summary.mean,
            p10: summary.p10,
            p50: summary.p50,
            p90: summary.p90,
            p99: summary.p99,
        }
    }
}

impl Measured {
    fn of(group: &Group, mass: f64) -> Self {
        Self {
            name: group.name,
            layers: group.layers.clone(),
            recordings: group.recordings,
            heads: group.heads,
            head_dim: group.head_dim,
            searched_keys: group.searched_keys,
            key_bytes: group.searched_keys * group.head_dim * 2,
            indexes: group.indexes.iter().map(|sums| IndexFigures::of(sums, mass)).collect(),
            served: group.served.iter().map(ServedFigures::of).collect(),
            served_bytes_per_token: group.served_bytes as f64 / group.served_keys.max(1) as f64,
        }
    }
}

impl IndexFigures {
    fn of(sums: &IndexSums, mass: f64) -> Self {
        let figures = sums.mass.figures();
        Self {
            name: sums.name.text(),
            build_seconds: sums.build_seconds.iter().sum::<f64>() / sums.build_seconds.len().max(1) as f64,
            bytes_per_token: sums.bytes as f64 / sums.keys.max(1) as f64,
            curve: sums.efforts.iter().map(|at| Point::of(at, sums.counts)).collect(),
            for_mass: sums.counts.then(|| ForMass {
                mass,
                reached: figures.reached,
                bytes: Spread::of(&figures.bytes),
                bytes_share: Spread::of(&figures.bytes_share),
                effort: Spread::of(&figures.effort),
            }),
        }
    }
}

impl Point {
    fn of(sums: &EffortSums, counts: bool) -> Self {
        let found = sums.plain.judgement();
        let recall = |nth: usize| found.recall.get(nth).map_or(0.0, |(_, recall)| *recall);
        Self {
            effort: sums.effort,
            recall_10: recall(0),
            recall_100: recall(1),
            keys_share: counts.then_some(found.keys_share),
            bytes_share: counts.then_some(found.bytes_share),
            bytes_per_search: counts.then_some(found.bytes_per_search),
            mass: Spread::of(&found.mass),
            error: Spread::of(&found.error),
            error_estimated: sums
                .estimated
                .as_ref()
                .map(|tally| Spread::of(&tally.judgement().error)),
            micros_per_search: median(sums.micros.clone()),
        }
    }
}

impl ServedFigures {
    fn of(sums: &ServedSums) -> Self {
        let Attend {
            effort, target_mass, ..
        } = sums.how;
        let found = sums.tally.judgement();
        Self {
            effort,
            target_mass,
            queries: found.queries,
            rows_share: found.rows_share,
            bytes_share: found.bytes_share,
            bytes_per_search: found.bytes_per_search,
            mass: Spread::of(&found.mass),
            error: Spread::of(&found.error),
            certificates_kept: found.certificates.coverage,
            bound: Spread::of(&found.certificates.bound),
            missed: Spread::of(&found.certificates.missed),
            micros_per_search: median(sums.micros.clone()),
        }
    }
}
