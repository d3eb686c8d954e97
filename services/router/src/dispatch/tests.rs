use kvasir_block::{BlockHash, ExtraKeys, block_hashes};
use kvasir_proto::v1;
use kvasir_runtime::{admin::Readiness, request_id::RequestId};
use tokio_util::task::TaskTracker;
use tonic::Code;

use super::*;
use crate::{
    grpc::scripted::{Play, ScriptedWorker, Step, schema},
    job::{Attention, Options},
    workers::Expected,
};

/// A dispatcher over scripted workers, with the tasks that watch them.
struct Bench {
    dispatcher: Arc<Dispatcher>,
    readiness: Readiness,
    tasks: TaskTracker,
    cut: CancellationToken,
}

impl Bench {
    async fn over(urls: &[&str]) -> Self {
        Self::with(urls, |_| {}).await
    }

    async fn with(urls: &[&str], change: impl FnOnce(&mut RouterConfig)) -> Self {
        let mut config = RouterConfig {
            workers: urls.iter().map(|url| (*url).to_owned()).collect(),
            block_tokens: schema().block_tokens,
            ..RouterConfig::default()
        };
        change(&mut config);
        let holders = Arc::new(Holders::new(1000));
        let readiness = Readiness::new();
        let expected = Expected {
            schema: schema(),
            context_tokens_max: 1000,
        };
        let workers = Workers::new(
            &config.workers,
            Duration::from_secs(1),
            expected,
            Arc::clone(&holders),
            readiness.clone(),
        )
        .expect("good addresses");
        workers.greet().await.expect("workers that agree");
        let (tasks, cut) = (TaskTracker::new(), CancellationToken::new());
        workers.supervise(&tasks, &cut, 7);
        let dispatcher = Dispatcher::new(&config, workers, holders, Admission::new(8), cut.clone());
        Self {
            dispatcher,
            readiness,
            tasks,
            cut,
        }
    }

    /// Text of a prompt's answer and the worker that gave it, or why there is none.
    async fn run(&self, tokens: u32) -> Result<(String, String), DispatchError> {
        let mut generation = self.dispatcher.start(job(tokens)).await?;
        let mut text = String::new();
        loop {
            match generation.next().await? {
                Event::Started(_) => {}
                Event::Text(piece) => text.push_str(&piece),
                Event::Finished(_) => return Ok((text, generation.worker_url().to_string())),
            }
        }
    }

    /// Waits until this holds.
    async fn until(&self, what: &str, holds: impl Fn(&Dispatcher) -> bool) {
        for _ in 0..500 {
            if holds(&self.dispatcher) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not within 5 s: {what}");
    }

    async fn stop(self) {
        self.cut.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

fn chain(tokens: u32) -> Vec<BlockHash> {
    let tokens: Vec<u32> = (0..tokens).collect();
    block_hashes(&tokens, usize::from(schema().block_tokens), &ExtraKeys::none())
}

fn job(tokens: u32) -> Job {
    Job {
        request_id: RequestId::random(),
        prompt: (0..tokens).collect(),
        chain: chain(tokens).into(),
        max_tokens: Some(5),
        options: Arc::new(Options {
            temperature: 0.0,
            top_p: 1.0,
            seed: Some(1),
            stop: vec!["END".to_owned()],
            attention: Attention::default(),
            cache_salt: String::new(),
            no_cache: false,
            ignore_eos: false,
        }),
    }
}

#[tokio::test]
async fn a_failed_start_goes_elsewhere_and_a_wrong_request_does_not() {
    let broken = |code| Play::Say(vec![Step::Started(0, 0), Step::Break(code, "broke")]);
    // The first worker's play -> the answer (the second worker says "two"), or the error.
    let table: [(&str, Play, Result<&str, &str>); 8] = [
        ("serves", Play::answer(&["one"]), Ok("one")),
        ("is full", Play::Refuse(Code::ResourceExhausted, "full"), Ok("two")),
        ("is away", Play::Refuse(Code::Unavailable, "away"), Ok("two")),
        ("fails", Play::Refuse(Code::Internal, "bug"), Ok("two")),
        (
            "refuses",
            Play::Refuse(Code::InvalidArgument, "k: too many"),
            Err("k: too many"),
        ),
        ("breaks before the first token", broken(Code::Unavailable), Ok("two")),
        (
            "ends before the first token",
            Play::Say(vec![Step::Started(0, 0)]),
            Ok("two"),
        ),
        (
            "breaks after the first text",
            Play::Say(vec![
                Step::Started(0, 0),
                Step::Text("on"),
                Step::Break(Code::Internal, "bug"),
            ]),
            Err("the worker failed (failed: bug)"),
        ),
    ];
    for (name, play, expected) in table {
        let one = ScriptedWorker::start(&schema(), [play]).await;
        let two = ScriptedWorker::start(&schema(), [Play::answer(&["two"])]).await;
        let bench = Bench::over(&[&one.url, &two.url]).await;
        // Turn 0 takes the first of equals.
        let found = bench
            .run(10)
            .await
            .map(|(text, _)| text)
            .map_err(|error| error.to_string());
        assert_eq!(
            found,
            expected.map(str::to_owned).map_err(str::to_owned),
            "the first worker {name}"
        );
        bench.stop().await;
    }
}

#[tokio::test]
async fn what_is_left_when_nobody_can() {
    let full = || Play::Refuse(Code::ResourceExhausted, "full");
    let one = ScriptedWorker::start(&schema(), [full()]).await;
    let two = ScriptedWorker::start(&schema(), [full()]).await;
    let bench = Bench::over(&[&one.url, &two.url]).await;
    let busy = bench.run(10).await.expect_err("both are full");
    assert_eq!(
        busy,
        DispatchError::Busy {
            why: "full".to_owned(),
            retry_after_secs: 1
        }
    );
    bench.stop().await;

    let bench = Bench::over(&["http://127.0.0.1:9"]).await;
    assert!(!bench.readiness.is_ready());
    let nobody = bench.run(10).await.expect_err("nobody listens there").to_string();
    assert!(nobody.contains("http://127.0.0.1:9 cannot be reached"), "{nobody}");
    bench.stop().await;
}

#[tokio::test]
async fn waits_have_an_end() {
    // Steps, first-token timeout in ms, silence in ms -> error
    let table = [
        (
            vec![Step::Hang],
            50,
            10_000,
            DispatchError::FirstTokenLate(Duration::from_millis(50)),
        ),
        (
            vec![Step::Started(0, 0), Step::Hang],
            50,
            10_000,
            DispatchError::FirstTokenLate(Duration::from_millis(50)),
        ),
        (
            vec![Step::Started(0, 0), Step::Text("a"), Step::Hang],
            10_000,
            50,
            DispatchError::Silent(Duration::from_millis(50)),
        ),
    ];
    for (steps, first_token, idle, expected) in table {
        let worker = ScriptedWorker::start(&schema(), [Play::Say(steps)]).await;
        let bench = Bench::with(&[&worker.url], |config| {
            config.first_token_timeout = Duration::from_millis(first_token).into();
            config.idle_timeout = Duration::from_millis(idle).into();
        })
        .await;
        assert_eq!(bench.run(10).await.expect_err("it hangs"), expected);
        worker.cancelled(1).await;
        bench.stop().await;
    }
}

#[tokio::test]
async fn dropping_a_generation_cancels_it_at_the_worker() {
    let play = Play::Say(vec![Step::Started(0, 0), Step::Text("a"), Step::Hang]);
    let worker = ScriptedWorker::start(&schema(), [play]).await;
    let bench = Bench::over(&[&worker.url]).await;
    let mut generation = bench.dispatcher.start(job(10)).await.expect("started");
    for _ in 0..2 {
        generation.next().await.expect("started, then a text");
    }
    assert_eq!(worker.open(), 1);
    drop(generation);
    worker.cancelled(1).await;
    assert_eq!(worker.open(), 0);
    bench.stop().await;
}

#[tokio::test]
async fn the_worker_that_holds_the_prefix_is_asked() {
    let one = ScriptedWorker::start(&schema(), []).await;
    let two = ScriptedWorker::start(&schema(), []).await;
    two.set_blocks(&chain(400));
    let bench = Bench::over(&[&one.url, &two.url]).await;
    let namespace = bench.dispatcher.workers.namespace().expect("a worker was reached");
    bench
        .until("the second worker's blocks are known", |dispatcher| {
            dispatcher
                .holders
                .lookup(namespace, &chain(400))
                .device_blocks(WorkerId(1))
                == 100
        })
        .await;
    for _ in 0..3 {
        let (_, worker) = bench.run(400).await.expect("served");
        assert_eq!(worker, two.url, "hits outweigh turns");
    }
    assert!(one.calls().is_empty());
    bench.stop().await;
}

#[tokio::test]
async fn draining_and_lost_workers_are_left_out_and_come_back() {
    let one = ScriptedWorker::start(&schema(), []).await;
    let two = ScriptedWorker::start(&schema(), []).await;
    let bench = Bench::over(&[&one.url, &two.url]).await;
    one.set_load(v1::WorkerLoad {
        draining: true,
        ..v1::WorkerLoad::default()
    });
    let usable = |count| move |dispatcher: &Dispatcher| dispatcher.workers.usable().count() == count;
    bench.until("the draining worker is left out", usable(1)).await;
    for _ in 0..3 {
        assert_eq!(bench.run(10).await.expect("served").1, two.url);
    }
    one.set_load(v1::WorkerLoad::default());
    bench.until("it is back", usable(2)).await;
    two.stop().await;
    bench.until("the stopped worker is left out", usable(1)).await;
    for _ in 0..3 {
        assert_eq!(bench.run(10).await.expect("served").1, one.url);
    }
    assert!(bench.readiness.is_ready());
    one.stop().await;
    bench.until("nobody is left", usable(0)).await;
    assert!(!bench.readiness.is_ready());
    bench.stop().await;
}

#[tokio::test]
async fn a_burst_is_spread_before_any_report() {
    let play = || Play::Say(vec![Step::Hang]);
    let one = ScriptedWorker::start(&schema(), (0..4).map(|_| play())).await;
    let two = ScriptedWorker::start(&schema(), (0..4).map(|_| play())).await;
    let bench = Bench::over(&[&one.url, &two.url]).await;
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(bench.dispatcher.start(job(100)).await.expect("started"));
    }
    assert_eq!((one.calls().len(), two.calls().len()), (4, 4));
    drop(held);
    bench.stop().await;
}

#[tokio::test]
async fn the_request_arrives_as_it_was_meant() {
    let worker = ScriptedWorker::start(&schema(), []).await;
    let bench = Bench::over(&[&worker.url]).await;
    let mut job = job(10);
    job.request_id = "from-the-client".parse().expect("a good id");
    bench.dispatcher.start(job).await.expect("started");
    let call = worker.calls().remove(0);
    assert_eq!(
        (call.request_id.as_str(), call.message.request_id.as_str()),
        ("from-the-client", "from-the-client")
    );
    let sampling = call.message.sampling.expect("sampling");
    assert_eq!((sampling.temperature, sampling.seed, sampling.has_seed), (0.0, 1, true));
    assert_eq!(call.message.prompt, (0..10).collect::<Vec<u32>>());
    assert_eq!(
        (call.message.max_tokens, call.message.stop),
        (5, vec!["END".to_owned()])
    );
    bench.stop().await;
}
