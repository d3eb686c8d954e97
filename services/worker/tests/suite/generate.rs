//! A worker by itself, without a store.

use std::time::Duration;

use kvasir_proto::v1;
use kvasir_runtime::units::{ByteSize, HumanDuration};
use kvasir_worker::WorkerConfig;
use tonic::Code;

use crate::harness::{self, Answer, Running, greedy, prompt};

/// Bytes of one page of all layers of SmolLM2-135M: 64 tokens x 30 layers x 2 x 3 heads x 64 x 2 bytes.
const PAGE_BYTES: u64 = 64 * 30 * 2 * 3 * 64 * 2;

/// The answers that every other way of computing must give.
async fn cold(worker: &Running, prompts: &[Vec<u32>]) -> Vec<Answer> {
    let mut answers = Vec::new();
    for prompt in prompts {
        let request = v1::GenerateRequest {
            no_cache: true,
            ..greedy(prompt, 12)
        };
        answers.push(worker.generate(request).await.expect("a cold answer"));
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_output_is_the_same_cold_cached_chunked_and_among_others() {
    let worker = Running::start(WorkerConfig::default()).await;
    // 300 tokens: four whole blocks and a tail. The second shares two blocks with it; the third ends on a block border.
    let long = prompt(300, 1);
    let mut half = long[..128].to_vec();
    half.extend(prompt(100, 2));
    let prompts = [long, half, prompt(192, 3)];
    let cold = cold(&worker, &prompts).await;
    for answer in &cold {
        assert_eq!((answer.started.cached_tokens, answer.ids.len()), (0, 12));
    }

    let filled = worker.generate(greedy(&prompts[0], 12)).await.expect("an answer");
    assert_eq!(
        (filled.started.cached_tokens, &filled.ids),
        (0, &cold[0].ids),
        "no_cache left nothing behind"
    );
    let table = [(0, 256), (1, 128), (1, 192), (2, 0), (2, 128)];
    for (which, cached) in table {
        let answer = worker.generate(greedy(&prompts[which], 12)).await.expect("an answer");
        let started = &answer.started;
        assert_eq!(
            (started.cached_tokens_device, started.cached_tokens_store),
            (cached, 0),
            "prompt {which}"
        );
        assert_eq!(
            answer.ids, cold[which].ids,
            "prompt {which} with {cached} cached tokens"
        );
        assert_eq!(answer.text, cold[which].text);
    }

    // All at once, half of them with a salt of their own and so without a hit.
    let salted = |prompt: &Vec<u32>| v1::GenerateRequest {
        cache_salt: "other".to_owned(),
        ..greedy(prompt, 12)
    };
    let requests = prompts.iter().map(|p| greedy(p, 12)).chain(prompts.iter().map(salted));
    let together = futures::future::join_all(requests.map(|request| worker.generate(request))).await;
    for (i, answer) in together.into_iter().enumerate() {
        assert_eq!(
            answer.expect("an answer").ids,
            cold[i % 3].ids,
            "prompt {} among others",
            i % 3
        );
    }
    worker.stop().await;

    let small_steps = WorkerConfig {
        step_tokens_max: 24,
        threads: 1,
        ..WorkerConfig::default()
    };
    let worker = Running::start(small_steps).await;
    let requests = prompts.iter().map(|p| worker.generate(greedy(p, 12)));
    for (i, answer) in futures::future::join_all(requests).await.into_iter().enumerate() {
        assert_eq!(
            answer.expect("an answer").ids,
            cold[i].ids,
            "prompt {i} in small steps on one thread"
        );
    }
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_end_where_they_should() {
    let worker = Running::start(WorkerConfig::default()).await;
    let prompt = worker.encode("<|im_start|>user\nCount from one to ten in words.<|im_end|>\n<|im_start|>assistant\n");

    let whole = worker.generate(greedy(&prompt, 60)).await.expect("an answer");
    assert_eq!(whole.finished.completion_tokens as usize, whole.ids.len());
    assert!(whole.text.len() > 20, "{:?}", whole.text);

    // max_tokens
    let short = worker.generate(greedy(&prompt, 5)).await.expect("an answer");
    assert_eq!(
        (short.reason(), short.ids.as_slice()),
        (v1::FinishReason::Length, &whole.ids[..5])
    );

    // A stop string in the middle of the text: cut exactly before it.
    let at = whole.text.char_indices().nth(12).expect("long enough").0;
    let stop = whole.text[at..].chars().take(4).collect::<String>();
    let first = whole.text.find(&stop).expect("is there");
    let request = v1::GenerateRequest {
        stop: vec!["never to be seen".to_owned(), stop],
        ..greedy(&prompt, 60)
    };
    let stopped = worker.generate(request).await.expect("an answer");
    assert_eq!(
        (stopped.reason(), stopped.text.as_str()),
        (v1::FinishReason::Stop, &whole.text[..first])
    );
    assert!(stopped.ids.len() < whole.ids.len());

    // Teacher forcing: along the greedy path the model chooses what it is fed; off it, the first choice is the same.
    let request = v1::GenerateRequest {
        forced: whole.ids[..8].to_vec(),
        ..greedy(&prompt, 60)
    };
    let forced = worker.generate(request).await.expect("an answer");
    assert_eq!(
        (forced.reason(), forced.ids.as_slice()),
        (v1::FinishReason::Length, &whole.ids[..8])
    );
    let request = v1::GenerateRequest {
        forced: vec![whole.ids[0] + 1; 3],
        ..greedy(&prompt, 60)
    };
    let forced = worker.generate(request).await.expect("an answer");
    assert_eq!((forced.ids.len(), forced.ids[0]), (3, whole.ids[0]));

    // Sampling is repeatable by its seed.
    let sampled = |seed| v1::GenerateRequest {
        sampling: Some(v1::SamplingParams {
            temperature: 1.5,
            top_p: 0.95,
            seed,
            has_seed: true,
        }),
        ignore_eos: true,
        ..greedy(&prompt, 20)
    };
    let first = worker.generate(sampled(7)).await.expect("an answer");
    let again = worker.generate(sampled(7)).await.expect("an answer");
    let other = worker.generate(sampled(8)).await.expect("an answer");
    assert_eq!((first.ids.len(), &first.ids), (20, &again.ids));
    assert_ne!(first.ids, other.ids);

    // Retrieval without a store: the answer is full attention's, and says so. A prompt this short would have nothing to
    // retrieve from, so the static set is made small.
    let long = harness::prompt(200, 5);
    let full = worker.generate(greedy(&long, 6)).await.expect("an answer");
    let attend = v1::GenerateRequest {
        attention: Some(v1::AttentionOptions {
            mode: v1::AttentionMode::Attend.into(),
            has_sink: true,
            has_window: true,
            ..v1::AttentionOptions::default()
        }),
        ..greedy(&long, 6)
    };
    let answer = worker.generate(attend.clone()).await.expect("an answer");
    let report = answer.report();
    assert_eq!(answer.ids, full.ids);
    assert!(
        report.fell_back && report.fallback_reason.contains("worker.store_url"),
        "{report:?}"
    );
    let nothing_to_retrieve = v1::GenerateRequest {
        prompt: prompt.clone(),
        ..attend
    };
    let answer = worker.generate(nothing_to_retrieve).await.expect("an answer");
    let report = answer.report();
    assert!(
        !report.fell_back && report.mode == i32::from(v1::AttentionMode::Attend),
        "{report:?}"
    );
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_with_the_field_and_the_numbers() {
    let config = WorkerConfig {
        kv_bytes_max: ByteSize::bytes(20 * PAGE_BYTES),
        ..WorkerConfig::default()
    };
    let worker = Running::start(config).await;
    let with = |change: &dyn Fn(&mut v1::GenerateRequest)| {
        let mut request = greedy(&[1, 2, 3], 4);
        change(&mut request);
        request
    };
    let sampling = |temperature, top_p| v1::SamplingParams {
        temperature,
        top_p,
        seed: 0,
        has_seed: false,
    };
    let table: Vec<(v1::GenerateRequest, &[&str])> = vec![
        (with(&|r| r.prompt.clear()), &["prompt", "at least one token"]),
        (
            with(&|r| r.prompt = vec![1; 8192]),
            &["prompt", "8192 tokens", "window of 8192"],
        ),
        (
            with(&|r| r.prompt = vec![1; 1280]),
            &["prompt", "page pool of 1280 tokens", "worker.kv_bytes_max"],
        ),
        (with(&|r| r.max_tokens = 1278), &["max_tokens", "at most 1277"]),
        (
            with(&|r| r.prompt = vec![1, u32::MAX]),
            &["prompt", "index 1", "vocabulary"],
        ),
        (with(&|r| r.forced = vec![u32::MAX]), &["forced", "index 0"]),
        (
            with(&|r| r.sampling = Some(sampling(-1.0, 1.0))),
            &["sampling.temperature"],
        ),
        (
            with(&|r| r.sampling = Some(sampling(1.0, 2.0))),
            &["sampling.top_p", "above 0 and at most 1"],
        ),
        (with(&|r| r.stop = vec![String::new()]), &["stop"]),
        (
            with(&|r| {
                r.attention = Some(v1::AttentionOptions {
                    mode: 7,
                    ..Default::default()
                })
            }),
            &["attention.mode", "full, rows, attend or auto"],
        ),
        (
            with(&|r| {
                r.attention = Some(v1::AttentionOptions {
                    target_mass: 2.0,
                    ..Default::default()
                })
            }),
            &["attention.target_mass", "(0, 1]"],
        ),
    ];
    for (request, words) in table {
        let status = worker.generate(request).await.expect_err("must be refused");
        assert_eq!(status.code(), Code::InvalidArgument, "{words:?}: {status}");
        for word in words {
            assert!(status.message().contains(word), "{:?} lacks {word:?}", status.message());
        }
    }
    worker
        .generate(greedy(&[1, 2, 3], 2))
        .await
        .expect("and the worker still works");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_pages_are_bounded_and_cancelled_when_the_caller_leaves() {
    let config = WorkerConfig {
        kv_bytes_max: ByteSize::bytes(10 * PAGE_BYTES),
        waiting_max: 2,
        drain_grace: HumanDuration::millis(200),
        ..WorkerConfig::default()
    };
    let worker = Running::start(config).await;
    let mut load = worker.watch_load().await;
    let idle = load.message().await.expect("a load").expect("open");
    assert_eq!((idle.running, idle.waiting, idle.kv_usage), (0, 0, 0.0));

    // Takes all ten pages, for long.
    let endless = v1::GenerateRequest {
        ignore_eos: true,
        ..greedy(&prompt(100, 1), 540)
    };
    let mut first = worker.open(endless.clone()).await.expect("is admitted");
    first.message().await.expect("has started");
    let mut second = worker.open(greedy(&prompt(70, 2), 3)).await.expect("waits");
    let third = worker.open(greedy(&prompt(70, 3), 3)).await.expect("waits");
    worker
        .load_until(&mut load, |load| {
            (load.running, load.waiting) == (1, 2) && load.kv_usage == 1.0
        })
        .await;
    let fourth = worker
        .generate(greedy(&prompt(70, 4), 3))
        .await
        .expect_err("the queue is full");
    assert_eq!(fourth.code(), Code::ResourceExhausted);
    assert!(fourth.message().contains("worker.waiting_max"), "{fourth}");

    drop(third);
    worker.load_until(&mut load, |load| load.waiting == 1).await;
    drop(first);
    let mut ids = 0;
    while let Some(reply) = second.message().await.expect("runs now") {
        if let Some(v1::generate_reply::Event::Tokens(tokens)) = reply.event {
            ids += tokens.ids.len();
        }
    }
    assert_eq!(ids, 3);
    worker
        .load_until(&mut load, |load| load.running == 0 && load.kv_usage == 0.0)
        .await;

    // Stopping ends what does not end by itself within the grace.
    let mut endless = worker.open(endless).await.expect("is admitted");
    endless.message().await.expect("has started");
    let reader = tokio::spawn(async move {
        loop {
            match endless.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    });
    worker.stop().await;
    let status = reader.await.expect("reads").expect("was cancelled");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("stopping"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_tell_what_the_device_tier_holds() {
    let config = WorkerConfig {
        kv_bytes_max: ByteSize::bytes(6 * PAGE_BYTES),
        ..WorkerConfig::default()
    };
    let worker = Running::start(config).await;
    worker.generate(greedy(&prompt(140, 1), 2)).await.expect("an answer");
    let mut events = worker.watch_events().await;
    let mut next = async || {
        let event = tokio::time::timeout(Duration::from_secs(30), events.message()).await;
        let event = event.expect("in time").expect("an event").expect("open");
        (event.kind(), event.hashes.len())
    };
    use v1::block_event::Kind;
    assert_eq!(next().await, (Kind::Snapshot, 2));
    assert_eq!(next().await, (Kind::SnapshotEnd, 0));
    // Nothing is told of a request without cache; the next one needs five pages and takes one of the two blocks' pages.
    let silent = v1::GenerateRequest {
        no_cache: true,
        ..greedy(&prompt(70, 2), 2)
    };
    worker.generate(silent).await.expect("an answer");
    worker.generate(greedy(&prompt(310, 3), 2)).await.expect("an answer");
    let (mut stored, mut removed) = (0, 0);
    while (stored, removed) != (4, 1) {
        match next().await {
            (Kind::Stored, n) => stored += n,
            (Kind::Removed, n) => removed += n,
            other => panic!("{other:?}"),
        }
    }
    let again = worker.generate(greedy(&prompt(140, 1), 2)).await.expect("an answer");
    assert_eq!(
        again.started.cached_tokens_device, 64,
        "the first block of the two is left"
    );

    let info = worker.info().await;
    assert_eq!((info.context_tokens_max, info.namespace.len()), (8192, 32));
    assert_eq!(info.schema.expect("a schema").block_tokens, 64);

    let text = worker.admin("/metrics").await;
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:request_success_total",
    ] {
        assert!(text.contains(name), "{name} is missing in {text}");
    }
    assert!(worker.admin("/readyz").await.starts_with("HTTP/1.1 200"));
    worker.stop().await;
}
