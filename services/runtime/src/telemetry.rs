//! Logs: where they go, in which form, and which are kept.

use serde::{Deserialize, Serialize};
use tracing_subscriber::{EnvFilter, fmt::format::FmtSpan, layer::SubscriberExt, util::SubscriberInitExt};

/// `[log]`: logs go to standard error, so that standard output stays for results.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// What is kept: a level, or levels by module, as in `info,kvasir_store=debug`.
    pub filter: String,
    /// `text` for people, `json` for machines (one object per line).
    pub format: LogFormat,
    /// Whether closed spans are logged with the time they took. For the one who looks for where a request's time goes.
    pub spans: bool,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One readable line per event.
    #[default]
    Text,
    /// One JSON object per event.
    Json,
}

/// The filter could not be read.
#[derive(Debug, thiserror::Error)]
#[error(
    "log.filter = {filter:?} is not a filter ({why}): write a level (error, warn, info, debug, trace), or levels by module as in \"info,kvasir_store=debug\""
)]
pub struct FilterError {
    filter: String,
    why: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            filter: "info".to_owned(),
            format: LogFormat::Text,
            spans: false,
        }
    }
}

/// Sends this process's events to standard error. The first call wins; later ones only check their filter.
pub fn init(config: &LogConfig) -> Result<(), FilterError> {
    let filter = parse_filter(&config.filter)?;
    let spans = if config.spans { FmtSpan::CLOSE } else { FmtSpan::NONE };
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_span_events(spans);
    let registry = tracing_subscriber::registry().with(filter);
    // An earlier subscriber (tests, a second service in the process) is not an error: its events go to the same place.
    let _already_set = match config.format {
        LogFormat::Text => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            registry.with(layer.with_ansi(colours).with_target(true)).try_init()
        }
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
    };
    Ok(())
}

fn parse_filter(filter: &str) -> Result<EnvFilter, FilterError> {
    EnvFilter::try_new(filter).map_err(|error| FilterError {
        filter: filter.to_owned(),
        why: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_checked() {
        for filter in ["info", "warn,kvasir_store=debug", "off", ""] {
            assert!(parse_filter(filter).is_ok(), "{filter}");
        }
        let error = parse_filter("kvasir=loud").expect_err("not a level");
        assert!(error.to_string().contains("log.filter = \"kvasir=loud\""), "{error}");
        assert!(error.to_string().contains("info,kvasir_store=debug"), "{error}");
    }
}
