//! What was measured, for people and as JSON.

use std::{fmt, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::load::Tally;
use crate::{
    args::{StoreOperation, StorePath, StoreTier},
    measure::Machine,
    output::say,
};

/// Version of the JSON; raised when a field goes or changes its meaning.
pub(super) const SCHEMA: u32 = 2;

/// The result of `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) schema: u32,
    pub(super) cases: Vec<Measured>,
    pub(super) tier: StoreTier,
    pub(super) path: StorePath,
    pub(super) verify: bool,
    /// Blocking connections; with any of them `connections` and `depth` say nothing.
    pub(super) threads: usize,
    pub(super) connections: usize,
    /// Requests under way per connection; of the closed loop.
    pub(super) depth: usize,
    /// Requests per second; `null` for the closed loop.
    pub(super) rate: Option<f64>,
    pub(super) seconds: f64,
    pub(super) zipf: f64,
    pub(super) read_share: f64,
    pub(super) kvasir: &'static str,
    pub(super) profile: &'static str,
    pub(super) machine: Machine,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Case {
    pub(super) operation: StoreOperation,
    pub(super) block_bytes: usize,
    /// Blocks per request.
    pub(super) batch: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operation = format!("{:?}", self.operation).to_lowercase();
        write!(f, "{operation:6} {:>5} KiB x {:<3}", self.block_bytes >> 10, self.batch)
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Measured {
    #[serde(flatten)]
    case: Case,
    operations: u64,
    blocks: u64,
    /// Blocks that were absent, busy or too late.
    refused: u64,
    /// Requests that were due and not sent, open loop.
    not_sent: u64,
    gigabytes_per_second: f64,
    operations_per_second: f64,
    blocks_per_second: f64,
    latency_us: Latency,
    client_cpu_seconds_per_gigabyte: Option<f64>,
    store_cpu_seconds_per_gigabyte: Option<f64>,
    client_cpu_seconds: Option<f64>,
    store_cpu_seconds: Option<f64>,
    /// Blocks that were compared byte for byte with what was put, after the measurement.
    verified: usize,
}

/// Percentiles of a latency, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Latency {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
}

impl Latency {
    pub(super) fn of(nanoseconds: &Histogram<u64>) -> Self {
        let at = |quantile: f64| nanoseconds.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: nanoseconds.max() as f64 / 1e3,
        }
    }
}

type Times = (Option<Duration>, Option<Duration>);

impl Measured {
    pub(super) fn new(case: Case, tally: &Tally, verified: usize, before: Times, after: Times) -> Self {
        let seconds = tally.elapsed.as_secs_f64().max(1e-9);
        let gigabytes = tally.bytes as f64 / 1e9;
        let used = |before: Option<Duration>, after: Option<Duration>| Some(after?.checked_sub(before?)?.as_secs_f64());
        let (client, store) = (used(before.0, after.0), used(before.1, after.1));
        let per_gigabyte = |used: Option<f64>| used.filter(|_| gigabytes > 0.0).map(|used| used / gigabytes);
        Self {
            case,
            operations: tally.operations,
            blocks: tally.blocks,
            refused: tally.refused,
            not_sent: tally.not_sent,
            gigabytes_per_second: gigabytes / seconds,
            operations_per_second: tally.operations as f64 / seconds,
            blocks_per_second: tally.blocks as f64 / seconds,
            latency_us: Latency::of(&tally.latency),
            client_cpu_seconds_per_gigabyte: per_gigabyte(client),
            store_cpu_seconds_per_gigabyte: per_gigabyte(store),
            client_cpu_seconds: client,
            store_cpu_seconds: store,
            verified,
        }
    }
}

impl Report {
    /// The table, on standard error.
    pub(super) fn show(&self) {
        let loop_ = match self.rate {
            _ if self.threads > 0 => format!("closed loop, {} blocking connections", self.threads),
            None => format!("closed loop, {} x {} under way", self.connections, self.depth),
            Some(rate) => format!("open loop, {rate} per second over {} connections", self.connections),
        };
        say(format_args!(
            "{:?} tier by {:?}, {loop_}, {} s each, profile {}; {} ({} cores)",
            self.tier, self.path, self.seconds, self.profile, self.machine.cpu, self.machine.cores
        ));
        say(format_args!(
            "{:22}{:>8}{:>11}{:>11}{:>10}{:>10}{:>10}{:>9}{:>9}{:>9}",
            "", "GB/s", "ops/s", "blocks/s", "p50 us", "p99 us", "p99.9 us", "refused", "cli s/GB", "sto s/GB"
        ));
        let or_dash = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        for measured in &self.cases {
            say(format_args!(
                "{:22}{:>8.2}{:>11.0}{:>11.0}{:>10.0}{:>10.0}{:>10.0}{:>9}{:>9}{:>9}",
                measured.case.to_string(),
                measured.gigabytes_per_second,
                measured.operations_per_second,
                measured.blocks_per_second,
                measured.latency_us.p50,
                measured.latency_us.p99,
                measured.latency_us.p999,
                measured.refused + measured.not_sent,
                or_dash(measured.client_cpu_seconds_per_gigabyte),
                or_dash(measured.store_cpu_seconds_per_gigabyte),
            ));
        }
    }
}
