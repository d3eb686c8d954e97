//! `/metrics`, read.

use anyhow::{Context, Result};

/// The Prometheus text of one moment.
#[derive(Clone, Debug)]
pub struct Metrics(String);

impl Metrics {
    /// Reads `/metrics` under a base URL.
    ///
    /// # Errors
    /// When nothing answers.
    pub async fn of(base: &str) -> Result<Self> {
        let response = reqwest::get(format!("{base}/metrics"))
            .await
            .context("nothing answers at /metrics")?;
        Ok(Self(response.text().await.context("/metrics broke off")?))
    }

    /// The sum over all label sets of a metric (with a histogram: of its `_count`); `None` when it is not there.
    pub fn sum(&self, name: &str) -> Option<f64> {
        let of = |wanted: &str| {
            let lines = self.0.lines().filter(|line| !line.starts_with('#'));
            let values: Vec<f64> = lines
                .filter(|line| line.split(['{', ' ']).next() == Some(wanted))
                .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
                .collect();
            (!values.is_empty()).then(|| values.iter().sum())
        };
        of(name).or_else(|| of(&format!("{name}_count")))
    }

    /// The whole text, for messages.
    pub fn text(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_go_over_labels() {
        let metrics = Metrics(
            "# TYPE a counter\na{x=\"1\"} 2\na{x=\"2\"} 3\nab 7\nh_bucket{le=\"1\"} 4\nh_sum 2.5\nh_count 4\n"
                .to_owned(),
        );
        assert_eq!(metrics.sum("a"), Some(5.0));
        assert_eq!(metrics.sum("ab"), Some(7.0));
        assert_eq!(metrics.sum("h"), Some(4.0));
        assert_eq!(metrics.sum("b"), None);
    }
}
