//! One prompt's answer as the front needs it: pieces of text, then an end with usage and report.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::stream::{BoxStream, StreamExt, unfold};
use serde::Serialize;

use crate::{
    dispatch::{DispatchError, Dispatcher, Generation},
    job::{Event, FinishReason, Finished, Job, Report, Started},
    metrics,
};

/// An answer that a worker has begun on.
pub(crate) struct Answer {
    generation: Generation,
    /// Read by [`Answer::start`] and not yet looked at.
    first: Option<Event>,
    started: Started,
    arrived: Instant,
    first_token_after: Option<Duration>,
}

/// Something to tell the client.
pub(crate) enum Piece {
    /// Never empty.
    Text(String),
    End(Box<End>),
}

/// How an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct End {
    pub(crate) reason: FinishReason,
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) report: KvasirReport,
}

/// The `kvasir` field of a response: what this prompt's KV did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct KvasirReport {
    /// Address of the worker that generated.
    worker: String,
    /// Prompt tokens found instead of computed ..
    pub(crate) cached_tokens: u32,
    /// .. in the worker's own pages ..
    cached_tokens_device: u32,
    /// .. and in the store.
    cached_tokens_store: u32,
    /// From the request's arrival at the router to the first token; `null` when there was none.
    ttft_ms: Option<f64>,
    #[serde(flatten)]
    report: Report,
}

impl Answer {
    /// Starts `job` and waits until a worker has admitted it, so that a refusal can still become an HTTP status.
    /// `arrived` is when the client's request came.
    pub(crate) async fn start(dispatcher: &Arc<Dispatcher>, job: Job, arrived: Instant) -> Result<Self, DispatchError> {
        let mut generation = dispatcher.start(job).await?;
        let first = generation.next().await?;
        Ok(Self {
            generation,
            first: Some(first),
            started: Started::default(),
            arrived,
            first_token_after: None,
        })
    }

    /// The next piece. After [`Piece::End`] or an error there is nothing more.
    pub(crate) async fn next(&mut self) -> Result<Piece, DispatchError> {
        loop {
            let event = match self.first.take() {
                Some(event) => event,
                None => self.generation.next().await?,
            };
            match event {
                Event::Started(started) => self.started = started,
                Event::Text(text) => {
                    if self.first_token_after.is_none() {
                        let after = self.arrived.elapsed();
                        self.first_token_after = Some(after);
                        metrics::first_token(after);
                    }
                    if !text.is_empty() {
                        return Ok(Piece::Text(text));
                    }
                }
                Event::Finished(finished) => return Ok(Piece::End(Box::new(self.end(*finished)))),
            }
        }
    }

    /// All pieces, each with `index`.
    pub(crate) fn pieces(self, index: usize) -> BoxStream<'static, (usize, Result<Piece, DispatchError>)> {
        unfold(Some(self), move |answer| async move {
            let mut answer = answer?;
            let piece = answer.next().await;
            let more = matches!(piece, Ok(Piece::Text(_)));
            Some(((index, piece), more.then_some(answer)))
        })
        .boxed()
    }

    fn end(&self, finished: Finished) -> End {
        let worker = self.generation.worker_url().to_string();
        let ttft_ms = self.first_token_after.map(|after| after.as_secs_f64() * 1e3);
        tracing::info!(
            %worker,
            prompt_tokens = finished.prompt_tokens,
            completion_tokens = finished.completion_tokens,
            cached_tokens = finished.cached_tokens,
            ttft_ms,
            reason = ?finished.reason,
            fell_back = finished.report.fell_back,
            "prompt served"
        );
        End {
            reason: finished.reason,
            prompt_tokens: finished.prompt_tokens,
            completion_tokens: finished.completion_tokens,
            report: KvasirReport {
                worker,
                cached_tokens: finished.cached_tokens,
                cached_tokens_device: self.started.cached_tokens_device,
                cached_tokens_store: self.started.cached_tokens_store,
                ttft_ms,
                report: finished.report,
            },
        }
    }
}

#[cfg(test)]
impl KvasirReport {
    /// A report for tests.
    pub(crate) fn example(cached_tokens: u32) -> Self {
        Self {
            worker: "http://worker".to_owned(),
            cached_tokens,
            cached_tokens_device: cached_tokens,
            cached_tokens_store: 0,
            ttft_ms: Some(1.5),
            report: Report::default(),
        }
    }
}
