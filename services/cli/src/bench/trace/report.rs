//! What a replay came to, for people and as JSON.

use std::time::Duration;

use serde::Serialize;

use super::{
    BLOCK_TOKENS, Sums,
    requests::{Request, unbounded},
};
use crate::{
    args::{ConfigArgs, TraceArgs},
    bench::store::Metrics,
    measure::{Machine, median},
    output::say,
    version::{PROFILE, VERSION},
};

/// Version of the JSON; raised when a field goes or changes its meaning.
const SCHEMA: u32 = 2;

/// What the store itself says it moved.
pub(super) struct Moved {
    /// `None` for a store that ran before.
    pub(super) metrics: Option<Metrics>,
    /// Of its process, for all reasons; `None` where it is not known.
    pub(super) disk_bytes_written: Option<u64>,
}

/// The result of `--json`. Shares are of all whole blocks of the trace.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema: u32,
    requests: usize,
    input_tokens: u64,
    blocks: u64,
    hit_share: f64,
    /// By the tier that a block was read from, as the store counts it.
    host_hit_share: f64,
    disk_hit_share: f64,
    object_hit_share: f64,
    /// What a store without bounds would hit, by an own count over the trace.
    hit_share_unbounded: f64,
    lost_blocks: u64,
    put_blocks: u64,
    put_refused_blocks: u64,
    block_bytes: usize,
    gigabytes_loaded: f64,
    gigabytes_put: f64,
    disk_gigabytes_written: Option<f64>,
    load_seconds_p50: f64,
    load_gigabytes_per_second: f64,
    prefill_tokens_per_second: f64,
    /// Computing what was hit would have taken this long.
    recompute_seconds: f64,
    load_seconds: f64,
    saved_seconds: f64,
    in_flight: usize,
    host_bytes_max: u64,
    disk_bytes_max: Option<u64>,
    /// Which blocks the disk is given; of a store that is started.
    disk_admission: String,
    /// Assignments of the command line; what they leave out is at its default.
    settings: Vec<String>,
    replay_seconds: f64,
    kvasir: &'static str,
    profile: &'static str,
    machine: Machine,
}

/// What `store.disk_admission` is set to, by the last assignment or by default.
fn disk_admission(set: &[String]) -> String {
    let assigned = set
        .iter()
        .rev()
        .find_map(|assignment| assignment.strip_prefix("store.disk_admission="));
    assigned.map_or_else(
        || {
            let default = serde_json::to_value(kvasir_store::StoreConfig::default().disk_admission);
            default
                .ok()
                .and_then(|value| Some(value.as_str()?.to_owned()))
                .unwrap_or_default()
        },
        |value| value.trim_matches('"').to_owned(),
    )
}

impl Report {
    pub(super) fn new(
        args: &TraceArgs,
        config: &ConfigArgs,
        requests: &[Request],
        sums: Sums,
        moved: &Moved,
        elapsed: Duration,
    ) -> Self {
        let block_bytes = args.bytes_per_token.as_usize() * usize::from(BLOCK_TOKENS);
        let (blocks, gigabytes) = (sums.blocks.max(1) as f64, block_bytes as f64 / 1e9);
        let hits = sums.hits as f64;
        let tier = |tier: &str| {
            let label = format!("tier=\"{tier}\"");
            moved.metrics.as_ref()?.sum("kvasir_store_get_hits_total", &[&label])
        };
        // A store that was there before serves others too; of it only what a match says is known.
        let (host, disk, object) = if moved.metrics.is_some() {
            (
                tier("host").unwrap_or(0.0),
                tier("disk").unwrap_or(0.0),
                tier("object").unwrap_or(0.0),
            )
        } else {
            let host = sums.matched_host.min(sums.hits) as f64;
            let object = sums.matched_object.min(sums.hits - sums.matched_host.min(sums.hits)) as f64;
            (host, hits - host - object, object)
        };
        let recompute = hits * f64::from(BLOCK_TOKENS) / args.prefill_tokens_per_second;
        let loading = sums.loading.as_secs_f64();
        let loaded = hits * gigabytes;
        Self {
            schema: SCHEMA,
            requests: requests.len(),
            input_tokens: sums.tokens,
            blocks: sums.blocks,
            hit_share: hits / blocks,
            host_hit_share: host / blocks,
            disk_hit_share: disk / blocks,
            object_hit_share: object / blocks,
            hit_share_unbounded: unbounded(requests) as f64 / blocks,
            lost_blocks: sums.lost,
            put_blocks: sums.put,
            put_refused_blocks: sums.put_refused,
            block_bytes,
            gigabytes_loaded: loaded,
            gigabytes_put: sums.put as f64 * gigabytes,
            disk_gigabytes_written: moved.disk_bytes_written.map(|bytes| bytes as f64 / 1e9),
            load_seconds_p50: median(sums.loads),
            load_gigabytes_per_second: if loading > 0.0 { loaded / loading } else { 0.0 },
            prefill_tokens_per_second: args.prefill_tokens_per_second,
            recompute_seconds: recompute,
            load_seconds: loading,
            saved_seconds: recompute - loading,
            in_flight: args.in_flight.into(),
            host_bytes_max: args.host.as_u64(),
            disk_bytes_max: args.disk.map(|bytes| bytes.as_u64()),
            disk_admission: disk_admission(&config.set),
            settings: config.set.clone(),
            replay_seconds: elapsed.as_secs_f64(),
            kvasir: VERSION,
            profile: PROFILE,
            machine: Machine::here(),
        }
    }

    /// In words, on standard error.
    pub(super) fn show(&self) {
        say(format_args!(
            "{} requests, {} blocks: hit {:.1} % (host {:.1}, disk {:.1}, object {:.1}; without bounds {:.1}), {} lost",
            self.requests,
            self.blocks,
            100.0 * self.hit_share,
            100.0 * self.host_hit_share,
            100.0 * self.disk_hit_share,
            100.0 * self.object_hit_share,
            100.0 * self.hit_share_unbounded,
            self.lost_blocks,
        ));
        say(format_args!(
            "loaded {:.2} GB in {:.1} s against {:.1} s of computing at {} tokens/s: {:.1} s saved",
            self.gigabytes_loaded,
            self.load_seconds,
            self.recompute_seconds,
            self.prefill_tokens_per_second,
            self.saved_seconds,
        ));
        let written = self
            .disk_gigabytes_written
            .map_or_else(String::new, |written| format!(", {written:.2} GB written to disk"));
        say(format_args!(
            "put {:.2} GB, {} refused{written} (admission: {}); {:.0} s",
            self.gigabytes_put, self.put_refused_blocks, self.disk_admission, self.replay_seconds
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_is_the_last_assigned_or_the_default() {
        let set = |assignments: &[&str]| assignments.iter().map(ToString::to_string).collect::<Vec<_>>();
        for (assignments, expected) in [
            (&[][..], "always"),
            (&["store.host_bytes_max=1GiB"], "always"),
            (
                &["store.disk_admission=always", "store.disk_admission=\"reuse\""],
                "reuse",
            ),
        ] {
            assert_eq!(disk_admission(&set(assignments)), expected);
        }
    }
}
