//! `kvasir config explain`: every key, its value, and where the value came from.

use anyhow::{Context, Result};
use kvasir_runtime::config::Source;
use serde_json::{Value, json};

use crate::{args::Format, output::print, tree::Configuration};

pub(crate) fn explain(configuration: &Configuration, format: Format) -> Result<()> {
    match format {
        Format::Text => {
            for line in text(configuration)? {
                print(line);
            }
        }
        Format::Json => print(serde_json::to_string_pretty(&as_json(configuration)?).context("cannot print JSON")?),
    }
    Ok(())
}

/// One key.
struct Row {
    key: String,
    /// As it is after everything that follows was filled in; `null` when not set.
    value: Value,
    /// The same as TOML.
    toml: Option<String>,
    source: String,
}

fn rows(configuration: &Configuration) -> Result<Vec<Row>> {
    let tree = serde_json::to_value(configuration.tree()).context("the configuration cannot be written as JSON")?;
    let row = |line: &kvasir_runtime::config::Explained| {
        let value = tree
            .pointer(&format!("/{}", line.key.replace('.', "/")))
            .cloned()
            .unwrap_or_default();
        let derived = configuration.derived_from(&line.key);
        Row {
            key: line.key.clone(),
            // A value that follows from another is not in the layers, only in the tree; none but texts and numbers do.
            toml: if derived.is_some() {
                Some(value.to_string())
            } else {
                line.value.clone()
            },
            value,
            source: derived.map_or_else(|| line.source.to_string(), |from| format!("follows from {from}")),
        }
    };
    Ok(configuration.loaded().explain().iter().map(row).collect())
}

/// TOML that could be pasted into a file, with the sources aligned behind it.
fn text(configuration: &Configuration) -> Result<Vec<String>> {
    /// Longer values push their comment out instead of all others'.
    const ALIGN_MAX: usize = 64;
    let rows = rows(configuration)?;
    let left = |row: &Row| match &row.toml {
        Some(value) => format!("{} = {value}", row.key),
        None => format!("# {} is not set", row.key),
    };
    let lefts: Vec<String> = rows.iter().map(left).collect();
    let width = lefts
        .iter()
        .map(|left| left.chars().count())
        .filter(|width| *width <= ALIGN_MAX)
        .max()
        .unwrap_or(0);
    Ok(rows
        .iter()
        .zip(&lefts)
        .map(|(row, left)| format!("{left:width$}  # {}", row.source))
        .collect())
}

fn as_json(configuration: &Configuration) -> Result<Value> {
    let place = |key: &str| match configuration.loaded().source(key) {
        Source::Default => match configuration.derived_from(key) {
            Some(from) => json!({"kind": "derived", "from": from}),
            None => json!({"kind": "default"}),
        },
        Source::File(path, line) => json!({"kind": "file", "path": path, "line": line}),
        Source::Env(name) => json!({"kind": "environment", "name": name}),
        Source::Flag(flag) => json!({"kind": "flag", "flag": flag}),
    };
    let rows = rows(configuration)?;
    Ok(rows
        .into_iter()
        .map(|row| json!({"key": row.key, "value": row.value, "source": place(&row.key)}))
        .collect())
}
