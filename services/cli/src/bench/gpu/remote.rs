//! A context at a store: put block by block, and attended to there.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kvasir_block::{BlockHash, Checksum};
use kvasir_client::{
    DecodeStream, Form, Found, Hint, IndexChoice, LayerBlock, Namespace, OpenContext, PutOutcome, Query, Report,
    StoreClient,
};
use kvasir_model::{StepAborted, StepHooks};
use kvasir_simd::Partial;
use kvasir_worker::Hints;
use tokio::runtime::Runtime;

use super::forward::Forward;

/// Longest wait for a store that is busy.
const BUSY_MAX: Duration = Duration::from_secs(120);
/// Longest wait for a partial.
const REPLY_MAX: Duration = Duration::from_secs(10);

/// Puts the first blocks of the first sequence under the names of `chain`, layer after layer; returns the seconds it took.
pub(super) async fn put(
    client: &StoreClient,
    namespace: &Namespace,
    forward: &Forward,
    chain: &[BlockHash],
) -> Result<f64> {
    let begun = Instant::now();
    for layer in 0..forward.shape().layers {
        let mut missing: Vec<usize> = (0..chain.len()).collect();
        while !missing.is_empty() {
            let mut puts = client.put_blocks(namespace).await?;
            for &block in &missing {
                let payload = forward.block(layer, block)?;
                puts.put(LayerBlock {
                    hash: chain[block],
                    layer: layer as u16,
                    checksum: Checksum::of(&payload),
                    payload,
                })
                .await?;
            }
            let mut busy = Vec::new();
            for (hash, _, outcome) in puts.finish().await? {
                match outcome {
                    PutOutcome::Stored | PutOutcome::Present => {}
                    PutOutcome::Busy => busy.extend(chain.iter().position(|name| *name == hash)),
                    PutOutcome::ChecksumMismatch => anyhow::bail!("block {hash} changed on its way to the store"),
                }
            }
            missing = busy;
            if !missing.is_empty() {
                ensure!(
                    begun.elapsed() < BUSY_MAX,
                    "the store is busy for {BUSY_MAX:?} while the context is put"
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// How a context is attended to at the store.
#[derive(Clone, Debug)]
pub(super) struct Asking {
    pub(super) form: Form,
    /// Positions that the worker holds itself.
    pub(super) excluded: Vec<Range<u32>>,
    /// First layer whose search is begun ahead; none for no such.
    pub(super) hint_from: Option<usize>,
}

/// What happened since the last [`Remote::take`].
#[derive(Debug, Default)]
pub(super) struct Since {
    /// Time that steps waited for partials.
    pub(super) waited: Duration,
    pub(super) reports: Vec<Report>,
    /// Hints that were sent.
    pub(super) hints: u64,
}

/// The hooks of a step whose context lies at the store; what they waited for and what they were told.
pub(super) struct Remote<'a> {
    runtime: &'a Runtime,
    stream: DecodeStream,
    asking: Asking,
    hints: Hints,
    sequence: u64,
    layer: usize,
    since: Since,
    /// All that were asked, by layer.
    queries: Vec<Vec<f32>>,
}

impl<'a> Remote<'a> {
    pub(super) fn open(
        runtime: &'a Runtime,
        client: &StoreClient,
        namespace: &Namespace,
        forward: &Forward,
        chain: &[BlockHash],
        asking: Asking,
    ) -> Result<Self> {
        let context = OpenContext {
            chain: chain.to_vec(),
            q_heads: forward.shape().q_heads,
            softmax_scale: forward.softmax_scale(),
            index: IndexChoice::Best,
            row_cache_rows: 0,
        };
        let stream = runtime
            .block_on(client.decode(namespace, context))
            .context("the store does not open the context")?;
        Ok(Self {
            runtime,
            stream,
            hints: Hints::new(forward.shape().layers, asking.hint_from.unwrap_or(usize::MAX)),
            asking,
            sequence: 0,
            layer: 0,
            since: Since::default(),
            queries: vec![Vec::new(); forward.shape().layers],
        })
    }

    /// The index that serves, and why it is no better one.
    pub(super) fn index(&self) -> (String, String) {
        let opened = self.stream.opened();
        (opened.index.clone(), opened.index_reason.clone())
    }

    /// The queries of each layer, `[n, q_heads, head_dim]`.
    pub(super) fn queries(&self) -> &[Vec<f32>] {
        &self.queries
    }

    /// First layer whose search is begun ahead.
    pub(super) fn hint_from(&self) -> Option<usize> {
        self.asking.hint_from
    }

    /// What happened since this was asked last.
    pub(super) fn take(&mut self) -> Since {
        std::mem::take(&mut self.since)
    }
}

fn aborted(error: impl std::fmt::Display) -> StepAborted {
    StepAborted(error.to_string())
}

impl StepHooks for Remote<'_> {
    fn remote_begin(&mut self, layer: usize, _: usize, q: &[f32]) -> Result<(), StepAborted> {
        self.layer = layer;
        self.sequence += 1;
        self.hints.asked(layer);
        if let Some(queries) = self.queries.get_mut(layer) {
            queries.extend_from_slice(q);
        }
        let query = Query {
            sequence: self.sequence,
            layer: layer as u16,
            q: q.to_vec(),
            form: self.asking.form,
            excluded: self.asking.excluded.clone(),
            deadline: Some(REPLY_MAX),
            // It stays on the GPU.
            local_lse: Vec::new(),
        };
        self.runtime.block_on(self.stream.send(query)).map_err(aborted)
    }

    fn wants_predicted(&self, _: usize) -> bool {
        self.hints.wants(self.layer + 1)
    }

    fn predicted(&mut self, layer: usize, _: usize, q: &[f32]) -> Result<(), StepAborted> {
        let hint = Hint {
            layer: layer as u16,
            q: q.to_vec(),
            local_lse: Vec::new(),
        };
        self.since.hints += 1;
        self.hints.sent(layer);
        self.runtime.block_on(self.stream.hint(hint)).map_err(aborted)
    }

    fn remote_finish(&mut self, _: usize, _: usize) -> Result<Option<Partial>, StepAborted> {
        let begun = Instant::now();
        let reply = self.runtime.block_on(self.stream.receive()).map_err(aborted)?;
        self.since.waited += begun.elapsed();
        self.hints.answered(reply.report.hinted);
        self.since.reports.push(reply.report);
        match reply.found {
            Found::Attend { o, lse } => Ok(Some(Partial { o, lse })),
            Found::Rows(_) => Err(StepAborted(
                "the store sent rows where a partial was asked for".to_owned(),
            )),
        }
    }
}
