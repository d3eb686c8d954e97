//! A worker, spoken to with token ids.

use anyhow::{Context, Result};
use kvasir_proto::v1::{
    Finished, GenerateReply, GenerateRequest, SamplingParams, Started, generate_reply::Event,
    worker_client::WorkerClient,
};

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generated {
    /// What was found instead of computed.
    pub started: Started,
    /// The model's choices.
    pub ids: Vec<u32>,
    /// The text.
    pub text: String,
    /// How it ended.
    pub finished: Finished,
}

/// An answer that is being read; dropping it is leaving.
#[derive(Debug)]
pub struct Generation(tonic::Streaming<GenerateReply>);

impl Generation {
    /// Asks a worker.
    ///
    /// # Errors
    /// The worker's refusal, as a [`tonic::Status`] in the chain.
    pub async fn start(worker_url: &str, request: GenerateRequest) -> Result<Self> {
        let mut client = WorkerClient::connect(worker_url.to_owned())
            .await
            .context("nothing answers there")?;
        Ok(Self(client.generate(request).await?.into_inner()))
    }

    /// The next event; `None` at the end.
    ///
    /// # Errors
    /// The status with which the worker ended the stream.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        Ok(self.0.message().await?.and_then(|reply| reply.event))
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// The status with which the worker ended the stream, or that it ended early.
    pub async fn finish(mut self) -> Result<Generated> {
        let mut generated = Generated::default();
        while let Some(event) = self.next().await? {
            match event {
                Event::Started(started) => generated.started = started,
                Event::Tokens(tokens) => {
                    generated.ids.extend(tokens.ids);
                    generated.text.push_str(&tokens.text);
                }
                Event::Finished(finished) => {
                    generated.finished = finished;
                    return Ok(generated);
                }
            }
        }
        anyhow::bail!("the stream ended before its last message")
    }
}

/// Asks a worker and reads to the end.
///
/// # Errors
/// See [`Generation`].
pub async fn generate(worker_url: &str, request: GenerateRequest) -> Result<Generated> {
    Generation::start(worker_url, request).await?.finish().await
}

/// A greedy request that goes on after an end token, so that its length is known.
pub fn request(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        request_id: "testkit".to_owned(),
        prompt: prompt.to_vec(),
        max_tokens,
        sampling: Some(SamplingParams {
            temperature: 0.0,
            top_p: 1.0,
            ..SamplingParams::default()
        }),
        ignore_eos: true,
        ..GenerateRequest::default()
    }
}
