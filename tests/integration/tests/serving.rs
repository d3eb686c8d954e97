//! Several workers behind a router, clients that leave, and what `/metrics` says.

use std::time::Duration;

use anyhow::Result;
use futures::StreamExt;
use kvasir_integration::words;
use kvasir_testkit::{Cluster, Metrics, Options, eventually, until_durable};
use serde_json::json;

/// Requests go where their prefix is; a worker that leaves is left out, and its prefixes come from the store.
#[tokio::test(flavor = "multi_thread")]
async fn two_workers_share_the_work_and_the_store() -> Result<()> {
    let mut cluster = Cluster::start(Options {
        workers: 2,
        ..Options::default()
    })
    .await?;
    let ask = |topic: &str| json!({"messages": [{"role": "system", "content": format!("{topic}. {}", words(220))}, {"role": "user", "content": "Go on."}], "max_tokens": 8});
    let mut homes = Vec::new();
    let mut texts = Vec::new();
    for topic in ["Physics", "History", "Music", "Law"] {
        let first = cluster.chat(ask(topic)).await?;
        assert_eq!((first.status, first.cached_tokens()), (200, 0), "{topic}: {first:?}");
        let home = first.body["kvasir"]["worker"].as_str().unwrap_or("").to_owned();
        // The worker tells the router about its blocks in its own time.
        let known = || async {
            let again = cluster.chat(ask(topic)).await?;
            assert_eq!(again.text(), first.text(), "{topic}");
            Ok(again.body["kvasir"]["worker"] == home.as_str() && again.cached_tokens() > 0)
        };
        eventually(
            "the same worker answers, from its cache",
            Duration::from_secs(20),
            known,
        )
        .await?;
        homes.push(home);
        texts.push(first.text().to_owned());
    }
    homes.sort();
    homes.dedup();
    assert_eq!(homes.len(), 2, "four unrelated prompts must not all go to one worker");

    until_durable(&cluster.store_url(), 4).await?;
    cluster.stop_last_worker().await?;
    for (topic, text) in ["Physics", "History", "Music", "Law"].iter().zip(&texts) {
        let answer = cluster.chat(ask(topic)).await?;
        assert_eq!(answer.status, 200, "{topic} with one worker left: {answer:?}");
        assert!(
            answer.cached_tokens() >= 64,
            "{topic}: from pages or from the store: {answer:?}"
        );
        assert_eq!(answer.text(), text, "{topic}");
    }
    cluster.stop().await
}

/// A client that leaves in the middle frees what it held, and the metrics have the names that dashboards know.
#[tokio::test(flavor = "multi_thread")]
async fn leaving_frees_pages_and_metrics_have_their_names() -> Result<()> {
    let cluster = Cluster::start(Options::default()).await?;
    let prompt = json!([{"role": "user", "content": words(300)}]);
    let request = json!({
        "model": cluster.file().name(), "messages": prompt, "max_tokens": 2000, "temperature": 0, "stream": true,
        "kvasir": {"ignore_eos": true},
    });
    let response = reqwest::Client::new()
        .post(format!("{}/v1/chat/completions", cluster.router_url()))
        .json(&request)
        .send()
        .await?;
    let mut body = response.bytes_stream();
    let mut heard = 0;
    while heard < 2000 {
        heard += body.next().await.transpose()?.map_or(2000, |bytes| bytes.len());
    }
    let admin = cluster.worker_admin_url(0);
    let running = Metrics::of(&admin).await?;
    assert_eq!(
        running.sum("vllm:num_requests_running"),
        Some(1.0),
        "{}",
        running.text()
    );
    assert!(
        running.sum("vllm:kv_cache_usage_perc") > Some(0.0),
        "{}",
        running.text()
    );
    drop(body);
    eventually(
        "the worker is idle and its pages are free",
        Duration::from_secs(10),
        async || {
            let now = Metrics::of(&admin).await?;
            Ok(now.sum("vllm:num_requests_running") == Some(0.0) && now.sum("vllm:kv_cache_usage_perc") == Some(0.0))
        },
    )
    .await?;

    let answer = cluster.chat(json!({"messages": prompt, "max_tokens": 4})).await?;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(
        answer.cached_tokens() > 0,
        "the pages of the one who left are still a cache: {answer:?}"
    );
    let tables: [(&str, String, &[&str]); 3] = [
        (
            "worker",
            admin,
            &[
                "vllm:num_requests_running",
                "vllm:num_requests_waiting",
                "vllm:kv_cache_usage_perc",
                "vllm:prompt_tokens_total",
                "vllm:generation_tokens_total",
                "vllm:time_to_first_token_seconds",
                "vllm:inter_token_latency_seconds",
                "vllm:e2e_request_latency_seconds",
                "vllm:prefix_cache_queries_total",
                "vllm:prefix_cache_hits_total",
                "vllm:request_success_total",
            ],
        ),
        (
            "store",
            cluster.store_admin_url(),
            &["kvasir_store_get_hits_total", "kvasir_store_put_blocks_total"],
        ),
        (
            "router",
            cluster.router_url(),
            &["kvasir_router_requests_total", "kvasir_router_cached_tokens_total"],
        ),
    ];
    for (part, base, names) in tables {
        let metrics = Metrics::of(&base).await?;
        for name in names {
            assert!(metrics.sum(name).is_some(), "{part} has no {name}:\n{}", metrics.text());
        }
        for path in ["healthz", "readyz"] {
            assert_eq!(
                reqwest::get(format!("{base}/{path}")).await?.status().as_u16(),
                200,
                "{part} {path}"
            );
        }
    }
    cluster.stop().await
}
