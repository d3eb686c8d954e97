//! The calls that OpenAI's API has no words for: token ids with teacher forcing, and the store's counters. Generated messages
//! stay in this file.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvasir_client::{ClientConfig, StoreClient};
use kvasir_proto::v1::{
    AttentionMode, AttentionOptions, GenerateRequest, SamplingParams, generate_reply::Event,
    worker_client::WorkerClient,
};

use crate::ready::Ready;

/// How decoding attends to the prompt.
#[derive(Clone, Copy, Debug)]
pub(super) enum Mode {
    Full,
    Attend { target_mass: f32 },
    Rows { k: u32 },
}

/// A worker, spoken to without the router.
pub(super) struct Worker {
    client: WorkerClient<tonic::transport::Channel>,
    asked: u32,
}

/// What a worker chose.
pub(super) struct Generated {
    pub(super) ids: Vec<u32>,
    pub(super) fell_back: bool,
    /// Mean negative log-likelihood of the forced tokens, in nats.
    pub(super) nll: f64,
}

/// Counters of a store, since its start.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoreStat {
    pub(super) bytes_pushed: u64,
    pub(super) bytes_loaded: u64,
}

impl Worker {
    pub(super) async fn connect(ready: &Ready) -> Result<Self> {
        let worker = ready.worker.as_ref().context("the service runs no worker")?;
        let client = WorkerClient::connect(worker.grpc.clone())
            .await
            .context("cannot reach the worker")?;
        Ok(Self { client, asked: 0 })
    }

    /// Decodes greedily, or feeds `forced` and takes the model's choice at each step.
    pub(super) async fn generate(
        &mut self,
        prompt: &[u32],
        max_tokens: u32,
        mode: Mode,
        forced: &[u32],
    ) -> Result<Generated> {
        self.asked += 1;
        let request = GenerateRequest {
            request_id: format!("demo-{}", self.asked),
            prompt: prompt.to_vec(),
            max_tokens,
            sampling: Some(SamplingParams {
                temperature: 0.0,
                top_p: 1.0,
                ..Default::default()
            }),
            attention: Some(options(mode)),
            forced: forced.to_vec(),
            ..Default::default()
        };
        let mut stream = self
            .client
            .generate(request)
            .await
            .context("the worker refused to generate")?
            .into_inner();
        let mut ids = Vec::new();
        while let Some(reply) = stream.message().await.context("the worker broke off")? {
            match reply.event {
                Some(Event::Tokens(tokens)) => ids.extend(tokens.ids),
                Some(Event::Finished(finished)) => {
                    let report = finished.report.unwrap_or_default();
                    return Ok(Generated {
                        ids,
                        fell_back: report.fell_back,
                        nll: report.forced_nll.into(),
                    });
                }
                _ => {}
            }
        }
        bail!("the worker's stream ended before its last message")
    }
}

fn options(mode: Mode) -> AttentionOptions {
    let mut options = AttentionOptions::default();
    match mode {
        Mode::Full => options.set_mode(AttentionMode::Full),
        Mode::Attend { target_mass } => {
            options.set_mode(AttentionMode::Attend);
            options.target_mass = target_mass;
        }
        Mode::Rows { k } => {
            options.set_mode(AttentionMode::Rows);
            options.k = k;
        }
    }
    options
}

/// Waits until the store holds `blocks` whole blocks and has synced everything it took.
pub(super) async fn wait_until_durable(ready: &Ready, blocks: u64) -> Result<StoreStat> {
    const POLL: Duration = Duration::from_millis(50);
    const PATIENCE: Duration = Duration::from_secs(60);
    let store = ready.store.as_ref().context("the service runs no store")?;
    let client = StoreClient::new(ClientConfig::to(store.grpc.clone()))?;
    let begun = tokio::time::Instant::now();
    loop {
        let stat = client.stat().await?;
        if stat.flush_dropped > 0 {
            bail!(
                "the store could not write {} layer blocks to its disk: is it full?",
                stat.flush_dropped
            );
        }
        if stat.blocks >= blocks && stat.flush_queue_blocks == 0 {
            return Ok(StoreStat {
                bytes_pushed: stat.put_bytes,
                bytes_loaded: stat.get_bytes,
            });
        }
        if begun.elapsed() > PATIENCE {
            bail!(
                "after {PATIENCE:?} the store holds {} of {blocks} blocks, and {} layer blocks are not synced",
                stat.blocks,
                stat.flush_queue_blocks
            );
        }
        tokio::time::sleep(POLL).await;
    }
}
