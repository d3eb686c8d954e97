//! Decoding speed and agreement of each attention mode over one real prompt, beside full attention.
//!
//! `cargo run --release -p kvasir-integration --example decode -- [PROMPT_TOKENS] [NEW_TOKENS]`
//!
//! A store, a worker and a router run in this process, over their real protocols. Each mode is fed the tokens that full
//! attention chose, so that an early difference does not make the rest incomparable.
use anyhow::Result;
use kvasir_proto::v1::{AttentionMode, AttentionOptions, GenerateRequest};
use kvasir_testkit::{Cluster, Generated, Options, generate, request};

type Change = fn(&mut AttentionOptions);

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (tokens, new) = (number(3500), number(64));
    let cluster = Cluster::start(Options::default()).await?;
    let worker = cluster.worker_url(0);
    let prompt = kvasir_integration::prompt(cluster.file(), tokens);
    let free = generate(&worker, request(&prompt, new as u32)).await?;
    // The same again with its own tokens forced, for their likelihood.
    let full = GenerateRequest {
        forced: free.ids,
        ..request(&prompt, new as u32)
    };
    let full = generate(&worker, full).await?;
    println!("{tokens} prompt tokens, {new} new ones");
    print_line("full", &full, &full);
    let table: [(&str, AttentionMode, Change); 4] = [
        ("attend, all", AttentionMode::Attend, |options| {
            options.target_mass = 1.0
        }),
        ("attend, 0.99", AttentionMode::Attend, |options| {
            options.target_mass = 0.99
        }),
        ("attend, 0.95", AttentionMode::Attend, |options| {
            options.target_mass = 0.95
        }),
        ("rows, 128", AttentionMode::Rows, |options| options.k = 128),
    ];
    for (name, mode, change) in table {
        let mut options = AttentionOptions::default();
        options.set_mode(mode);
        change(&mut options);
        let asked = GenerateRequest {
            attention: Some(options),
            forced: full.ids.clone(),
            ..request(&prompt, new as u32)
        };
        let answer = generate(&worker, asked).await?;
        print_line(name, &answer, &full);
    }
    cluster.stop().await
}

fn print_line(name: &str, answer: &Generated, full: &Generated) {
    let report = answer.finished.report.clone().unwrap_or_default();
    let agreeing = answer.ids.iter().zip(&full.ids).filter(|(a, b)| a == b).count();
    let steps = answer.ids.len().saturating_sub(1);
    println!(
        "{name:14} {:6.1} tok/s, {agreeing} of {} as full, nll {:.4}, {:5.2} % of keys attended, mass p50 {:.4}, {} B/token{}",
        steps as f32 * 1e3 / report.decode_ms,
        full.ids.len(),
        report.forced_nll,
        // Attended keys are counted per query head, searchable ones per KV head: SmolLM2 has 3 query heads to one.
        report.keys_attended as f64 * 100.0 / (report.keys_total * 3).max(1) as f64,
        report.mass_covered_p50,
        report.retrieved_bytes / steps.max(1) as u64,
        if report.fell_back {
            format!(", fell back: {}", report.fallback_reason)
        } else {
            String::new()
        }
    );
    if report.round_trips > 0 {
        let per_reply = |ms: f32| ms * 1e3 / report.round_trips as f32;
        println!(
            "{:14} {}: per reply {:.0} us searched, {:.0} us queued, {:.0} us waited for; wire p50 {:.0} us; {:.0} % of the \
             search hidden, {} hinted; {} of {} rows kept",
            "",
            report.index,
            per_reply(report.search_ms),
            per_reply(report.store_queued_ms),
            per_reply(report.waited_ms),
            report.wire_us_p50,
            report.search_hidden * 100.0,
            report.hinted,
            report.rows_kept,
            report.rows,
        );
    }
}
