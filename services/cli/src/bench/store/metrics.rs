//! A store's own numbers, read from its `/metrics` in Prometheus' text format.

use std::time::Duration;

use anyhow::{Context, Result};

/// Longest wait for the page.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The page at one time.
#[derive(Clone, Debug)]
pub(in crate::bench) struct Metrics(String);

impl Metrics {
    /// Reads `admin`'s page, where `admin` is a base URL.
    pub(super) async fn of(admin: &str) -> Result<Self> {
        let url = format!("{admin}/metrics");
        let client = reqwest::Client::builder().timeout(TIMEOUT).build()?;
        let page = client
            .get(&url)
            .send()
            .await
            .and_then(reqwest::Response::error_for_status);
        let page = page.with_context(|| format!("cannot read {url}"))?;
        Ok(Self(page.text().await.with_context(|| format!("cannot read {url}"))?))
    }

    /// The sum of all series of `name` that have each of `labels`, written as in `tier=\"disk\"`; `None` without any.
    pub(in crate::bench) fn sum(&self, name: &str, labels: &[&str]) -> Option<f64> {
        self.0
            .lines()
            .filter_map(|line| {
                let rest = line.strip_prefix(name)?;
                let (series, value) = rest.rsplit_once(' ')?;
                let whole_name = series.is_empty() || series.starts_with('{');
                (whole_name && labels.iter().all(|label| series.contains(label)))
                    .then(|| value.parse::<f64>().ok())
                    .flatten()
            })
            .fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_chosen_by_name_and_labels() {
        let page = Metrics(
            "# TYPE hits counter\nhits{tier=\"host\",a=\"b c\"} 3\nhits{tier=\"disk\"} 4\nhits_max 9\nsegments 2\n"
                .to_owned(),
        );
        let table: [(&str, &[&str], Option<f64>); 6] = [
            ("hits", &[], Some(7.0)),
            ("hits", &["tier=\"host\""], Some(3.0)),
            ("hits", &["tier=\"host\"", "a=\"b c\""], Some(3.0)),
            ("hits", &["tier=\"object\""], None),
            ("segments", &[], Some(2.0)),
            ("segment", &[], None),
        ];
        for (name, labels, expected) in table {
            assert_eq!(page.sum(name, labels), expected, "{name} {labels:?}");
        }
    }
}
