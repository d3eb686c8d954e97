//! `kvasir demo`: a real model reads a real document and answers questions about it, first cold, then warm from the worker's
//! own pages, from the store after a restart, from the store after kill -9, and with retrieval attention.
//!
//! The service is a child process (this binary's own `up`) on free ports with a data folder of its own, so that killing it
//! is killing it. What is measured is what a client sees: the time from sending the request to the first piece of text.

mod ask;
mod document;
mod grpc;
mod progress;
mod report;
mod service;
mod table;

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use kvasir_model::ModelFile;
use serde_json::{Value, json};

use self::{
    ask::{Answer, Client},
    document::Question,
    grpc::Mode,
    progress::Progress,
    report::{Asked, Forced, Measured, Report, Run},
    service::Place,
};
use crate::{
    args::{ConfigArgs, DemoArgs},
    child::Service,
    output::{print, say},
    tree::Configuration,
    up::open_model,
};

/// Keys of each query head that `rows` brings in the demo.
const ROWS_K: u32 = 256;
/// Share of the searched mass that `attend` covers in the demo.
const TARGET_MASS: f32 = 0.99;

/// Runs everything, prints a table, writes the report. Fails when an answer differed, or when nothing came from a cache.
pub(crate) async fn run(configuration: &Configuration, args: &ConfigArgs, options: &DemoArgs) -> Result<()> {
    let file = open_model(&configuration.tree().model.path).await?;
    let questions = document::questions(&file, usize::from(options.questions), options.max_tokens)?;
    let place = Place::make(&options.out, configuration, args)?;
    let steps = Demo::steps(questions.len());
    let mut demo = Demo {
        file,
        questions,
        max_tokens: options.max_tokens,
        progress: Progress::new(steps),
        place,
        report: Report::default(),
    };
    let ran = demo.run().await;
    demo.progress.finish();
    ran.with_context(|| {
        format!(
            "the demo did not finish; the service's own words are in {}",
            demo.place.log().display()
        )
    })?;
    let report = demo.report.finish(&demo.file, options.max_tokens);
    let path = options.out.join("report.json");
    let text = serde_json::to_string_pretty(&report).context("the report cannot be written as JSON")?;
    std::fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    for line in table::lines(&report) {
        print(line);
    }
    print(format_args!("\nall figures: {}", path.display()));
    demo.place.clean();
    if !report.failures.is_empty() {
        bail!(
            "the demo ran, and it did not show what it must:\n  {}",
            report.failures.join("\n  ")
        );
    }
    Ok(())
}

struct Demo {
    file: Arc<ModelFile>,
    questions: Vec<Question>,
    max_tokens: u32,
    progress: Progress,
    place: Place,
    report: Report,
}

impl Demo {
    /// Everything that is asked: cold, warm, restarted, killed, attend, rows, and three times with forced tokens; the primer.
    fn steps(questions: usize) -> usize {
        9 * questions + 1
    }

    async fn run(&mut self) -> Result<()> {
        let service = self.start().await?;
        let service = self.cold_and_warm(service).await?;
        let service = self.after_restarts(service).await?;
        let service = self.after_kills(service).await?;
        self.retrieval(&service).await?;
        self.stop(service).await
    }

    /// Cold means that no cache is read or written; one more question then fills the caches, and the rest is warm.
    async fn cold_and_warm(&mut self, service: Service) -> Result<Service> {
        for index in 0..self.questions.len() {
            let answer = self.ask(&service, index, "cold", json!({"no_cache": true})).await?;
            self.report.note(Run::Cold, index, answer);
        }
        self.progress.step("a first question that fills the caches");
        let primer = self
            .client(&service)
            .ask(&document::primer(), self.max_tokens, &json!({}))
            .await?;
        self.report.filling = Some(Measured::from(&primer));
        for index in 0..self.questions.len() {
            let answer = self.ask(&service, index, "warm", json!({})).await?;
            self.report.note(Run::Warm, index, answer);
        }
        Ok(service)
    }

    /// Each question meets a worker whose pages are empty: what it finds comes from the store.
    async fn after_restarts(&mut self, mut service: Service) -> Result<Service> {
        for index in 0..self.questions.len() {
            self.stop(service).await?;
            service = self.start().await?;
            let answer = self.ask(&service, index, "after a restart", json!({})).await?;
            self.report.note(Run::Restarted, index, answer);
        }
        Ok(service)
    }

    /// The same after SIGKILL, at a moment when the store says that everything it took is synced.
    async fn after_kills(&mut self, mut service: Service) -> Result<Service> {
        for index in 0..self.questions.len() {
            let stat = grpc::wait_until_durable(&service.ready, self.whole_blocks()).await?;
            self.report.note_stat(&stat);
            service.kill().await?;
            service = self.start().await?;
            let answer = self.ask(&service, index, "after kill -9", json!({})).await?;
            self.report.note(Run::Killed, index, answer);
        }
        Ok(service)
    }

    async fn retrieval(&mut self, service: &Service) -> Result<()> {
        let attend = json!({"attention": "attend", "target_mass": TARGET_MASS});
        let rows = json!({"attention": "rows", "k": ROWS_K});
        for index in 0..self.questions.len() {
            let answer = self.ask(service, index, "attend", attend.clone()).await?;
            self.report.note(Run::Attend, index, answer);
            let answer = self.ask(service, index, "rows", rows.clone()).await?;
            self.report.note(Run::Rows, index, answer);
        }
        // Agreement is counted against the tokens of full attention, fed step by step: one early difference would otherwise
        // make all later ones incomparable.
        let mut worker = grpc::Worker::connect(&service.ready).await?;
        for index in 0..self.questions.len() {
            let prompt = self.questions[index].prompt.clone();
            self.progress
                .step(format_args!("question {}, full attention, token by token", index + 1));
            let chosen = worker.generate(&prompt, self.max_tokens, Mode::Full, &[]).await?;
            let full = worker
                .generate(&prompt, self.max_tokens, Mode::Full, &chosen.ids)
                .await?;
            for (run, mode) in [
                (
                    Run::Attend,
                    Mode::Attend {
                        target_mass: TARGET_MASS,
                    },
                ),
                (Run::Rows, Mode::Rows { k: ROWS_K }),
            ] {
                self.progress.step(format_args!(
                    "question {}, {}, the same tokens forced",
                    index + 1,
                    run.name()
                ));
                let forced = worker.generate(&prompt, self.max_tokens, mode, &full.ids).await?;
                let compared = Forced::compare(run, &full, &forced)?;
                self.report.forced.push(compared);
            }
        }
        Ok(())
    }

    /// Asks one question and checks that the server counted the tokens that the demo counts.
    async fn ask(&mut self, service: &Service, index: usize, how: &str, kvasir: Value) -> Result<Asked> {
        let question = &self.questions[index];
        self.progress.step(format_args!("question {}, {how}", index + 1));
        let answer: Answer = self
            .client(service)
            .ask(&question.messages, self.max_tokens, &kvasir)
            .await?;
        if answer.prompt_tokens != question.prompt.len() as u64 {
            bail!(
                "the server counts {} prompt tokens and the demo {}: they do not serve the same model",
                answer.prompt_tokens,
                question.prompt.len()
            );
        }
        self.progress
            .measured(format_args!("{:.0} ms to the first token", answer.ttft_ms));
        Ok(Asked::new(question.text, answer))
    }

    fn client(&self, service: &Service) -> Client {
        Client::new(service.ready.router.as_deref().unwrap_or_default(), self.file.name())
    }

    /// Blocks that the document fills: what the store must hold before the process may be killed.
    fn whole_blocks(&self) -> u64 {
        let shortest = self
            .questions
            .iter()
            .map(|question| question.prompt.len())
            .min()
            .unwrap_or(0);
        shortest as u64 / u64::from(self.place.block_tokens)
    }

    async fn start(&mut self) -> Result<Service> {
        self.progress.doing("starting the service");
        self.place.start().await
    }

    /// An orderly stop; what the process counted is noted before.
    async fn stop(&mut self, service: Service) -> Result<()> {
        self.progress.doing("stopping the service");
        let stat = grpc::wait_until_durable(&service.ready, self.whole_blocks()).await?;
        self.report.note_stat(&stat);
        if let Err(error) = service.stop().await {
            say(format_args!("{error:#}"));
            self.report
                .failures
                .push(format!("the service did not stop in good order: {error:#}"));
        }
        Ok(())
    }
}
