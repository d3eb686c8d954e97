//! Runs the fault matrix, or some rows of it, and prints a table: `make faults`.
//!
//! `cargo run -p kvasir-faults --example matrix -- --rows torn,flips --count 1000 --json faults.json`

#![expect(clippy::print_stdout, reason = "the table is what it is for")]

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use clap::Parser;
use kvasir_faults::{Outcome, Plan, ROWS, Row, Tier, row};

/// The fault matrix.
#[derive(Debug, Parser)]
struct Options {
    /// Names or numbers of rows, separated by commas; all of them if empty.
    #[arg(long, env = "ROWS", value_delimiter = ',')]
    rows: Vec<String>,
    /// Seed of everything random.
    #[arg(long, env = "SEED", default_value_t = 0x5EED)]
    seed: u64,
    /// Faults for each row instead of its full number.
    #[arg(long, env = "COUNT")]
    count: Option<u64>,
    /// Share of the full numbers.
    #[arg(long, env = "SCALE", default_value_t = 1.0)]
    scale: f64,
    /// Where to write what was counted.
    #[arg(long, env = "JSON")]
    json: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let rows = chosen(&options.rows)?;
    println!(
        "| row | fault | faults | hits host / disk / object / over the wire | misses | corrupt, said so | shed | wrong bytes | deaths | seconds |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let mut outcomes = Vec::new();
    for row in rows {
        let scaled = (row.full as f64 * options.scale).ceil().max(1.0) as u64;
        let outcome = row.run(Plan {
            seed: options.seed,
            count: options.count.unwrap_or(scaled),
        });
        show(row, &outcome);
        outcomes.push(outcome);
    }
    for outcome in &outcomes {
        if let Some(failure) = &outcome.failure {
            println!("\nFAILED {}: {failure}", outcome.row);
        }
        if let Some(reason) = &outcome.skipped {
            println!("\nNOT RUN {}: {reason}", outcome.row);
        }
    }
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&outcomes)?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    let passed = outcomes.iter().all(|outcome| outcome.failure.is_none());
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn chosen(names: &[String]) -> Result<Vec<&'static Row>> {
    let names: Vec<&str> = names
        .iter()
        .map(|name| name.trim())
        .filter(|name| !name.is_empty())
        .collect();
    if names.is_empty() {
        return Ok(ROWS.iter().collect());
    }
    let mut rows = Vec::new();
    for name in names {
        let Some(row) = row(name) else {
            let known: Vec<_> = ROWS.iter().map(|row| row.name).collect();
            bail!("no row {name:?}: choose from {}", known.join(", "));
        };
        rows.push(row);
    }
    Ok(rows)
}

fn show(row: &Row, outcome: &Outcome) {
    let tally = &outcome.tally;
    let hits = |tier| tally.hits.get(&tier).copied().unwrap_or(0);
    let number = row.number.map_or_else(String::new, |number| format!("{number} "));
    println!(
        "| {number}{} | {} | {} | {} / {} / {} / {} | {} | {} | {} | {} | {} | {:.1} |",
        row.name,
        row.fault,
        tally.faults,
        hits(Tier::Host),
        hits(Tier::Disk),
        hits(Tier::Object),
        hits(Tier::Store),
        tally.misses,
        tally.corrupt,
        tally.shed,
        tally.wrong,
        tally.deaths,
        outcome.seconds
    );
}
