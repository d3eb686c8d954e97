//! Decoding with retrieval beside full attention, token by token over a long real prompt.

use anyhow::Result;
use kvasir_integration::prompt;
use kvasir_proto::v1::{AttentionMode, AttentionOptions, GenerateRequest};
use kvasir_testkit::{Cluster, Options, generate, request, until_durable};

/// Tokens of the prompt: a long page, of which sink and window leave most to retrieve from.
const PROMPT: usize = 3000;
const TOKENS: u32 = 128;
/// Query heads of SmolLM2 per KV head: attended keys are counted per query head, searchable ones per KV head.
const GROUP: f64 = 3.0;

/// What a row of a table changes in the options.
type Change = fn(&mut AttentionOptions);

/// The same tokens are fed under full attention and under each form. What the model would have chosen agrees, the fed tokens
/// are about as likely, and the report says how little was attended to.
#[tokio::test(flavor = "multi_thread")]
async fn retrieval_agrees_with_full_attention() -> Result<()> {
    let cluster = Cluster::start(Options::default()).await?;
    let worker = cluster.worker_url(0);
    let prompt = prompt(cluster.file(), PROMPT);
    let free = generate(&worker, request(&prompt, TOKENS)).await?;
    until_durable(&cluster.store_url(), PROMPT as u64 / 64).await?;
    let forced = |attention: Option<AttentionOptions>| GenerateRequest {
        forced: free.ids.clone(),
        attention,
        ..request(&prompt, TOKENS)
    };
    let full = generate(&worker, forced(None)).await?;
    assert_eq!(full.ids, free.ids, "the choices are those that were fed");
    let full_nll = full.finished.report.unwrap_or_default().forced_nll;

    // Name, form, options; least share of equal choices, largest difference of likelihood (nats), largest share attended.
    let table: [(&str, AttentionMode, Change, f64, f32, f64); 3] = [
        (
            "attend to 0.99",
            AttentionMode::Attend,
            |o| o.target_mass = 0.99,
            0.96,
            0.02,
            0.08,
        ),
        ("auto", AttentionMode::Auto, |o| o.target_mass = 0.99, 0.96, 0.02, 0.08),
        ("rows", AttentionMode::Rows, |o| o.k = 128, 0.95, 0.05, 0.3),
    ];
    for (name, mode, change, agreement, nll, attended) in table {
        let mut options = AttentionOptions::default();
        options.set_mode(mode);
        change(&mut options);
        let answer = generate(&worker, forced(Some(options))).await?;
        let report = answer.finished.report.unwrap_or_default();
        assert!(!report.fell_back, "{name}: {}", report.fallback_reason);
        let expected = match mode {
            AttentionMode::Auto => AttentionMode::Attend,
            mode => mode,
        };
        assert_eq!(report.mode(), expected, "{name}");
        assert!(!report.index.is_empty(), "{name}: no word of the index");
        let equal = answer.ids.iter().zip(&full.ids).filter(|(a, b)| a == b).count();
        let equal = equal as f64 / f64::from(TOKENS);
        assert!(equal >= agreement, "{name}: {equal} of the choices are equal");
        let difference = (report.forced_nll - full_nll).abs();
        assert!(difference <= nll, "{name}: {} and {full_nll} nats", report.forced_nll);
        let share = report.keys_attended as f64 / (report.keys_total as f64 * GROUP);
        assert!(share > 0.0 && share <= attended, "{name}: {share} of the keys attended");
        // Every layer of every token but the first asked once.
        assert_eq!(report.round_trips, u64::from(TOKENS - 1) * 30, "{name}");
        assert!(report.search_ms > 0.0 && report.waited_ms > 0.0, "{name}: {report:?}");
        // Nine tenths where nothing else runs; a busy store drops some.
        assert!(report.hinted > report.round_trips / 4, "{name}: {report:?}");
        assert!(report.search_hidden > 0.0, "{name}: {report:?}");
    }
    cluster.stop().await
}
