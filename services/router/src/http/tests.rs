//! The whole router over HTTP: the real model's tokenizer and template, and workers that say what a script tells them.

use std::{path::PathBuf, time::Duration};

use kvasir_model::ModelFile;
use kvasir_proto::v1;
use kvasir_runtime::{Runtime, units::HumanDuration};
use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tonic::Code;

use crate::{
    Router, RouterConfig,
    grpc::scripted::{Play, ScriptedWorker, Step},
};

/// Where `make` puts what is fetched.
fn cache() -> PathBuf {
    std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            let home = std::env::var_os("HOME").expect("a home folder");
            PathBuf::from(home).join(".cache")
        })
}

fn model_file() -> std::sync::Arc<ModelFile> {
    let path = cache().join("kvasir/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    std::sync::Arc::new(ModelFile::open(&path).unwrap_or_else(|error| panic!("{error}; `make model` brings it")))
}

/// A router over one scripted worker.
struct Bench {
    router: Router,
    worker: ScriptedWorker,
    runtime: Runtime,
    client: reqwest::Client,
    url: String,
    model: String,
}

impl Bench {
    async fn start(plays: impl IntoIterator<Item = Play>) -> Self {
        Self::with(plays, |_| {}).await
    }

    async fn with(plays: impl IntoIterator<Item = Play>, change: impl FnOnce(&mut RouterConfig)) -> Self {
        let file = model_file();
        let worker = ScriptedWorker::start(&file.schema(64), plays).await;
        let mut config = RouterConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            workers: vec![worker.url.clone()],
            store_url: String::new(),
            ..RouterConfig::default()
        };
        change(&mut config);
        let runtime = Runtime::new();
        let model = file.name().to_owned();
        let router = Router::start(&config, file, &runtime).await.expect("a router");
        Self {
            url: format!("http://{}", router.http_addr()),
            router,
            worker,
            runtime,
            client: reqwest::Client::new(),
            model,
        }
    }

    fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.client.post(format!("{}{path}", self.url)).json(body)
    }

    fn chat(&self, changes: Value) -> RequestBuilder {
        let body = json!({"model": self.model, "messages": [{"role": "user", "content": "hello"}]});
        self.post("/v1/chat/completions", &with(body, changes))
    }

    fn text(&self, changes: Value) -> RequestBuilder {
        let body = json!({"model": self.model, "prompt": "hello"});
        self.post("/v1/completions", &with(body, changes))
    }

    async fn stop(self) {
        self.router.stop().await.expect("an orderly end");
        self.worker.stop().await;
    }
}

fn with(mut body: Value, changes: Value) -> Value {
    if let (Some(body), Value::Object(changes)) = (body.as_object_mut(), changes) {
        body.extend(changes);
    }
    body
}

/// Status, and the error object in OpenAI's shape.
async fn refusal(request: RequestBuilder) -> (u16, Value, Option<u64>) {
    let response = request.send().await.expect("an answer");
    let status = response.status().as_u16();
    assert!(
        response.headers().contains_key("x-request-id"),
        "every answer has an id"
    );
    let retry_after = response
        .headers()
        .get("retry-after")
        .and_then(|value| value.to_str().ok()?.parse().ok());
    let body: Value = response.json().await.expect("JSON");
    let error = body
        .get("error")
        .unwrap_or_else(|| panic!("no error in {body}"))
        .clone();
    for field in ["message", "type", "param", "code"] {
        assert!(error.get(field).is_some(), "no {field} in {error}");
    }
    (status, error, retry_after)
}

/// The `data:` lines of a stream.
async fn events(request: RequestBuilder) -> Vec<String> {
    let response = request.send().await.expect("an answer");
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    let text = response.text().await.expect("a whole stream");
    let mut events = Vec::new();
    for block in text.split_terminator("\n\n") {
        events.push(block.strip_prefix("data: ").expect("an event").to_owned());
    }
    events
}

fn parsed(event: &str) -> Value {
    serde_json::from_str(event).expect("JSON")
}

fn hang() -> Play {
    Play::Say(vec![Step::Started(0, 0), Step::Text("a"), Step::Hang])
}

#[tokio::test]
async fn a_chat_is_streamed_and_reported() {
    let report = v1::GenerateReport {
        mode: v1::AttentionMode::Attend.into(),
        fell_back: true,
        fallback_reason: "the store went away".to_owned(),
        queue_ms: 1.5,
        ..v1::GenerateReport::default()
    };
    let steps = vec![
        Step::Started(3, 4),
        Step::Text(""),
        Step::Text("Hel"),
        Step::Wait(Duration::from_millis(20)),
        Step::Text("lo"),
        Step::Finish(v1::FinishReason::Length, Box::new(report)),
    ];
    let bench = Bench::start([Play::Say(steps)]).await;
    let request = bench
        .chat(json!({"stream": true, "stream_options": {"include_usage": true}, "kvasir": {"attention": "attend"}}))
        .header("x-request-id", "mine");
    let events = events(request).await;
    let (done, pieces) = events.split_last().expect("events");
    assert_eq!(done, "[DONE]");
    let pieces: Vec<Value> = pieces.iter().map(|piece| parsed(piece)).collect();
    let deltas: Vec<&Value> = pieces
        .iter()
        .filter_map(|piece| piece["choices"].get(0))
        .map(|c| &c["delta"])
        .collect();
    let expected = [
        json!({"role": "assistant", "content": ""}),
        json!({"content": "Hel"}),
        json!({"content": "lo"}),
        json!({}),
    ];
    assert_eq!(deltas, expected.iter().collect::<Vec<_>>(), "empty text is no piece");
    assert_eq!(pieces[3]["choices"][0]["finish_reason"], "length");
    let last = &pieces[4];
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 3);
    let kvasir = &last["kvasir"];
    let found = (
        &kvasir["attention"],
        &kvasir["fell_back"],
        &kvasir["reason"],
        &kvasir["queue_ms"],
    );
    assert_eq!(
        found,
        (
            &json!("attend"),
            &json!(true),
            &json!("the store went away"),
            &json!(1.5)
        )
    );
    let by_tier = (&kvasir["cached_tokens_device"], &kvasir["cached_tokens_store"]);
    assert_eq!(by_tier, (&json!(3), &json!(4)));
    assert_eq!(kvasir["worker"], bench.worker.url);
    assert!(kvasir["ttft_ms"].as_f64().is_some_and(|ms| ms > 0.0));

    let call = bench.worker.calls().remove(0);
    assert_eq!(call.request_id, "mine");
    assert_eq!(
        call.message.attention.expect("options").mode(),
        v1::AttentionMode::Attend
    );
    assert_eq!(call.message.max_tokens, 0, "the worker's own default");
    let prompt = model_file().tokenizer().encode("hello", true).expect("ids");
    assert!(call.message.prompt.len() > prompt.len(), "the template is around it");
    assert!(call.message.prompt.windows(prompt.len()).any(|window| window == prompt));

    let metrics = bench
        .client
        .get(format!("{}/metrics", bench.url))
        .send()
        .await
        .expect("metrics");
    let metrics = metrics.text().await.expect("text");
    for line in [
        "kvasir_router_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
        "vllm:healthy_pods_total 1",
        "kvasir_router_cached_tokens_total 7",
        "kvasir_router_in_flight 0",
    ] {
        assert!(metrics.contains(line), "no {line:?} in\n{metrics}");
    }
    bench.stop().await;
}

#[tokio::test]
async fn answers_come_whole_and_models_are_listed() {
    let bench = Bench::start([
        Play::answer(&["Hel", "lo"]),
        Play::answer(&["one"]),
        Play::answer(&["two"]),
    ])
    .await;
    let chat: Value = bench
        .chat(json!({}))
        .send()
        .await
        .expect("sent")
        .json()
        .await
        .expect("JSON");
    assert_eq!(chat["choices"][0]["message"]["content"], "Hello");
    assert_eq!(chat["usage"]["completion_tokens"], 2);

    let several = bench
        .text(json!({"prompt": ["a", [1, 2, 3]]}))
        .send()
        .await
        .expect("sent");
    let several: Value = several.json().await.expect("JSON");
    let texts: std::collections::BTreeSet<&str> = several["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .filter_map(|choice| choice["text"].as_str())
        .collect();
    assert_eq!(texts, ["one", "two"].into());
    let prompts: Vec<Vec<u32>> = bench
        .worker
        .calls()
        .into_iter()
        .skip(1)
        .map(|call| call.message.prompt)
        .collect();
    assert!(prompts.contains(&vec![1, 2, 3]), "ids go as they came");

    let url = format!("{}/v1/models", bench.url);
    let list: Value = bench
        .client
        .get(&url)
        .send()
        .await
        .expect("sent")
        .json()
        .await
        .expect("JSON");
    assert_eq!(
        (&list["object"], &list["data"][0]["id"]),
        (&json!("list"), &json!(bench.model))
    );
    let one: Value = bench
        .client
        .get(format!("{url}/{}", bench.model))
        .send()
        .await
        .expect("sent")
        .json()
        .await
        .expect("JSON");
    assert_eq!(one, list["data"][0]);
    let (status, error, _) = refusal(bench.client.get(format!("{url}/some/other"))).await;
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    bench.stop().await;
}

#[tokio::test]
async fn a_wrong_request_is_told_what_is_wrong_and_reaches_no_worker() {
    let bench = Bench::with([], |config| {
        config.body_bytes_max = kvasir_runtime::units::ByteSize::kib(256)
    })
    .await;
    let raw = |body: &'static str| {
        let request = bench.client.post(format!("{}/v1/chat/completions", bench.url));
        request.header("content-type", "application/json").body(body)
    };
    let long = vec![1; 9000];
    let table = [
        (
            raw("{\"model\": \n nope}"),
            400,
            json!(null),
            "not valid JSON: expected ident at line 2 column 3",
        ),
        (raw(""), 400, json!(null), "not valid JSON: EOF"),
        (raw("[]"), 400, json!(null), "send a JSON object"),
        (
            bench.chat(json!({"temprature": 1})),
            400,
            json!("unknown_parameter"),
            "did you mean `temperature`?",
        ),
        (
            bench.chat(json!({"model": "gpt-4"})),
            404,
            json!("model_not_found"),
            "this server serves",
        ),
        (bench.chat(json!({"model": null})), 400, json!(null), "model is missing"),
        (
            bench.text(json!({"prompt": long})),
            400,
            json!("context_length_exceeded"),
            "window is 8192 tokens, but the prompt has 9000",
        ),
        (
            bench.text(json!({"prompt": [1, 2], "max_tokens": 8192})),
            400,
            json!("context_length_exceeded"),
            "8194 were requested (2 in the prompt, 8192 in the answer)",
        ),
        (
            bench.text(json!({"prompt": ""})),
            400,
            json!(null),
            "the prompt is empty",
        ),
        (
            bench.text(json!({"prompt": [1, 4_000_000]})),
            400,
            json!(null),
            "token at index 1",
        ),
        (
            bench.text(json!({"prompt": "x".repeat(300 << 10)})),
            413,
            json!("request_too_large"),
            "more than 262144 bytes",
        ),
        (
            bench
                .client
                .post(format!("{}/v1/chat/completions", bench.url))
                .header("content-type", "text/plain")
                .body("{}"),
            415,
            json!("unsupported_media_type"),
            "application/json",
        ),
        (
            bench.client.get(format!("{}/v1/completions", bench.url)),
            405,
            json!("method_not_allowed"),
            "POST",
        ),
        (
            bench.client.get(format!("{}/v1/edits", bench.url)),
            404,
            json!("unknown_url"),
            "/v1/chat/completions",
        ),
    ];
    for (request, status, code, words) in table {
        let (found, error, _) = refusal(request).await;
        assert_eq!((found, &error["code"]), (status, &code), "{words}: {error}");
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains(words), "{message:?} should say {words:?}");
    }
    assert!(bench.worker.calls().is_empty());
    bench.stop().await;
}

#[tokio::test]
async fn what_workers_say_becomes_a_status_or_the_end_of_a_stream() {
    let broken = Play::Say(vec![
        Step::Started(0, 0),
        Step::Text("a"),
        Step::Break(Code::Internal, "bug"),
    ]);
    let bench = Bench::start([
        Play::Refuse(Code::ResourceExhausted, "16 requests wait already"),
        Play::Say(vec![Step::Break(Code::ResourceExhausted, "16 requests wait already")]),
        Play::Refuse(Code::InvalidArgument, "attention.k: too many"),
        Play::Refuse(Code::Internal, "bug"),
        broken.clone(),
        broken,
    ])
    .await;
    let table = [
        (429, "16 requests wait already", true),
        (429, "16 requests wait already", true),
        (400, "attention.k: too many", false),
        (502, "bug", false),
        (502, "bug", false),
    ];
    for (status, words, later) in table {
        let (found, error, retry_after) = refusal(bench.chat(json!({}))).await;
        assert_eq!(found, status, "{error}");
        assert!(
            error["message"].as_str().is_some_and(|message| message.contains(words)),
            "{error}"
        );
        assert_eq!(retry_after.is_some_and(|seconds| seconds >= 1), later, "{error}");
    }
    let events = events(bench.chat(json!({"stream": true}))).await;
    let last = parsed(events.last().expect("events"));
    assert_eq!(
        last["error"]["code"], "worker_failed",
        "a broken stream ends with its error, and without [DONE]"
    );
    assert_eq!(events.len(), 3);
    bench.stop().await;
}

#[tokio::test]
async fn without_workers_the_answer_is_503_and_not_ready() {
    let bench = Bench::start([]).await;
    let ready = |bench: &Bench| bench.client.get(format!("{}/readyz", bench.url)).send();
    assert_eq!(ready(&bench).await.expect("an answer").status(), StatusCode::OK);
    let Bench { worker, runtime, .. } = &bench;
    worker.set_load(v1::WorkerLoad {
        draining: true,
        ..v1::WorkerLoad::default()
    });
    for _ in 0..500 {
        if !runtime.readiness.is_ready() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(
        ready(&bench).await.expect("an answer").status(),
        StatusCode::SERVICE_UNAVAILABLE
    );
    let (status, error, retry_after) = refusal(bench.chat(json!({}))).await;
    assert_eq!((status, &error["code"]), (503, &json!("no_worker")), "{error}");
    assert!(retry_after.is_some());
    bench.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_work_and_frees_its_place() {
    let bench = Bench::with([hang(), hang(), hang()], |config| config.in_flight_max = 1).await;
    for (number, stream) in [(1, true), (2, false)] {
        let request = bench.chat(json!({"stream": stream})).build().expect("a request");
        let client = bench.client.clone();
        let asking = tokio::spawn(async move {
            let mut response = client.execute(request).await.expect("headers");
            while response.chunk().await.expect("pieces").is_some() {}
        });
        while bench.worker.open() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (status, error, retry_after) = refusal(bench.chat(json!({}))).await;
        assert_eq!(
            (status, &error["code"]),
            (429, &json!("rate_limit_exceeded")),
            "{error}"
        );
        assert!(retry_after.is_some_and(|seconds| seconds >= 1));
        asking.abort();
        bench.worker.cancelled(number).await;
        // A body that is wrong is refused after a place was found: no more 429 means that it is free again.
        while refusal(bench.chat(json!({"n": 0}))).await.0 == 429 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    // More prompts than there are places could never be served: no "come back later" for those.
    let (status, error, _) = refusal(bench.text(json!({"prompt": ["a", "b"]}))).await;
    assert_eq!((status, &error["param"]), (400, &json!("prompt")), "{error}");
    bench.stop().await;
}

#[tokio::test]
async fn a_client_that_stops_reading_is_cut_off() {
    let text: &'static str = "x".repeat(64 << 10).leak();
    let steps = std::iter::once(Step::Started(0, 0)).chain((0..2000).map(|_| Step::Text(text)));
    let bench = Bench::with([Play::Say(steps.collect())], |config| {
        config.stall_timeout = HumanDuration::millis(200);
    })
    .await;
    let body = json!({"model": bench.model, "prompt": "hello", "stream": true}).to_string();
    let mut socket = tokio::net::TcpStream::connect(bench.router.http_addr())
        .await
        .expect("connected");
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(request.as_bytes()).await.expect("sent");
    // 128 MB would follow, and nobody reads.
    bench.worker.cancelled(1).await;
    drop(socket);
    bench.stop().await;
}

#[tokio::test]
async fn stopping_lets_answers_finish_and_then_cuts_them() {
    let slow = Play::Say(vec![
        Step::Started(0, 0),
        Step::Text("a"),
        Step::Wait(Duration::from_millis(300)),
        Step::Text("b"),
        Step::Finish(v1::FinishReason::Stop, Box::default()),
    ]);
    let bench = Bench::with([slow, hang()], |config| config.drain_grace = HumanDuration::secs(1)).await;
    let finishing = tokio::spawn(events(bench.chat(json!({"stream": true}))));
    while bench.worker.calls().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let hanging = tokio::spawn(events(bench.chat(json!({"stream": true}))));
    while bench.worker.calls().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let later = bench.chat(json!({}));
    let since = std::time::Instant::now();
    bench.stop().await;
    assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    let finished = finishing.await.expect("joined");
    assert_eq!(finished.last().expect("events"), "[DONE]");
    let cut = hanging.await.expect("joined");
    assert_eq!(parsed(cut.last().expect("events"))["error"]["code"], "stopping");
    assert!(later.send().await.is_err(), "nobody accepts any more");
}

#[tokio::test]
async fn a_router_does_not_start_over_workers_that_disagree() {
    let file = model_file();
    let worker = ScriptedWorker::start(&file.schema(32), []).await;
    let config = RouterConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        workers: vec![worker.url.clone()],
        store_url: String::new(),
        ..RouterConfig::default()
    };
    let error = Router::start(&config, std::sync::Arc::clone(&file), &Runtime::new())
        .await
        .expect_err("block sizes differ");
    let error = format!("{error:#}");
    assert!(error.contains("block_tokens is 32, this router's is 64"), "{error}");

    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let config = RouterConfig {
        listen: taken.local_addr().expect("an address"),
        ..config
    };
    let error = Router::start(&config, file, &Runtime::new()).await.expect_err("taken");
    assert!(format!("{error:#}").contains("router.listen"), "{error:#}");
    worker.stop().await;
}

/// The package that most clients are written with, as it comes from PyPI (`make openai` installs it).
#[tokio::test]
async fn the_official_client_understands_every_answer() {
    let bench = Bench::start([
        Play::answer(&["Hel", "lo"]),
        Play::answer(&["Why", "?"]),
        Play::answer(&["one"]),
        Play::answer(&["two"]),
        Play::answer(&["on ", "and on"]),
        Play::Refuse(Code::ResourceExhausted, "full"),
        Play::Say(vec![
            Step::Started(0, 0),
            Step::Text("a"),
            Step::Break(Code::Internal, "bug"),
        ]),
    ])
    .await;
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/http/tests/openai_client.py");
    let python = cache().join("kvasir/openai/bin/python");
    let output = tokio::process::Command::new(&python)
        .arg(script)
        .args([&bench.url, &bench.model])
        .output()
        .await
        .unwrap_or_else(|error| panic!("{}: {error}; `make openai` brings it", python.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let expected = json!({
        "models": [bench.model],
        "whole": ["Hello", "stop", 2], "cached": 0, "worker": bench.worker.url, "request_id": true,
        "stream": "Why?", "role": "assistant", "usage": 2,
        "texts": ["one", "two"], "text_stream": "on and on",
        "no_model": ["NotFoundError", 404, "model_not_found", "model"],
        "tools": ["BadRequestError", 400, "unsupported_parameter", "tools"],
        "busy": ["RateLimitError", 429, "rate_limit_exceeded", null],
        "broken": ["APIError", "worker_failed"],
    });
    assert_eq!(found, expected);
    bench.stop().await;
}
