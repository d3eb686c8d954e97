//! The process's one metrics recorder, and its text for Prometheus.

use std::{sync::OnceLock, time::Duration};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Renders what was recorded. All handles of a process see the same recorder.
#[derive(Clone)]
pub struct MetricsHandle(PrometheusHandle);

/// Upper bounds of the buckets of every histogram named `*_seconds`: from 100 µs (a local lookup) to 2 minutes
/// (a long prompt on a CPU).
pub const SECONDS_BUCKETS: [f64; 19] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 120.0,
];

/// Upper bounds of the buckets of every histogram named `*_bytes`.
pub const BYTES_BUCKETS: [f64; 9] = [
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];

/// How often histograms are folded when nobody scrapes, so that their memory stays bounded.
const UPKEEP: Duration = Duration::from_secs(5);

/// Installs the recorder on the first call; every later call returns the same one.
pub fn install() -> MetricsHandle {
    static HANDLE: OnceLock<MetricsHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let recorder = builder().build_recorder();
            let handle = recorder.handle();
            // Refused only if another recorder was installed before, by code outside Kvasir; then ours stays empty.
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::warn!("another metrics recorder was installed before, /metrics will be empty");
            }
            let upkeep = handle.clone();
            let spawned = std::thread::Builder::new().name("metrics-upkeep".to_owned()).spawn(move || {
                loop {
                    std::thread::sleep(UPKEEP);
                    upkeep.run_upkeep();
                }
            });
            if let Err(error) = spawned {
                tracing::warn!(%error, "could not start the metrics upkeep thread, histograms are folded only when scraped");
            }
            MetricsHandle(handle)
        })
        .clone()
}

impl MetricsHandle {
    /// The Prometheus text of this moment.
    pub fn render(&self) -> String {
        self.0.render()
    }
}

impl std::fmt::Debug for MetricsHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MetricsHandle")
    }
}

fn builder() -> PrometheusBuilder {
    let with_buckets = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS_BUCKETS)
        .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_bytes".to_owned()), &BYTES_BUCKETS));
    // Fails only on an empty list of buckets; both lists above are constants and are not empty.
    with_buckets.unwrap_or_else(|_| PrometheusBuilder::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installing_twice_gives_the_same_recorder_and_buckets() {
        let first = install();
        metrics::counter!("kvasir_runtime_test_total", "kind" => "a").increment(3);
        metrics::histogram!("kvasir_runtime_test_seconds").record(0.004);
        let second = install();
        for handle in [first, second] {
            let text = handle.render();
            assert!(text.contains("kvasir_runtime_test_total{kind=\"a\"} 3"), "{text}");
            assert!(
                text.contains("kvasir_runtime_test_seconds_bucket{le=\"0.005\"} 1"),
                "{text}"
            );
            assert!(
                text.contains("kvasir_runtime_test_seconds_bucket{le=\"0.0025\"} 0"),
                "{text}"
            );
        }
    }
}
