//! The table that a person reads at the end.

use super::report::{Finished, Retrieval, Run};

pub(super) fn lines(report: &Finished) -> Vec<String> {
    let mut lines = vec![
        format!(
            "{} as context, {} prompt tokens; {} questions, medians; {}, {} cores ({})",
            report.document,
            report.prompt_tokens,
            report.questions,
            report.model,
            report.machine.cores,
            report.machine.cpu
        ),
        String::new(),
        format!(
            "{:18}{:>14}{:>10}{:>20}{:>14}",
            "", "first token", "", "prompt tokens found", "decode"
        ),
    ];
    for run in Run::ALL {
        let (ttft_ms, cached, speed) = report.line(run);
        let faster = match run {
            Run::Cold => String::new(),
            _ if ttft_ms > 0.0 => format!("{:.0}x", report.ttft_cold_ms / ttft_ms),
            _ => String::new(),
        };
        lines.push(format!(
            "{:18}{ttft_ms:>11.0} ms{faster:>10}{cached:>20}{speed:>8.1} tok/s",
            run.name()
        ));
    }
    lines.push(String::new());
    lines.push(format!(
        "cold while pushing to the store: {:.0} ms; pushed {}, loaded {}",
        report.ttft_cold_pushing_ms,
        bytes(report.bytes_pushed),
        bytes(report.bytes_loaded)
    ));
    let verdict = if report.greedy_identical_full_vs_cached {
        "equal"
    } else {
        "NOT EQUAL"
    };
    lines.push(format!(
        "greedy answers with and without the cache, also after restart and kill: {verdict}"
    ));
    let tenth = if report.warm_within_a_tenth_of_cold {
        "yes"
    } else {
        "NO"
    };
    lines.push(format!(
        "first token warm within a tenth of cold, also after restart and kill: {tenth}"
    ));
    lines.push(retrieval(&report.retrieval));
    lines.push(retrieval(&report.retrieval_rows));
    lines
}

fn retrieval(of: &Retrieval) -> String {
    format!(
        "{} ({}): {:.1} % of the keys attended ({:.0} % scanned), mass covered {:.4} (median; least {:.4}), {:.1} % of {} tokens \
         as with full attention (nll {:+.4}), {:.0} % of the search hidden, {:.0} % of the rows kept, {} per token",
        of.asked_for,
        of.index,
        of.keys_attended_fraction * 100.0,
        of.keys_scanned_fraction * 100.0,
        of.mass_covered_p50,
        of.mass_covered_min,
        of.top1_agreement * 100.0,
        of.forced_tokens,
        of.nll_difference,
        of.search_hidden * 100.0,
        of.rows_kept_fraction * 100.0,
        bytes(of.retrieved_bytes_per_token as u64)
    )
}

fn bytes(n: u64) -> String {
    match n {
        0..1_000 => format!("{n} B"),
        1_000..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        _ => format!("{:.1} MB", n as f64 / 1e6),
    }
}
