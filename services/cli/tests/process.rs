//! The binary as a process: how it starts, what it says, how it ends, and what survives when it is killed.

#[path = "process/calibrate.rs"]
mod calibrate;
#[path = "process/kvasir.rs"]
mod kvasir;
#[path = "process/peers.rs"]
mod peers;
#[path = "process/recall.rs"]
mod recall;

use std::{path::Path, time::Duration};

use kvasir_testkit::{Generation, generate, model, request, until_durable};
use serde_json::{Value, json};

use self::kvasir::{Running, run};

const BLOCK: usize = 64;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn prompt(count: usize) -> Vec<u32> {
    let page = include_str!("../../../ARCHITECTURE.md");
    let mut tokens = model().tokenizer().encode(page, false).expect("a page of text");
    tokens.truncate(count);
    tokens
}

#[tokio::test]
async fn mistakes_are_refused_with_place_and_remedy() {
    let folder = folder();
    std::fs::write(folder.path().join("typo.toml"), "[store]\nhost_bytes_mx = \"1GiB\"\n").expect("a file");
    std::fs::write(folder.path().join("bad.toml"), "[worker]\nthreads = \"many\"\n").expect("a file");
    std::fs::write(folder.path().join("broken.toml"), "[worker\n").expect("a file");
    std::fs::write(folder.path().join("text.gguf"), "not a model at all").expect("a file");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (typo, bad, broken, text) = (
        path("typo.toml"),
        path("bad.toml"),
        path("broken.toml"),
        path("text.gguf"),
    );
    // Arguments, exit code, what is said on standard error.
    let table: Vec<(Vec<&str>, i32, Vec<&str>)> = vec![
        (
            vec!["--config", &typo, "up"],
            2,
            vec!["typo.toml:2", "store.host_bytes_mx", "store.host_bytes_max"],
        ),
        (vec!["--config", &bad, "up"], 2, vec!["bad.toml:2", "worker.threads"]),
        (vec!["--config", &broken, "up"], 2, vec!["broken.toml:1", "TOML"]),
        (
            vec!["--config", "/no/such.toml", "up"],
            2,
            vec!["/no/such.toml", "--config"],
        ),
        (
            vec!["--set", "worker.thread=2", "up"],
            2,
            vec!["--set worker.thread=2", "worker.threads"],
        ),
        (vec!["--set", "worker.threads", "up"], 2, vec!["is not an assignment"]),
        (
            vec!["--model", "/no/model.gguf", "up"],
            1,
            vec!["/no/model.gguf", "make model", "--model"],
        ),
        (vec!["--model", &text, "up"], 1, vec!["text.gguf", "GGUF"]),
        (
            vec!["--set", "router.listen=0.0.0.0:0", "router"],
            1,
            vec!["router.listen", "router.allow_remote"],
        ),
        (vec!["--set", "log.filter=kvasir=loud", "store"], 1, vec!["log.filter"]),
        (vec!["down"], 2, vec!["down"]),
    ];
    for (args, code, named) in table {
        let said = run(kvasir::kvasir(folder.path()).args(&args)).await;
        assert_eq!(said.status.code(), Some(code), "{args:?}: {}", said.err);
        for word in named {
            assert!(said.err.contains(word), "{args:?} should name {word}: {}", said.err);
        }
        assert!(!said.err.contains("panicked"), "{args:?}: {}", said.err);
    }
    let said = run(kvasir::kvasir(folder.path())
        .arg("config")
        .arg("explain")
        .env("KVASIR__STORE__HOST_BYTES_MAX", "lots"))
    .await;
    assert_eq!(said.status.code(), Some(2));
    assert!(
        said.err.contains("KVASIR__STORE__HOST_BYTES_MAX: store.host_bytes_max"),
        "{}",
        said.err
    );
}

#[tokio::test]
async fn explain_says_where_each_value_came_from() {
    let folder = folder();
    std::fs::write(
        folder.path().join("kvasir.toml"),
        "[up]\ndata_dir = \"/srv/kvasir\"\n\n[worker]\nthreads = 3\n",
    )
    .expect("a file");
    let explain = |format: &'static str| {
        let mut command = kvasir::kvasir(folder.path());
        command.args([
            "config",
            "explain",
            "--format",
            format,
            "--set",
            "worker.attention.k=99",
        ]);
        command.env("KVASIR__ROUTER__IN_FLIGHT_MAX", "12");
        command
    };
    let said = run(&mut explain("text")).await;
    assert!(said.status.success(), "{}", said.err);
    let table = [
        ("worker.threads = 3", "kvasir.toml:5"),
        ("router.in_flight_max = 12", "KVASIR__ROUTER__IN_FLIGHT_MAX"),
        ("worker.attention.k = 99", "--set worker.attention.k=99"),
        ("store.data_dir = \"/srv/kvasir/store\"", "follows from up.data_dir"),
        ("worker.step_tokens_max = 256", "default"),
    ];
    for (value, source) in table {
        let line = said
            .out
            .lines()
            .find(|line| line.starts_with(value))
            .unwrap_or_else(|| panic!("{value}: {}", said.out));
        assert!(line.ends_with(source), "{line}");
    }
    let said = run(&mut explain("json")).await;
    let rows: Vec<Value> = serde_json::from_str(&said.out).expect("a JSON array");
    let row = |key: &str| {
        rows.iter()
            .find(|row| row["key"] == key)
            .unwrap_or_else(|| panic!("{key}"))
    };
    assert_eq!(row("worker.threads")["value"], 3);
    assert_eq!(
        row("worker.threads")["source"],
        json!({"kind": "file", "path": "kvasir.toml", "line": 5})
    );
    assert_eq!(row("store.data_dir")["value"], "/srv/kvasir/store");
    assert_eq!(row("store.data_dir")["source"]["kind"], "derived");
    assert_eq!(
        row("router.in_flight_max")["source"],
        json!({"kind": "environment", "name": "KVASIR__ROUTER__IN_FLIGHT_MAX"})
    );
    // The text is TOML that means the same: a file made of it explains itself alike.
    let pasted = folder.path().join("pasted.toml");
    std::fs::write(&pasted, run(&mut explain("text")).await.out).expect("a file");
    let said = run(kvasir::kvasir(folder.path())
        .args(["config", "explain", "--config"])
        .arg(&pasted))
    .await;
    assert!(said.status.success(), "{}", said.err);
    assert!(said.out.contains("worker.threads = 3"), "{}", said.out);
}

/// Starts, says what can be pasted, serves it, logs nothing of it, and ends in good order; a second one says what is in its way.
#[tokio::test(flavor = "multi_thread")]
async fn up_serves_and_ends_in_good_order() {
    let folder = folder();
    let up = Running::start(folder.path(), "up", &["log.filter=trace"]).await;
    let router = up.url("/router");
    let out = up.out();
    for word in [
        router.as_str(),
        &up.url("/worker/grpc"),
        &up.url("/store/grpc"),
        "curl -s",
        "Ctrl-C",
    ] {
        assert!(out.contains(word), "{word} is not in {out}");
    }
    assert_eq!(up.ready["pid"], up.pid());

    // The pasted line works as it is.
    let curl = out
        .lines()
        .find(|line| line.trim_start().starts_with("curl"))
        .expect("a curl line");
    let pasted = tokio::process::Command::new("sh")
        .args(["-c", curl])
        .output()
        .await
        .expect("sh runs");
    let answer: Value = serde_json::from_slice(&pasted.stdout).expect("an answer in JSON");
    assert!(
        answer["choices"][0]["message"]["content"]
            .as_str()
            .is_some_and(|text| !text.is_empty()),
        "{answer}"
    );

    let secret = "Zyzzogeton";
    let client = reqwest::Client::new();
    for stream in [false, true] {
        let body = json!({"model": up.ready["model"], "messages": [{"role": "user", "content": format!("Repeat {secret} and {secret}.")}], "max_tokens": 8, "stream": stream});
        let response = client
            .post(format!("{router}/v1/chat/completions"))
            .json(&body)
            .send()
            .await
            .expect("an answer");
        assert_eq!(response.status().as_u16(), 200);
        response.text().await.expect("a whole answer");
    }

    let taken = router.trim_start_matches("http://");
    let second_data = folder.path().join("second").display().to_string();
    let table: [(&str, Vec<String>, Vec<&str>); 2] = [
        (
            "the port",
            vec![format!("router.listen={taken}"), format!("up.data_dir={second_data}")],
            vec!["router.listen", "another process"],
        ),
        ("the folder", vec![], vec!["store"]),
    ];
    for (name, assignments, named) in table {
        let mut command = kvasir::kvasir(folder.path());
        for assignment in kvasir::ANY_PORTS
            .iter()
            .map(|text| (*text).to_owned())
            .chain(assignments)
        {
            command.args(["--set", &assignment]);
        }
        let said = run(command.arg("up")).await;
        assert_eq!(said.status.code(), Some(1), "{name}: {}", said.err);
        for word in named {
            assert!(
                said.err.contains(word),
                "{name} is taken, and {word} should be named: {}",
                said.err
            );
        }
    }

    let err = up.err();
    assert!(
        err.contains("request_id"),
        "the log of a trace filter shows requests: {err}"
    );
    for content in [secret, "Name three uses"] {
        assert!(!err.contains(content), "the log holds prompt text: {content}");
    }
    let ready_file = up.ready_file();
    assert!(ready_file.exists());
    let status = up.stop().await;
    assert_eq!(status.code(), Some(0));
    assert!(!ready_file.exists(), "the ready file is there while the process serves");
}

/// The parts as three processes: the store is killed, comes back, and nothing that it had synced is lost; it is killed again in
/// the middle of retrieval decoding, and the request finishes.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_store_loses_nothing_and_stops_no_one() {
    let folder = folder();
    let prompt = prompt(12 * BLOCK + 9);
    let store = Running::start(folder.path(), "store", &[]).await;
    let listen = format!(
        "store.listen={}",
        store.url("/store/grpc").trim_start_matches("http://")
    );
    let store_url = format!("worker.store_url={}", store.url("/store/grpc"));
    let worker = Running::start(folder.path(), "worker", &[&store_url]).await;
    let cold = generate(&worker.url("/worker/grpc"), request(&prompt, 24))
        .await
        .expect("a cold answer");
    assert_eq!(cold.started.cached_tokens, 0);
    until_durable(&store.url("/store/grpc"), 12).await.expect("synced");
    store.kill().await;

    // The worker goes on without; the store comes back on its folder and its port.
    let alone = generate(&worker.url("/worker/grpc"), request(&prompt, 24))
        .await
        .expect("without a store");
    assert_eq!(alone.ids, cold.ids);
    let store = Running::start(folder.path(), "store", &[&listen]).await;
    let second = Running::start(folder.path(), "worker", &[&store_url]).await;
    let warm = generate(&second.url("/worker/grpc"), request(&prompt, 24))
        .await
        .expect("a warm answer");
    assert_eq!(
        warm.started.cached_tokens_store as usize,
        12 * BLOCK,
        "what was synced before the kill is there"
    );
    assert_eq!(warm.ids, cold.ids);
    assert_eq!(warm.text, cold.text);

    let mut attending = request(&prompt, 200);
    let options = attending.attention.get_or_insert_default();
    options.set_mode(kvasir_proto::v1::AttentionMode::Attend);
    (options.sink, options.window, options.has_sink, options.has_window) = (64, 128, true, true);
    let mut generation = Generation::start(&second.url("/worker/grpc"), attending)
        .await
        .expect("is admitted");
    let mut tokens = 0;
    while tokens < 3 {
        match generation.next().await.expect("goes on") {
            Some(kvasir_proto::v1::generate_reply::Event::Tokens(step)) => tokens += step.ids.len(),
            Some(_) => {}
            None => panic!("ended after {tokens} tokens"),
        }
    }
    store.kill().await;
    let rest = tokio::time::timeout(Duration::from_secs(120), generation.finish())
        .await
        .expect("in time")
        .expect("finishes");
    assert_eq!(tokens + rest.ids.len(), 200);
    let report = rest.finished.report.unwrap_or_default();
    assert!(report.fell_back && !report.fallback_reason.is_empty(), "{report:?}");
    for worker in [worker, second] {
        assert_eq!(worker.stop().await.code(), Some(0), "an orderly end without a store");
    }
}

/// A second signal does not wait for the first one's work.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_leaves_at_once() {
    let folder = folder();
    let mut up = Running::start(
        folder.path(),
        "up",
        &["worker.drain_grace=60s", "router.drain_grace=60s"],
    )
    .await;
    // Something that an orderly end would wait for.
    let mut long = request(&prompt(BLOCK), 4000);
    long.request_id = "long".to_owned();
    let mut generation = Generation::start(&up.url("/worker/grpc"), long)
        .await
        .expect("is admitted");
    generation.next().await.expect("has begun");
    up.signal("INT");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(
        up.child.try_wait().expect("can be watched").is_none(),
        "the first signal waits for the request: {}",
        up.err()
    );
    let asked = std::time::Instant::now();
    up.signal("INT");
    assert_eq!(up.ended().await.code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(2));
}

/// What the README tells a reader to run: its make targets exist, its commands parse, its request is answered.
#[tokio::test(flavor = "multi_thread")]
async fn the_readme_can_be_followed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = std::fs::read_to_string(root.join("README.md")).expect("the README");
    let blocks: Vec<&str> = readme
        .split("```sh\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect();
    assert!(blocks.len() >= 3, "the README shows commands");
    let folder = folder();
    let up = Running::start(folder.path(), "up", &[]).await;
    let (mut targets, mut commands, mut requests) = (0, 0, 0);
    for block in blocks {
        if block.starts_with("curl") {
            let asked = block.replace("http://127.0.0.1:7400", &up.url("/router"));
            let output = tokio::process::Command::new("sh")
                .args(["-c", &asked])
                .output()
                .await
                .expect("sh runs");
            let answer: Value =
                serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{asked}: {output:?}"));
            assert!(answer["choices"][0]["finish_reason"].is_string(), "{asked}: {answer}");
            requests += 1;
            continue;
        }
        for line in block.lines() {
            let line = line.split('#').next().unwrap_or("").trim();
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["make", target] => {
                    let dry = std::process::Command::new("make")
                        .args(["-n", target])
                        .current_dir(&root)
                        .output()
                        .expect("make runs");
                    assert!(
                        dry.status.success(),
                        "make {target}: {}",
                        String::from_utf8_lossy(&dry.stderr)
                    );
                    targets += 1;
                }
                ["target/debug/kvasir", rest @ ..] => {
                    let said = run(kvasir::kvasir(folder.path()).args(rest).arg("--help")).await;
                    assert!(said.status.success(), "{line}: {}", said.err);
                    commands += 1;
                }
                [] => {}
                _ => panic!("the README shows a command that this test does not know how to check: {line}"),
            }
        }
    }
    assert!(
        targets >= 3 && commands >= 1 && requests >= 1,
        "{targets} targets, {commands} commands, {requests} requests"
    );
    assert_eq!(up.stop().await.code(), Some(0));
}
