//! Put, match, get and retrieve between workers that share a store.

use std::time::Duration;

use anyhow::Result;
use kvasir_integration::prompt;
use kvasir_proto::v1::{AttentionMode, AttentionOptions, GenerateRequest, generate_reply::Event};
use kvasir_testkit::{Cluster, Generation, Options, generate, request, until_durable};

const BLOCK: u32 = 64;

/// What a row of a table changes in the options that all rows share.
type Change = fn(&mut AttentionOptions);

/// Cold, from its own pages, from the store, partly from the store: the same tokens, and the counts say where they came from.
#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_a_prompt_gives_the_same_tokens() -> Result<()> {
    let mut cluster = Cluster::start(Options::default()).await?;
    let first = cluster.worker_url(0);
    // Ten blocks and a tail, so that a hit never covers all of the prompt.
    let prompt = prompt(cluster.file(), 10 * BLOCK as usize + 17);
    let ask = || request(&prompt, 24);

    let cold = generate(
        &first,
        GenerateRequest {
            no_cache: true,
            ..ask()
        },
    )
    .await?;
    assert_eq!((cold.started.cached_tokens, cold.ids.len()), (0, 24));
    let pushed = generate(&first, ask()).await?;
    assert_eq!(
        pushed.started.cached_tokens, 0,
        "a request without cache must leave nothing behind"
    );
    until_durable(&cluster.store_url(), 10).await?;
    let second = cluster.start_worker().await?;
    let second = cluster.worker_url(second);

    let salted = GenerateRequest {
        cache_salt: "another tenant's secret".to_owned(),
        ..ask()
    };
    let shorter = request(&prompt[..6 * BLOCK as usize], 8);
    let mut longer = ask();
    longer.prompt.extend_from_slice(&prompt[..2 * BLOCK as usize]);
    // Whom to ask, with what, cached tokens from pages and from the store.
    let table = [
        ("its own pages", &first, ask(), 10 * BLOCK, 0),
        ("the store", &second, ask(), 0, 10 * BLOCK),
        ("pages that came from the store", &second, ask(), 10 * BLOCK, 0),
        // The last token is always computed, so the sixth block is not taken from anywhere.
        ("whole blocks only", &second, shorter, 5 * BLOCK, 0),
        ("another salt", &second, salted, 0, 0),
        ("a longer prompt", &second, longer, 10 * BLOCK, 0),
    ];
    for (name, worker, request, device, store) in table {
        let same_prompt = request.prompt == prompt;
        let warm = generate(worker, request).await?;
        let found = (warm.started.cached_tokens_device, warm.started.cached_tokens_store);
        assert_eq!(found, (device, store), "{name}: tokens from pages and from the store");
        if same_prompt {
            assert_eq!(warm.ids, cold.ids, "{name}: not the cold tokens");
            assert_eq!(warm.text, cold.text, "{name}");
        }
    }
    assert_eq!(pushed.ids, cold.ids, "computing while pushing");

    // The store starts again on its folder, as after an upgrade: a third worker finds everything.
    cluster.stop_store().await?;
    cluster.start_store().await?;
    let third = cluster.start_worker().await?;
    let warm = generate(&cluster.worker_url(third), ask()).await?;
    assert_eq!(
        warm.started.cached_tokens_store,
        10 * BLOCK,
        "after a restart of the store"
    );
    assert_eq!(warm.ids, cold.ids);
    cluster.stop().await
}

/// Attend and rows report what they did; with everything covered the tokens are those of full attention. When the store goes
/// away in the middle, the request finishes and says so.
#[tokio::test(flavor = "multi_thread")]
async fn retrieval_decodes_and_survives_the_loss_of_the_store() -> Result<()> {
    let mut cluster = Cluster::start(Options::default()).await?;
    let worker = cluster.worker_url(0);
    let prompt = prompt(cluster.file(), 12 * BLOCK as usize + 5);
    let with = |mode: AttentionMode, change: Change, tokens: u32| {
        let mut options = AttentionOptions {
            sink: 64,
            window: 128,
            has_sink: true,
            has_window: true,
            ..AttentionOptions::default()
        };
        options.set_mode(mode);
        change(&mut options);
        GenerateRequest {
            attention: Some(options),
            ..request(&prompt, tokens)
        }
    };
    let full = generate(&worker, request(&prompt, 16)).await?;

    let table: [(&str, AttentionMode, Change, f32); 3] = [
        (
            "attend to everything",
            AttentionMode::Attend,
            |options| options.target_mass = 1.0,
            0.9999,
        ),
        (
            "attend",
            AttentionMode::Attend,
            |options| options.target_mass = 0.9,
            // What the worker attends to by itself counts towards the target: of the rest little may be enough.
            0.05,
        ),
        ("rows", AttentionMode::Rows, |options| options.k = 64, 0.2),
    ];
    for (name, mode, change, mass_least) in table {
        let forced = GenerateRequest {
            forced: full.ids.clone(),
            ..with(mode, change, 16)
        };
        let got = generate(&worker, forced).await?;
        let report = got.finished.report.unwrap_or_default();
        assert!(!report.fell_back, "{name}: {}", report.fallback_reason);
        assert_eq!(report.mode, mode as i32, "{name}");
        assert!(
            report.keys_scanned > 0 && report.keys_scanned <= report.keys_total,
            "{name}: {report:?}"
        );
        assert!(
            report.round_trips > 0 && report.retrieved_bytes > 0,
            "{name}: {report:?}"
        );
        assert!(
            report.mass_covered_p50 >= mass_least && report.mass_covered_p50 <= 1.0 + 1e-4,
            "{name}: {report:?}"
        );
        let agreeing = got.ids.iter().zip(&full.ids).filter(|(got, full)| got == full).count();
        assert_eq!(got.ids.len(), full.ids.len(), "{name}");
        // Covering everything differs from full attention by rounding only; the rest may differ where two tokens are close.
        let least = if mass_least > 0.99 { 16 } else { 8 };
        assert!(
            agreeing >= least,
            "{name}: {agreeing} of 16 tokens as with full attention"
        );
    }

    let long = with(AttentionMode::Attend, |options| options.target_mass = 0.99, 96);
    let mut generation = Generation::start(&worker, long).await?;
    let mut tokens = 0;
    while tokens < 4 {
        if let Some(Event::Tokens(step)) = generation.next().await? {
            tokens += step.ids.len();
        }
    }
    let (stopped, rest) = tokio::join!(
        cluster.stop_store(),
        tokio::time::timeout(Duration::from_secs(120), generation.finish())
    );
    stopped?;
    let rest = rest??;
    assert_eq!(tokens + rest.ids.len(), 96, "the request must finish");
    let report = rest.finished.report.unwrap_or_default();
    assert!(report.fell_back && !report.fallback_reason.is_empty(), "{report:?}");
    // Without a store the worker still works, and cached pages are still good.
    let alone = generate(&worker, request(&prompt, 16)).await?;
    assert_eq!(alone.ids, full.ids);
    cluster.stop().await
}
